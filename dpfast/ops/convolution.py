"""Per-sample gradients and norms of convolutions: the compiled ops, Triton's kernels, else the reference.

``x [rows, C, *]`` is the layer's input, ``G [rows, p, *]`` its backprops, the rows of a sample side by side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native, is_triton
from dpfast.ops.matmul import product_reach
from dpfast.ops.norms import certified
from dpfast.reference import Geometry
from dpfast.reference.rounding import of_slip, underflow

AXES, TRITON_AXES = 3, 2  # of the compiled ops and of Triton's: fewer come with 1s in front


def convolution_grad_samples(
    x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int
) -> tuple[Tensor, Tensor | None]:
    """Per-sample gradients ``[batch, *weight.shape]``; with squared norms ``[batch]`` where their op has made them."""
    if _is_native("convolution_grad_samples", x, G):
        samples, squares = torch.ops.dpfast.convolution_grad_samples(*_arguments(x, G, weight, geometry, batch))
        return samples.transpose(1, 2).unflatten(2, weight.shape[1:]), squares
    if _is_triton("convolution_grad_samples", x, G):
        from dpfast_kernels.convolution import convolution_sample_gradients

        sides, sizes = _in_axes(TRITON_AXES, x, G, weight, geometry)
        samples, squares = convolution_sample_gradients(*sides, *sizes, geometry.groups, batch, True)
        return samples.view(batch, *weight.shape), squares
    return reference.convolution_grad_samples(x, G, weight, geometry, batch), None


def convolution_squared_norm(
    x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int
) -> tuple[Tensor, Tensor]:
    """Ghost norms ``[batch]`` over patches, and bounds on their errors."""
    _, positions, d, p = reference.convolution_sizes(x, G, weight, geometry)
    T = positions * (len(x) // batch)
    if _is_triton("convolution_grad_samples", x, G):
        return _from_tiles(x, G, weight, geometry, batch, T)
    if not has_convolution_stats(x, G, T):
        return reference.convolution_squared_norm(x, G, weight, geometry, batch)
    return reference.certified_ghost(convolution_stats(x, G, weight, geometry, batch), (T, d, p), G.dtype)


def has_convolution_stats(x: Tensor, G: Tensor, T: int) -> bool:
    """Whether there is :func:`convolution_stats` for these, of T positions a sample."""
    return T > 1 and not _is_triton("convolution_grad_samples", x, G) and _is_native("convolution_ghost", x, G)


def convolution_stats(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int) -> Tensor:
    """What a ghost norm over patches and its bound are made of: see :func:`dpfast.reference.matmul.ghost_stats`."""
    return torch.ops.dpfast.convolution_ghost(*_arguments(x, G, weight, geometry, batch))


def convolution_clipped_gradient(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · g_i``: ``weight``'s shape, float32 (float64 for float64); ``factors`` ``[batch]``."""
    if _is_triton("convolution_clipped_gradient", x, G):
        from dpfast_kernels.convolution import convolution_clipped_gradient as kernel

        sides, sizes = _in_axes(TRITON_AXES, x, G, weight, geometry)
        return kernel(*sides, factors.float().contiguous(), *sizes, geometry.groups).view(weight.shape)
    dtype = reference.compute_dtype(G.dtype)
    by_row = factors.to(dtype).repeat_interleave(len(x) // max(len(factors), 1))
    by_row, x, G = reference.left_in(by_row, x, G)
    scaled = G.to(dtype) * by_row.view(-1, *[1] * (G.dim() - 1))
    return reference.convolution_weight_gradient(x, scaled, weight, geometry)


def _from_tiles(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int, T: int) -> tuple[Tensor, Tensor]:
    """Norms of gradients that are made in tiles and dropped; what is summed later errs alike (see ops.matmul)."""
    from dpfast_kernels.convolution import convolution_sample_gradients

    sides, sizes = _in_axes(TRITON_AXES, x, G, weight, geometry)
    squares = convolution_sample_gradients(*sides, *sizes, geometry.groups, batch, False)[1]
    squared, bound = (rows[0] for rows in certified(squares.unsqueeze(0), [weight.unsqueeze(0)]))
    energies = [side.unflatten(0, (batch, -1)).flatten(1).float().square().sum(1).double() for side in sides]
    # A pixel is in at most as many patches as a kernel has elements.
    patches, rows = energies[0] * math.prod(sizes[0]), energies[1]
    _, _, d, p = reference.convolution_sizes(x, G, weight, geometry)
    lost = underflow(torch.float32) * T * (d * rows + p * patches + geometry.groups * d * p * T)
    return squared, bound + of_slip(squared, product_reach(T, *sides) * (patches * rows).sqrt()) + lost


def _is_triton(op: str, x: Tensor, G: Tensor) -> bool:
    return x.dim() - 2 <= TRITON_AXES and is_triton(op, x, G)


def _is_native(op: str, x: Tensor, G: Tensor) -> bool:
    """Sums are made in float32 there."""
    return is_native(op, G.device) and torch.float64 not in (x.dtype, G.dtype)


def _arguments(x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry, batch: int) -> tuple[Any, ...]:
    """Of the compiled ops."""
    sides, sizes = _in_axes(AXES, x, G, weight, geometry)
    return (*(side.contiguous() for side in sides), batch, geometry.groups, *sizes)


def _in_axes(
    axes: int, x: Tensor, G: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[list[Tensor], list[list[int]]]:
    """``[unfolded, rows]`` and ``[kernel, stride, padding, dilation]`` in so many dimensions, 1s in front."""
    front = axes - (x.dim() - 2)
    unfolded, rows = (G, x) if geometry.transposed else (x, G)  # see reference.convolution
    sides = [side.reshape(*side.shape[:2], *[1] * front, *side.shape[2:]) for side in (unfolded, rows)]
    sizes = (weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    return sides, [[fill] * front + list(size) for fill, size in zip((1, 1, 0, 1), sizes, strict=True)]
