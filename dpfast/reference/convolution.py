"""Convolutions: linear layers over their patches, for norms; PyTorch's own weight gradient, for sums.

``x [rows, C, *]`` is the layer's input, ``G [rows, p, *]`` its backprops, samples first, the same number of rows each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.reference.matmul import ghost_squared_norm, grad_samples, one_position_squared_norm
from dpfast.reference.precision import in_full_precision
from dpfast.reference.rounding import compute_dtype

# Patches are unfolded for so many bytes' worth of samples at a time: near the cache, and no more memory than that.
PATCH_BYTES = 8 << 20
# Multiplications in one sample's weight gradient, below which a call for each sample costs more than patches do.
SMALL = 8 << 20


@dataclass(frozen=True)
class Geometry:
    """The arguments of ``aten.convolution`` after weight and bias; padding is with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)


def convolution_sizes(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int, int, int]:
    """``(groups, L, d, p)`` of the linear layer over the patches of one row."""
    unfolded_rows = x if geometry.transposed else G
    return geometry.groups, math.prod(unfolded_rows.shape[2:]), weight[0].numel(), len(weight) // geometry.groups


@in_full_precision
def convolution_weight_gradient(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The ordinary weight gradient, summed over all rows."""
    dtype = compute_dtype(G.dtype)
    if len(x) == 0:
        return torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    mask = (False, True, False)
    sides = (G.to(dtype), x.to(dtype), weight.to(dtype))
    return torch.ops.aten.convolution_backward(*sides, None, *geometry.arguments, mask)[1]


def convolution_grad_samples(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int) -> Tensor:
    """Per-sample gradients ``[B, *weight.shape]``: the weight gradient of one sample at a time, or of patches."""
    groups, positions, d, p = convolution_sizes(x, G, weight, geometry)
    if groups * positions * d * p * (len(x) // batch) < SMALL:
        parts = [grad_samples(*sides) for sides in _unfolded(x, G, weight, geometry, batch)]
        return torch.cat(parts).view(batch, *weight.shape)
    out = torch.empty(batch, *weight.shape, dtype=compute_dtype(G.dtype), device=G.device)
    for sample, (x_i, G_i) in enumerate(zip(x.chunk(batch), G.chunk(batch), strict=True)):
        out[sample] = convolution_weight_gradient(x_i, G_i, weight, geometry)
    return out


def convolution_squared_norm(
    x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int
) -> tuple[Tensor, Tensor]:
    """Ghost norms over patches, a few samples at a time."""
    parts = [
        (one_position_squared_norm if A.shape[2] == 1 else ghost_squared_norm)(A, B)
        for A, B in _unfolded(x, G, weight, geometry, batch)
    ]
    squares, bounds = zip(*parts, strict=True)
    return torch.cat(squares), torch.cat(bounds)


def _unfolded(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``A [b, g, T, d]`` and ``G [b, g, T, p]`` of the linear layer over patches, b samples at a time.

    A transposed convolution is the adjoint of a convolution with the same weight, so there the backprops are unfolded
    and the input gives the rows.
    """
    groups, positions, d, p = convolution_sizes(x, G, weight, geometry)
    unfolded, rows = (G, x) if geometry.transposed else (x, G)
    per_sample = len(x) // batch
    samples = max(1, PATCH_BYTES // max(1, groups * positions * d * per_sample * unfolded.element_size()))
    for chunk in (slice(i, i + samples * per_sample) for i in range(0, len(x), samples * per_sample)):
        A = patches(unfolded[chunk], tuple(weight.shape[2:]), geometry, tuple(rows.shape[2:]))
        B = rows[chunk].flatten(2).unflatten(1, (groups, p)).transpose(2, 3)
        A, B = (side.unflatten(0, (-1, per_sample)).transpose(1, 2).flatten(2, 3) for side in (A, B))
        yield A, B


def patches(x: Tensor, kernel: Sequence[int], geometry: Geometry, positions: Sequence[int]) -> Tensor:
    """The first ``positions`` patches along each of 1 to 3 axes of ``x [rows, C, *]``: ``[rows, g, L, C/g · ∏kernel]``.

    A transposed convolution with output padding has more of them, which no weight has seen.
    """
    x = F.pad(x, [n for pad in reversed(geometry.padding) for n in (pad, pad)])
    axes = zip(kernel, geometry.stride, geometry.dilation, positions, strict=True)
    for axis, (k, step, spread, count) in enumerate(axes, start=2):
        x = x.unfold(axis, (k - 1) * spread + 1, step).narrow(axis, 0, count)[..., ::spread]
    n, groups = len(kernel), geometry.groups
    x = x.unflatten(1, (groups, x.shape[1] // groups))  # [rows, g, C/g, *out, *kernel]
    order = [0, 1, 2, *range(3 + n, 3 + 2 * n), *range(3, 3 + n)]  # kernel before positions: long contiguous runs
    return x.permute(order).flatten(3 + n).flatten(2, 2 + n).transpose(2, 3)
