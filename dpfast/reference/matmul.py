"""Per-sample gradients that are matrix products: ``g_i = G_iᵀ A_i`` (linear layers, unfolded convolutions)."""

import torch
from torch import Tensor

from dpfast.reference.precision import in_full_precision
from dpfast.reference.rounding import compute_dtype, drift, of_slip, smallest, underflow, unit_roundoff, with_safety

# Gram matrices are made in strips of so many rows, of which only the part s >= t is formed and counted twice off the
# diagonal: at most four strips (a tenth more work than the triangle has), none thinner than matrix products like.
STRIPS, THINNEST = 4, 64


@in_full_precision
def grad_samples(A: Tensor, G: Tensor) -> Tensor:
    """``g_i = G_iᵀ A_i``: ``[B, g·p, d]``, in float32 (float64 for float64 inputs)."""
    dtype = compute_dtype(G.dtype)
    B, groups, T, d = A.shape
    p = G.shape[-1]
    A, G = A.to(dtype).reshape(B * groups, T, d), G.to(dtype).reshape(B * groups, T, p)
    return torch.bmm(G.transpose(1, 2), A).view(B, groups * p, d)


def one_position_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_groups ‖a‖²·‖g‖²`` where T = 1: nothing cancels, and float64 neither over- nor underflows."""
    a, g = (side.double().square().sum(-1).flatten(1) for side in (A, G))
    squared = (a * g).sum(1)
    return with_safety(squared, one_position_bound(squared, a, g, (A.shape[-1], G.shape[-1]), G.dtype), G.dtype)


def one_position_bound(squared: Tensor, a: Tensor, g: Tensor, sizes: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What underflow may take of the contribution ``Σ_groups (factor · g) ⊗ a``: see :func:`underflow`.

    ``a`` and ``g`` ``[B, groups]`` are squared norms of sides of ``sizes`` elements, ``squared`` their products' sum.
    """
    d, p = sizes
    lost = underflow(dtype)
    return ((a + d * lost) * (g + p * lost)).sum(1) - squared + a.shape[1] * d * p * lost


@in_full_precision
def ghost_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_{t,s} (a_t·a_s)(g_t·g_s)``, no per-sample gradient formed.

    The sum can cancel, so its rounding is bounded from ``Σ_{t,s} |a_t·a_s|·|g_t·g_s|``: see :func:`ghost_bound`. What
    underflows is bounded from the diagonals, ``|a_t·a_s| ≤ ‖a_t‖·‖a_s‖``.
    """
    dtype = compute_dtype(G.dtype)
    B, groups, T, d = A.shape
    p = G.shape[-1]
    A, G = A.to(dtype).reshape(B * groups, T, d), G.to(dtype).reshape(B * groups, T, p)
    signed, absolute, lengths_a, lengths_g, reach = torch.zeros(5, B * groups, dtype=torch.float64, device=A.device)
    lost = smallest(dtype)
    strip = max(THINNEST, -(-T // STRIPS))
    for t in range(0, T, strip):
        rows = slice(t, t + strip)
        products, other = (torch.bmm(side[:, rows], side[:, t:].transpose(1, 2)) for side in (A, G))
        length_a = (products.diagonal(dim1=1, dim2=2).double() + d * lost).sqrt()
        length_g = (other.diagonal(dim1=1, dim2=2).double() + p * lost).sqrt()
        lengths_a += length_a.sum(1)
        lengths_g += length_g.sum(1)
        reach += (length_a * length_g).sum(1)
        products.mul_(other)
        products[:, :, strip:].mul_(2)
        signed += products.sum((1, 2)).double()
        absolute += products.abs_().sum((1, 2)).double()
    bound = ghost_bound(signed, absolute, (lengths_a, lengths_g, reach), (T, d, p), dtype)
    return with_safety(signed.view(B, groups).sum(1), bound.view(B, groups).sum(1), dtype)


def ghost_bound(
    squared: Tensor,
    absolute: Tensor,
    lengths: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
) -> Tensor:
    """How far a ghost sum may be from the squared norm of what is later summed for the sample.

    That is the rounding of the ghost sum, and that of the contribution: a sum over T of its own.

    Args:
        squared, absolute: ``Σ (a_t·a_s)(g_t·g_s)`` and ``Σ |a_t·a_s|·|g_t·g_s|``.
        lengths: ``Σ ‖a_t‖``, ``Σ ‖g_t‖`` and ``Σ ‖a_t‖·‖g_t‖``.
        sizes: ``(T, d, p)``.
    """
    (lengths_a, lengths_g, reach), (T, d, p) = lengths, sizes
    u = unit_roundoff(dtype)
    of_norm = (drift(d) + drift(p)) * u * absolute
    lost = underflow(dtype) * (d * lengths_g**2 + p * lengths_a**2 + d * p * T**2)
    return of_norm + lost + of_slip(squared, drift(T) * u * reach)


@in_full_precision
def clipped_weight_gradient(A: Tensor, G: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · G_iᵀ A_i``: ``[g·p, d]``; the smaller side is scaled, in float32, before any rounding."""
    dtype = compute_dtype(G.dtype)
    groups = A.shape[1]
    sides = [G.to(dtype), A.to(dtype)]
    smaller = int(A.shape[-1] < G.shape[-1])
    sides[smaller] = sides[smaller] * factors.to(dtype).view(-1, 1, 1, 1)
    if groups == 1:
        return sides[0].flatten(0, 2).t() @ sides[1].flatten(0, 2)
    by_group = [side.transpose(0, 1).flatten(1, 2) for side in sides]
    return torch.bmm(by_group[0].transpose(1, 2), by_group[1]).flatten(0, 1)


@in_full_precision
def factored_times_grad_samples(A: Tensor, G: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨G_iᵀ A_i, h_i⟩ = Σ_t g_tᵀ h_i a_t`` for per-sample gradients ``h``: ``[B, g·p, d]``."""
    dtype = compute_dtype(G.dtype)
    B, groups, _, d = A.shape
    h = other.view(B, groups, G.shape[-1], d).to(dtype)
    terms = (torch.matmul(G.to(dtype), h) * A.to(dtype)).sum(-1).flatten(1)
    # Not from |terms|, which may have cancelled.
    length = [torch.linalg.vector_norm(side.double(), dim=3) for side in (A, G)]
    reach = ((length[0] * length[1]).sum(2) * torch.linalg.vector_norm(h.double(), dim=(2, 3))).sum(1)
    units = drift(d) + drift(G.shape[-1])
    return terms.sum(1).double(), units * unit_roundoff(dtype) * reach
