"""Which samples a training forward is over, so that a step counts each of them once.

What a loader gives is known by its indices. Which of its rows a forward has got is told by where they lie in memory;
else by when they came, if the forward has as many rows as the loader has given samples; else by their values. Where
none of these tells, it may be any of them. Tensors from elsewhere are told apart by memory and values alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils.data import Subset

from dpfast.capture.segments import Segments
from dpfast.capture.trees import tensors

COLUMNS = 256  # elements of a row that are compared
PADDING = "padding"  # in place of a data set's id: a row that no sample is in


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
    loop: Any = None  # the one in which they were given: a list that has something in it once it has ended
    padding: int = 0  # rows behind them that no sample is in
    units: Sequence[Any] | None = None  # what each is clipped together with; None: it is clipped alone
    copies: int = 1  # rows that each index has, one after the other

    def __len__(self) -> int:
        return len(self.indices) + self.padding

    @classmethod
    def given(
        cls, dataset: Any, indices: Sequence[Any], loop: Any = None, units: Sequence[Any] | None = None, copies: int = 1
    ) -> Samples:
        """Those of ``dataset`` with these indices; of a ``Subset``, the samples of what it is a subset of."""
        while isinstance(dataset, Subset):
            dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
        return cls(id(dataset), indices, loop=loop, units=units, copies=copies)

    def as_in(self, batch: Any) -> Samples:
        """The same, in the tensors of ``batch``."""
        return replace(self, rows=tuple([Rows.of(x) for x in tensors(batch) if _plain(x)]))

    @property
    def gone(self) -> bool:
        """Whether nobody has any of the tensors."""
        return all(rows.storage.expired() for rows in self.rows)

    @property
    def names(self) -> list[Any]:
        """What tells its samples from all others."""
        if self.copies == 1:
            return [*((self.dataset, index) for index in self.indices), *self._padding]
        return [*((self.dataset, index, k % self.copies) for k, index in enumerate(self.indices)), *self._padding]

    @property
    def owners(self) -> list[Any]:
        """What tells the units of its rows from all others: samples, where these are clipped alone."""
        if self.units is None:
            return self.names
        return [*((self.dataset, "unit", unit) for unit in self.units), *self._padding]

    @property
    def _padding(self) -> list[Any]:
        return [(PADDING, id(self.indices), k) for k in range(self.padding)]


class ForwardPass:
    """One training forward, and the samples that it is over."""

    def __init__(self) -> None:
        self.told = False  # which samples these are, as far as it can be told
        self.batch: int | None = None
        self.given: list[tuple[Rows, int]] = []  # inputs that have a batch dimension, and which of theirs it is
        self.shared: list[Rows] = []  # inputs that are the same for all samples
        self.opaque = False  # there are inputs that cannot be looked at
        self.group: tuple[Samples, ...] = ()  # all its samples are of these; empty if no loader has said
        self.rows: Sequence[int] | None = None  # which of the group's rows, in order, if that is known
        self.whole = 0  # rows that the group has
        self.counted = False  # which are known only by how many there are, and not by memory or values
        self.repeats = False  # some sample is in it more than once
        self.calls: Counter[str] = Counter()  # of its tapped layers, by their names
        self.segments: Segments | None = None  # of its rows, where they are packed
        self.attention: Any = None  # what ran their attention
        self.astray = False  # it is over another batch than the physical one that waits
        self._inputs: list[Tensor] = []  # until another backward or a step
        self._keys: list[tuple[bytes, ...]] | None = None  # of its rows, where no loader has said which they are

    def saw(self, args: Any, kwargs: Any, batch: int | None, batch_dim: int) -> None:
        """Its inputs, and how many samples are in them."""
        self.batch = batch
        for x in tensors((args, kwargs)):
            while torch._C._functorch.is_functorch_wrapped_tensor(x):  # torch.func.grad around the model
                x = torch._C._functorch.get_unwrapped(x)
            dim = batch_dim if x.dim() > max(batch_dim, 1) else 0
            if not batch or not x.dim() or not x.numel():
                continue
            if not _plain(x):
                self.opaque |= x.shape[dim] == batch
            elif batch > 1 and (x.shape[dim] == 1 or (x.shape[dim] == batch and x.stride(dim) == 0)):
                self.shared.append(Rows.of(x))
            elif x.shape[dim] == batch:
                self.given.append((Rows.of(x), dim))
                self._inputs.append(x)

    def let_go(self) -> None:
        """Another backward has come: its inputs may go, and are known again by where they lay, and by some values."""
        if self._inputs and not self.group and self._keys is None:
            self._keys = self._row_keys()
        self._inputs.clear()

    # ------------------------------------------------------------------ what the loader has given

    def lies_in(self, batches: Sequence[Samples]) -> bool:
        """Whether the inputs lie in the tensors of one of ``batches``, the last first; their samples are then known."""
        for samples in reversed(batches):
            self.repeats |= any(rows.is_in(held) for rows in self.shared for held in samples.rows)
            where = [self._places_in(rows, dim, samples) for rows, dim in self.given]
            found = [each for each in where if each is not None]
            if found and not self.opaque and len(found) == len(where) and all(each == found[0] for each in found):
                self.group, (self.rows, self.whole) = (samples,), found[0]
                return True
        return False

    def _places_in(self, rows: Rows, dim: int, samples: Samples) -> tuple[list[int], int] | None:
        for held in samples.rows:
            if rows.is_in(held) and (found := places(rows.place, held.place, dim)) is not None:
                return found, held.place.shape[dim if len(held.place.shape) == len(rows.place.shape) else 0]
        return None

    def taken_for(self, group: Sequence[Samples], first: bool) -> None:
        """It is over samples of ``group``, given since the last forward (``first``) or before it."""
        rows = self.batch
        if rows == 0:
            return
        if self.segments is not None and len(group) > 1:  # rows are no samples
            group = [samples for samples in group if self._has_a_tensor_of(samples)] or group
        self.group, self.whole = tuple(group), sum(map(len, group))
        if rows is None:
            return
        if first and rows >= self.whole:
            self.rows, self.whole, self.counted = range(rows), rows, True
        elif not any(self._named_by(samples) for samples in reversed(group)):
            if rows >= self.whole and not self._is_permuted():
                self.rows, self.whole, self.counted = range(rows), rows, True  # another view of them
            else:
                self._part_of_a_view()

    def _has_a_tensor_of(self, samples: Samples) -> bool:
        """Whether one of its inputs has the values of one that the loader gave."""
        pairs = [(rows.unchanged(), held.unchanged()) for rows, _ in self.given for held in samples.rows]
        return any(
            x is not None and y is not None and x.shape == y.shape and keys(x, 0) == keys(y.to(x.dtype), 0)
            for x, y in pairs
        )

    def is_copy_of(self, batches: Iterable[Samples]) -> bool:
        """Whether its values are those of rows of one of ``batches``, whose samples it then is over."""
        return any(self._named_by(samples) for samples in batches)

    def _named_by(self, samples: Samples) -> bool:
        """Whether the values of its rows say which of the loader's these are."""
        possible, telling = self._alike(samples)
        rows = [row for places in possible if len(places) == 1 for row in places]
        if len(rows) == self.batch and len(rows) < len(samples) and len(set(rows)) < len(rows):
            self.repeats = True
        in_order = self.batch == len(samples) and all(k in places for k, places in enumerate(possible))
        if self.opaque or not (in_order or (telling and all(len(places) == 1 for places in possible))):
            return False
        self.group, self.whole = (samples,), len(samples)
        self.counted = any(len(places) > 1 for places in possible)
        self.rows = range(len(samples)) if in_order else [row for (row,) in possible]
        return True

    def _is_permuted(self) -> bool:
        """Whether it has the rows of the group's last batch in another order."""
        possible, _ = self._alike(self.group[-1])
        taken = sorted(k for places in possible for k in places)
        return len(possible) == len(self.group[-1]) and taken == [*range(len(possible))]

    def _part_of_a_view(self) -> None:
        """A part of a tensor that has as many rows as the group: of a view of it, as a whole."""
        where = []
        for rows, dim in self.given:
            along = dim if len(rows.base.shape) == len(rows.place.shape) else 0
            fits = rows.base != rows.place and rows.base.shape[along] == self.whole
            where.append(places(rows.place, rows.base, dim) if fits else None)
        if where and not self.opaque and where[0] is not None and all(each == where[0] for each in where):
            self.rows, self.counted = where[0], True

    def _alike(self, samples: Samples) -> tuple[list[set[int]], bool]:
        """For each row the rows of the loader's batch with its values; whether chance cannot have made them equal."""
        found: list[set[int] | None] = [None] * (self.batch or 0)
        telling = False
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
                any_here = False
                for k, key in enumerate(keys(x, dim)):
                    if same := alike.get(key):
                        any_here = True
                        found[k] = same if found[k] is None else found[k] & same  # type: ignore[operator]
                telling |= any_here and x.is_floating_point() and bool((x != x.round()).any())
        return [set() if each is None else each for each in found], telling

    # ------------------------------------------------------------------ two of them

    def order(self) -> list[Any] | None:
        """The sample of each row, if that is known."""
        if self.rows is None:
            return None
        known = [name for samples in self.group for name in samples.names]
        if self.whole != len(known):  # a sample has several rows
            return [(row, *(id(samples.indices) for samples in self.group)) for row in self.rows]
        return [known[row] for row in self.rows]

    def padding(self) -> list[int] | None:
        """Which of its rows no sample is in; None if there are some, and nothing tells which."""
        if not any(samples.padding for samples in self.group):
            return []
        names = [name for samples in self.group for name in samples.names]
        if self.rows is None or self.whole != len(names):
            return None
        return [k for k, row in enumerate(self.rows) if names[row][0] == PADDING]

    def has_a_sample_twice(self) -> bool:
        """Whether one of the loader's samples is several of its rows."""
        if self.repeats or (isinstance(self.rows, range) and len(self.group) == 1):  # a batch has each once
            return self.repeats
        order = self.order()
        return order is not None and len(set(order)) < len(order)

    def _samples(self) -> set[Any]:
        known = [owner for samples in self.group for owner in samples.owners]
        if self.rows is None or self.whole != len(known):
            return set(known)
        return {known[row] for row in self.rows}

    def shares_samples(self, other: ForwardPass) -> bool:
        """Whether some sample is, or may be, in both."""
        if self is other:
            return True
        if self.group and other.group:
            return not self._samples().isdisjoint(other._samples())
        pairs = [(a, b, dim) for a, dim in self.given for b, _ in other.given]
        if any(_overlap(a, b, dim) for a, b, dim in pairs):
            return True
        mine, theirs = self._row_keys(), other._row_keys()
        # If all rows are equal, that says nothing.
        return bool(mine and theirs) and len(set(mine)) > 1 and not set(mine).isdisjoint(theirs)

    def _row_keys(self) -> list[tuple[bytes, ...]]:
        if self._keys is not None:
            return self._keys
        held = [(rows.unchanged(), dim) for rows, dim in self.given]
        return list(zip(*(keys(x, dim) for x, dim in held if x is not None), strict=True))

    def same_rows(self, other: ForwardPass) -> bool:
        """Whether row k of both is the same sample, for every k, as far as anything tells.

        Of tensors that no loader has given, and that lie apart and have no rows in common, nothing does: they are
        taken for two views of the same samples.
        """
        pairs = [(a, b, dim) for (a, dim), (b, _) in zip(self.given, other.given, strict=False)]
        as_many = len(self.given) == len(other.given) > 0
        if as_many and all(a.is_in(b) and a.place == b.place for a, b, _ in pairs):
            return True
        if self.group or other.group:
            mine, theirs = self.order(), other.order()
            return mine is not None and mine == theirs
        return all(_in_step(a, b, dim) for a, b, dim in pairs)


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, Parameter) and x.layout == torch.strided and not x.is_inference() and x.dim() > 0


def _overlap(a: Rows, b: Rows, dim: int) -> bool:
    """Whether both lie in one storage, and have rows in common; rows that are all equal tell nothing apart."""
    if not a.is_in(b):
        return False
    mine, theirs = places(a.place, a.base, dim), places(b.place, a.base, dim)
    x = a.unchanged()
    if x is not None and x.shape[dim] > 1 and torch.equal(x, x.narrow(dim, 0, 1).expand_as(x)):
        return False
    if mine is None or theirs is None:
        return a.place == b.place
    return not set(mine).isdisjoint(theirs)


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
