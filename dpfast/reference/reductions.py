"""Ops on per-sample gradients that are written out, ``[B, *shape]``."""

import math

import torch
from torch import Tensor

from dpfast.reference.rounding import compute_dtype, with_safety

# Long rows are summed in pieces of this length, the pieces in float64: what is lost is a few units.
PIECE = 128


def squared_norm(samples: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖²`` of what is stored, so that a later weighted sum is clipped exactly."""
    rows = _rows(samples.to(compute_dtype(samples.dtype)))
    return with_safety(row_squares(rows), 0.0, rows.dtype, squares=rows.shape[1])


def row_squares(rows: Tensor) -> Tensor:
    """Squared norm of each row, float64."""
    whole = rows.shape[1] - rows.shape[1] % PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, PIECE)), dim=2).double()
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1).double()
    return pieces.square().sum(1) + rest.square()


def weighted_sum(samples: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · g_i``, float32 (float64 for float64 samples)."""
    dtype = compute_dtype(samples.dtype)
    rows = _rows(samples.to(dtype))
    return (factors.to(dtype) @ rows).view(samples.shape[1:])


def _rows(samples: Tensor) -> Tensor:
    """``[B, *shape]`` as ``[B, n]``, for a scalar shape and for B = 0 too."""
    return samples.reshape(samples.shape[0], math.prod(samples.shape[1:]))
