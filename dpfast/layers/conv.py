"""Convolutions: linear layers over their patches, per group, every padding mode, transposed ones included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.capture.forms import Convolved, Form, Waiting
from dpfast.capture.tap import Call, Tap
from dpfast.layers.base import Layer, by_sample, sum_positions
from dpfast.ops import Geometry, compute_dtype


class _Convolution(Layer):
    """What plain and transposed convolutions share."""

    needs_batch = True

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        weight, bias = params
        return torch.convolution(x, weight, bias, *call.spec.arguments)

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        weight = params[0]
        mask = (True, False, False)
        gradients = torch.ops.aten.convolution_backward(
            G, x.to(G.dtype), weight.to(G.dtype), None, *call.spec.arguments, mask
        )
        return gradients[0].to(x.dtype)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        if 0 in needed:
            yield 0, call.planned(Convolved(x, G, params[0].detach(), call.spec, call.batch))
        if 1 in needed:
            per_row = G.flatten(2).sum(2, dtype=compute_dtype(G.dtype))
            yield 1, sum_positions(by_sample(per_row, call.batch))


class _Conv(_Convolution):
    inherits = ("_conv_forward",)

    def run(self, module: Any, tap: Tap, input: Tensor) -> Tensor:
        n = len(module.kernel_size)
        padding = module.padding
        if module.padding_mode != "zeros":
            input = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * n
        elif padding == "valid":
            padding = (0,) * n
        elif padding == "same":
            input = F.pad(input, module._reversed_padding_repeated_twice)
            padding = (0,) * n
        spec = Geometry(module.stride, padding, module.dilation, False, (0,) * n, module.groups)
        return tap(input, module.weight, module.bias, spec=spec)


class Conv1d(_Conv):
    types: ClassVar[tuple[Any, ...]] = (nn.Conv1d,)
    least_dims = 3


class Conv2d(_Conv):
    types: ClassVar[tuple[Any, ...]] = (nn.Conv2d,)
    least_dims = 4


class Conv3d(_Conv):
    types: ClassVar[tuple[Any, ...]] = (nn.Conv3d,)
    least_dims = 5


class _ConvTranspose(_Convolution):
    inherits = ("_output_padding",)

    def run(self, module: Any, tap: Tap, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        n = len(module.kernel_size)
        extra = module._output_padding(
            input, output_size, module.stride, module.padding, module.kernel_size, n, module.dilation
        )
        spec = Geometry(module.stride, module.padding, module.dilation, True, tuple(extra), module.groups)
        return tap(input, module.weight, module.bias, spec=spec)


class ConvTranspose1d(_ConvTranspose):
    types: ClassVar[tuple[Any, ...]] = (nn.ConvTranspose1d,)
    least_dims = 3


class ConvTranspose2d(_ConvTranspose):
    types: ClassVar[tuple[Any, ...]] = (nn.ConvTranspose2d,)
    least_dims = 4


class ConvTranspose3d(_ConvTranspose):
    types: ClassVar[tuple[Any, ...]] = (nn.ConvTranspose3d,)
    least_dims = 5
