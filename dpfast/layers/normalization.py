"""Normalisation layers: per-sample gradients ``Σ_t g_t ∘ x̂_t`` and ``Σ_t g_t``, formed at once (they are small)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpfast import ops
from dpfast.capture.forms import Form, Instantiated, NormalisedSides, NormalisedSum, Waiting
from dpfast.capture.tap import Call, Tap
from dpfast.layers.base import Layer, by_sample, own, sum_positions


def _as(x: Tensor, *params: Any) -> Tensor:
    """``x`` in the parameters' dtype: under autocast it may be narrower."""
    for p in params:
        if p is not None:
            return x if x.dtype is p.dtype else x.to(p.dtype)
    return x


def _normalised_forms(
    call: Call, needed: Sequence[int], G: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor
) -> Iterator[tuple[int, Form | Waiting]]:
    """Weight (0) and bias (1) of a layer that normalises its last dimensions, from one pass over G and x."""
    shape = call.spec[0]
    if 0 not in needed:
        yield 1, sum_positions(by_sample(G, call.batch, len(shape)))
        return
    of_g, of_x = (by_sample(side, call.batch, len(shape)) for side in (G, x))
    if len(shape) > 1:
        of_g, of_x = of_g.flatten(2), of_x.flatten(2)
    sides = NormalisedSides(of_g, of_x, mean, rstd)
    for i in (0, 1):
        if i in needed:
            yield i, NormalisedSum(sides, i)


class LayerNorm(Layer):
    """``y = x̂ ∘ w + b`` over the last dimensions."""

    types: ClassVar[tuple[Any, ...]] = (nn.LayerNorm,)
    least_dims = 2
    saves = True

    def is_by_last(self, spec: Any) -> bool:
        return len(spec[0]) == 1

    def run(self, module: nn.LayerNorm, tap: Tap, input: Tensor) -> Tensor:
        return tap(input, own(module, "weight"), own(module, "bias"), spec=(module.normalized_shape, module.eps))

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        shape, eps = call.spec
        weight, bias = params
        y, mean, rstd = torch.native_layer_norm(_as(x, *params), shape, weight, bias, eps)
        call.saved = (mean, rstd)
        return y

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        mean, rstd = call.saved
        mask = [True, False, False]
        gradients = torch.ops.aten.native_layer_norm_backward.default(
            G, _as(x, *params), call.spec[0], mean, rstd, *params, mask
        )
        gx = gradients[0]
        return gx if gx.dtype is x.dtype else gx.to(x.dtype)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        mean, rstd = call.saved
        yield from _normalised_forms(call, needed, G, _as(x, *params), mean, rstd)


class RMSNorm(Layer):
    """``y = x̂ ∘ w`` with ``x̂ = x / √(mean x² + ε)``."""

    types: ClassVar[tuple[Any, ...]] = (nn.RMSNorm,)
    least_dims = 2

    def is_by_last(self, spec: Any) -> bool:
        return len(spec[0]) == 1

    def run(self, module: nn.RMSNorm, tap: Tap, input: Tensor) -> Tensor:
        return tap(input, own(module, "weight"), spec=(module.normalized_shape, module.eps))

    def _normalised(self, call: Call, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        shape, eps = call.spec
        dims = list(range(-len(shape), 0))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
        return wide * rstd, rstd, dims

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        normalised, _, _ = self._normalised(call, _as(x, *params))
        return (normalised * params[0]).to(_as(x, *params).dtype)

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        normalised, rstd, dims = self._normalised(call, _as(x, *params))
        inner = G * params[0]
        return (rstd * (inner - normalised * (inner * normalised).mean(dims, keepdim=True))).to(x.dtype)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        x = _as(x, *params)
        _, rstd, _ = self._normalised(call, x)
        yield from _normalised_forms(call, needed, G, x, None, rstd)


class GroupNorm(Layer):
    """``y = x̂ ∘ w + b`` per channel, x̂ normalised over groups of channels of one sample."""

    types: ClassVar[tuple[Any, ...]] = (nn.GroupNorm,)
    least_dims = 2
    saves = True
    needs_batch = True

    def run(self, module: Any, tap: Tap, input: Tensor) -> Tensor:
        return tap(input, own(module, "weight"), own(module, "bias"), spec=(module.num_groups, module.eps))

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], math.prod(x.shape[2:])

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        groups, eps = call.spec
        if x.numel() == 0:  # torch's op divides by the size of an empty group
            return x.clone()
        weight, bias = params
        rows, channels, positions = self._sizes(x)
        y, mean, rstd = torch.native_group_norm(
            _as(x, *params).contiguous(), weight, bias, rows, channels, positions, groups, eps
        )
        call.saved = (mean, rstd)
        return y

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        if x.numel() == 0:
            return torch.zeros_like(x)
        mask = [True, False, False]
        gradients = torch.ops.aten.native_group_norm_backward(
            G.contiguous(),
            _as(x, *params).contiguous(),
            *call.saved,
            params[0],
            *self._sizes(x),
            call.spec[0],
            mask,
        )
        return gradients[0].to(x.dtype)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        rows, channels, positions = self._sizes(x)
        if x.numel() == 0:
            yield from ((i, Instantiated(G.new_zeros(call.batch, channels))) for i in needed)
            return
        sides = (side.reshape(rows, channels, positions) for side in (G, _as(x, *params)))
        statistics = (part.reshape(rows, call.spec[0]) for part in call.saved)
        sums = ops.channel_sums(*sides, *statistics)
        for i in needed:
            yield i, sum_positions(by_sample(sums[i], call.batch))


class InstanceNorm1d(GroupNorm):
    """A group norm with a group for every channel."""

    types: ClassVar[tuple[Any, ...]] = (nn.InstanceNorm1d,)
    inherits = ("_check_input_dim", "_apply_instance_norm")
    least_dims = 3

    def refusal(self, module: Any) -> str | None:
        if module.track_running_stats:
            return "track_running_stats=True keeps statistics of the data that are not private; set it to False"
        return None

    def exact_alone(self, module: Any) -> bool:
        return False

    def run(self, module: Any, tap: Tap, input: Tensor) -> Tensor:
        module._check_input_dim(input)
        return tap(input, own(module, "weight"), own(module, "bias"), spec=(module.num_features, module.eps))


class InstanceNorm2d(InstanceNorm1d):
    types: ClassVar[tuple[Any, ...]] = (nn.InstanceNorm2d,)
    least_dims = 4


class InstanceNorm3d(InstanceNorm1d):
    types: ClassVar[tuple[Any, ...]] = (nn.InstanceNorm3d,)
    least_dims = 5
