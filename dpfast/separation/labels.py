"""Whose data is at each place of a tensor.

A label is kept for each block of memory (a tensor's storage), so views need no rule: the label of a view follows from
its strides. Row r of a block, of ``period`` bytes, is of sample ``owners[r % len(owners)]``.

A tensor's own label says the same along one of its dimensions. What more than one sample has reached is :class:`Met`,
and what cannot be followed is :class:`Lost`. ``None`` is no label: the same whatever the samples are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

NOBODY = -1  # the owner of a row that depends on no sample
ORDERED, PICKED = 1, 2  # by the samples' values


class Owners:
    """The sample of each row. There is one object for each list, made by :meth:`Labels.owners`: equal is identical."""

    def __init__(self, each: np.ndarray):
        self.each = each

    def __len__(self) -> int:
        return len(self.each)


@dataclass(frozen=True)
class Rows:
    """Index i along ``dim`` is of sample ``owners.each[i]``; with ``dim`` None all is of one, ``owners.each[0]``.

    ``by_data``: which rows there are (:data:`PICKED`), or at least in which order (:data:`ORDERED`), follows from the
    samples' values: another batch has others.
    """

    dim: int | None
    owners: Owners
    by_data: int = 0


@dataclass(frozen=True)
class Met:
    """Several samples have reached each place, at operator ``op`` in ``module``.

    ``summed``: as a sum of what each of them gives by itself, as in a mean over the batch. Such a sum may be what a
    model returns; nothing may be computed from it.
    """

    op: str
    module: str
    summed: bool = False

    def __str__(self) -> str:
        return f"{self.op} in {self.module}" if self.module else self.op


@dataclass(frozen=True)
class Lost:
    """Cannot be followed, from operator ``op`` in ``module`` on.

    ``dims``: along which dimensions the samples lie, where they lie along two.
    """

    op: str
    module: str
    dims: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} in {self.module}" if self.module else self.op


@dataclass(frozen=True)
class Drawn:
    """Random numbers and what is made of them alone."""


@dataclass(frozen=True)
class Unwritten:
    """Memory that nothing has been written to."""


Label = Rows | Met | Lost | Drawn | Unwritten | None
CUT = Lost("a view that cuts through samples", "")


@dataclass(frozen=True)
class _Periodic:
    """The label of a block of memory whose rows are the samples'."""

    period: int
    owners: Owners
    by_data: int


