"""NaN at chosen positions of packed rows, to see where it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.trees import map_tensors


def spoilt(x: Tensor, bad: Tensor) -> Tensor:
    """``x``, NaN where ``bad [rows, length]`` is True, if it goes over these positions.

    NaN is added, so that the gradient goes on through these positions too.
    """
    rows, length = bad.shape
    flat = x.shape[:1] == (rows * length,)
    if not x.is_floating_point() or not (flat or x.shape[:2] == (rows, length)):
        return x
    where = (bad.flatten() if flat else bad).to(x.device)
    where = where.reshape(*where.shape, *[1] * (x.dim() - where.dim()))
    return x + torch.zeros_like(where, dtype=x.dtype).masked_fill(where, torch.nan)


@contextmanager
def not_finite(module: nn.Module, bad: Tensor) -> Iterator[None]:
    """What the leaves of ``module`` return within is NaN where ``bad [rows, length]`` is True."""

    def spoil(leaf: nn.Module, args: Any, out: Any) -> Any:
        return map_tensors(lambda x: spoilt(x, bad), out)

    hooks = [each.register_forward_hook(spoil) for each in module.modules() if not each._modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
