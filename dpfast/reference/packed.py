"""Norms and per-sample gradients of the segments of packed rows: ``A [R, d]`` and ``G [R, p]``, one after the other.

A segment is a view: nothing is gathered, padded or masked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.reference.matmul import gram_strips
from dpfast.reference.precision import in_full_precision
from dpfast.reference.rounding import (
    column,
    compute_dtype,
    drift,
    drifts,
    of_slip,
    underflow,
    unit_roundoff,
    with_safety,
)

Bounds = Sequence[tuple[int, int]]  # the first position and the end of each segment


@in_full_precision
def packed_ghost_stats(A: Tensor, G: Tensor, bounds: Bounds) -> Tensor:
    """:func:`dpfast.reference.matmul.ghost_stats` of each segment: ``[5, segments]``, float64."""
    dtype = compute_dtype(G.dtype)
    out = [gram_strips(A[None, first:end].to(dtype), G[None, first:end].to(dtype)) for first, end in bounds]
    return torch.cat(out, 1) if out else torch.zeros(5, 0, dtype=torch.float64, device=G.device)


def certified_packed_ghosts(
    stats: Tensor, sizes: Sequence[tuple[int, int]], lengths: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`dpfast.reference.matmul.certified_ghosts` of segments, from ``stats [n, 5, segments]``.

    Each has the bound of its own length, so that no sample's factor depends on how long the others are.

    Args:
        sizes: ``(d, p)`` of each weight.
        lengths: of the segments, float64.
    """
    signed, absolute, lengths_a, lengths_g, reach = stats.unbind(1)
    u, lost = unit_roundoff(dtype), underflow(dtype)
    constants = (
        tuple((drift(d) + drift(p)) * u for d, p in sizes),
        tuple(lost * d for d, _ in sizes),
        tuple(lost * p for _, p in sizes),
        tuple(lost * d * p for d, p in sizes),
    )
    of_norm, of_g, of_a, of_both = (column(each, stats.device) for each in constants)
    bound = of_norm * absolute + (of_g * lengths_g**2 + of_a * lengths_a**2 + of_both * lengths**2)
    return with_safety(signed, bound + of_slip(signed, drifts(lengths) * u * reach), dtype)


@in_full_precision
def packed_grad_samples(A: Tensor, G: Tensor, bounds: Bounds) -> Tensor:
    """``g_i = G_iᵀ A_i`` of each segment: ``[segments, p, d]``, in float32 (float64 for float64 inputs)."""
    dtype = compute_dtype(G.dtype)
    out = torch.empty(len(bounds), G.shape[1], A.shape[1], dtype=dtype, device=G.device)
    for of_segment, (first, end) in zip(out, bounds, strict=True):
        torch.mm(G[first:end].to(dtype).t(), A[first:end].to(dtype), out=of_segment)
    return out
