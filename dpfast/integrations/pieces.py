"""One logical batch, a physical batch at a time: for training loops that see one batch a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.trees import map_tensors
from dpfast.capture.which_samples import Samples
from dpfast.clipping.samples_once import LogicalBatch, Loop, Piece
from dpfast.data.empty_batch import CollateOrEmpty
from dpfast.data.physical_batches import padded
from dpfast.data.user_batches import packed
from dpfast.optim.optimizer import FusedDPOptimizer


def pieces(batch: Any, of: Sequence[int]) -> Iterator[Any]:
    """``batch``, nested mappings, tuples or lists of tensors with the samples first, in pieces ``of`` so many."""
    for end, given in zip(itertools.accumulate(of), of, strict=True):
        yield map_tensors(lambda x: x[end - given : end], batch)  # noqa: B023 (used at once)


def counts(samples: int, size: int, least: int = 1, units: Sequence[int] | None = None) -> list[int]:
    """How many of ``samples`` are in each piece of at most ``size``; there are at least ``least`` of them, and one.

    Where the samples are of ``units``, each is whole in one piece. Its samples stand one after the other.
    """
    if units is None:
        return [max(0, min(size, samples - k * size)) for k in range(max(1, least, -(-samples // size)))]
    found = [len(piece) for piece in packed([[*its] for _, its in itertools.groupby(units)], size)]
    return found + [0] * (max(1, least) - len(found))


class CollatedPieces:
    """Collates a logical batch a physical batch at a time, so that texts are padded to the longest of each.

    Args:
        collator: from a list of samples to a batch.
        size: most samples of a physical batch.
        data: the data set that the samples are of; used where there are ``rows``.
        rows: fewest rows of a physical batch. Zeros stand behind the samples, and there is at least one batch.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], size: int, data: Any = None, rows: int = 0):
        self.collator = CollateOrEmpty(collator, data, 0) if rows else collator
        self.size, self.rows = size, rows

    def __call__(self, samples: list[Any], units: Sequence[int] | None = None) -> dict[str, Any]:
        of = counts(len(samples), self.size, units=units) if samples or self.rows else []
        ends = [*itertools.accumulate(of)]
        found = [self._piece(samples[end - given : end]) for given, end in zip(of, ends, strict=True)]
        return {"samples": len(samples), "units": units, "pieces": found}

    def _piece(self, samples: list[Any]) -> Any:
        batch = self.collator(samples)
        return batch if len(samples) >= self.rows else padded(batch, len(samples), self.rows)


def first_rows(batch: Any, there: int, rows: int) -> Any:
    """The first ``rows`` of a ``batch`` that has ``there``; a tensor that is not the samples' stays as it is."""
    return map_tensors(lambda x: x[:rows] if x.dim() and x.shape[0] == there else x, batch)


def announced(
    optimizer: FusedDPOptimizer,
    parts: Iterable[Any],
    of: Sequence[int],
    rows: int = 0,
    units: Sequence[int] | None = None,
    each: int = 1,
) -> Iterator[tuple[Any, int, bool]]:
    """Each piece of a logical batch, how many samples it has, and whether it is the last.

    The optimizer is told of each, as by ``BatchMemoryManager``. So samples of equal values, in several pieces, are not
    taken for one that would count twice.

    Args:
        optimizer: private.
        parts: what the model will see, on its device; taken one at a time.
        of: the number of samples in each.
        rows: fewest samples that each has; those behind what is given are left out of the clipped sum.
        units: what each sample is clipped together with; None: it is clipped alone.
        each: rows that the model sees of each sample, one after the other.
    """
    batch, loop, start = LogicalBatch(), Loop(), 0
    if units is None and each > 1:
        units = range(sum(of))
    for k, (part, given) in enumerate(zip(parts, of, strict=True)):
        last = k == len(of) - 1
        its = None if units is None else [unit for unit in units[start : start + given] for _ in range(each)]
        samples = Samples(
            id(batch), range(each * start, each * (start + given)), padding=each * max(0, rows - given), units=its
        )
        optimizer.clipped_sum.batches.give_piece(Piece(batch, k == 0, last, samples, loop), False, part)
        yield part, given, last
        start += given


def backward_in_pieces(
    optimizer: FusedDPOptimizer,
    parts: Iterable[Any],
    of: Sequence[int],
    loss_of: Callable[[Any, int], Tensor],
    rows: int = 0,
    units: Sequence[int] | None = None,
    each: int = 1,
) -> Tensor:
    """Forward and backward of one logical batch, a piece at a time; ``optimizer.step()`` has to follow.

    Args:
        optimizer, parts, of, rows, units, each: see :func:`announced`.
        loss_of: from a piece and the number of its samples to the loss of these, reduced over them as ``make_private``
            was told.

    Returns:
        The sum of the pieces' losses, detached.
    """
    optimizer.abandon()  # an exception may have ended the logical batch before this one half-way
    total = torch.zeros(())
    for part, given, last in announced(optimizer, parts, of, rows, units, each):
        loss = loss_of(part, given)
        loss.backward()
        total = total.to(loss.device) + loss.detach()
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    return total