class Labels:
    """The labels of all memory that a pass has touched, for ``batch`` samples."""

    def __init__(self, batch: int):
        self.batch = batch
        self._of: dict[int, tuple[Any, Any]] = {}  # by storage, with what keeps its address from being used again
        self._owners: dict[bytes, Owners] = {}
        self._views: dict[Any, Label] = {}
        self._in_order: dict[int, Owners] = {}
        self._shortest: dict[bytes, tuple[int, Owners]] = {}

    def owners(self, each: Any) -> Owners:
        """The object for this list of samples."""
        each = np.ascontiguousarray(each, dtype=np.int64)
        return self._owners.setdefault(each.tobytes(), Owners(each))

    def rows(self, dim: int, each: Any, by_data: int = 0) -> Rows | None:
        """The label of a tensor whose index i along ``dim`` is of sample ``each[i]``."""
        each = np.asarray(each)
        if not len(each) or bool((each == NOBODY).all()):
            return None
        if bool((each == each[0]).all()):
            return Rows(None, self.owners(each[:1]), by_data)
        return Rows(dim, self.owners(each), by_data)

    def in_order(self, dim: int, size: int) -> Rows | None:
        """``size`` rows along ``dim``, those of a sample beside each other, the samples in order; None if it cannot."""
        if size == 0 or size % self.batch:
            return None
        if self.batch == 1:
            return Rows(None, self.owners([0]))
        if size not in self._in_order:
            self._in_order[size] = self.owners(np.repeat(np.arange(self.batch), size // self.batch))
        return Rows(dim, self._in_order[size])

    def merged(self, one: Rows, other: Rows) -> Rows | None:
        """The label of what is made of both place by place; None where that would be of two samples."""
        if one.dim == other.dim and one.owners is other.owners:
            return one if one.by_data >= other.by_data else other
        mine, theirs = one.owners.each, other.owners.each
        if one.dim != other.dim or len(mine) != len(theirs):
            return None
        if bool(((mine != theirs) & (mine != NOBODY) & (theirs != NOBODY)).any()):
            return None
        return Rows(one.dim, self.owners(np.maximum(mine, theirs)), max(one.by_data, other.by_data))

    def __getitem__(self, x: Tensor) -> Label:
        if x.layout is not torch.strided:
            return None  # such as the edges of a graph that all samples share; what is made of samples is a gap
        found = self._of.get(x.untyped_storage()._cdata)
        if found is None or x.numel() == 0:
            return None
        label = found[1]
        return self._of_view(label, x) if isinstance(label, _Periodic) else label

    def __setitem__(self, x: Tensor, label: Label) -> None:
        """``x`` is all that is in its memory."""
        known: Any = label
        if isinstance(label, Lost) and label.dims:
            known = Lost(label.op, label.module)  # the dimensions were those of another tensor
        if isinstance(label, Rows):
            known = self._of_memory(label, x) or CUT
        self._keep(x.untyped_storage(), known)

    def write(self, x: Tensor, label: Label, lost: Lost) -> None:
        """``x``, a view of some memory, has been written to; ``lost`` if memory then has no label of its kind."""
        storage = x.untyped_storage()
        if _covers(x, storage.nbytes()):
            self[x] = label
            return
        found = self._of.get(storage._cdata)
        before = found[1] if found else None
        if isinstance(before, Met | Lost):
            return
        if label is None or isinstance(label, Drawn | Unwritten):
            if before is None or isinstance(before, Unwritten):
                self._keep(storage, label)
        elif not isinstance(label, Rows):
            self._keep(storage, label)
        else:
            self._keep(storage, self._extended(before, x, label) or lost)

    def _keep(self, storage: Any, label: Any) -> None:
        if label is None:
            self._of.pop(storage._cdata, None)
        else:
            self._of[storage._cdata] = (StorageWeakRef(storage), label)

    def _extended(self, before: Any, x: Tensor, label: Rows) -> _Periodic | None:
        """The label of memory in which the view ``x`` now has ``label``, beside what was there ``before``."""
        nbytes = x.untyped_storage().nbytes()
        if isinstance(before, _Periodic):
            periods = [before.period]
        else:
            periods = [x.stride(label.dim) * x.element_size()] if label.dim is not None else []
            periods += [nbytes // self.batch]
        for period in periods:
            where = _rows_of_view(period, nbytes // period, x) if period and nbytes % period == 0 else None
            if where is None or (label.dim is not None and label.dim not in where[0]):
                continue
            dims, places = where
            shape = [-1 if d == label.dim else 1 for d in dims]
            new = np.broadcast_to(label.owners.each.reshape(shape), places.shape)
            each = np.full(nbytes // period, NOBODY)
            if isinstance(before, _Periodic):
                each = np.resize(before.owners.each, nbytes // period)
            if not bool(((each[places] == NOBODY) | (each[places] == new)).all()):
                continue
            each[places] = new
            by_data = max(label.by_data, before.by_data if isinstance(before, _Periodic) else 0)
            return _Periodic(*self._shortened(period, each), by_data)
        return None

    def _of_memory(self, label: Rows, x: Tensor) -> _Periodic | None:
        """The label of the memory that ``x`` has for itself."""
        if label.dim is None:
            return _Periodic(x.untyped_storage().nbytes(), label.owners, label.by_data)
        step = x.stride(label.dim) * x.element_size()
        found = _Periodic(*self._shortened(step, label.owners.each), label.by_data) if step else None
        return found if found and self._of_view(found, x) == label else None

    def _shortened(self, period: int, each: np.ndarray) -> tuple[int, Owners]:
        """The same rows with those of one sample taken together, and only the first of equal cycles."""
        key = each.tobytes()
        if key not in self._shortest:
            repeats = int(np.gcd.reduce(np.append(np.flatnonzero(np.diff(each)) + 1, len(each))))
            runs = each[::repeats]
            if len(runs) % self.batch == 0 and np.array_equal(
                runs, np.tile(runs[: self.batch], len(runs) // self.batch)
            ):
                runs = runs[: self.batch]
            self._shortest[key] = repeats, self.owners(runs)
        repeats, owners = self._shortest[key]
        return period * repeats, owners

    def _of_view(self, memory: _Periodic, x: Tensor) -> Label:
        key = (memory.period, memory.owners, memory.by_data, x.element_size(), x.storage_offset(), x.stride(), x.shape)
        if key not in self._views:
            self._views[key] = self._label_of_view(memory, x)
        return self._views[key]

    def _label_of_view(self, memory: _Periodic, x: Tensor) -> Label:
        """Along which dimension the samples change, if they do along one."""
        owners = memory.owners.each
        where = _rows_of_view(memory.period, len(owners), x)
        if where is None:
            return CUT
        dims, places = where
        if memory.by_data == PICKED and len(np.unique(places % len(owners))) < len(owners):
            return Met("a part of the rows that samples' values pick", "")
        each = owners[places % len(owners)]
        if not dims:
            return self.rows(0, each.reshape(1), memory.by_data)
        for k, dim in enumerate(dims):
            along = each.max(axis=tuple(d for d in range(len(dims)) if d != k), keepdims=True)
            if not np.any((each != along) & (each != NOBODY)):
                return self.rows(dim, along.reshape(-1), memory.by_data)
        return Lost("a view whose samples lie along several dimensions", "", dims)


def _covers(x: Tensor, nbytes: int) -> bool:
    """Whether ``x`` is all of its memory, each place once."""
    dense = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != dense:
            return False
        dense *= size
    return x.numel() * x.element_size() == nbytes


def _rows_of_view(period: int, cycle: int, x: Tensor) -> tuple[tuple[int, ...], np.ndarray] | None:
    """The dimensions that go from row to row of memory, and the row at each of their indices; None if it cuts rows.

    Rows are ``period`` bytes; a dimension that goes on by whole cycles of rows does not count.
    """
    item = x.element_size()
    first = x.storage_offset() * item
    within = 0  # bytes that the dimensions within a row reach over
    dims: list[int] = []
    for stride, size, dim in sorted(zip(x.stride(), x.shape, range(x.dim()), strict=True)):
        stride *= item
        if size == 1 or stride == 0 or (stride % period == 0 and (stride // period) % cycle == 0):
            continue
        if not dims and first % period + within + stride * (size - 1) < period:
            within += stride * (size - 1)
        else:
            dims.append(dim)
    dims.sort()
    steps = np.full([x.shape[d] for d in dims], first)
    for k, d in enumerate(dims):
        along = np.arange(x.shape[d]) * x.stride(d) * item
        steps = steps + along.reshape([-1 if j == k else 1 for j in range(len(dims))])
    if np.any(steps % period + within >= period):
        return None
    return tuple(dims), steps // period
