"""Clipped sums → noisy gradients, in one pass over all parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dpfast.ops.backends import is_native
from dpfast.reference import noisy_grad as reference
from dpfast.reference.noise import low_bits

KEY_WORDS = 8
# ChaCha20 counts its blocks, of 8 elements each, with 32 bits.
MOST_ELEMENTS = 1 << 35


@dataclass(frozen=True)
class Noise:
    """One step's noise: what a summed gradient becomes is ``(summed + std · z) · scale``.

    Args:
        key: 8 words of 32 bits; the fast mode uses two.
        step: counts the steps of one key, below 2³².
        std: standard deviation; 0 for none.
        grid: 0 for the fast mode. In the secure mode the step, a power of two, that sums and noise are whole multiples
            of; between ``std / 2²⁶`` and ``std / 2¹⁶``.
        scale: one over the expected batch size.

    Raises:
        ValueError, OverflowError: with the argument's name.
    """

    key: tuple[int, ...] = field(repr=False)
    step: int
    std: float
    grid: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.key) != KEY_WORDS or not all(isinstance(w, int) and 0 <= w < 1 << 32 for w in self.key):
            raise ValueError(f"key: give {KEY_WORDS} words of 32 bits, not {len(self.key)}")  # never shown: a secret
        if not 0 <= self.step < 1 << 32:
            raise OverflowError(f"step={self.step}: the noise counts steps with 32 bits; start over with a new key")
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std={self.std!r}: a standard deviation is a finite number that is not negative")
        if self.std and not 2**-100 < self.std < 2**100:
            raise ValueError(f"std={self.std!r}: noise is float32, its standard deviation must lie in 2⁻¹⁰⁰ to 2¹⁰⁰")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale!r}: give a finite number")
        if self.grid and not (
            math.frexp(self.grid)[0] == 0.5
            and 2.0**16 <= self.std / self.grid <= 2.0**26
            and 2**-80 < self.grid < 2**80
        ):
            raise ValueError(
                f"grid={self.grid!r} with std={self.std!r}: secure noise needs a power of two, 2⁻²⁶ to 2⁻¹⁶ of std, in "
                f"2⁻⁸⁰ to 2⁸⁰"
            )


def noisy_grad_(
    summed: Sequence[Tensor],
    grads: Sequence[Tensor],
    parameters: Sequence[int],
    noise: Noise,
    offsets: Sequence[int] | None = None,
) -> None:
    """``grad = (summed + std · z) · scale`` for every tensor, each read once and written once.

    Arithmetic is float32 (float64 for float64, whose z has 32 more random bits); only the result is rounded, to the
    dtype of ``grad``. An element that
    is NaN or infinite stays alone. z of an element depends on key, step, the parameter's index and the element's index
    alone: not on how many tensors there are, on threads, on shards or on the backend.

    Args:
        summed: contiguous, float32, or float64 with a float64 grad.
        grads: contiguous, of any floating dtype, each the size of its ``summed``; may be the very same tensor.
        parameters: each one's index in the noise stream; no two tensors may share elements of one.
        offsets: where in its parameter a tensor starts (0), for shards.

    Raises:
        ValueError: names the tensor that does not fit; nothing is written.
    """
    offsets = [0] * len(summed) if offsets is None else list(offsets)
    check_places(summed, parameters, offsets)
    if len(grads) != len(summed):
        raise ValueError(f"grads has {len(grads)} tensors for {len(summed)} sums: give one each")
    for k, (sum_, grad) in enumerate(zip(summed, grads, strict=True)):
        check_tensor(f"summed[{k}]", sum_, sum_, (torch.float32, torch.float64))
        wide = sum_.dtype == torch.float64
        allowed = (torch.float64,) if wide else (torch.float32, torch.bfloat16, torch.float16)
        check_tensor(f"grads[{k}]", grad, sum_, allowed)
    check_overlap({"summed": summed, "grads": grads})
    summed = [_with_low_bits(*each, noise) for each in zip(summed, parameters, offsets, strict=True)]
    for device, mine in by_device(summed).items():
        picked: list[list[Any]] = [[items[k] for k in mine] for items in (summed, grads, parameters, offsets)]
        if is_native("noisy_grad_", device):
            arguments = (list(noise.key), noise.step, noise.std, noise.grid, noise.scale)
            torch.ops.dpfast.noisy_grad_(*picked, *arguments)
        else:
            for sum_, grad, parameter, offset in zip(*picked, strict=True):
                reference.noisy_grad_(
                    sum_, grad, parameter, offset, noise.key, noise.step, noise.std, noise.grid, noise.scale
                )


def _with_low_bits(summed: Tensor, parameter: int, offset: int, noise: Noise) -> Tensor:
    """A float64 sum with noise where a float32 z has none: otherwise its low bits would come out as they are."""
    if summed.dtype != torch.float64 or noise.grid or not noise.std or not summed.numel():
        return summed
    end = offset + summed.numel()
    low = low_bits(noise.key, noise.step, parameter, offset, end, device=summed.device)
    return summed + noise.std * low.view(summed.shape)


def by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Indices of the tensors on each device."""
    places: dict[torch.device, list[int]] = {}
    for k, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(k)
    return places


def check_places(tensors: Sequence[Tensor], parameters: Sequence[int], offsets: Sequence[int]) -> None:
    """Refuse indices and offsets that the counters cannot hold."""
    if not len(tensors) == len(parameters) == len(offsets):
        raise ValueError(f"{len(tensors)} tensors, {len(parameters)} parameters and {len(offsets)} offsets: one each")
    for k, (tensor, parameter, offset) in enumerate(zip(tensors, parameters, offsets, strict=True)):
        if not 0 <= parameter < 1 << 32:
            raise ValueError(f"parameters[{k}]={parameter}: the noise counts parameters with 32 bits")
        end = offset + tensor.numel()
        if offset < 0 or end > MOST_ELEMENTS:
            raise ValueError(f"offsets[{k}]={offset}: elements {offset} to {end} are more than the noise can count")


def check_tensor(name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a tensor that a kernel cannot take beside ``like``."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}: it must be one of {', '.join(map(str, dtypes))}")
    if tensor.numel() != like.numel():
        raise ValueError(f"{name} has {tensor.numel()} elements, its sum {like.numel()}: they must be of one size")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, its sum on {like.device}: move them to one device")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}): call .contiguous()")


def check_overlap(tensors: dict[str, Sequence[Tensor]]) -> None:
    """Refuse tensors that share memory, but for a grad that is its own summed gradient."""
    spans = [
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name, k)
        for name, items in tensors.items()
        for k, tensor in enumerate(items)
        if tensor.numel()
    ]
    for before, after in pairwise(sorted(spans)):
        apart = before[0] != after[0] or before[2] <= after[1]
        in_place = before[1:3] == after[1:3] and before[4] == after[4] and {before[3], after[3]} == {"summed", "grads"}
        if not apart and not in_place:
            raise ValueError(
                f"{before[3]}[{before[4]}] and {after[3]}[{after[4]}] overlap in memory: give each tensor its own"
            )
