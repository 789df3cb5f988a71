"""Which samples a training forward is over, so that a step counts each of them once.

What a loader gives is known by its indices. Which of its rows a forward has got is told by where they lie in memory;
else by when they came, if the forward has as many rows as the loader has given samples; else by their values. Where
none of these tells, it may be any of them. Tensors from elsewhere are told apart by memory and values alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from dpfast.trees import tensors

COLUMNS = 256  # elements of a row that are compared


class Place(NamedTuple):
    """Where a tensor lies in its storage."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Place:
        return cls(int(x.storage_offset()), x.shape, x.stride())


class Rows(NamedTuple):
    """A tensor: where it lies and what it was when it was seen, without keeping it."""

    storage: StorageWeakRef  # while it is held, no other storage has its address
    version: int
    place: Place
    base: Place  # of the tensor that it is a view of
    itself: weakref.ref[Tensor]

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        place, base = Place.of(x), x._base
        storage = StorageWeakRef(x.untyped_storage())
        return cls(storage, x._version, place, place if base is None else Place.of(base), weakref.ref(x))

    def is_in(self, other: Rows) -> bool:
        """Whether both lie in one storage that nobody has written to in between."""
        return self.storage.cdata == other.storage.cdata and self.version == other.version

    def unchanged(self) -> Tensor | None:
        """The tensor, if it is there still as it was."""
        x = self.itself()
        return x if x is not None and x._version == self.version else None


def places(given: Place, base: Place, dim: int) -> list[int] | None:
    """Which rows of ``base`` those of ``given`` are, both of one storage; None unless each lies within one of them."""
    along = dim if len(base.shape) == len(given.shape) else 0
    row, rows = base.stride[along], base.shape[along]
    if not row or not rows:
        return None
    wider = min((s for n, s in zip(base.shape, base.stride, strict=True) if n > 1 and s > row), default=0)
    start = given.offset - base.offset
    within = (start % wider if wider else start) % row
    for k, (size, stride) in enumerate(zip(given.shape, given.stride, strict=True)):
        if k != dim and size > 1:
            if stride < row:
                within += (size - 1) * stride
            elif not wider or stride % wider:
                return None
    if start < 0 or within >= row:
        return None
    first = (start % wider if wider else start) // row
    step = given.stride[dim] / row if given.shape[dim] > 1 else 0
    found = [int(first + k * step) for k in range(given.shape[dim])]
    return found if step == int(step) and found and found[0] >= 0 and found[-1] < rows else None


