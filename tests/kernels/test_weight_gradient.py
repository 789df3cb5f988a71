"""Clipped weight gradients against sums over samples in float64."""

import pytest
import torch
from dpfast_kernels import weight_gradient
from dpfast_kernels.weight_gradient import Config, clipped_weight_gradient, clipped_weight_gradient_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(5, 37, 41, 18), (3, 64, 16, 50), (2, 32, 5, 3), (7, 3, 33, 19), (40, 1, 7, 17)]  # both sides of BY_SAMPLE


def reference(A, G, factors):
    """Weight [groups * p, d] and bias, in float64, one sample and group at a time; samples of factor 0 left out."""
    if A.dim() == 3:
        A, G = A.unsqueeze(1), G.unsqueeze(1)
    weight = torch.zeros(G.shape[1], G.shape[3], A.shape[3], dtype=torch.float64, device=A.device)
    bias = torch.zeros(G.shape[1], G.shape[3], dtype=torch.float64, device=A.device)
    for a, g, factor in zip(A.double(), G.double(), factors.double(), strict=True):
        if factor != 0:
            for group in range(G.shape[1]):
                weight[group] += factor * g[group].T @ a[group]
                bias[group] += factor * g[group].sum(0)
    return weight.flatten(0, 1), bias.flatten()


def inputs(device, B, T, d, p, dtype):
    """A and G, and factors of many sizes, some of them 0."""
    factors = 10.0 ** torch.linspace(-6, 0, B, device=device)
    factors[1::4] = 0
    return torch.randn(B, T, d, device=device).to(dtype), torch.randn(B, T, p, device=device).to(dtype), factors


def check(A, G, factors, weight, bias, already=0):
    """A float32 rounding a term, and of what was ``already`` there; or two bfloat16 roundings of a row (cut off by the
    interpreter, not rounded).
    """
    expected = reference(A, G, factors)
    most = reference(A.abs(), G.abs(), factors.abs())
    unit = 2**-15 if A.dtype == torch.bfloat16 and A.shape[-2] < weight_gradient.BY_SAMPLE else 0
    unit += (A.shape[0] * A.shape[-2] + 8) * 2**-24
    for result, right, size in zip((weight, bias), expected, most, strict=True):
        assert result.dtype == torch.float32
        error = (result.double() - right).abs()
        assert (error <= unit * size + already * 2**-22).all(), (error / size).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_values(device, dtype, sizes):
    A, G, factors = inputs(device, *sizes, dtype)
    check(A, G, factors, *clipped_weight_gradient(A, G, factors, True))


def test_without_bias(device):
    A, G, factors = inputs(device, 3, 33, 5, 6, torch.float32)
    weight, bias = clipped_weight_gradient(A, G, factors, False)
    assert bias.shape == (0,)
    assert torch.equal(weight, clipped_weight_gradient(A, G, factors, True)[0])


@pytest.mark.parametrize("T", [4, 33])
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_added(device, T, splits):
    """Added to what is there, in one part or in several; of three parts the last has no samples."""
    A, G, factors = inputs(device, 4, T, 21, 18, torch.bfloat16)
    weight, bias = torch.ones(18, 21, device=device), torch.ones(18, device=device)
    shape = (16, 16, 16) if weight_gradient.INTERPRETED else (64, 64, 64)
    weight_gradient.run(A, G, factors, weight, bias, add=True, config=Config(*shape, 8, 3, splits))
    check(A, G, factors, weight - 1, bias - 1, already=1)


@pytest.mark.parametrize("T", [4, 33])
def test_groups(device, T):
    """Of a convolution in groups; inputs whose rows are columns in memory."""
    A = torch.randn(3, 2, 9, T, device=device).transpose(2, 3)
    G = torch.randn(3, 2, 7, T, device=device).transpose(2, 3)
    factors = torch.rand(3, 2, device=device)[:, 0]
    check(A, G, factors, *clipped_weight_gradient(A, G, factors, True))


@pytest.mark.parametrize("T", [4, 33])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_far_apart(device, far_apart, T, dim):
    A, G, factors = inputs(device, 3, T, 19, 18, torch.float16)
    apart = clipped_weight_gradient(far_apart(A, dim), far_apart(G, dim), factors, True)
    check(A, G, factors, *apart)


@pytest.mark.parametrize("T", [4, 33])
def test_two_dtypes(device, T):
    A, G, factors = inputs(device, 3, T, 9, 7, torch.float32)
    check(A, G.bfloat16(), factors, *clipped_weight_gradient(A, G.bfloat16(), factors, True))


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (3, 0, 4, 3), (3, 5, 0, 3), (3, 5, 4, 0), (3, 40, 0, 3)])
def test_empty(device, sizes):
    A, G, factors = inputs(device, *sizes, torch.float32)
    check(A, G, factors, *clipped_weight_gradient(A, G, factors, True))


@pytest.mark.parametrize("T", [4, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_left_out(device, T, dtype):
    """A sample of factor 0 leaves no trace, whatever it holds: the sum is that without it, to the bit."""
    A, G, factors = inputs(device, 5, T, 9, 7, dtype)
    before = clipped_weight_gradient(A, G, factors, True)
    A[1], G[1] = float("nan"), float("inf")
    after = clipped_weight_gradient(A, G, factors, True)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("T", [4, 33])
def test_ops(device, T):
    A, G, factors = inputs(device, 3, T, 9, 7, torch.float32)
    torch.library.opcheck(clipped_weight_gradient, (A, G, factors, True))
    weight, bias = torch.zeros(7, 9, device=device), torch.zeros(7, device=device)
    torch.library.opcheck(clipped_weight_gradient_, (A, G, factors, weight, bias))
    torch.library.opcheck(clipped_weight_gradient_, (A, G, factors, weight, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(30, 513, 1040, 272), (30, 512, 333, 50), (300, 1, 1024, 256), (30, 7, 1024, 256)])
def test_large_tiles(gpu, dtype, sizes):
    A, G, factors = inputs(gpu, *sizes, dtype)
    check(A, G, factors, *clipped_weight_gradient(A, G, factors, True))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [4, 33])
def test_captured(gpu, replayed, T):
    A, G, factors = inputs(gpu, 3, T, 9, 7, torch.float32)
    check(A, G, factors, *replayed(lambda: clipped_weight_gradient(A, G, factors, True)))
