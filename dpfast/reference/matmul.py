"""Per-sample gradients that are matrix products: ``g_i = G_iᵀ A_i`` (linear layers, unfolded convolutions)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpfast.reference.precision import full_precision, in_full_precision
from dpfast.reference.rounding import (
    column,
    compute_dtype,
    drift,
    left_in,
    of_slip,
    smallest,
    underflow,
    unit_roundoff,
    with_safety,
)

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


def ghost_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_{t,s} (a_t·a_s)(g_t·g_s)`` and the bound on its error, no per-sample gradient formed."""
    return certified_ghost(ghost_stats(A, G), (A.shape[2], A.shape[3], G.shape[3]), G.dtype)


def gram_stats(products: Tensor, other: Tensor, lost: float, other_lost: float) -> Tensor:
    """Of rows of two Gram matrices ``[R, t, s]``, from the diagonal on: what :func:`ghost_stats` adds up, ``[5, R]``.

    Each product past the diagonal block counts twice. ``lost`` is what underflow may take of a diagonal.
    """
    t = products.shape[1]
    length, other_length = (
        (side.diagonal(dim1=1, dim2=2).double() + least).sqrt()
        for side, least in ((products, lost), (other, other_lost))
    )
    both = products * other
    both[:, :, t:].mul_(2)
    sums = both.sum((1, 2)).double(), both.abs_().sum((1, 2)).double()
    return torch.stack([*sums, length.sum(1), other_length.sum(1), (length * other_length).sum(1)])


@in_full_precision
def ghost_stats(A: Tensor, G: Tensor) -> Tensor:
    """What a ghost norm and its bound are made of: ``[5, B, groups]``, float64.

    ``Σ_{t,s} (a_t·a_s)(g_t·g_s)``, which can cancel, the sum of absolute values, and ``Σ_t ‖a_t‖``, ``Σ_t ‖g_t‖`` and
    ``Σ_t ‖a_t‖·‖g_t‖``, with what may have underflowed.
    """
    dtype = compute_dtype(G.dtype)
    B, groups, T, d = A.shape
    p = G.shape[-1]
    A, G = A.to(dtype).reshape(B * groups, T, d), G.to(dtype).reshape(B * groups, T, p)
    return gram_strips(A, G).view(5, B, groups)


def gram_strips(A: Tensor, G: Tensor) -> Tensor:
    """What :func:`ghost_stats` adds up, ``[5, B]``, of ``A [B, T, d]`` and ``G [B, T, p]`` in the dtype of the sums."""
    B, T, d = A.shape
    p = G.shape[2]
    strip = max(THINNEST, -(-T // STRIPS))
    lost = smallest(A.dtype)
    parts = []
    for t in range(0, T, strip):
        products, other = (torch.bmm(side[:, t : t + strip], side[:, t:].transpose(1, 2)) for side in (A, G))
        parts.append(gram_stats(products, other, d * lost, p * lost))
    total = parts[0] if parts else torch.zeros(5, B, dtype=torch.float64, device=A.device)
    for part in parts[1:]:
        total = total + part
    return total


def certified_ghosts(stats: Tensor, sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Squared norms ``[n, B]`` and bounds of n weights, from their :func:`ghost_stats` ``[n, 5, B, groups]``.

    The bound has the rounding of the ghost sum, and that of the contribution, which is a sum over T of its own.

    Args:
        sizes: ``(T, d, p)`` of each weight.
    """
    signed, absolute, lengths_a, lengths_g, reach = stats.unbind(1)
    u, lost = unit_roundoff(dtype), underflow(dtype)
    constants = (
        tuple((drift(d) + drift(p)) * u for _, d, p in sizes),
        tuple(lost * d for _, d, _ in sizes),
        tuple(lost * p for _, _, p in sizes),
        tuple(lost * d * p * T**2 for T, d, p in sizes),
        tuple(drift(T) * u for T, _, _ in sizes),
    )
    of_norm, of_g, of_a, of_both, of_sum = (column(each, stats.device, 3) for each in constants)
    bound = of_norm * absolute + (of_g * lengths_g**2 + of_a * lengths_a**2 + of_both) + of_slip(signed, of_sum * reach)
    return with_safety(signed.sum(2), bound.sum(2), dtype)


def certified_ghost(stats: Tensor, sizes: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`certified_ghosts` of one weight: ``[B]`` each, from its :func:`ghost_stats`."""
    squared, bound = certified_ghosts(stats.unsqueeze(0), [sizes], dtype)
    return squared[0], bound[0]


def clipped_weight_gradient(A: Tensor, G: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · G_iᵀ A_i``: ``[g·p, d]``; the smaller side is scaled, in float32, before any rounding.

    A sample whose factor is 0 is left out, not multiplied.
    """
    return next(clipped_weight_gradients([(A, G)], [factors]))


def clipped_weight_gradients(sides: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor]) -> Iterator[Tensor]:
    """:func:`clipped_weight_gradient` of several weights, one after the other."""
    columns: dict[tuple[int, torch.dtype], tuple[bool, Tensor]] = {}
    with full_precision(sides[0][1].device):
        for (A, G), row in zip(sides, factors, strict=True):
            dtype = compute_dtype(G.dtype)
            if (id(row), dtype) not in columns:
                all_in = row.device.type == "cpu" and bool(row.numpy().all())
                columns[id(row), dtype] = all_in, row.to(dtype).view(-1, 1)
            all_in, by_row = columns[id(row), dtype]
            if not all_in:
                by_row, A, G = left_in(by_row.squeeze(1), A, G)
                by_row = by_row.unsqueeze(1)
            if A.shape[1] == A.shape[2] == 1 and A.dtype == G.dtype == dtype:
                a, g = A.flatten(1), G.flatten(1)
                yield g.t() @ (a * by_row) if a.shape[1] < g.shape[1] else (g * by_row).t() @ a
            else:
                yield _weight_gradient(A.to(dtype), G.to(dtype), by_row.view(-1, 1, 1, 1))


def _weight_gradient(A: Tensor, G: Tensor, factors: Tensor) -> Tensor:
    A, G = (A * factors, G) if A.shape[-1] < G.shape[-1] else (A, G * factors)
    if A.shape[1] == 1:
        return G.flatten(0, 2).t() @ A.flatten(0, 2)
    a, g = (side.transpose(0, 1).flatten(1, 2) for side in (A, G))
    return torch.bmm(g.transpose(1, 2), a).flatten(0, 1)


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
