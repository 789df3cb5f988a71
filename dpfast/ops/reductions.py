"""Per-sample norms and sums of tensors ``[B, ...]``: the compiled ops, Triton's kernels, else the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native, is_triton
from dpfast.ops.matmul import BLOCK_UNITS, product_reach
from dpfast.reference.rounding import column, compute_dtype, of_slip, unit_roundoff, with_safety

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def squared_norm(samples: Tensor) -> tuple[Tensor, Tensor]:
    """``(‖g_i‖² [B], bound [B])``, float64, of per-sample gradients ``[B, *]``."""
    squared, bound = SquaredNorms([samples]).of_samples([samples])
    return squared[0], bound[0]


class SquaredNorms:
    """Squared norms of the rows of several tensors ``[B, *]`` of one B, compute dtype and device, made in one launch.

    A tensor that is there twice, by its place in memory, is read once.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.rows: dict[tuple[int, ...], int] = {}
        distinct: list[Tensor] = []
        for x in tensors:
            if self.rows.setdefault(self._key(x), len(distinct)) == len(distinct):
                distinct.append(x)
        if not distinct:
            return
        if is_native("squared_norms", distinct[0].device):
            self.squared = torch.ops.dpfast.squared_norms([x.contiguous() for x in distinct])
        elif is_triton("squared_norms", *distinct):
            from dpfast_kernels.weighted_sum import squared_norms

            self.squared = squared_norms(distinct)
        else:
            self.squared = torch.stack([reference.row_squares(x) for x in distinct])

    @staticmethod
    def _key(x: Tensor) -> tuple[int, ...]:
        return x.untyped_storage()._cdata, int(x.storage_offset()), x.numel(), x.element_size()

    def of_samples(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``‖g_i‖²`` and bounds, ``[n, B]``, of per-sample gradients ``[B, *]`` that are written out."""
        return certified(self._of(samples), samples)

    def of_products(self, sides: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """``‖a‖²·‖g‖²`` and bounds, ``[n, B]``, of ``A [B, 1, 1, d]`` and ``G [B, 1, 1, p]`` of each of n weights."""
        # Each sum is rounded, and what one side loses to underflow is multiplied by the other one.
        a, slack_a = certified(self._of([A for A, _ in sides]), [A for A, _ in sides])
        g, slack_g = certified(self._of([G for _, G in sides]), [G for _, G in sides])
        (A, G), product = sides[0], a * g
        slack = (a + slack_a) * (g + slack_g) - product
        sizes = column(tuple(A.shape[-1] * G.shape[-1] for A, G in sides), G.device)
        squared, bound = with_safety(product, slack, G.dtype, squares=sizes)
        if is_triton("clipped_weight_gradient", A, G):  # which makes the sum, and may round both sides of it
            bound = bound + of_slip(squared, product_reach(1, A, G) * squared.sqrt())
        return squared, bound

    def _of(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = [self.rows[self._key(x)] for x in tensors]
        if rows == [*range(len(self.squared))]:
            return self.squared
        return self.squared.index_select(0, index_of(tuple(rows), self.squared.device))


@lru_cache(maxsize=256)
def index_of(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Row numbers on a device, copied there once."""
    return torch.tensor(rows, device=device)


def weighted_sum(samples: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · g_i`` of ``samples [B, *]``, float32 (float64 for float64); factor 0 leaves a sample out."""
    return weighted_sums([samples], [factors])[0]


def weighted_sums(samples: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`weighted_sum` of several tensors of one B, dtype and device, each with factors ``[B]``, in one launch."""
    dtype, device = samples[0].dtype, samples[0].device
    if all([row is factors[0] for row in factors]):
        stacked = factors[0].to(compute_dtype(dtype)).expand(len(samples), -1).contiguous()
    else:
        stacked = torch.stack([row.to(compute_dtype(dtype)) for row in factors])
    if all([x.is_contiguous() for x in samples]) and is_native("weighted_sums", device):
        totals = torch.ops.dpfast.weighted_sums(list(samples), stacked)
        return [total if x.dim() == 2 else total.view(x.shape[1:]) for total, x in zip(totals, samples, strict=True)]
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


def certified(squared: Tensor, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared norms ``[n, B]`` of n tensors ``[B, *]``, as an op gave them, with bounds on their rounding.

    Float64 ones are sums of exact squares, or nearly; float32 ones were summed in blocks in float32.
    """
    blocks = BLOCK_UNITS * unit_roundoff(torch.float32) if squared.dtype == torch.float32 else 0.0
    sizes = column(tuple(math.prod(x.shape[1:]) for x in samples), squared.device)
    return with_safety(squared, 0.0, samples[0].dtype, squares=sizes, relative=blocks)


def has_products(A: Tensor, G: Tensor) -> bool:
    """Whether ``A [B, g, T, d]`` and ``G`` have one position and one group, whose norms are products of their norms."""
    return (
        A.shape[1] == A.shape[2] == 1
        and A.dtype in NARROW
        and G.dtype in NARROW
        and is_native("squared_norms", G.device)
    )


def one_position_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_groups ‖a‖²·‖g‖²`` for ``A [B, g, 1, d]``, ``G [B, g, 1, p]``."""
    if has_products(A, G):
        squared, bound = SquaredNorms([A, G]).of_products([(A, G)])
        return squared[0], bound[0]
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
