"""How far a floating-point result may be from the truth."""

import math
from typing import Any

import torch
from torch import Tensor

# Units of rounding added to every squared norm: the final reduction, the factor's own rounding, the scaling of
# the backprops and the accumulation into the clipped sum, each at most one or two units.
SAFETY_UNITS = 8.0
LONGEST_BLOCK = 512  # terms that matrix products add up in one go, at most


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms' inner sums and of the clipped sum: float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half of the distance from 1 to the next number of the dtype that sums are made in."""
    return torch.finfo(compute_dtype(dtype)).eps / 2


def drift(n: int) -> float:
    """Units of rounding that a sum of n products may be off, in a matrix product of any library or kernel.

    Roundings of different terms are a random walk (Higham and Mary 2019). Equal terms are all rounded alike: matrix
    products add some hundred of them one after the other before they add up such blocks, dot products and tensor cores
    (which cut off what they add, 16 products at a time) go on so to the end.
    """
    return math.sqrt(n) + min(n, LONGEST_BLOCK) / 4 + n / 8 + 8


def product_units(device: torch.device, convolution: bool = False) -> float:
    """Units of float32 that a product may be off before it is added, where the user has allowed tf32 or bfloat16 in it.

    cuDNN's convolutions have tf32 allowed from the start.
    """
    library: Any = torch.backends.mkldnn
    if device.type == "cuda":
        library = torch.backends.cudnn if convolution else torch.backends.cuda
    part = library.conv if convolution else library.matmul
    asked = (part.fp32_precision, getattr(torch.backends, "fp32_precision", "none"))
    precision = next((precision for precision in asked if precision != "none"), "ieee")
    return {"tf32": 2.0**15, "bf16": 2.0**18}.get(precision, 0.0)


def smallest(dtype: torch.dtype) -> float:
    """The most that a product may lose to underflow, where subnormal numbers are flushed to zero too."""
    return torch.finfo(compute_dtype(dtype)).tiny


def of_slip(squared: Tensor, slip: Tensor) -> Tensor:
    """What a squared norm may be off where the gradient itself is, by ``slip`` in norm."""
    return 2 * squared.clamp_min(0).sqrt() * slip + slip**2


def with_safety(
    squared: Tensor, bound: Tensor | float, dtype: torch.dtype, squares: int = 0, relative: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(squared, bound + (SAFETY_UNITS · u + relative) · squared + underflow of so many squares)``, float64, never
    negative.
    """
    squared = squared.double().clamp_min(0)
    slack, underflow = squared * (SAFETY_UNITS * unit_roundoff(dtype) + relative), squares * smallest(dtype)
    if isinstance(bound, Tensor):  # as few ops as can be: there is one of these for every parameter
        return squared, slack + bound + underflow if squares else slack + bound
    return squared, slack + (bound + underflow)


def rounded_up(value: float) -> float:
    """``value`` as a float32 that is not smaller: noise is never less than asked for."""
    nearest = torch.tensor(value, dtype=torch.float32)
    return (nearest if nearest.double() >= value else nearest.nextafter(torch.tensor(torch.inf))).item()
