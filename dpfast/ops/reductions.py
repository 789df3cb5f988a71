"""Per-sample norms and sums of tensors ``[B, ...]``: the compiled ops where they are, else the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native
from dpfast.reference.rounding import compute_dtype, with_safety


def squared_norm(samples: Tensor) -> tuple[Tensor, Tensor]:
    """``(‖g_i‖² [B], bound [B])``, float64, of per-sample gradients ``[B, *]``."""
    if not is_native("squared_norms", samples.device):
        return reference.squared_norm(samples)
    squared = torch.ops.dpfast.squared_norms([samples.contiguous()])[0]
    return certified(squared, samples)


def weighted_sum(samples: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · g_i`` of ``samples [B, *]``, float32 (float64 for float64); factor 0 leaves a sample out."""
    if not is_native("weighted_sums", samples.device):
        return reference.weighted_sum(samples, factors)
    factors = factors.to(compute_dtype(samples.dtype)).contiguous()
    order = sorted(range(1, samples.dim()), key=samples.stride, reverse=True)
    stored = samples.permute(0, *order)  # as they lie in memory: a transposed view is not copied
    total = torch.ops.dpfast.weighted_sums([stored.contiguous()], factors)[0].view(stored.shape[1:])
    return total.permute([order.index(dim) for dim in range(1, samples.dim())])


def certified(squared: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of ``samples [B, *]``, as an op gave them, with the bound on their rounding."""
    return with_safety(squared, 0.0, samples.dtype, squares=math.prod(samples.shape[1:]))


def one_position_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_groups ‖a‖²·‖g‖²`` for ``A [B, g, 1, d]``, ``G [B, g, 1, p]``."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    fits = A.shape[1] == 1 and A.dtype in narrow and G.dtype in narrow
    if not fits or not is_native("squared_norms", G.device):
        return reference.one_position_squared_norm(A, G)
    a, g = torch.ops.dpfast.squared_norms([A.contiguous(), G.contiguous()])
    # Each sum is rounded, and what its squares lose below the smallest float32 is multiplied by the other one.
    (a, slack_a), (g, slack_g) = certified(a, A), certified(g, G)
    return with_safety(a * g, a * slack_g + g * slack_a + slack_a * slack_g, G.dtype)


def sum_positions(G: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t g_t`` of ``G [B, T, *]``: ``[B, *]`` in float32 (float64 for float64), and its squared norms ``[B]``."""
    if is_native("sum_positions", G.device):
        samples, squared = torch.ops.dpfast.sum_positions(G.flatten(2).contiguous())
    else:
        samples, squared = reference.sum_positions(G.flatten(2))
    return samples.view(G.shape[0], *G.shape[2:]), squared


def normalised_sums(G: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``Σ_t g_t ∘ (x_t - mean_t) · rstd_t`` and ``Σ_t g_t`` of a normalisation layer, each with its squared norms.

    Args:
        G, x: ``[B, T, d]``.
        mean, rstd: ``[B, T]``; no mean for RMSNorm.

    Returns:
        ``weight [B, d], its squared norms [B], bias [B, d], its squared norms [B]``.
    """
    if mean is None:
        mean = rstd.new_empty(0)
    if is_native("normalised_sums", G.device) and G.dtype == x.dtype:
        return torch.ops.dpfast.normalised_sums(G.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous())
    return reference.normalised_sums(G, x, mean, rstd)


def channel_sums(G: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t g_t · (x_t - mean) · rstd`` and ``Σ_t g_t`` of every channel of a group normalisation: ``[R, C]`` each.

    Args:
        G, x: ``[R, C, T]``.
        mean, rstd: ``[R, groups]``.
    """
    if is_native("channel_sums", G.device) and G.dtype == x.dtype:
        return torch.ops.dpfast.channel_sums(G.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous())
    return reference.channel_sums(G, x, mean, rstd)


def embedding_squared_norm(ids: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms ``[B]`` of ``g_i[v] = Σ_{t: id_t = v} G_t`` and bounds, from segments of equal ids."""
    if is_native("embedding_squared_norm", G.device):
        return torch.ops.dpfast.embedding_squared_norm(ids.long().contiguous(), G.contiguous())
    return reference.embedding_squared_norm(ids, G)


def embedding_sum(ids: Tensor, G: Tensor, factors: Tensor, rows: int) -> Tensor:
    """``Σ_i factor_i · g_i`` of an embedding: ``[rows, d]``, float32 (float64 for float64)."""
    dtype = compute_dtype(G.dtype)
    if is_native("embedding_sum", G.device):
        return torch.ops.dpfast.embedding_sum(
            ids.long().contiguous(), G.contiguous(), factors.to(dtype).contiguous(), rows
        )
    scaled = G.to(dtype) * factors.to(dtype).view(-1, 1, 1)
    table = torch.zeros(rows, G.shape[-1], dtype=dtype, device=G.device)
    return table.index_add_(0, ids.reshape(-1), scaled.flatten(0, 1))
