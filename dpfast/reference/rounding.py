"""How far a floating-point result may be from the truth."""

import torch
from torch import Tensor

# Units of rounding added to every squared norm: the final reduction, the factor's own rounding, the scaling of
# the backprops and the accumulation into the clipped sum, each at most one or two units.
SAFETY_UNITS = 8.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms' inner sums and of the clipped sum: float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half of the distance from 1 to the next number of the dtype that sums are made in."""
    return torch.finfo(compute_dtype(dtype)).eps / 2


def with_safety(squared: Tensor, bound: Tensor | float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(squared, bound + SAFETY_UNITS · u · squared)``, both float64 and never negative."""
    squared = squared.double().clamp_min(0)
    return squared, SAFETY_UNITS * unit_roundoff(dtype) * squared + bound
