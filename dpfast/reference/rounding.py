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


def smallest(dtype: torch.dtype) -> float:
    """The most that a product may lose to underflow, where subnormal numbers are flushed to zero too."""
    return torch.finfo(compute_dtype(dtype)).tiny


def with_safety(squared: Tensor, bound: Tensor | float, dtype: torch.dtype, squares: int = 0) -> tuple[Tensor, Tensor]:
    """``(squared, bound + SAFETY_UNITS · u · squared + underflow of so many squares)``, float64, never negative."""
    squared = squared.double().clamp_min(0)
    return squared, SAFETY_UNITS * unit_roundoff(dtype) * squared + bound + squares * smallest(dtype)


def rounded_up(value: float) -> float:
    """``value`` as a float32 that is not smaller: noise is never less than asked for."""
    nearest = torch.tensor(value, dtype=torch.float32)
    return (nearest if nearest.double() >= value else nearest.nextafter(torch.tensor(torch.inf))).item()
