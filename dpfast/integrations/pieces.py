"""One logical batch, a physical batch at a time: for training loops that see one batch a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.trees import map_tensors, tensors
from dpfast.optim.optimizer import FusedDPOptimizer


def pieces(batch: Any, size: int, count: int | None = None) -> Iterator[Any]:
    """``batch``, nested mappings, tuples or lists of tensors with the samples first, in pieces of at most ``size``.

    There are at least ``count`` of them, and at least one: what is missing at the end are empty ones.
    """
    rows = len(tensors(batch)[0])
    for k in range(max(1, -(-rows // size), count or 0)):
        yield map_tensors(lambda x: x[k * size : (k + 1) * size], batch)  # noqa: B023 (used at once)


def backward_in_pieces(
    optimizer: FusedDPOptimizer, batch: Mapping[str, Any], size: int, loss_of: Callable[[Any], Tensor]
) -> Tensor:
    """Forward and backward of one logical batch, ``size`` samples at a time; ``optimizer.step()`` has to follow.

    Args:
        optimizer: private; it is told which pieces end no logical batch, as by Opacus' ``BatchMemoryManager``.
        batch: nested mappings, tuples or lists of tensors, each with the samples first.
        size: most samples of one forward.
        loss_of: from a piece to its loss, reduced over the samples as ``make_private`` was told.

    Returns:
        The sum of the pieces' losses, detached.
    """
    optimizer.abandon()  # an exception may have ended the logical batch before this one half-way
    parts = list(pieces(batch, size, optimizer.ranks.most(-(-len(tensors(batch)[0]) // size))))
    total = torch.zeros(())
    for k, part in enumerate(parts):
        last = k == len(parts) - 1
        optimizer.signal_skip_step(not last)
        loss = loss_of(part)
        loss.backward()
        total = total.to(loss.device) + loss.detach()
        if not len(tensors(part)[0]):
            optimizer.expect_no_samples()
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    return total
