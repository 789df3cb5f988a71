"""Clipped weight gradients against sums over samples in float64."""

import pytest
import torch
from dpfast_kernels import weight_gradient
from dpfast_kernels.weight_gradient import Config, clipped_weight_gradient

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


def check(A, G, factors, weight, bias):
    """A float32 rounding a term, and two a sample; or two bfloat16 roundings of a row (cut off by the interpreter, not
    rounded).
    """
    expected = reference(A, G, factors)
    most = reference(A.abs(), G.abs(), factors.abs())
    unit = 2**-15 if A.dtype == torch.bfloat16 and A.shape[-2] < weight_gradient.BY_SAMPLE else 0
    unit += (A.shape[0] * (A.shape[-2] + 2) + 8) * 2**-24
    for result, right, size in zip((weight, bias), expected, most, strict=True):
        assert result.dtype == torch.float32
        error = (result.double() - right).abs()
        assert (error <= unit * size).all(), (error / size).max()


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
def test_splits(device, T, splits):
    """In one part or in several; of three the last has no samples. Nothing that was in memory stays."""
    A, G, factors = inputs(device, 4, T, 21, 18, torch.bfloat16)
    weight, bias = torch.full((18, 21), torch.nan, device=device), torch.full((18,), torch.nan, device=device)
    shape = (16, 16, 16) if weight_gradient.INTERPRETED else (64, 64, 64)
    weight_gradient.run(A, G, factors, weight, bias, Config(*shape, 8, 3, splits))
    check(A, G, factors, weight, bias)


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


def apart(device, factors, T=32):
    """Ones in one sample's own column each, so that what becomes of every one of them is seen: A, G and factors."""
    B = len(factors)
    A = torch.eye(B, device=device)[:, None].expand(B, T, B) / T
    return A.contiguous(), torch.ones(B, T, 1, device=device), torch.tensor(factors, dtype=torch.float32, device=device)


GROWING = [1 + 2.0**-20 * k for k in range(40)]
FACTORS = {
    "alike": [0.7] * 9,
    "two in turn": [0.9, 0.013] * 9,
    "zeros": [0.0, 0.0, 0.3, 0.0, 0.7, 0.0, 0.0],
    "all zero": [0.0] * 5,
    "near one another": GROWING,
    "falling": GROWING[::-1],
    "far apart": [1.0, 2.0**-60, 2.0**50, 3e-10, 2.0**50, 2.0**-60],
    "subnormal": [1e-40, 3e-42, 2e-41],
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_contribution(device, name, splits):
    """Each sample adds its own factor times its gradient, to within the roundings that its norm is raised by."""
    A, G, factors = apart(device, FACTORS[name])
    B = len(factors)
    weight = torch.full((1, B), torch.nan, device=device)
    shape = (32, 16, 16) if weight_gradient.INTERPRETED else (64, 64, 64)
    weight_gradient.run(A, G, factors, weight, None, Config(*shape, 4, 1, splits))
    error = (weight[0].double() - factors.double()).abs()
    assert (error <= (B + 2) * 2**-24 * factors.double() + 2**-149).all(), error / factors


@pytest.mark.parametrize("factors", [[1e-38, 1.0, 2.0**100], [2.0**100, 1e-38, 1.0], [1.0, 1e-40, 2.0**100, 1e-40]])
def test_ratios_that_are_no_numbers(device, factors):
    """A sample before a ratio that float32 has no number for is lost at most: none is more than its part, or NaN."""
    A, G, factors = apart(device, factors)
    weight, _ = clipped_weight_gradient(A, G, factors, False)
    assert weight.isfinite().all() and (weight >= 0).all()
    assert (weight[0].double() <= factors.double() * (1 + 6 * 2**-24)).all()


def test_many_samples(device):
    """One of 512, whose elements are rounded the same way after each of the others; 513 have two accumulators."""
    B, T = weight_gradient.RUN, 32
    A, G = torch.zeros(B, T, 8, device=device), torch.ones(B, T, 1, device=device)
    A[0, 0] = 1 + torch.rand(8, device=device)
    factors = 1 + torch.arange(B, device=device) * 2.0**-23 * 90
    weight = torch.empty(1, 8, device=device)
    shape = (32, 16, 16) if weight_gradient.INTERPRETED else (64, 64, 64)
    weight_gradient.run(A, G, factors, weight, None, Config(*shape, 4, 1, 1))
    off = (weight.double() / A[0, 0].double() - 1).abs().max() * 2**24
    assert 8 < off <= weight_gradient.SCALING_UNITS, f"{off} units"
    configured = [
        weight_gradient.configure(B, 1, T, 9, 9, torch.bfloat16, False, weight_gradient.chip(A.device)).splits
        for B in (513, 1025)
    ]
    assert configured[0] >= 2 and configured[1] >= 3


@pytest.mark.parametrize("T", [4, 33])
def test_ops(device, T):
    A, G, factors = inputs(device, 3, T, 9, 7, torch.float32)
    torch.library.opcheck(clipped_weight_gradient, (A, G, factors, True))


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
