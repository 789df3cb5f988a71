"""Operators that order or pick samples."""

from __future__ import annotations

import sys
from typing import Any

import torch
from opacus.layers import dp_rnn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OrderWatch(TorchDispatchMode):
    """Notices what orders or picks samples, or rows of them, but for PyTorch's own packed sequences.

    Such a model may keep the samples in place in one batch and not in the next, which no check of one batch shows.
    """

    SORTING = (torch.ops.aten.sort, torch.ops.aten.argsort, torch.ops.aten.topk)
    PICKING = (torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._unique2)

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.orders = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._orders(func.overloadpacket, args) and not _inside_packing():
            self.orders = True
        return func(*args, **(kwargs or {}))

    def _orders(self, op: Any, args: Any) -> bool:
        def of_batch(x: Any) -> bool:
            return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == self.batch

        def has_rows(x: Any) -> bool:
            return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] > 0 and x.shape[0] % self.batch == 0

        if op in self.SORTING:
            return of_batch(args[0]) and args[0].dim() == 1
        if op in self.PICKING:
            return has_rows(args[0])
        if op is torch.ops.aten.index_select:
            return args[1] == 0 and of_batch(args[0]) and of_batch(args[2])
        if op is torch.ops.aten.index:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool and has_rows(x) for x in indices):
                return True
            one = len(args[1]) == len(indices) == 1
            return one and of_batch(args[0]) and args[0].dim() > 1 and of_batch(indices[0]) and indices[0].dim() == 1
        return False


class PositionWatch(TorchDispatchMode):
    """Notices what orders or picks positions of packed rows ``[rows, length]``.

    A layer is given positions in their order in one batch then, and in another order in the next, which no trial of one
    batch shows: gradients would be taken for those of other samples.
    """

    ALONG = tuple(
        getattr(torch.ops.aten, name)
        for name in ("index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_copy", "index_add")
    )
    ALONG_IN_PLACE = tuple(getattr(torch.ops.aten, f"{op.__name__}_") for op in ALONG[2:])
    BY_INDICES = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)

    def __init__(self, rows: int, length: int):
        super().__init__()
        self.rows, self.length = rows, length
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.found and self.length > 1 and self._orders(func, args, kwargs):
            self.found = func.overloadpacket.__name__
        return func(*args, **kwargs)

    def _orders(self, func: Any, args: Any, kwargs: Any) -> bool:
        op = func.overloadpacket
        if op in OrderWatch.SORTING:
            return args[0].numel() in self._sizes and self.length in args[0].shape
        if op in OrderWatch.PICKING:
            return bool({*self._sizes} & {*args[0].shape})
        if op in self.ALONG or op in self.ALONG_IN_PLACE:
            given = dict(zip([each.name for each in func._schema.arguments], args, strict=False)) | kwargs
            x, index = args[0], given["index"]
            axis = given["dim"] % max(1, x.dim())
            many = index.shape[axis] if index.dim() == x.dim() else index.numel()
            return axis in self._axes(x) and many in self._sizes
        if op in self.BY_INDICES:
            axes = [axis for axis, index in enumerate(args[1]) if index is not None]
            picked = [args[1][axis] for axis in axes if axis in self._axes(args[0])]
            return any(index.dtype == torch.bool or index.numel() in self._sizes for index in picked)
        return False

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.length, self.rows * self.length

    def _axes(self, x: Tensor) -> list[int]:
        """Dimensions of ``x``, numbers of a model, that go over positions."""
        if not x.is_floating_point() or x.dim() < 2:
            return []
        return [
            axis for axis in (0, 1) if x.shape[: axis + 1] in ((self.rows * self.length,), (self.rows, self.length))
        ]


def _inside_packing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename in (torch.nn.utils.rnn.__file__, dp_rnn.__file__):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
