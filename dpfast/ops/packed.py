"""Norms, per-sample gradients and clipped sums of the segments of packed rows, none of which is copied or padded.

``A [1, R, d]`` and ``G [1, R, p]`` are the positions of all rows, one behind the other. Triton kernels know where
segments lie; on a CPU a segment is a view, and a clipped sum is one product over all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_triton
from dpfast.ops.matmul import (
    BLOCK_UNITS,
    Samples,
    aligned_columns,
    clipped_weight_gradient,
    has_native_stats,
    native_stats,
    units_of_a_product,
)
from dpfast.reference.rounding import column, drift, drifts, of_slip, underflow, unit_roundoff, with_safety

Sides = Sequence[tuple[Tensor, Tensor]]


class Places:
    """Where the segments of rows of ``size`` positions in all lie: the first position and the end of each, in order."""

    def __init__(self, bounds: Sequence[tuple[int, int]], size: int):
        self.bounds, self.size = tuple(bounds), size
        self._lengths: dict[torch.device, Tensor] = {}
        self._spread: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.bounds)

    @cached_property
    def samples(self) -> Samples:
        return Samples([0] * len(self), [first for first, _ in self.bounds], [end for _, end in self.bounds])

    @cached_property
    def for_kernels(self) -> Any:
        from dpfast_kernels.segments import Segments

        return Segments(self.bounds)

    def lengths(self, device: torch.device) -> Tensor:
        """``[segments]``, float64."""
        if device not in self._lengths:
            made = torch.tensor([end - first for first, end in self.bounds], dtype=torch.float64)
            self._lengths[device] = made.to(device)
        return self._lengths[device]

    @cached_property
    def _owners(self) -> Tensor:
        """The segment of each position; -1 where there is none."""
        owners = torch.full((self.size,), -1)
        for number, (first, end) in enumerate(self.bounds):
            owners[first:end] = number
        return owners

    def by_position(self, of_segments: Tensor) -> Tensor:
        """``[R]``: of each position what its segment has, and 0 where there is none."""
        if self._spread is None or self._spread[0] is not of_segments:  # layers of one kind have the same factors
            with_zero = torch.cat([of_segments, of_segments.new_zeros(1)])
            self._spread = of_segments, with_zero[self._owners.to(of_segments.device)]
        return self._spread[1]


def has_packed(A: Tensor, G: Tensor) -> bool:
    """Whether segments of such sides are clipped where they lie; elsewhere they are put beside each other first."""
    if not is_triton("ghost_squared_norm", A, G):
        return G.device.type == "cpu"
    return not any(aligned_columns(side.shape[-1]) for side in (A, G))  # others are read through a copy


def sums_by_position(G: Tensor) -> bool:
    """Whether a clipped sum over single positions errs by no more than one over samples: no kernel splits backprops."""
    return not is_triton("clipped_weight_gradient", G)


def packed_ghost_squared_norms(sides: Sides, places: Places) -> tuple[Tensor, Tensor]:
    """``‖g_i‖²`` of segments of n weights and the bounds on their errors, ``[n, segments]`` each, float64.

    All weights are of one device, and of one dtype of sums.
    """
    sizes = [(A.shape[-1], G.shape[-1]) for A, G in sides]
    G = sides[0][1]
    if is_triton("ghost_squared_norm", *sides[0]):
        from dpfast_kernels.packed_ghost import packed_ghost_norms

        stats = packed_ghost_norms([A for A, _ in sides], [G for _, G in sides], places.for_kernels)
        return _certified(stats, sides, sizes, places)
    if has_native_stats(sides):
        stats = native_stats(sides, places.samples)
    else:
        stats = torch.stack([reference.packed_ghost_stats(A[0], G[0], places.bounds) for A, G in sides])
    return reference.certified_packed_ghosts(stats, sizes, places.lengths(G.device), G.dtype)


def packed_tile_squared_norm(A: Tensor, G: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """The same of one weight, ``[segments]`` each, from tiles of ``G_iᵀ A_i`` that are squared and dropped."""
    from dpfast_kernels.sample_gradients import packed_gradient_norm

    stats = packed_gradient_norm(A, G, places.for_kernels).unsqueeze(0)
    squared, bound = _certified(stats, [(A, G)], [()], places)
    return squared[0], bound[0]


def packed_grad_samples(A: Tensor, G: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
    """``g_i = G_iᵀ A_i``: ``[segments, p, d]`` in float32, or float64; squared norms where its op has made them."""
    if not is_triton("grad_samples", A, G):
        return reference.packed_grad_samples(A[0], G[0], places.bounds), None
    from dpfast_kernels.sample_gradients import packed_sample_gradients

    return packed_sample_gradients(A, G, torch.float32, places.for_kernels)


def packed_clipped_weight_gradient(A: Tensor, G: Tensor, factors: Tensor, places: Places) -> Tensor:
    """``Σ_i factor_i · G_iᵀ A_i``: ``[p, d]``; a segment whose factor is 0 is left out."""
    if not is_triton("clipped_weight_gradient", A, G):
        A, G = (side[0][:, None, None] for side in (A, G))  # each position is a sample
        return clipped_weight_gradient(A, G, places.by_position(factors))
    from dpfast_kernels.weight_gradient import packed_clipped_weight_gradient as kernel

    return kernel(A, G, factors.float().contiguous(), places.for_kernels)


def _certified(
    stats: Tensor, sides: Sides, products: Sequence[tuple[int, ...]], places: Places
) -> tuple[Tensor, Tensor]:
    """As :func:`dpfast.ops.matmul.certified_stats`, of samples of different lengths, each with the bound of its own.

    The sum is always scaled by sample.
    """
    from dpfast_kernels.weight_gradient import SCALING_UNITS

    squared, absolute, energy_a, energy_g = stats.double().unbind(1)
    u, device = unit_roundoff(torch.float32), stats.device
    grown = (1 + SCALING_UNITS * u) ** 2
    off = [units_of_a_product(A, G) for A, G in sides]
    of_norm = [
        grown * u * (sum(drift(n) + more for n in lengths) or BLOCK_UNITS)
        for lengths, more in zip(products, off, strict=True)
    ]
    T = places.lengths(device)
    d, p = (column(tuple(float(pair[k].shape[-1]) for pair in sides), device) for k in (0, 1))
    reach = grown * u * 2 * (drifts(T) + column(tuple(off), device))
    lost = underflow(torch.float32) * T
    bound = column(tuple(of_norm), device) * absolute + of_slip(squared, reach * (energy_a * energy_g).sqrt())
    bound = bound + lost * (d * energy_g + p * energy_a + d * p * T)
    return with_safety(squared, bound, torch.float32, relative=grown - 1)
