"""Norms, per-sample gradients and clipped sums of the segments of packed rows, by kernels that know where they lie.

``A [1, R, d]`` and ``G [1, R, p]`` are the positions of all rows, one behind the other; nothing is gathered or padded.
Where there are no such kernels, segments are put beside each other first: see :mod:`dpfast.clipping.segment_kinds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.ops.backends import is_triton
from dpfast.ops.matmul import BLOCK_UNITS, aligned_columns, units_of_a_product
from dpfast.reference.rounding import column, drift, drifts, of_slip, underflow, unit_roundoff, with_safety


def table_of(bounds: Sequence[tuple[int, int]]) -> Any:
    """Where segments lie, for kernels: the first position and the end of each, in order."""
    from dpfast_kernels.segments import Segments

    return Segments(bounds)


def has_packed(A: Tensor, G: Tensor) -> bool:
    """Whether there are kernels for segments of such sides; rows that kernels read through a copy have none."""
    return is_triton("ghost_squared_norm", A, G) and not any(aligned_columns(side.shape[-1]) for side in (A, G))


def sums_by_position(G: Tensor) -> bool:
    """Whether a clipped sum over single positions errs by no more than one over samples: no kernel splits backprops."""
    return not is_triton("clipped_weight_gradient", G)


def packed_ghost_squared_norms(sides: Sequence[tuple[Tensor, Tensor]], table: Any) -> tuple[Tensor, Tensor]:
    """``‖g_i‖²`` of segments of n weights and the bounds on their errors, ``[n, segments]`` each, float64."""
    from dpfast_kernels.ghost import packed_ghost_norms

    stats = packed_ghost_norms([A for A, _ in sides], [G for _, G in sides], table)
    return _certified(stats, sides, [(A.shape[-1], G.shape[-1]) for A, G in sides], table)


def packed_tile_squared_norm(A: Tensor, G: Tensor, table: Any) -> tuple[Tensor, Tensor]:
    """The same of one weight, ``[segments]`` each, from tiles of ``G_iᵀ A_i`` that are squared and dropped."""
    from dpfast_kernels.sample_gradients import packed_gradient_norm

    squared, bound = _certified(packed_gradient_norm(A, G, table).unsqueeze(0), [(A, G)], [()], table)
    return squared[0], bound[0]


def packed_grad_samples(A: Tensor, G: Tensor, table: Any) -> tuple[Tensor, Tensor]:
    """``g_i = G_iᵀ A_i``: ``[segments, p, d]`` in float32, and squared norms."""
    from dpfast_kernels.sample_gradients import packed_sample_gradients

    return packed_sample_gradients(A, G, torch.float32, table)


def packed_clipped_weight_gradient(A: Tensor, G: Tensor, factors: Tensor, table: Any) -> Tensor:
    """``Σ_i factor_i · G_iᵀ A_i``: ``[p, d]``; a segment whose factor is 0 is left out."""
    from dpfast_kernels.weight_gradient import packed_clipped_weight_gradient as kernel

    return kernel(A, G, factors.float().contiguous(), table)


def _certified(
    stats: Tensor, sides: Sequence[tuple[Tensor, Tensor]], products: Sequence[tuple[int, ...]], table: Any
) -> tuple[Tensor, Tensor]:
    """As :func:`dpfast.ops.matmul.certified_stats`, for samples of different length.

    Each has the bound of its own length, so that no sample's factor depends on how long the others are. The sum is
    always scaled by sample.
    """
    from dpfast_kernels.weight_gradient import SCALING_UNITS

    squared, absolute, energy_a, energy_g = stats[:, :4].double().unbind(1)
    u, device = unit_roundoff(torch.float32), stats.device
    grown = (1 + SCALING_UNITS * u) ** 2
    places = table.places(device)
    T = (places[:, 1] - places[:, 0]).double()
    off = [units_of_a_product(A, G) for A, G in sides]
    of_norm = [
        grown * u * (sum(drift(n) + more for n in lengths) or BLOCK_UNITS)
        for lengths, more in zip(products, off, strict=True)
    ]
    d, p = (column(tuple(float(pair[k].shape[-1]) for pair in sides), device) for k in (0, 1))
    reach = grown * u * 2 * (drifts(T) + column(tuple(off), device))
    lost = underflow(torch.float32) * T
    bound = column(tuple(of_norm), device) * absolute + of_slip(squared, reach * (energy_a * energy_g).sqrt())
    bound = bound + lost * (d * energy_g + p * energy_a + d * p * T)
    return with_safety(squared, bound, torch.float32, relative=grown - 1)
