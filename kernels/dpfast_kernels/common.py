"""What kernels share: the launch, the precision of products, the order of tiles, and cases to compile without a GPU."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2

INTERPRETED = not isinstance(tl.cdiv, triton.JITFunction)
"""TRITON_INTERPRET was set when triton was imported: kernels run on the CPU, one numpy call an operation."""

WIDEN = tl.constexpr(INTERPRETED)  # numpy has no bfloat16: there, tiles are widened before a product, which is exact

OPTIONS = {"enable_fp_fusion": True}
"""What every kernel is compiled with, whatever Triton's own default is: a product and the sum after it may be rounded
once. Noise has the same bits either way, as its multiply-adds are ``tl.fma`` and no other product of it is added to
anything; bounds hold either way, as they count a rounding for each of the two.
"""

TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a product: tf32 only of float32, and only where the user has allowed it in torch."""
    asked = (torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision)
    allowed = next((precision for precision in asked if precision != "none"), "ieee")
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


def dot_dtype(A: torch.Tensor, G: torch.Tensor) -> torch.dtype:
    """What tiles of both are cast to before their product: what they are, or float32 where they differ."""
    return A.dtype if A.dtype == G.dtype else torch.float32


@dataclass(frozen=True)
class Chip:
    """What configurations depend on."""

    processors: int
    capability: int

    @property
    def large(self) -> bool:
        """Of the sm_90 and sm_100 families: products read shared memory, and there is 227 KiB of it; else 99."""
        return 90 <= self.capability < 120


def vectorised(*tensors: torch.Tensor) -> bool:
    """Whether rows, or columns, are read 16 bytes at a time: unbroken, aligned, and of whole multiples of 16 elements.
    Else each element takes a load of its own, and its address a register or two: large tiles would spill.
    """
    for X in tensors:
        unbroken = [size for size, stride in zip(X.shape, X.stride(), strict=True) if stride == 1]
        strides = [stride for stride in X.stride() if stride != 1]
        if not unbroken or X.data_ptr() % 16 or any(n % 16 for n in unbroken + strides):
            return False
    return True


_chips = {80: Chip(108, 80), 90: Chip(132, 90)}  # A100, H100
_assumed = _chips[90]


@cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(properties.multi_processor_count, 10 * properties.major + properties.minor)


def chip(device: torch.device) -> Chip:
    """The GPU's; where there is none to ask an H100, or what a ``Compile`` is for."""
    if device.type != "cuda":
        return _assumed
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@triton.jit
def wide(size):
    """A size or stride in 64 bits: its multiples do not fit in 32. Also where Triton made it a constant."""
    return tl.cast(size, tl.int64)


@triton.jit
def dot(x, y, sums, PRECISION: tl.constexpr):
    """``tl.dot``, in the interpreter too."""
    if WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, sums, input_precision=PRECISION)


@triton.jit
def tile_at(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of tile ``index``: down ``GROUP`` rows of tiles, then right, so that programs that run together
    read few different rows and columns and find them in the L2 cache.
    """
    group = index // (GROUP * columns)
    height = min(rows - group * GROUP, GROUP)
    inside = index - group * GROUP * columns
    return group * GROUP + inside % height, inside // height


@dataclass(frozen=True)
class Launch:
    """One launch that was not made: what there is to compile, and in how many programs it would have run."""

    kernel: Any
    arguments: Sequence[Any]
    options: dict[str, Any]
    programs: int


@dataclass(frozen=True)
class Compile:
    """A case for cross-compilation: ``call`` runs a launcher on meta tensors, so that the kernel, its configuration and
    what Triton specialises are those of a launch. ``wgmma``: each kernel it launches must use it on sm_90.
    """

    name: str
    call: Callable[[], object] = field(repr=False)
    wgmma: bool = False

    def launches(self, capability: int = 90) -> list[Launch]:
        global _assumed
        _assumed = _chips[capability]
        _not_made.clear()
        try:
            self.call()
            return list(_not_made)
        finally:
            _assumed = _chips[90]


_not_made: list[Launch] = []


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, for a ``Compile``."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on ``device``; nothing where the grid is empty. ``options``: the
    ``tl.constexpr`` arguments, ``num_warps`` and ``num_stages``; :data:`OPTIONS` come beside them. On the meta device
    it is noted and not made.
    """
    if 0 in grid:
        return
    options |= OPTIONS
    if device.type == "meta":
        _not_made.append(Launch(kernel, arguments, options, math.prod(grid)))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)
