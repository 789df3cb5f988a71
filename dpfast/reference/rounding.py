"""How far a floating-point result may be from the truth."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

# Units of rounding added to every squared norm: the final reduction, the factor's own rounding, the scaling of
# the backprops and the accumulation into the clipped sum, each at most one or two units; and four for underflow.
SAFETY_UNITS = 12.0
LEAST_WEIGHT = 2.0**-64  # of what is left of a sample: what clipping would multiply by less is left out
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


def drifts(n: Tensor) -> Tensor:
    """:func:`drift` of each of several lengths, float64."""
    return n.sqrt() + n.clamp(max=LONGEST_BLOCK) / 4 + n / 8 + 8


def smallest(dtype: torch.dtype) -> float:
    """The most that a product may lose to underflow, where subnormal numbers are flushed to zero too."""
    return torch.finfo(compute_dtype(dtype)).tiny


def underflow(dtype: torch.dtype) -> float:
    """What a squared norm is raised by for every number that may underflow when the clipped sum is made.

    A backprop, or a term of a product, loses up to :func:`smallest` once it is multiplied by a sample's weight; seen
    from the gradient before, n of them lose ``s = smallest · √n / LEAST_WEIGHT`` in norm. That is covered, as
    ``(norm + s)² ≤ (1 + ε) norm² + (1 + 1/ε) s²``: ε is four of :data:`SAFETY_UNITS`, and ``s² / ε`` is n times this,
    with a factor of 4 to spare for several such losses together.
    """
    return 2.0**26 * smallest(dtype)


@lru_cache(maxsize=1024)
def column(numbers: tuple[float, ...], device: torch.device, dims: int = 2) -> Tensor:
    """Constants of some parameters, float64 ``[n, 1, ...]``: the same every step, and copied to the device once."""
    return torch.tensor(numbers, dtype=torch.float64, device=device).view(-1, *[1] * (dims - 1))


_all_left_in = False


@contextmanager
def all_left_in() -> Iterator[None]:
    """Within, on this process's CPU, no sample is left out of a sum: for a trace, whose user sees to it."""
    global _all_left_in
    before, _all_left_in = _all_left_in, True
    try:
        yield
    finally:
        _all_left_in = before


def left_in(factors: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``factors [B]`` and tensors ``[B, *]`` without the samples whose factor is 0: ``0 · inf`` would be NaN.

    On a device they become zeros instead, as nobody is to wait for how many there are.
    """
    if factors.device.type != "cpu":
        on_device = factors != 0
        return factors, *(torch.where(on_device.view(-1, *[1] * (x.dim() - 1)), x, 0) for x in tensors)
    if _all_left_in:
        return factors, *tensors
    kept = factors.detach().numpy()
    if kept.all():
        return factors, *tensors
    index = torch.from_numpy(kept.nonzero()[0])
    return factors[index], *(x[index] for x in tensors)


def of_slip(squared: Tensor, slip: Tensor) -> Tensor:
    """What a squared norm may be off where the gradient itself is, by ``slip`` in norm."""
    return 2 * squared.clamp_min(0).sqrt() * slip + slip**2


def with_safety(
    squared: Tensor, bound: Tensor | float, dtype: torch.dtype, squares: int | Tensor = 0, relative: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(squared, bound + (SAFETY_UNITS · u + relative) · squared + underflow of so many squares)``, float64, never
    negative.

    ``squared [B]`` of one parameter, or ``[n, B]`` of several; then ``squares [n, 1]`` is a number of each.
    """
    squared = squared.double().clamp_min(0)
    slack = squared * (SAFETY_UNITS * unit_roundoff(dtype) + relative)
    return squared, slack + (bound + squares * underflow(dtype))


def rounded_up(value: float) -> float:
    """``value ≥ 0`` as a float32 that is not smaller: noise is never less than asked for."""
    if value > torch.finfo(torch.float32).max:
        return math.inf
    packed = struct.pack("<f", value)
    (nearest,) = struct.unpack("<f", packed)
    if nearest >= value:
        return nearest
    (bits,) = struct.unpack("<I", packed)
    (above,) = struct.unpack("<f", struct.pack("<I", bits + 1))
    return above
