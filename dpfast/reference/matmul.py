"""Per-sample gradients that are matrix products: ``g_i = G_iᵀ A_i`` (linear layers, unfolded convolutions)."""

import math

import torch
from torch import Tensor

from dpfast.reference.rounding import compute_dtype, unit_roundoff, with_safety

# Rows of the Gram matrices made at a time: only tiles s >= t are formed, off-diagonal ones counted twice.
GHOST_TILE = 128


def grad_samples(A: Tensor, G: Tensor) -> Tensor:
    """``g_i = G_iᵀ A_i``: ``[B, g·p, d]``, in float32 (float64 for float64 inputs)."""
    dtype = compute_dtype(G.dtype)
    B, groups, T, d = A.shape
    p = G.shape[-1]
    A, G = A.to(dtype).reshape(B * groups, T, d), G.to(dtype).reshape(B * groups, T, p)
    return torch.bmm(G.transpose(1, 2), A).view(B, groups * p, d)


def one_position_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_groups ‖a‖²·‖g‖²`` where T = 1: no cancellation is possible."""
    dtype = compute_dtype(G.dtype)
    a = A.to(dtype).square().sum(-1, dtype=torch.float64)
    g = G.to(dtype).square().sum(-1, dtype=torch.float64)
    return with_safety((a * g).sum((1, 2)), 0.0, dtype)


def ghost_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_{t,s} (a_t·a_s)(g_t·g_s)``, no per-sample gradient formed.

    The sum can cancel, so its rounding is bounded from ``Σ_{t,s} |a_t·a_s|·|g_t·g_s|``. Dot products of length n
    are taken to err by ``√n`` units (the random walk of Higham and Mary, 2019), not by the worst case n.
    """
    dtype = compute_dtype(G.dtype)
    B, groups, T, d = A.shape
    p = G.shape[-1]
    A, G = A.to(dtype).reshape(B * groups, T, d), G.to(dtype).reshape(B * groups, T, p)
    signed = torch.zeros(B * groups, dtype=torch.float64, device=A.device)
    absolute = torch.zeros_like(signed)
    for t in range(0, T, GHOST_TILE):
        rows = slice(t, t + GHOST_TILE)
        products = torch.bmm(A[:, rows], A[:, t:].transpose(1, 2))
        products.mul_(torch.bmm(G[:, rows], G[:, t:].transpose(1, 2)))
        if t + GHOST_TILE < T:
            products[:, :, GHOST_TILE:].mul_(2)
        signed += products.sum((1, 2)).double()
        absolute += products.abs_().sum((1, 2)).double()
    units = math.sqrt(d) + math.sqrt(p) + 8
    squared = signed.view(B, groups).sum(1)
    return with_safety(squared, units * unit_roundoff(dtype) * absolute.view(B, groups).sum(1), dtype)


def clipped_weight_gradient(A: Tensor, G: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · G_iᵀ A_i``: ``[g·p, d]``; rows of G are scaled in float32, before any rounding."""
    dtype = compute_dtype(G.dtype)
    groups = A.shape[1]
    scaled = G.to(dtype) * factors.to(dtype).view(-1, 1, 1, 1)
    if groups == 1:
        return scaled.flatten(0, 2).t() @ A.to(dtype).flatten(0, 2)
    by_group = [side.transpose(0, 1).flatten(1, 2) for side in (scaled, A.to(dtype))]
    return torch.bmm(by_group[0].transpose(1, 2), by_group[1]).flatten(0, 1)


def factored_times_grad_samples(A: Tensor, G: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨G_iᵀ A_i, h_i⟩ = Σ_t g_tᵀ h_i a_t`` for per-sample gradients ``h``: ``[B, g·p, d]``."""
    dtype = compute_dtype(G.dtype)
    B, groups, _, d = A.shape
    h = other.view(B, groups, G.shape[-1], d).to(dtype)
    terms = (torch.matmul(G.to(dtype), h) * A.to(dtype)).sum(-1).flatten(1)
    units = math.sqrt(d) + math.sqrt(G.shape[-1]) + 8
    return terms.sum(1).double(), units * unit_roundoff(dtype) * terms.abs().sum(1).double()
