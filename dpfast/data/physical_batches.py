"""``BatchMemoryManager``: logical batches a physical batch at a time, in loops that may be left anywhere."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import opacus.utils.batch_memory_manager
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from dpfast.capture.trees import map_tensors, tensors
from dpfast.clipping.clipped_sum import ClippedSum
from dpfast.clipping.samples_once import LogicalBatch, Loop, Piece
from dpfast.data.loaders import arguments_of, distinct, drawn_samples
from dpfast.data.sampling import PoissonBatches, split
from dpfast.data.user_batches import UserBatches
from dpfast.refusals import BatchOrderError, LoaderError, PaddingError

OPACUS_WRAPS = opacus.utils.batch_memory_manager.wrap_data_loader  # its own, whatever is patched later


def wrap_data_loader(*, data_loader: DataLoader, max_batch_size: int, optimizer: Any) -> DataLoader:
    """A loader of the same batches in parts of at most ``max_batch_size`` samples, as Opacus' function of this name.

    Its parts are told apart by their indices, so that samples with equal values are no reason to refuse one. A loop
    over it may be left anywhere, as with :class:`BatchMemoryManager`. An optimizer of another mode than "fused" gets
    Opacus' own loader.

    Raises:
        ValueError: ``max_batch_size`` is no whole number of at least 1, or ``data_loader`` cannot be split.
    """
    clipped_sum = getattr(optimizer, "clipped_sum", None)
    if not isinstance(clipped_sum, ClippedSum):
        return OPACUS_WRAPS(data_loader=data_loader, max_batch_size=max_batch_size, optimizer=optimizer)
    check_size("max_batch_size", max_batch_size, data_loader.batch_sampler)
    return PhysicalLoader(data_loader, max_batch_size, clipped_sum)


def check_size(name: str, size: Any, batches: Any) -> None:
    """Refuse what is no size of a physical batch of ``batches``, whose units it never splits."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"{name}={size!r}: give a whole number of at least 1")
    if isinstance(batches, UserBatches):
        batches.check_fits(name, int(size))


class BatchMemoryManager(opacus.utils.batch_memory_manager.BatchMemoryManager):
    """Opacus' ``BatchMemoryManager``, whose loops may be left in the middle of a logical batch.

    That batch is then dropped as a whole: the next loop, or a loop over the private loader itself, begins a new one.
    The optimizer is told of a physical batch when it is handed out, not when a worker begins to load it.

    With ``pad=True`` every physical batch has ``max_physical_batch_size`` rows, an empty Poisson batch included: zeros
    stand behind the samples, in every tensor whose first dimension is the batch. These rows are left out of the clipped
    sum, so that they contribute exactly nothing. Shapes then never change, and what is compiled for them is compiled
    once. With a number, as in ``pad=32``, the rows are the next multiple of it, and at most
    ``max_physical_batch_size``: whole Poisson batches then have a few shapes, at the cost of a few rows. A mean over
    the batch in the loss is over all rows. The model must get the rows in the loader's order: in another one samples
    would be left out and zeros trained on, at no cost in privacy.

    A unit of several rows (``make_private(units=...)``) is in one physical batch as a whole, so that the size must be
    at least the rows of the largest.

    All ranks run equally many physical batches, some of them empty. A model after ``fully_shard`` needs that: its ranks
    gather parameters together in every forward and backward.

    An optimizer of another mode than "fused" gets Opacus' own loader.
    """

    def __init__(
        self, *, data_loader: DataLoader, max_physical_batch_size: int, optimizer: Any, pad: bool | int = False
    ):
        if not isinstance(pad, (bool, np.bool_, int, np.integer)) or pad < 0:
            raise ValueError(f"pad={pad!r}: give True, False, or of what number of rows batches are a multiple")
        super().__init__(data_loader=data_loader, max_physical_batch_size=max_physical_batch_size, optimizer=optimizer)
        self.pad = bool(pad) if isinstance(pad, np.bool_) else pad

    def __enter__(self) -> DataLoader:
        clipped_sum = getattr(self.optimizer, "clipped_sum", None)
        if not isinstance(clipped_sum, ClippedSum):
            if self.pad:
                raise ValueError(f"pad={self.pad}: the fused mode has it, and this optimizer is of another one")
            return super().__enter__()
        check_size("max_physical_batch_size", self.max_physical_batch_size, self.data_loader.batch_sampler)
        self.optimizer.abandon()
        return PhysicalLoader(self.data_loader, self.max_physical_batch_size, clipped_sum, self.pad)

    def __exit__(self, *exception: Any) -> None:
        if isinstance(getattr(self.optimizer, "clipped_sum", None), ClippedSum):
            self.optimizer.leave_loop()