def keys(x: Tensor, dim: int) -> list[bytes]:
    """For each row along ``dim`` some of its elements; equal rows have equal keys."""
    rows = x.detach().movedim(dim, 0).reshape(x.shape[dim], -1)
    rows = rows[:, :: -(-rows.shape[1] // COLUMNS) or 1].contiguous().cpu()
    return [row.tobytes() for row in rows.view(torch.uint8).numpy()]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a data set, and the tensors in which a loader has given them."""

    dataset: int  # its id
    indices: Sequence[Any]
    rows: tuple[Rows, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def given_as(self, batch: Any) -> Samples:
        """The same, in the tensors of ``batch``."""
        return Samples(self.dataset, self.indices, tuple([Rows.of(x) for x in tensors(batch) if _plain(x)]))


class ForwardPass:
    """One training forward, and the samples that it is over.

    An input that all samples share, and one that was expanded to the batch, says nothing of which samples these are.
    """

    def __init__(self) -> None:
        self.batch: int | None = None
        self.given: list[tuple[Rows, int]] = []  # inputs that have a batch dimension, and which of theirs it is
        self._inputs: list[Tensor] = []  # these, until the backward, up to which the graph keeps most of them too
        self.group: tuple[Samples, ...] = ()  # all its samples are of these; empty if no loader has said
        self.rows: Sequence[int] | None = None  # which of the group's rows, in order, if that is known
        self.whole = 0  # rows that the group has

    def saw(self, args: Any, kwargs: Any, batch: int | None, batch_dim: int) -> None:
        """Its inputs, and how many samples are in them."""
        self.batch = batch
        for x in tensors((args, kwargs)):
            while torch._C._functorch.is_functorch_wrapped_tensor(x):  # torch.func.grad around the model
                x = torch._C._functorch.get_unwrapped(x)
            dim = batch_dim if x.dim() > max(batch_dim, 1) else 0
            if (
                _plain(x)
                and batch
                and x.dim()
                and x.shape[dim] == batch
                and x.numel()
                and (x.stride(dim) or batch == 1)
            ):
                self.given.append((Rows.of(x), dim))
                self._inputs.append(x)

    def let_go(self) -> None:
        """Its backward has come: its inputs may go, and are known again by where they lay."""
        self._inputs.clear()

    # ------------------------------------------------------------------ what the loader has given

    def lies_in(self, batches: Iterable[Samples]) -> bool:
        """Whether the inputs lie in the tensors of one of ``batches``; their samples are then known."""
        for samples in batches:
            where = [self._places_in(rows, dim, samples) for rows, dim in self.given]
            found = [each for each in where if each is not None]
            if found and len(found) == len(where) and all(each == found[0] for each in found):
                self.group, (self.rows, self.whole) = (samples,), found[0]
                return True
        return False

    def _places_in(self, rows: Rows, dim: int, samples: Samples) -> tuple[list[int], int] | None:
        for held in samples.rows:
            if rows.is_in(held) and (found := places(rows.place, held.place, dim)) is not None:
                return found, held.place.shape[dim if len(held.place.shape) == len(rows.place.shape) else 0]
        return None

    def taken_for(self, group: Sequence[Samples], first: bool) -> None:
        """It is over samples of ``group``, which the loader has given last; ``first`` if no other forward was."""
        rows = self.batch
        if rows == 0:
            return
        self.group, self.whole = tuple(group), sum(map(len, group))
        if rows is None:
            return
        if first and rows >= self.whole:
            self.rows, self.whole = range(rows), rows
            return
        last, possible = group[-1], self._alike(group[-1])
        in_order = rows == len(last) and all(k in places for k, places in enumerate(possible))
        if in_order or all(len(places) == 1 for places in possible):
            self.group, self.whole = (last,), len(last)
            self.rows = range(rows) if in_order else [row for (row,) in possible]
            return
        before = self.whole - len(last)
        if rows >= self.whole and all(not places or k - before in places for k, places in enumerate(possible)):
            self.rows, self.whole = range(rows), rows  # another view of them, in the same order

    def _alike(self, samples: Samples) -> list[set[int]]:
        """For each row the rows of the loader's batch that have its values."""
        found: list[set[int] | None] = [None] * (self.batch or 0)
        for rows, dim in self.given:
            x = rows.unchanged()
            for theirs in (held.unchanged() for held in samples.rows):
                if x is None or theirs is None or theirs.dim() != x.dim() or theirs.shape[dim] != len(samples):
                    continue
                if [*x.shape[:dim], *x.shape[dim + 1 :]] != [*theirs.shape[:dim], *theirs.shape[dim + 1 :]]:
                    continue
                alike: dict[bytes, set[int]] = {}
                for k, key in enumerate(keys(theirs.to(x.dtype), dim)):
                    alike.setdefault(key, set()).add(k)
                for k, key in enumerate(keys(x, dim)):
                    if same := alike.get(key):
                        found[k] = same if found[k] is None else found[k] & same  # type: ignore[operator]
        return [set() if each is None else each for each in found]

    # ------------------------------------------------------------------ two of them

    def _samples(self) -> set[Any]:
        known = [(samples.dataset, index) for samples in self.group for index in samples.indices]
        if self.rows is None or self.whole != len(known):  # a sample may have several rows
            return set(known)
        return {known[row] for row in self.rows}

    def _order(self) -> list[Any] | None:
        known = [(samples.dataset, index) for samples in self.group for index in samples.indices]
        if self.rows is None:
            return None
        if self.whole != len(known):
            return [(row, *(id(samples.indices) for samples in self.group)) for row in self.rows]
        return [known[row] for row in self.rows]

    def shares_samples(self, other: ForwardPass) -> bool:
        """Whether some sample is, or may be, in both."""
        if self is other:
            return True
        if self.group and other.group:
            return not self._samples().isdisjoint(other._samples())
        if not self.given or len(self.given) != len(other.given):
            return False
        pairs = [(a, b, dim) for (a, dim), (b, _) in zip(self.given, other.given, strict=True)]
        return all(_overlap(a, b, dim) for a, b, dim in pairs) or all(_equal(a, b, dim) for a, b, dim in pairs)

    def same_rows(self, other: ForwardPass) -> bool:
        """Whether row k of both is the same sample, for every k, as far as anything tells.

        Of tensors that no loader has given, and that lie apart and have no rows in common, nothing does: they are
        taken for two views of the same samples.
        """
        if self.group or other.group:
            mine, theirs = self._order(), other._order()
            return mine is not None and mine == theirs and bool(self.group) == bool(other.group)
        return all(_in_step(a, b, dim) for (a, dim), (b, _) in zip(self.given, other.given, strict=False))


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, Parameter) and x.layout == torch.strided and not x.is_inference() and x.dim() > 0


def _overlap(a: Rows, b: Rows, dim: int) -> bool:
    if not a.is_in(b):
        return False
    mine, theirs = places(a.place, a.base, dim), places(b.place, a.base, dim)
    if mine is None or theirs is None:
        return a.place == b.place
    return not set(mine).isdisjoint(theirs)


def _equal(a: Rows, b: Rows, dim: int) -> bool:
    """Whether both are still there and hold the same rows; if all rows are equal, that says nothing."""
    x, y = a.unchanged(), b.unchanged()
    if x is None or y is None or (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
        return False
    return torch.equal(x, y) and not torch.equal(x, x.narrow(dim, 0, 1).expand_as(x))


def _in_step(a: Rows, b: Rows, dim: int) -> bool:
    if a.is_in(b):
        mine, theirs = places(a.place, a.base, dim), places(b.place, a.base, dim)
        return a.place == b.place or (mine is not None and mine == theirs and a.base == b.base)
    x, y = a.unchanged(), b.unchanged()
    if x is None or y is None or x.shape != y.shape:
        return True
    of_mine, of_theirs = keys(x, dim), keys(y.to(x.dtype), dim)
    return all(p == q or q not in of_mine for p, q in zip(of_mine, of_theirs, strict=True))


def leaves_gradients(below: list[Any]) -> bool:
    """Within a backward pass: whether it leaves gradients behind, as ``torch.autograd.grad`` does not.

    ``below`` are nodes of the graph that it runs through. Every leaf under them gets its gradient in ``backward()``.
    """
    seen, stack = set(), list(below)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not hasattr(node, "variable"):
            stack += [child for child, _ in node.next_functions if child is not None]
            continue
        try:
            return bool(torch._C._will_engine_execute_node(node))
        except RuntimeError:  # a leaf that autograd.grad was asked for
            return False
    return True
