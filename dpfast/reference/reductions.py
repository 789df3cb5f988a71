"""Ops on per-sample gradients that are written out, ``[B, *shape]``, or that are sums over positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.reference.precision import in_full_precision
from dpfast.reference.rounding import compute_dtype, left_in, with_safety

# Long rows are summed in pieces of this length, the pieces in float64: what is lost is a few units.
PIECE = 128


def squared_norm(samples: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖²`` of what is stored, so that a later weighted sum is clipped exactly."""
    return with_safety(row_squares(samples), 0.0, samples.dtype, squares=math.prod(samples.shape[1:]))


def row_squares(samples: Tensor) -> Tensor:
    """``‖g_i‖²`` of ``[B, *]``, float64."""
    rows = _rows(samples.to(compute_dtype(samples.dtype)))
    whole = rows.shape[1] - rows.shape[1] % PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, PIECE)), dim=2).double()
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1).double()
    return pieces.square().sum(1) + rest.square()


@in_full_precision
def weighted_sum(samples: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · g_i``, float32 (float64 for float64 samples); added up in pieces, and these in float64.

    A sample whose factor is 0 is left out, not multiplied: its NaN or inf is nowhere in the sum.
    """
    dtype, shape = compute_dtype(samples.dtype), samples.shape[1:]
    factors, samples = left_in(factors.to(dtype), samples)
    rows = _rows(samples.to(dtype))
    whole = len(rows) - len(rows) % PIECE
    total = factors[whole:] @ rows[whole:]
    if whole:
        pieces = factors[:whole].view(-1, 1, PIECE) @ rows[:whole].unflatten(0, (-1, PIECE))
        total = (total + pieces.sum((0, 1), dtype=torch.float64)).to(dtype)
    return total.view(shape)


def squared_norms(samples: Sequence[Tensor]) -> Tensor:
    """``‖g_i‖²`` of several tensors ``[B, *]``: ``[len(samples), B]``, float64 (squares of float32 are exact)."""
    return torch.stack([_squares(_rows(tensor)) for tensor in samples])


def weighted_sums(samples: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """``Σ_i factor_i · g_i`` of several tensors ``[B, *]``, flat; ``factors`` ``[B]`` or ``[len(samples), B]``.

    A sample whose factor is 0 is left out, as from :func:`weighted_sum`.
    """
    rows = factors.expand(len(samples), -1)
    return [weighted_sum(_rows(tensor), row) for tensor, row in zip(samples, rows, strict=True)]


def sum_positions(G: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t g_t`` of ``[B, T, d]``: ``[B, d]`` in float32 (float64 for float64), and their squared norms ``[B]``."""
    samples = G.sum(1, dtype=compute_dtype(G.dtype))
    return samples, _squares(samples)


def normalised_sums(G: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``Σ_t g_t ∘ (x_t - mean_t) · rstd_t`` and ``Σ_t g_t``, ``[B, d]``, each with its squared norms ``[B]``.

    ``G`` and ``x`` ``[B, T, d]``, ``mean`` and ``rstd`` ``[B, T]``; an empty ``mean`` is 0 (RMSNorm).
    """
    dtype = compute_dtype(G.dtype)
    x, mean, rstd = (side.to(dtype) for side in (x, mean, rstd))
    centred = x - mean.unsqueeze(2) if mean.numel() else x
    weight = (G.to(dtype) * (centred * rstd.unsqueeze(2))).sum(1)
    return weight, _squares(weight), *sum_positions(G)


@in_full_precision
def channel_sums(G: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_t g_t · (x_t - mean) · rstd`` and ``Σ_t g_t``: ``[R, C]``, of ``G`` and ``x`` ``[R, C, T]``.

    ``mean`` and ``rstd`` ``[R, groups]`` are constant over a group: ``Σ g∘x̂ = (Σ g∘x - mean · Σ g) · rstd``.
    """
    dtype = compute_dtype(G.dtype)
    R, C, T = G.shape
    mean, rstd = (side.to(dtype).repeat_interleave(C // side.shape[1], 1) for side in (mean, rstd))
    G, x = (side.to(dtype).reshape(R * C, 1, T) for side in (G, x))
    bias = G.sum((1, 2)).view(R, C)
    return (torch.bmm(G, x.transpose(1, 2)).view(R, C) - mean * bias) * rstd, bias


def _squares(rows: Tensor) -> Tensor:
    """Squared norm of each row, float64."""
    return rows.double().square().sum(1)


def _rows(samples: Tensor) -> Tensor:
    """``[B, *shape]`` as ``[B, n]``, for a scalar shape and for B = 0 too."""
    return samples.reshape(samples.shape[0], math.prod(samples.shape[1:]))
