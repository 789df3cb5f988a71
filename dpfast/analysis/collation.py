"""Does a sample's gradient depend on what it is collated with, as where rows are padded to the longest of a batch?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.forms import Form
from dpfast.capture.trees import tensors
from dpfast.model.private_model import FusedHooks
from dpfast.refusals import CollateError
from dpfast.separation import aside, observed, own_random_numbers

ROWS = 4  # that are compared
AMONG = 64  # the first of a data set, of which the shortest and the longest are taken


def is_random(collate_fn: Callable[[list[Any]], Any], rows: Sequence[Any]) -> bool:
    """Whether ``collate_fn`` draws random numbers, as one does that masks tokens."""
    batches = []
    for seed in (0, 1):
        with own_random_numbers(seed):
            batches.append(tensors(collate_fn(list(rows))))
    pairs = zip(*batches, strict=False)
    return any(x.shape != y.shape or not torch.equal(x, y) for x, y in pairs)


def of_other_lengths(rows: Sequence[Any]) -> list[Any]:
    """A few rows, the smallest and the largest among them."""
    by_size = sorted(rows, key=lambda row: sum(_size(x) for x in (row.values() if isinstance(row, dict) else [row])))
    few = min(ROWS, len(by_size))
    return [by_size[round(k * (len(by_size) - 1) / max(1, few - 1))] for k in range(few)]


def _size(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.numel()
    if isinstance(x, (list, tuple)):
        return sum(_size(y) for y in x)
    return getattr(x, "size", 1) if isinstance(getattr(x, "size", 1), int) else 1


def check_collation(
    hooks: FusedHooks,
    loss_of: Callable[[Any], Tensor],
    data: Any,
    collate_fn: Callable[[list[Any]], Any],
    each: int = 1,
) -> None:
    """Compare gradients of a few rows that are collated alone and together, with the loss that trains.

    Nothing is left behind. A ``collate_fn`` that draws random numbers shows nothing, and is not compared.

    Args:
        hooks: of a private model.
        loss_of: from a collated batch to its loss: the sum or mean over samples, as ``make_private`` was told.
        data: the data set; of its first rows the smallest, the largest and two between are compared.
        collate_fn: the loader's.
        each: rows that the model sees of each sample, one after the other.

    Raises:
        ValueError: a sample has another gradient beside others than alone.
    """
    with own_random_numbers(0):
        few = of_other_lengths([data[k] for k in range(min(AMONG, len(data)))])
    if len(few) < 2 or is_random(collate_fn, few):
        return
    together = squared_norms(hooks, lambda: loss_of(collate_fn(few)), each * len(few))
    for k, row in enumerate(few):
        alone = squared_norms(hooks, lambda row=row: loss_of(collate_fn([row])), each)  # type: ignore[misc]
        beside = together[each * k : each * (k + 1)]
        changes = (alone.sqrt() / beside.sqrt().clamp_min(1e-30) - 1).abs().nan_to_num(0, 0, 0)
        change = float(changes.max())
        if change > _allowed(hooks) and bool((torch.maximum(alone, beside)[changes > _allowed(hooks)] > 0).any()):
            raise CollateError(
                f"collate_fn: a sample has another gradient beside others than alone (its norm changes by "
                f"{100 * change:.3g} %): what it is collated with reaches it, most often as padding to the longest of "
                f"the batch. Pad all rows to one fixed length, or have the model leave padding out by a mask"
            )


def uncompiled() -> AbstractContextManager[Any]:
    """Models that are compiled run as they are: a few rows are not worth a graph of their own."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _allowed(hooks: FusedHooks) -> float:
    coarse = any(p.dtype.itemsize < 4 for p in hooks.clipped_sum.names) or torch.is_autocast_enabled("cpu")
    return 0.1 if coarse or (torch.cuda.is_available() and torch.is_autocast_enabled("cuda")) else 0.01


def squared_norms(hooks: FusedHooks, loss: Callable[[], Tensor], samples: int) -> Tensor:
    """``[samples]`` squared norms of a loss's gradients, without dropout; each use of a weight counts by itself."""
    clipped_sum, module = hooks.clipped_sum, hooks._module
    total = torch.zeros(samples, dtype=torch.float64)

    def observe(name: str, form: Form, parameter: Any) -> None:
        squared = form.squared_norm()[0].double().cpu()
        if len(squared) == samples:
            total.add_(squared)

    training = [m for m in module.modules() if m.training]
    try:
        with aside(module), observed(clipped_sum, observe), own_random_numbers(0), torch.enable_grad():
            for m in training:
                m.training = False
            with clipped_sum.setting(needs_model=False, verifies=False), uncompiled():
                loss().backward()
    finally:
        for m in training:
            m.training = True
    return total * (samples**2 if hooks.loss_reduction == "mean" else 1)
