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


def _inside_packing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename in (torch.nn.utils.rnn.__file__, dp_rnn.__file__):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
