"""Opacus' recurrent layers: their cells are linear layers called once a time step, on packed sequences in a
sorted order."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dpfast.capture.tap import Tap
from dpfast.layers.base import Layer

# Their kernels fuse all time steps; nothing inside them can be tapped, and vmap has no rule for them.
UNSERVED = {nn.LSTM: DPLSTM, nn.GRU: DPGRU, nn.RNN: DPRNN}


class Recurrent(Layer):
    """Tells the taps of the cells which sample each row of a packed sequence belongs to."""

    types: ClassVar[tuple[Any, ...]] = (DPRNN, DPGRU, DPLSTM)

    def run(self, module: Any, tap: Tap, input: Tensor | PackedSequence, *args: Any, **kwargs: Any) -> Any:
        forward = type(module).forward
        if not isinstance(input, PackedSequence):
            return forward(module, input, *args, **kwargs)
        order = input.sorted_indices
        if order is None:
            order = torch.arange(int(input.batch_sizes[0]), device=input.data.device)
        with tap.recorder.setting(row_order=order):
            return forward(module, input, *args, **kwargs)
