"""A tap that ``torch.compile`` may trace: within a graph it is an operator of :mod:`dpfast.capture.compiled_tap`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.tap import Tap
from dpfast.ops import needs_full_precision

# A [B] tensor with a gradient, for the compiled graph of the forward that is under way. It is no attribute of what
# hangs on a module: the compiler takes the sizes of such tensors for constants.
_token: Tensor | None = None
_expands = True  # layers may be made a part of the graph: their products are as the compiler makes them


@contextmanager
def batch_token(batch: int | None) -> Iterator[None]:
    """For a forward of ``batch`` samples; None where their number is not known, and no layer can be compiled."""
    global _token, _expands
    before = _token, _expands
    _token = None if batch is None else torch.zeros(batch, requires_grad=True)
    _expands = not needs_full_precision("cpu")
    try:
        yield
    finally:
        _token, _expands = before


class TracedTap(Tap):
    """Every tap of a private model. What only a compiler needs is here, so that :class:`Tap` is the main path."""

    def is_batch(self, rows: int) -> bool:
        """Whether so many rows are the samples, each once and in their order, as far as their number tells."""
        recorder = self.recorder
        if recorder.token is not None or recorder.row_order is not None or recorder.follows_rows:
            return False
        if torch.compiler.is_compiling():  # whose sizes may be unknown numbers
            return _token is not None and rows == _token.shape[0]
        return rows == recorder.batch_size

    def _in_graph(self, x: Tensor, *params: Tensor | None, spec: Any) -> Tensor:
        """:meth:`__call__` as ``torch.compile`` traces it; a use that is new or no plain one breaks the graph."""
        from dpfast.capture import compiled_tap

        recorder, token = self.recorder, _token
        number = self._use(spec, params)
        plain = recorder.token is None and recorder.row_order is None
        plain = plain and not (recorder.ranks.sharded or recorder.follows_rows)
        if number is None or token is None or not plain or x.dim() < self.layer.least_dims or len(params) > 2:
            return compiled_tap.out_of_graph(self, x, *params, spec=spec)
        dim = self.batch_dim if x.dim() > self.layer.least_dims else 0
        x = x.movedim(dim, 0)
        weight, bias = (*recorder.shift.at(params), None)[:2]
        shared = x.shape[0] == 1 and token.shape[0] > 1
        if shared:
            x = x.expand(token.shape[0], *x.shape[1:])
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        arguments = (token, x, weight, bias, self.handle, number, shared, autocast, _expands)
        return compiled_tap.tapped(*arguments).movedim(0, dim)
