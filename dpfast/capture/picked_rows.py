"""Rows that a model picks from all samples' rows, as a mixture of experts does: whose each of them is.

A layer that gets some of the samples' rows, in some order, puts each sample's rows beside each other, with zeros where
a sample has fewer than another one. So every per-sample gradient is whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

OWNERS = "dpfast_owners"  # attribute of a tensor of picked rows: the sample of each, [n]


def owners_of(x: Tensor) -> Tensor | None:
    """The sample of each row of ``x``, where it has rows that were picked."""
    owners = getattr(x, OWNERS, None)
    return owners if owners is not None and x.dim() and len(owners) == x.shape[0] else None


def owned(x: Tensor, owners: Tensor) -> Tensor:
    """``x``, whose rows are of these samples."""
    setattr(x, OWNERS, owners)
    return x


def places(owners: Tensor, batch: int) -> tuple[Tensor, int]:
    """Where each row goes among ``batch · most`` rows, those of a sample beside each other; and ``most``."""
    with _disable_current_modes():  # our own book-keeping: nothing of the samples' values is in it
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=batch)
        before = counts.cumsum(0) - counts
        nth = torch.empty_like(owners)
        nth[order] = torch.arange(len(owners), device=owners.device) - before[owners[order]]
        most = int(counts.max())
    return owners * most + nth, most


class PickedRows(TorchFunctionMode):
    """Notes whose rows are picked by an index or a mask, and what is computed from them row by row."""

    def __init__(self, batch: int, module: nn.Module):
        super().__init__()
        self.batch = batch
        self.held = {x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers()) if _strided(x)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        owners = self._picked(func, args, kwargs)
        if owners is None:
            owners = _of_all(args)
        if owners is not None:
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor) and x.dim() and x.shape[0] == len(owners):
                    owned(x, owners)
        return out

    def _picked(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        if func is Tensor.__getitem__:
            x, index = args
            index = index[0] if isinstance(index, tuple) and index else index
        elif func in (torch.index_select, Tensor.index_select):
            x, dim, index = (*args, *kwargs.values())[:3]
            if dim != 0:
                return None
        else:
            return None
        if not isinstance(index, Tensor) or not index.dim() or not isinstance(x, Tensor):
            return None
        if not _strided(x) or x.untyped_storage()._cdata in self.held:
            return None  # a table, whose rows are nobody's
        if x.shape[0] == 0 or (x.shape[0] % self.batch and owners_of(x) is None):
            return None
        with torch._C.DisableTorchFunction():
            everyone = owners_of(x)
            if everyone is None:
                each = x.shape[0] // self.batch
                everyone = torch.arange(self.batch, device=x.device).repeat_interleave(each)
            if index.dtype in (torch.bool, torch.uint8):
                shape = [-1, *[1] * (index.dim() - 1)]
                return everyone.view(shape).expand(index.shape)[index]
            return everyone[index] if index.dim() == 1 else None


def _strided(x: Tensor) -> bool:
    return x.layout is torch.strided and not is_traceable_wrapper_subclass(x)


def _of_all(args: Any) -> Tensor | None:
    """The owners of all arguments that have as many rows; None where one has rows of its own, to be added to."""
    given = [x for x in args if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)]
    first = next((x for x in given if owners_of(x) is not None), None)
    if first is None:
        return None
    owners = owners_of(first)
    for x in given:
        beside = x.dim() == first.dim() and x.shape[0] == first.shape[0]
        if beside and owners_of(x) is not owners and not _equal(owners_of(x), owners):
            return None
    return owners


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return one is not None and other is not None and torch.equal(one, other)
