"""For the tests of the Triton kernels: the interpreter where there is no GPU, chosen before triton is imported."""

import math
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture
def replayed(gpu):
    """Gives what a call returns when a CUDA graph of it is replayed."""

    def replay(call):
        call()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        graph.replay()
        return out

    return replay


@pytest.fixture
def far_apart():
    """Gives a float16 tensor anew, its slices along one dimension so far apart that offsets pass 2³¹."""

    def spread(x: torch.Tensor, dim: int) -> torch.Tensor:
        strides = list(torch.empty_like(x.select(dim, 0), memory_format=torch.contiguous_format).stride())
        strides.insert(dim, max(math.ceil(2**31 / (x.shape[dim] - 1)), x.numel()))
        size = strides[dim] * x.shape[dim]
        if x.is_cuda:
            memory = torch.zeros(size, dtype=x.dtype, device=x.device)
        else:  # pages that nobody writes to are not there
            memory = torch.from_numpy(np.zeros(size, dtype=np.float16))
        return memory.as_strided(x.shape, strides).copy_(x)

    return spread
