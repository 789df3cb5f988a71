"""Convolutions: linear layers over their patches, per group, every padding mode, transposed ones included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast import ops, planner
from dpfast.layers.base import Layer, by_sample, sum_positions
from dpfast.layers.forms import Factored, Form, Instantiated
from dpfast.layers.tap import Call, Tap

# Samples unfolded at a time, so that their patches (kernel-size times the input) stay near the cache.
PATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class Geometry:
    """The arguments of ``aten.convolution`` after the weight and bias, zero padding."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)


class _Convolution(Layer):
    """What plain and transposed convolutions share; subclasses say which side is unfolded."""

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
    ) -> Iterator[tuple[int, Form]]:
        weight = params[0]
        if 0 in needed:
            unfolded, rows = (G, x) if call.spec.transposed else (x, G)
            yield 0, _weight_form(unfolded, rows, weight, call)
        if 1 in needed:
            yield 1, Instantiated(sum_positions(by_sample(G.flatten(2).transpose(1, 2), call.batch)))


def _weight_form(unfolded: Tensor, rows: Tensor, weight: Tensor, call: Call) -> Form:
    """Per-sample gradients of the weight, ``[rows.channels, unfolded.channels / g · ∏kernel]`` per sample.

    For a convolution the input is unfolded and the backprops are the rows; a transposed convolution is the adjoint
    of a convolution with the same weight, so there the backprops are unfolded and the input gives the rows.
    """
    spec, kernel = call.spec, tuple(weight.shape[2:])
    groups, positions = spec.groups, math.prod(rows.shape[2:])
    d, p = weight[0].numel(), len(weight) // groups
    per_sample = len(rows) // call.batch
    plan = planner.choose(call.batch, groups, positions * per_sample, d, p, max(4, rows.element_size()))

    def factor(chunk: slice) -> Factored:
        A = ops.patches(unfolded[chunk], kernel, spec.stride, spec.padding, spec.dilation, groups)
        G = rows[chunk].flatten(2).unflatten(1, (groups, p)).transpose(2, 3)
        A = A[:, :, :positions]  # output padding lets the last patches hang over the input's edge
        A, G = (_samples_first(side, call.batch if chunk == slice(None) else None, per_sample) for side in (A, G))
        return Factored(A, G, len(weight))

    if plan.way != "instantiate":
        return factor(slice(None))
    step = max(1, PATCH_BYTES // max(1, groups * positions * d * per_sample * 4)) * per_sample
    parts = [factor(slice(i, i + step)).instantiate().samples for i in range(0, len(rows), step)]
    return Instantiated(torch.cat(parts).view(call.batch, *weight.shape), plan)


def _samples_first(side: Tensor, batch: int | None, per_sample: int) -> Tensor:
    """``[rows, g, L, c]`` as ``[samples, g, T, c]``: the rows of one sample side by side along T."""
    if per_sample == 1:
        return side
    return (
        side.unflatten(0, (batch if batch is not None else len(side) // per_sample, per_sample))
        .transpose(1, 2)
        .flatten(2, 3)
    )


class _Conv(_Convolution):
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
