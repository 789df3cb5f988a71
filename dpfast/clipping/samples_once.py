"""Which samples the loader has given, and which of them the running step has used: none may count twice."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from dpfast.capture.trees import tensors
from dpfast.capture.which_samples import ForwardPass, Samples
from dpfast.capture.which_units import settle
from dpfast.refusals import BatchOrderError, PaddingError, RepeatedSampleError, SecondBackwardError

RECENT = 8  # batches that are remembered: a loop may read ahead
MOST_FRESH = 1000  # of which no forward has come: those of an evaluation


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
    taken: list[Samples] = field(default_factory=list)  # what the last forward was over
    recent: list[Samples] = field(default_factory=list)  # and before steps, as long as somebody has their tensors
    newest: deque[list[Tensor]] = field(default_factory=lambda: deque(maxlen=RECENT))  # of the fresh ones: their values
    used: list[ForwardPass] = field(default_factory=list)  # whose backward passes have ended since the last step
    passes: int = 0  # how many these were
    forwards: int = 0  # training forwards since the last of them
    earlier: deque[Samples] = field(default_factory=lambda: deque(maxlen=RECENT))  # of steps before
    unseen: bool = False  # and one was of a forward that nobody knows
    forwarded: bool = False  # a training forward ran since the last physical batch was given
    cleared: bool = False  # gradients were cleared since then
    tried: bool = False  # a step of it was refused half-way
    aside: bool = False  # whole batches were given since then, and not all that their loop has
    unclear: bool = False  # and then came a forward: over which of them?
    empty: bool = False  # the last batch had no samples
    warned: set[str] = field(default_factory=set)
    signalled: LogicalBatch | None = None  # in whose middle ``signal_skip_step`` has left us

    @property
    def piece(self) -> Piece | None:
        """The physical batch that the next backward or step is of."""
        return self.pieces[0] if self.pieces else None

    def start_step(self) -> None:
        """What was given was used."""
        self.earlier.extend(samples for forward in self.used for samples in forward.group)
        self.drop()
        self.of, self.given, self.fresh, self.empty, self.forwards = None, [], [], False, 0
        self.newest.clear()

    def drop(self) -> None:
        """The sums were dropped; the batch that was given last may be used again."""
        self.passes, self.unseen, self.tried = 0, False, False
        self.given, self.used = self.given[-1:], []

    def forget(self) -> None:
        """Whatever was given and not stepped with is left."""
        self._leave()
        self.pieces.clear()
        self.signalled = None
        self.start_step()

    # ------------------------------------------------------------------ what loaders say

    def give(self, samples: Samples, batch: Any = None) -> None:
        """A loader gives a whole ``batch``: to train on, or only to look at, as an evaluation does."""
        if self.loop is not None and self.loop.ended:
            self._leave()
        self.aside = self.loop is not None and bool(self.pieces)
        self._note(samples, batch)

    def end_whole(self) -> None:
        """A loop over whole batches is at its end: it was an evaluation, if a physical batch waits."""
        self.aside = False

    def give_piece(self, piece: Piece, waits: bool, batch: Any = None) -> None:
        """A loop gives a physical ``batch``; ``waits``: a backward pass has come, and no step after it.

        Raises:
            ValueError: it could not be told which physical batch a backward pass is of.
        """
        loop, before, held = piece.loop, self.loop, self.piece
        assert loop is not None
        if before is not loop:
            if held is not None and before is not None and not before.ended:
                raise BatchOrderError(
                    "two loops over BatchMemoryManager's loader at once: a physical batch of the first waits for its "
                    "step. Finish the first loop or delete its iterator, and look at batches before the loop"
                )
            self._leave()
            self.pieces.clear()
            self.signalled, self.loop = None, loop
        elif held is not None:
            self._pass_over(held, waits)
        loop.batch = piece.batch
        self.forwarded = self.cleared = self.aside = self.unclear = False
        assert piece.samples is not None
        self.pieces.append(piece._replace(samples=self._note(piece.samples, batch)))

    def end(self, loop: Loop, finished: bool) -> None:
        """The iterator of ``loop`` is at its end, or was closed."""
        loop.ended = True
        if loop is self.loop and not finished and self.of is not None and self.of is loop.batch:
            self.of.dropped = True  # its other parts will not come

    def _pass_over(self, held: Piece, waits: bool) -> None:
        loop = held.loop
        assert loop is not None
        if waits:
            raise BatchOrderError(
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

    def _note(self, samples: Samples, batch: Any) -> Samples:
        if not self.fresh:
            self.newest.clear()
        self.newest.append(tensors(batch))
        samples = samples.as_in(self.newest[-1])
        del self.fresh[: -MOST_FRESH + 1]
        self.fresh.append(samples)
        self.recent.append(samples)
        if len(self.recent) > RECENT:
            self.recent = [*(each for each in self.recent[:-RECENT] if not each.gone), *self.recent[-RECENT:]]
        self.empty = not samples
        return samples

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
            raise BatchOrderError(
                "it cannot be told which physical batch of BatchMemoryManager this is: some were given before, and "
                "neither a forward nor a step came. Do not read ahead of the steps; where a batch is skipped, call "
                "optimizer.zero_grad() first"
            )
        if self.unclear:
            raise BatchOrderError(
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
        held = self.piece
        if held is not None and held.loop is not None and not held.whole:
            self._lose(held)  # and it stays: used once more, it is no batch of its own
            return
        held = self.stepped()
        if held is not None:
            self._lose(held)
        elif self.signalled is not None:
            self.signalled.dropped = True

    def lose(self) -> None:
        """What the physical batch was a part of is no whole logical batch any more."""
        if self.pieces:
            self._lose(self.pieces[0])

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

    def forward(self, forward: ForwardPass) -> None:
        """A training forward has run: what it was over.

        Where its inputs lie in what the loader has given, nothing has to be guessed. Else it is over the physical
        batch, or what the loader has given since the last forward, or what that forward was over. What a loop gave that
        has ended since was only looked at, if another one goes on.
        """
        forward.told = True
        held = self.piece
        physical = held.samples if held is not None else None
        if physical is not None:
            new, old = [] if self.forwarded else [physical], [physical]
        else:
            live = [samples for samples in self.fresh if not samples.loop]
            new, old = live or [*self.fresh], self.taken
        self.fresh.clear()
        if forward.lies_in(self.recent):
            new = [samples for samples in forward.group if samples not in self.given]
            forward.astray = held is not None and not held.whole and forward.group[0] is not physical
            self.taken = [*forward.group]
        elif new or old:
            earlier = [samples for samples in self.given if samples not in new]
            if not (self.passes and new and forward.is_copy_of(earlier)):
                forward.taken_for(new or old, first=bool(new))
            left = [samples for samples in new if samples not in forward.group]
            self.taken = [*left, *forward.group]
        settle(forward)
        self.given += [samples for samples in new if samples not in self.given]
        self.forwards += 1
        self.forwarded, self.empty = True, forward.batch == 0
        self.unclear |= self.aside

    def take_back(self, forward: ForwardPass) -> None:
        """``forward``, the last one, is run again: no backward pass of it will come."""
        self.forwards -= 1
        self.fresh = [samples for samples in forward.group if samples in self.given] or self.fresh

    def use(self, passing: Iterable[ForwardPass], reached: bool, drawn: bool = False) -> None:
        """A backward pass of the step ends, of the forwards ``passing``; ``reached``: it reached parameters.

        ``drawn``: batches are Poisson samples, and each step is accounted for as of a new one.

        Raises:
            ValueError: some sample was in another of them, and would count twice at the noise of once; or samples of
                several forwards would be clipped as if they were one.
        """
        passing = [forward for forward in passing if forward.batch != 0]
        unseen = reached and not passing
        several = unseen and self.forwards > 1
        for forward in passing[1:]:
            several |= forward.batch == passing[0].batch and not forward.same_rows(passing[0])
        if several:
            raise SecondBackwardError(
                "one backward pass of two forwards, and nothing shows that both had the same samples in the same "
                "order: row k of each is clipped as one sample, so that a sample could count twice. Call backward() "
                "and step() for each, with BatchMemoryManager where they are parts of a batch; or call the model "
                "once, on what has both"
            )
        if any(forward.has_a_sample_twice() for forward in passing):
            raise RepeatedSampleError(
                "a sample of the loader was in one forward more than once, in several rows or as an input that all "
                "share: it would count as often, at the noise of once. Give the model each sample once, and make what "
                "it needs several times inside of its forward"
            )
        if any(forward.astray for forward in passing):
            raise BatchOrderError(
                "a backward pass over an earlier batch than the physical batch that BatchMemoryManager has given last: "
                "train on the batch that the loop gives, and once on each"
            )
        number = self.passes + 1
        twice = number > 1 and (unseen or self.unseen)
        twice |= any(forward.shares_samples(other) for forward in passing for other in self.used)
        if twice:
            raise SecondBackwardError(
                "a second backward pass over samples that were in one since the last step, or may have been: each "
                "would count twice, at the noise of once. Add up the losses and call backward() once, or call "
                "optimizer.step() or optimizer.zero_grad() in between. Parts of a batch are told apart by where they "
                "lie in the tensors that the loader gave, or by their values. Those of dpfast.BatchMemoryManager and "
                "dpfast.wrap_data_loader are told apart by their indices, also where samples have equal values, which "
                "those of Opacus' own are not"
            )
        for forward in self.used:  # a step with one backward asks no input for its values
            forward.let_go()
        self.used += passing
        if drawn and any(samples in self.earlier for forward in passing for samples in forward.group):
            self.warn(
                "again",
                "a step over a Poisson batch that an earlier step has used: the accountant counts it as one that was "
                "drawn anew, and its ε is too small. Take the next batch from the loader for each step",
            )
        self.passes, self.forwards, self.unseen = number, 0, self.unseen or unseen
        self._look_for_rows(max((forward.batch or 0 for forward in passing), default=0))

    def padding(self, passing: Iterable[ForwardPass]) -> list[int]:
        """Rows of the backward pass that no sample is in.

        Raises:
            ValueError: nothing tells which rows these are.
        """
        found = [forward.padding() for forward in passing if forward.batch != 0]
        padded = self.piece is not None and self.piece.samples is not None and self.piece.samples.padding > 0
        if None in found or any(rows != found[0] for rows in found) or (padded and not found):
            raise PaddingError(
                "BatchMemoryManager's pad: it cannot be told which rows of the model's inputs are padding, to be "
                "left out. Give the model the rows as the loader gave them, in their order"
            )
        return found[0] or [] if found else []

    def _look_for_rows(self, rows: int) -> None:
        known = sum(map(len, self.given))
        if self.given and rows > known > 0 and rows not in map(len, self.recent):
            self.warn(
                "rows",
                f"the loader gave {known} samples and the model saw {rows} rows: each row is clipped as a sample of "
                f"its own, so that a sample counts {rows / known:.3g} times on average. Divide max_grad_norm by the "
                f"most rows that a sample has, or make the rows of a sample inside of the model",
            )