class PhysicalLoader(DataLoader):
    """A loader of at most ``size`` samples at a time, in the batches of another loader; ``pad`` is as of
    :class:`BatchMemoryManager`.
    """

    clipped_sum: ClippedSum
    size: int
    multiple: int | None  # what the rows of a batch are a multiple of; None: it has as many as samples
    _loop: Loop
    _drawn: deque[Piece]

    def __init__(self, loader: DataLoader, size: int, clipped_sum: ClippedSum, pad: bool | int = False):
        if loader.batch_sampler is None:
            raise LoaderError(
                "data_loader has batch_size=None: its data set gives whole batches, which cannot be split"
            )
        self.clipped_sum = clipped_sum
        self.size, self.multiple = size, size if pad is True else int(pad) or None
        parts = PhysicalBatches(loader.batch_sampler, size, loader.dataset, clipped_sum)
        super().__init__(loader.dataset, batch_sampler=parts, **arguments_of(loader))

    @property
    def _index_sampler(self) -> Any:
        return _Noting(self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        loop = self._loop = Loop()
        drawn = self._drawn = deque()
        iterator, finished = super().__iter__(), False
        try:
            while True:
                # Persistent workers have one iterator, which another loop has begun anew.
                if loop.left or (self._iterator is iterator and self._loop is not loop):
                    raise BatchOrderError(
                        "this loop over BatchMemoryManager's loader cannot go on: another one was begun in the middle "
                        "of it"
                    )
                try:
                    batch = next(iterator)
                except StopIteration:
                    finished = True
                    return
                piece = drawn.popleft()
                if self.multiple is not None and piece.samples is not None:
                    given = len(piece.samples)
                    rows = min(self.size, self.multiple * max(1, -(-given // self.multiple)))
                    batch = padded(batch, given, rows)
                    piece = piece._replace(samples=replace(piece.samples, padding=rows - given))
                self.clipped_sum.batches.give_piece(piece, self.clipped_sum.waits_for_step, batch)
                yield batch
        finally:
            self.clipped_sum.batches.end(loop, finished)


def padded(batch: Any, given: int, rows: int) -> Any:
    """A ``batch`` of ``given`` samples with zeros behind them, so that its tensors have as many ``rows``.

    Raises:
        ValueError: none of its tensors has the samples along its first dimension.
    """
    if given == rows:
        return batch
    found = [x for x in tensors(batch) if x.dim() and x.shape[0] == given]
    if not found and given == 0:  # with rand_on_empty a batch without samples has a row
        given = 1
        found = [x for x in tensors(batch) if x.dim() and x.shape[0] == given]
    if not found:
        shapes = [list(x.shape) for x in tensors(batch)]
        raise PaddingError(
            f"pad: a batch of {given} samples has tensors of shapes {shapes}, none of which has the samples along "
            f"its first dimension: leave pad out, or have collate_fn return such tensors"
        )

    def one(x: Tensor) -> Tensor:
        if not x.dim() or x.shape[0] != given:
            return x
        wide = torch.zeros(rows, *x.shape[1:], dtype=x.dtype, device=x.device, pin_memory=x.is_pinned())
        wide[:given] = x
        return wide

    return map_tensors(one, batch)


class _Noting(Sampler[list[Any]]):
    """The physical batches of one loop over ``loader``, noted in the order in which they are drawn."""

    def __init__(self, loader: PhysicalLoader):
        self.parts: Any = loader.batch_sampler
        self.loader = weakref.ref(loader)  # as in dpfast.data.loaders: an iterator keeps this

    def __iter__(self) -> Iterator[list[Any]]:
        loader = self.loader()
        assert loader is not None  # it is what asks
        return self._draw(loader._loop, loader._drawn)  # those of now, not of when the first is asked for

    def _draw(self, loop: Loop, drawn: deque[Piece]) -> Iterator[list[Any]]:
        for piece, indices in self.parts.pieces(loop):
            drawn.append(piece)
            yield indices

    def __len__(self) -> int:
        return len(self.parts)


class PhysicalBatches(Sampler[list[Any]]):
    """The batches of ``batches`` in parts; ``clipped_sum`` hears of each one drawn from here, without a loader."""

    def __init__(self, batches: Any, size: int, dataset: Any, clipped_sum: ClippedSum):
        self.batches, self.size, self.dataset, self.clipped_sum = batches, size, dataset, clipped_sum

    def __iter__(self) -> Iterator[list[Any]]:
        loop, finished = Loop(), False
        try:
            for piece, indices in self.pieces(loop):
                self.clipped_sum.batches.give_piece(piece, self.clipped_sum.waits_for_step)
                yield list(indices)
            finished = True
        finally:
            self.clipped_sum.batches.end(loop, finished)

    def pieces(self, loop: Loop) -> Iterator[tuple[Piece, list[Any]]]:
        """Each physical batch, with its place in its logical batch, and the indices to load."""
        for parts in self._logical_batches():
            batch = LogicalBatch()
            for k, part in enumerate(parts):
                samples = drawn_samples(self.batches, self.dataset, part)
                yield Piece(batch, k == 0, k == len(parts) - 1, samples, loop), part

    def _logical_batches(self) -> Iterator[Sequence[list[Any]]]:
        if isinstance(self.batches, PoissonBatches):
            first = self.batches.step
            for step, _ in enumerate(self.batches, first):
                yield self.batches.physical_batches(step, self.size)
            return
        for batch in self.batches:
            indices = distinct(batch, self.dataset)
            yield split(indices, max(1, -(-len(indices) // self.size)))

    def __len__(self) -> int:
        """About: of Poisson batches it is known only how large they are on average."""
        size = getattr(self.batches, "batch_size", None)
        if size is None and hasattr(self.batches, "sample_rate"):
            rows = getattr(self.batches, "num_rows", self.batches.num_samples)  # of all its samples or units
            size = self.batches.sample_rate * rows / getattr(self.batches, "world_size", 1)
        if not size or not isinstance(size, (int, float)):
            return len(self.batches)
        if isinstance(self.batches, BatchSampler):
            return len(self.batches) * -(-int(size) // self.size)
        return max(len(self.batches), round(len(self.batches) * size / self.size))
