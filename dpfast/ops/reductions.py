"""Per-sample norms and sums of tensors ``[B, ...]``: the compiled ops, Triton's kernels, else the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native, is_triton
from dpfast.ops.matmul import BLOCK_UNITS, product_reach
from dpfast.reference.rounding import compute_dtype, of_slip, unit_roundoff, with_safety


def squared_norm(samples: Tensor) -> tuple[Tensor, Tensor]:
    """``(‖g_i‖² [B], bound [B])``, float64, of per-sample gradients ``[B, *]``."""
    if is_native("squared_norms", samples.device):
        return certified(torch.ops.dpfast.squared_norms([samples.contiguous()])[0], samples)
    if is_triton("squared_norms", samples):
        from dpfast_kernels.weighted_sum import squared_norms

        return certified(squared_norms([samples])[0], samples)
    return reference.squared_norm(samples)


def weighted_sum(samples: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · g_i`` of ``samples [B, *]``, float32 (float64 for float64); factor 0 leaves a sample out."""
    return weighted_sums([samples], [factors])[0]


def weighted_sums(samples: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`weighted_sum` of several tensors of one B, dtype and device, each with factors ``[B]``, in one launch."""
    dtype, device = samples[0].dtype, samples[0].device
    stacked = torch.stack([row.to(compute_dtype(dtype)) for row in factors])
    orders = [sorted(range(1, x.dim()), key=x.stride, reverse=True) for x in samples]
    stored = [x.permute(0, *order) for x, order in zip(samples, orders, strict=True)]  # as they lie in memory: no copy
    if is_native("weighted_sums", device):
        totals = torch.ops.dpfast.weighted_sums([x.contiguous() for x in stored], stacked)
    elif is_triton("weighted_sums", *samples):
        from dpfast_kernels.weighted_sum import weighted_sums as kernel

        totals = kernel(stored, stacked)
    else:
        totals = [reference.weighted_sum(x, row) for x, row in zip(stored, stacked, strict=True)]
    return [
        total.view(x.shape[1:]).permute([order.index(dim) for dim in range(1, x.dim())])
        for total, x, order in zip(totals, stored, orders, strict=True)
    ]


def certified(squared: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of ``samples [B, *]``, as an op gave them, with the bound on their rounding.

    Float64 ones are sums of exact squares, or nearly; float32 ones were summed in blocks in float32.
    """
    blocks = BLOCK_UNITS * unit_roundoff(torch.float32) if squared.dtype == torch.float32 else 0.0
    return with_safety(squared, 0.0, samples.dtype, squares=math.prod(samples.shape[1:]), relative=blocks)


def one_position_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_groups ‖a‖²·‖g‖²`` for ``A [B, g, 1, d]``, ``G [B, g, 1, p]``."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    fits = A.shape[1] == 1 and A.dtype in narrow and G.dtype in narrow
    if fits and is_native("squared_norms", G.device):
        a, g = torch.ops.dpfast.squared_norms([A.contiguous(), G.contiguous()])
        # Each sum is rounded, and what one side loses to underflow is multiplied by the other one.
        (a, slack_a), (g, slack_g) = certified(a, A), certified(g, G)
        product = a * g
        slack = (a + slack_a) * (g + slack_g) - product
        squared, bound = with_safety(product, slack, G.dtype, squares=A.shape[-1] * G.shape[-1])
    else:
        squared, bound = reference.one_position_squared_norm(A, G)
    if is_triton("clipped_weight_gradient", A, G):  # which makes the sum, and may round both sides of it
        bound = bound + of_slip(squared, product_reach(1, A, G) * squared.sqrt())
    return squared, bound


def sum_positions(G: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t g_t`` of ``G [B, T, *]``: ``[B, *]`` in float32 (float64 for float64), and its squared norms ``[B]``."""
    if is_native("sum_positions", G.device):
        samples, squared = torch.ops.dpfast.sum_positions(G.flatten(2).contiguous())
    elif is_triton("sum_positions", G):
        from dpfast_kernels import normalization

        samples, squared = normalization.sum_positions(G.flatten(2))
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
    centre = rstd.new_empty(0) if mean is None else mean
    if is_native("normalised_sums", G.device) and G.dtype == x.dtype:
        return torch.ops.dpfast.normalised_sums(G.contiguous(), x.contiguous(), centre.contiguous(), rstd.contiguous())
    if is_triton("normalised_sums", G, x):
        from dpfast_kernels import normalization

        weight, weight_squared, bias, bias_squared = normalization.normalised_sums(G, x, mean, rstd)
        return weight, weight_squared, bias, bias_squared
    return reference.normalised_sums(G, x, centre, rstd)


def channel_sums(G: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t g_t · (x_t - mean) · rstd`` and ``Σ_t g_t`` of every channel of a group normalisation: ``[R, C]`` each.

    Args:
        G, x: ``[R, C, T]``.
        mean, rstd: ``[R, groups]``.
    """
    if is_native("channel_sums", G.device) and G.dtype == x.dtype:
        return torch.ops.dpfast.channel_sums(G.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous())
    if is_triton("channel_sums", G, x):
        from dpfast_kernels import normalization

        weight, _, bias, _ = normalization.channel_sums(G, x, mean, rstd)
        return weight, bias
    return reference.channel_sums(G, x, mean, rstd)
