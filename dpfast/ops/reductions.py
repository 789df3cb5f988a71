"""Sums of tensors ``[B, ...]`` over samples or positions: the compiled ops, Triton's kernels, else the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native, is_triton
from dpfast.ops.matmul import stacked
from dpfast.reference.rounding import compute_dtype


def weighted_sum(samples: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · g_i`` of ``samples [B, *]``, float32 (float64 for float64); factor 0 leaves a sample out."""
    return weighted_sums([samples], [factors])[0]


def weighted_sums(samples: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`weighted_sum` of several tensors of one B, dtype and device, each with factors ``[B]``, in one launch."""
    dtype, device = samples[0].dtype, samples[0].device
    weights = stacked(factors, compute_dtype(dtype))
    if all([x.is_contiguous() for x in samples]) and is_native("weighted_sums", device):
        return torch.ops.dpfast.weighted_sums(list(samples), weights)
    orders = [sorted(range(1, x.dim()), key=x.stride, reverse=True) for x in samples]
    if weights.dim() == 1 and not is_native("weighted_sums", device):
        weights = weights.expand(len(samples), -1)
    stored = [x.permute(0, *order) for x, order in zip(samples, orders, strict=True)]  # as they lie in memory: no copy
    if is_native("weighted_sums", device):
        totals = torch.ops.dpfast.weighted_sums([x.contiguous() for x in stored], weights)
    elif is_triton("weighted_sums", *samples):
        from dpfast_kernels.weighted_sum import weighted_sums as kernel

        totals = kernel(stored, weights.contiguous())
    else:
        totals = [reference.weighted_sum(x, row) for x, row in zip(stored, weights, strict=True)]
    return [
        total.view(x.shape[1:]).permute([order.index(dim) for dim in range(1, x.dim())])
        for total, x, order in zip(totals, stored, orders, strict=True)
    ]


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
        mean, rstd: of each position, in order, ``[B, T]`` or of any other shape; no mean for RMSNorm.

    Returns:
        ``weight [B, d], its squared norms [B], bias [B, d], its squared norms [B]``.
    """
    rstd = rstd.reshape(G.shape[:2])
    centre = rstd.new_empty(0) if mean is None else mean.reshape(G.shape[:2])
    if is_native("normalised_sums", G.device) and G.dtype == x.dtype:
        return torch.ops.dpfast.normalised_sums(G.contiguous(), x.contiguous(), centre.contiguous(), rstd.contiguous())
    if is_triton("normalised_sums", G, x):
        from dpfast_kernels import normalization

        centred = None if mean is None else centre
        weight, weight_squared, bias, bias_squared = normalization.normalised_sums(G, x, centred, rstd)
        return weight, weight_squared, bias, bias_squared
    return reference.normalised_sums(G, x, centre, rstd)


def all_position_sums(Gs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """:func:`sum_positions` of several ``G [B, T, d]`` of one B and dtype, in one launch where there is a library."""
    if not is_native("all_position_sums", Gs[0].device):
        return [sum_positions(G) for G in Gs]
    samples, squared = torch.ops.dpfast.all_position_sums([G.contiguous() for G in Gs])
    return list(zip(samples, squared.unbind(), strict=True))


def all_normalised_sums(
    layers: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor]],
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """:func:`normalised_sums` of several layers' ``(G, x, mean, rstd)`` of one B and dtype, likewise."""
    G, x, mean, rstd = zip(*layers, strict=True)
    if not is_native("all_normalised_sums", G[0].device) or any(
        [a.dtype != b.dtype for a, b in zip(G, x, strict=True)]
    ):
        return [normalised_sums(*layer) for layer in layers]
    centres = [spread.new_empty(0) if m is None else m.contiguous() for m, spread in zip(mean, rstd, strict=True)]
    sides = [[side.contiguous() for side in each] for each in (G, x)]
    spreads = [side.contiguous() for side in rstd]
    weights, biases, squared = torch.ops.dpfast.all_normalised_sums(*sides, centres, spreads)
    of_weights, of_biases = squared[: len(weights)].unbind(), squared[len(weights) :].unbind()
    return list(zip(weights, of_weights, biases, of_biases, strict=True))


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
