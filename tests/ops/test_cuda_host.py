"""csrc/cuda without a GPU: its kernels, launches and ops compiled by the C++ compiler, against the CPU library.

tests/ops/emulator/cuda_runtime.h stands in for CUDA, one thread after another. What a GPU must still show is in
tests/gpu: that the device's own instructions give the same bits, races, and speed.
"""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dpfast.native import build
from tests.ops import cuda_cases as cases

pytestmark = pytest.mark.compiles

EMULATOR = Path(__file__).parent / "emulator"
CSRC = Path(__file__).parents[2] / "csrc"
# A vector that is not aligned stops the program, as it would on a GPU.
CHECKED = ("-O1", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-Wno-unknown-pragmas")

each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "bf16", "f16", "f64"])
each_mode = pytest.mark.parametrize("mode", cases.MODES)


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    cases.cpu()
    try:
        compiler, (folder, _) = build.compiler(), build.torch_folder()
    except build.BuildError as error:
        pytest.skip(f"csrc/cuda cannot be compiled here: {error}")
    out = tmp_path_factory.mktemp("emulated")
    headers = [folder / "include", folder / "include/torch/csrc/api/include"]
    flags = [*build.CXX_FLAGS, *CHECKED, build.TARGET_FLAG, "-DDPFAST_EMULATED", f"-I{EMULATOR}", f"-I{CSRC}"]
    flags += [f"-I{CSRC / 'include'}", *(f"-isystem{path}" for path in headers)]

    def compile(source):
        target = out / f"{source.name}.o"
        subprocess.run([*compiler, "-x", "c++", *flags, "-c", source, "-o", target], check=True)
        return target

    sources = [*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp"), EMULATOR / "register.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    library = out / "libdpfast_emulated.so"
    torch_libraries = [f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*compiler, "-shared", *objects, *torch_libraries, "-o", library], check=True)
    torch.ops.load_library(str(library))
    emulated = ctypes.CDLL(str(library))

    @contextmanager
    def capturing():
        emulated.dpfast_emulated_capture(True)
        try:
            yield emulated.dpfast_emulated_replay
        finally:
            emulated.dpfast_emulated_capture(False)

    return cases.Side(torch.ops.dpfast_emulated, "cpu", capturing)


@each_dtype
@each_mode
def test_noisy_grad(side, dtype, mode):
    cases.noisy_grad(side, dtype, mode)


def test_many_tensors(side):
    cases.many_tensors(side)


@pytest.mark.parametrize(("mode", "offset"), [("fast", 0), ("fast", 2**34 - 3), ("secure", 0), ("secure", 131)])
def test_standard_normal(side, mode, offset):
    cases.standard_normal(side, mode, 10_001, offset)


@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=["f32", "bf16", "f16"])
@each_mode
@pytest.mark.parametrize(("rule", "rounding", "extras"), cases.UPDATES)
def test_update(side, dtype, mode, rule, rounding, extras):
    cases.update(side, dtype, mode, rule, rounding, extras)


@pytest.mark.parametrize("name", cases.RULES)
@pytest.mark.parametrize(
    ("dtype", "mode", "rounding"),
    [
        (cases.F32, "fast", "nearest"),
        (cases.F32, "none", "nearest"),
        (cases.BF16, "secure", "nearest"),
        (cases.F16, "fast", "stochastic"),
    ],
    ids=str,
)
def test_updates_in_a_graph(side, dtype, mode, name, rounding):
    cases.updates_in_a_graph(side, dtype, mode, name, rounding)


def test_keys_are_not_captured(side):
    cases.captured_keys(side)


@pytest.mark.parametrize("function", range(5))
def test_clip_factors(side, function):
    cases.clip_factors(side, function)


@pytest.mark.parametrize("batch", [0, 1, 7, 60])
def test_squared_norms(side, batch):
    cases.squared_norms(side, batch)


@pytest.mark.parametrize("batch", [0, 1, 7, 60, 300])
@pytest.mark.parametrize(("dtype", "shared"), [(cases.F32, True), (cases.F64, False)])
def test_weighted_sums(side, batch, dtype, shared):
    cases.weighted_sums(side, batch, dtype, shared)


@each_dtype
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_positions(side, dtype, shape):
    cases.positions(side, dtype, shape)


@each_dtype
@pytest.mark.parametrize("table", cases.TABLES)
def test_embedding(side, dtype, table):
    cases.embedding(side, dtype, table)


def test_refusals(side):
    cases.refusals(side)
