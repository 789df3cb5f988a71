"""Per-sample gradients and norms of convolutions: the compiled ops where they are, else the reference.

``x [rows, C, *]`` is the layer's input, ``G [rows, p, *]`` its backprops, the rows of a sample side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native
from dpfast.reference import Geometry
from dpfast.reference.matmul import ghost_bound
from dpfast.reference.rounding import with_safety

AXES = 3  # of the compiled ops: fewer come with 1s in front


def convolution_grad_samples(
    x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int
) -> tuple[Tensor, Tensor | None]:
    """Per-sample gradients ``[batch, *weight.shape]``; with squared norms ``[batch]`` where their op has made them."""
    if not _is_native("convolution_grad_samples", x, G):
        return reference.convolution_grad_samples(x, G, weight, geometry, batch), None
    samples, squares = torch.ops.dpfast.convolution_grad_samples(*_arguments(x, G, weight, geometry, batch))
    return samples.transpose(1, 2).unflatten(2, weight.shape[1:]), squares


def convolution_squared_norm(
    x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int
) -> tuple[Tensor, Tensor]:
    """Ghost norms ``[batch]`` over patches, and bounds on their errors."""
    _, positions, d, p = reference.convolution_sizes(x, G, weight, geometry)
    T = positions * (len(x) // batch)
    if T == 1 or not _is_native("convolution_ghost", x, G):
        return reference.convolution_squared_norm(x, G, weight, geometry, batch)
    sums = torch.ops.dpfast.convolution_ghost(*_arguments(x, G, weight, geometry, batch))
    signed, absolute, lengths_a, lengths_g = sums
    bound = ghost_bound(absolute, lengths_a, lengths_g, (T, d, p), G.dtype)
    return with_safety(signed.sum(1), bound.sum(1), G.dtype)


def _is_native(op: str, x: Tensor, G: Tensor) -> bool:
    """Sums are made in float32 there."""
    return is_native(op, G.device) and torch.float64 not in (x.dtype, G.dtype)


def _arguments(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int) -> tuple[Any, ...]:
    front = AXES - (x.dim() - 2)
    unfolded, rows = (G, x) if geometry.transposed else (x, G)  # see reference.convolution
    sides = [side.reshape(*side.shape[:2], *[1] * front, *side.shape[2:]).contiguous() for side in (unfolded, rows)]
    sizes = (weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    filled = [[fill] * front + list(size) for fill, size in zip((1, 1, 0, 1), sizes, strict=True)]
    return (*sides, batch, geometry.groups, *filled)
