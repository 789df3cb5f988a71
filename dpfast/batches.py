"""Which samples the loader has given, and which of them the running step has used: none may count twice."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpfast.once import ForwardPass

RECENT = 8  # batches whose sizes are remembered: a loop may read ahead


@dataclass(eq=False)
class LogicalBatch:
    """What one step accounts for."""

    dropped: bool = False  # a part of it is missing, and it is not released: other parts depend on what is left out


@dataclass(eq=False)
class Loop:
    """One pass over the physical batches of a loader."""

    batch: LogicalBatch | None = None  # the one that was last given from
    ended: bool = False  # its iterator was closed or is at its end
    left: bool = False  # in the middle of a logical batch
    skipped: bool = False  # a physical batch was neither used nor cleared: was it skipped, or is the loop read ahead?
    skipped_parts: bool = False  # and it was only a part of its logical batch


class Samples(NamedTuple):
    """Samples of a data set."""

    dataset: int  # its id
    indices: Sequence[Any]

    def __len__(self) -> int:
        return len(self.indices)


class Piece(NamedTuple):
    """A physical batch and its place in its logical one."""

    batch: LogicalBatch
    first: bool
    last: bool
    samples: Samples | None = None  # None: from elsewhere, by ``signal_skip_step``
    loop: Loop | None = None

    @property
    def whole(self) -> bool:
        return self.first and self.last


@dataclass
class Batches:
    """The batches of one private model, from the loader that gives them to the step that uses them.

    Every backward pass and every step is of the physical batch that a loop over ``BatchMemoryManager``'s loader has
    given last, or of none if there is no such loop. A logical batch is released whole or not at all: which samples are
    in which of its physical batches depends on all of them, so that a part of it may change by more than a sample.
    """

    pieces: deque[Piece] = field(default_factory=deque)  # given and not stepped with yet
    of: LogicalBatch | None = None  # what the sums are of; None where batches are not split
    loop: Loop | None = None
    fresh: list[Samples] = field(default_factory=list)  # given since the last forward
    given: list[Samples] = field(default_factory=list)  # and before forwards since the last step
    used: list[ForwardPass] = field(default_factory=list)  # whose backward passes have ended since the last step
    rows: int = 0  # that these had
    passes: int = 0  # how many these were
    passing: dict[ForwardPass, list[Any]] = field(default_factory=dict)  # of the running pass, with nodes of its graph
    forwarded: bool = False  # a training forward ran since the last physical batch was given
    cleared: bool = False  # gradients were cleared since then
    tried: bool = False  # a step of it was refused half-way
    aside: bool = False  # whole batches were given since then, and not all that their loop has
    unclear: bool = False  # and then came a forward: over which of them?
    empty: bool = False  # the last batch had no samples
    sizes: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    warned: set[str] = field(default_factory=set)
    signalled: LogicalBatch | None = None  # in whose middle ``signal_skip_step`` has left us

    @property
    def piece(self) -> Piece | None:
        """The physical batch that the next backward or step is of."""
        return self.pieces[0] if self.pieces else None

    def start_step(self) -> None:
        """What was given was used."""
        self.drop()
        self.of, self.given, self.fresh, self.empty = None, [], [], False

    def drop(self) -> None:
        """The sums were dropped; the batch that was given last may be used again."""
        self.rows, self.passes, self.tried = 0, 0, False
        self.given, self.used = self.given[-1:], []

    def forget(self) -> None:
        """Whatever was given and not stepped with is left."""
        self._leave()
        self.pieces.clear()
        self.signalled = None
        self.start_step()

    # ------------------------------------------------------------------ what loaders say

    def give(self, samples: Samples) -> None:
        """A loader gives a whole batch: to train on, or only to look at, as an evaluation does."""
        if self.loop is not None and self.loop.ended:
            self._leave()
        self.aside = self.loop is not None and bool(self.pieces)
        self._note(samples)

    def end_whole(self) -> None:
        """A loop over whole batches is at its end: it was an evaluation, if a physical batch waits."""
        self.aside = False

    def give_piece(self, piece: Piece, backwards: int) -> None:
        """A loop gives a physical batch; ``backwards`` is how many passes wait for a step.

        Raises:
            ValueError: it could not be told which physical batch a backward pass is of.
        """
        loop, before, held = piece.loop, self.loop, self.piece
        assert loop is not None
        if before is not loop:
            if held is not None and before is not None and not before.ended:
                raise ValueError(
                    "two loops over BatchMemoryManager's loader at once: a physical batch of the first waits for its "
                    "step. Finish the first loop or delete its iterator, and look at batches before the loop"
                )
            self._leave()
            self.pieces.clear()
            self.signalled, self.loop = None, loop
        elif held is not None:
            self._pass_over(held, backwards)
        loop.batch = piece.batch
        self.pieces.append(piece)
        self.forwarded = self.cleared = self.aside = self.unclear = False
        assert piece.samples is not None
        self._note(piece.samples)

    def end(self, loop: Loop, finished: bool) -> None:
        """The iterator of ``loop`` is at its end, or was closed."""
        loop.ended = True
        if loop is self.loop and not finished and self.of is not None and self.of is loop.batch:
            self.of.dropped = True  # its other parts will not come

    def _pass_over(self, held: Piece, backwards: int) -> None:
        loop = held.loop
        assert loop is not None
        if backwards:
            raise ValueError(
                "a physical batch of BatchMemoryManager was asked for after a backward pass and before its "
                "optimizer.step(): call step() for each of them, or optimizer.zero_grad() to drop one"
            )
        self.pieces.clear()
        if held.whole and not held.samples:
            return
        if self.forwarded or self.cleared:
            self._lose(held)
            return
        loop.skipped = True
        loop.skipped_parts |= not held.whole
        held.batch.dropped |= not held.whole

    def _leave(self) -> None:
        """No loop is under way; what one was in the middle of will not be released."""
        loop, self.loop = self.loop, None
        if loop is not None:
            self.pieces.clear()
            if self.of is not None and self.of is loop.batch:
                self.of.dropped = loop.left = True

    def _note(self, samples: Samples) -> None:
        self.fresh.append(samples)
        self.sizes.append(len(samples))
        self.empty = not samples

    # ------------------------------------------------------------------ what the optimizer says

    def signal(self, last: bool) -> None:
        """The next physical batch, of which nothing else is known, is or is not the last of its logical batch."""
        batch, first = self.signalled or LogicalBatch(), self.signalled is None
        self.signalled = None if last else batch
        self.pieces.append(Piece(batch, first, last))

    def enter(self) -> bool:
        """A backward or a step comes; whether what is summed is of another logical batch, and must not be added to.

        Raises:
            ValueError: physical batches were given that nothing was done with: this may be one of them.
        """
        held, loop = self.piece, self.loop
        part = held is not None and not held.whole
        if loop is not None and loop.skipped and (loop.skipped_parts or part):  # whole ones may be confused
            raise ValueError(
                "it cannot be told which physical batch of BatchMemoryManager this is: some were given before, and "
                "neither a forward nor a step came. Do not read ahead of the steps; where a batch is skipped, call "
                "optimizer.zero_grad() first"
            )
        if self.unclear:
            raise ValueError(
                "it cannot be told whether this is of a physical batch of BatchMemoryManager, which waits for its "
                "step, or of a whole batch that the loader has given since. Look at batches before the loop, or "
                "through a DataLoader of its own"
            )
        batch = held.batch if held else self.signalled
        if batch is None and loop is not None and self.of is not None:
            self._leave()  # another loop trains in the middle of this one
        adopted = self.of is None and held is not None and held.loop is None  # a signal that came after the backward
        other = batch is not self.of and not adopted
        self.of = batch
        return other

    def stepped(self) -> Piece | None:
        """A step takes the physical batch, if there is one."""
        self.forwarded = self.cleared = self.empty = self.tried = self.aside = self.unclear = False
        return self.pieces.popleft() if self.pieces else None

    def drop_piece(self) -> None:
        """The physical batch is not to be used, though its backward was run."""
        held = self.stepped()
        if held is not None:
            self._lose(held)
        elif self.signalled is not None:
            self.signalled.dropped = True

    def _lose(self, held: Piece) -> None:
        if not held.whole:
            held.batch.dropped = True
            self.warn(
                "dropped",
                "a physical batch was dropped, and with it the whole of its logical batch: which samples are in the "
                "others depends on those of this one. Training goes on with the next logical batch",
            )

    def warn(self, kind: str, message: str) -> None:
        """Once for each ``kind``."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    # ------------------------------------------------------------------ what forward and backward passes say

    def forward(self, rows: int | None) -> list[Any]:
        """A training forward over so many rows has run; the samples that no forward has run over since they were given.

        They are those of the physical batch, or what the loader has given last, as far as the rows reach; what it gave
        before was only looked at.
        """
        held = self.piece
        if held is not None and held.samples is not None:
            taken = [] if self.forwarded else [held.samples]
        else:
            taken = list[Samples]()
            while self.fresh and (not taken or sum(map(len, taken)) < (rows or 0)):
                taken.insert(0, self.fresh.pop())
        self.fresh.clear()
        self.given += taken
        self.forwarded, self.empty = True, rows == 0
        self.unclear |= self.aside
        return [(dataset, index) for dataset, indices in taken for index in indices]

    def use(self) -> None:
        """The running backward pass is one of the step's.

        Raises:
            ValueError: some sample was in another of them: it would count twice at the noise of once.
        """
        rows = max((forward.batch or 0 for forward in self.passing), default=0)
        number, total = self.passes + 1, self.rows + rows
        known = sum(map(len, self.given))
        seen = [sample for forward in (*self.used, *self.passing) for sample in forward.samples]
        unknown = not self.given and self.of is None  # what the loader has given: equal values are all that tells
        twice = any(f.shares_samples(g, compare=unknown) for f in self.passing for g in self.used)
        twice |= number > 1 and len(set(seen)) < len(seen)
        twice |= bool(self.given) and number > len(self.given) and total > known
        if twice:
            raise ValueError(
                "a second backward pass over samples that were in one since the last step: each would count twice, at "
                "the noise of once. Add up the losses and call backward() once, or call optimizer.step() or "
                "optimizer.zero_grad() in between"
            )
        self.used += self.passing
        self.passes, self.rows = number, total
        more = rows > known and rows not in self.sizes
        if self.given and more and self.sizes[-1] and rows % self.sizes[-1] == 0:
            self.warn(
                "rows",
                f"the loader gave {self.sizes[-1]} samples and the model saw {rows} rows: each row is clipped as a "
                f"sample of its own, so that a sample counts {rows // self.sizes[-1]} times. Divide max_grad_norm by "
                f"that, or make the rows of a sample inside of the model",
            )
