"""The ops on samples make the same bits with any number of threads and any instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpfast import native
from tests.ops.samples import draw

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def everything(dtype):
    """Each op on inputs of some size, from a seed: what must not depend on threads or on the instruction set."""
    torch.manual_seed(7)
    ops = torch.ops.dpfast
    samples = [draw(dtype, 40, n) for n in (3, 1025, 5000)] + [draw(dtype, 40, 9, 70)]
    factors = torch.rand(40)
    factors[::4] = 0
    G, x = draw(dtype, 5, 300, 129), draw(dtype, 5, 300, 129)
    mean, rstd, ids = torch.randn(5, 300), torch.rand(5, 300), torch.randint(60, (5, 300))
    return [
        ops.squared_norms(samples),
        ops.squared_norms([draw(dtype, 2, 150_000)]),
        *ops.weighted_sums(samples, factors),
        *ops.sum_positions(G),
        *ops.sum_positions(draw(dtype, 300, 1, 1100)),
        *ops.normalised_sums(G, x, mean, rstd),
        *ops.embedding_squared_norm(ids, G),
        ops.embedding_sum(ids, G, factors[1:6].contiguous(), 70),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_any_number_of_threads(ops, dtype):
    alone = everything(dtype)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for one, other in zip(alone, everything(dtype), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


ALL_OF_IT = """
import sys, torch
from dpfast import native
from tests.ops.test_same_bits import DTYPES, everything
torch.set_num_threads(1)
assert native.available("cpu"), native.why_not("cpu")
torch.save([native.instruction_set(), [everything(dtype) for dtype in DTYPES]], sys.argv[1])
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_the_same_bits_with_any_instruction_set(ops, isa, tmp_path):
    """A machine without AVX-512 computes what one that has it does."""
    file = tmp_path / "results.pt"
    here = Path(__file__).parents[2]
    env = os.environ | {"DPFAST_CPU_ISA": isa, "DPFAST_LIBRARY_CPU": str(native.library("cpu").path)}
    subprocess.run([sys.executable, "-c", ALL_OF_IT, str(file)], check=True, cwd=here, env=env, timeout=300)
    used, results = torch.load(file)
    if used != isa:
        pytest.skip(f"this machine has no {isa}: it used {used}")
    for dtype, got in zip(DTYPES, results, strict=True):
        for one, other in zip(everything(dtype), got, strict=True):
            assert torch.equal(one, other)
