"""One logical batch, a physical batch at a time: for training loops that see one batch a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.trees import map_tensors, tensors
from dpfast.capture.which_samples import Samples
from dpfast.clipping.samples_once import LogicalBatch, Loop, Piece
from dpfast.data.empty_batch import CollateOrEmpty
from dpfast.data.physical_batches import padded
from dpfast.optim.optimizer import FusedDPOptimizer


def pieces(batch: Any, size: int) -> Iterator[Any]:
    """``batch``, nested mappings, tuples or lists of tensors with the samples first, in pieces of at most ``size``.

    There are as many as there are :func:`counts`.
    """
    for k in range(len(counts(len(tensors(batch)[0]), size))):
        yield map_tensors(lambda x: x[k * size : (k + 1) * size], batch)  # noqa: B023 (used at once)


def counts(samples: int, size: int, least: int = 1) -> list[int]:
    """How many of ``samples`` are in each piece of at most ``size``; there are at least ``least`` of them, and one."""
    return [max(0, min(size, samples - k * size)) for k in range(max(1, least, -(-samples // size)))]


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

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        starts = range(0, max(len(samples), int(self.rows > 0)), self.size)
        return {"samples": len(samples), "pieces": [self._piece(samples[k : k + self.size]) for k in starts]}

    def _piece(self, samples: list[Any]) -> Any:
        batch = self.collator(samples)
        return batch if len(samples) >= self.rows else padded(batch, len(samples), self.rows)


def first_rows(batch: Any, there: int, rows: int) -> Any:
    """The first ``rows`` of a ``batch`` that has ``there``; a tensor that is not the samples' stays as it is."""
    return map_tensors(lambda x: x[:rows] if x.dim() and x.shape[0] == there else x, batch)


def announced(
    optimizer: FusedDPOptimizer, parts: Iterable[Any], of: Sequence[int], rows: int = 0
) -> Iterator[tuple[Any, int, bool]]:
    """Each piece of a logical batch, how many samples it has, and whether it is the last.

    The optimizer is told of each, as by ``BatchMemoryManager``. So samples of equal values, in several pieces, are not
    taken for one that would count twice.

    Args:
        optimizer: private.
        parts: what the model will see, on its device; taken one at a time.
        of: the number of samples in each.
        rows: fewest that each has; those behind the samples are left out of the clipped sum.
    """
    batch, loop, start = LogicalBatch(), Loop(), 0
    for k, (part, given) in enumerate(zip(parts, of, strict=True)):
        last = k == len(of) - 1
        samples = Samples(id(batch), range(start, start + given), padding=max(0, rows - given))
        optimizer.clipped_sum.batches.give_piece(Piece(batch, k == 0, last, samples, loop), False, part)
        yield part, given, last
        start += given


def backward_in_pieces(
    optimizer: FusedDPOptimizer,
    parts: Iterable[Any],
    of: Sequence[int],
    loss_of: Callable[[Any, int], Tensor],
    rows: int = 0,
) -> Tensor:
    """Forward and backward of one logical batch, a piece at a time; ``optimizer.step()`` has to follow.

    Args:
        optimizer, parts, of, rows: see :func:`announced`.
        loss_of: from a piece and the number of its samples to the loss of these, reduced over them as ``make_private``
            was told.

    Returns:
        The sum of the pieces' losses, detached.
    """
    optimizer.abandon()  # an exception may have ended the logical batch before this one half-way
    total = torch.zeros(())
    for part, given, last in announced(optimizer, parts, of, rows):
        loss = loss_of(part, given)
        loss.backward()
        total = total.to(loss.device) + loss.detach()
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    return total
