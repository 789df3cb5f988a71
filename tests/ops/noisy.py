"""What the tests of the ops with noise share: noise, guarded memory, exact comparisons, other instruction sets."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfast import native, ops
from tests.ops.vectors import BUILDS

CPU = torch.device("cpu")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
GRID = 2.0**-24  # in the secure mode, for a std of 1 to 2
GUARD = 67  # elements before and after a guarded tensor: no multiple of any vector
SIZES = (0, 1, 5, 127, 128, 129, 1000, 100_001)
MODES = ("fast", "secure")


def require(op: str) -> None:
    """Skip unless the compiled library serves ``op`` here."""
    if not ops.is_native(op, CPU):
        pytest.skip(f"{op} is not compiled here: {native.why_not('cpu')}")


def new_key() -> list[int]:
    return torch.randint(1 << 32, (ops.KEY_WORDS,)).tolist()


def new_noise(mode: str = "fast", std: float = 1.37, scale: float = 1 / 37, step: int | None = None) -> ops.Noise:
    """Noise with a key of its own; the grid of the secure mode is that of :class:`dpfast.noise.stream.NoiseStream`."""
    step = int(torch.randint(1 << 32, ())) if step is None else step
    grid = math.ldexp(1.0, math.frexp(std)[1] - 25) if mode == "secure" and std else 0.0
    return ops.Noise(tuple(new_key()), step, std, grid, scale)


def arguments(noise: ops.Noise) -> tuple:
    """As the compiled ops take it."""
    return list(noise.key), noise.step, noise.std, noise.grid, noise.scale


def guarded(n: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """``n`` poisoned elements amid others, at an address that is a multiple of nothing."""
    return torch.full((n + 2 * GUARD + shift,), math.nan, dtype=dtype)[GUARD + shift : GUARD + shift + n]


def assert_guards(tensor: Tensor) -> None:
    """Nothing was written before or after a guarded tensor."""
    start = tensor.storage_offset()
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    assert whole[:start].isnan().all(), "written before the tensor"
    assert whole[start + tensor.numel() :].isnan().all(), "written after the tensor"


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(a: Any, b: Any) -> bool:
    """The same bits, of two tensors or of two lists of them."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def units(dtype: torch.dtype, *sizes: Tensor) -> Tensor:
    """The unit in the last place of ``dtype`` at the largest of ``sizes``, float64."""
    size = torch.stack([t.detach().double().abs() for t in sizes]).amax(0)
    info = torch.finfo(dtype)
    return (info.eps * torch.ldexp(torch.ones_like(size), size.frexp().exponent - 1)).clamp_min(
        info.smallest_normal * info.eps
    )


def apart(a: Tensor, b: Tensor, *sizes: Tensor) -> float:
    """The largest distance of two tensors in units of their dtype, at the largest of both and ``sizes``."""
    assert a.dtype == b.dtype and a.shape == b.shape
    distance = (a.detach().double() - b.detach().double()).abs()
    return (distance / units(a.dtype, a, b, *sizes)).max().item() if a.numel() else 0.0


Call = tuple[str, tuple]  # an op's name and its arguments; what it writes, it writes into them

_RUN = """
import ctypes, sys, torch
library, source, target = sys.argv[1:]
torch.ops.load_library(library)
name = ctypes.CDLL(library).dpfast_cpu_isa
name.restype = ctypes.c_char_p
calls = torch.load(source)
for op, arguments in calls:
    getattr(torch.ops.dpfast, op)(*arguments)
torch.save((name().decode(), calls), target)
"""


def run(calls: list[Call]) -> None:
    for op, args in calls:
        getattr(torch.ops.dpfast, op)(*args)


def run_with(isa: str, calls: list[Call], folder: Path) -> list[Call]:
    """The same calls in a process of their own that uses ``isa``; skips where the CPU does not have it."""
    has = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if missing := [flag for flag in BUILDS[isa] if flag.removeprefix("-m") not in has]:
        pytest.skip(f"this CPU lacks {' '.join(missing)}")
    source, target = folder / "calls.pt", folder / "done.pt"
    torch.save(calls, source)
    command = [sys.executable, "-c", _RUN, str(native.library("cpu").path), str(source), str(target)]
    subprocess.run(command, env=os.environ | {"DPFAST_CPU_ISA": isa}, check=True)
    used, done = torch.load(target)
    assert used == isa
    return done


def tensors(calls: list[Call]) -> list[Tensor]:
    """All tensors among the arguments of calls."""
    found = []
    for _, args in calls:
        for argument in args:
            if isinstance(argument, (list, tuple)):
                found += [item for item in argument if isinstance(item, Tensor)]
    return found
