"""Weighted sums and squared norms of many tensors against float64, one sample at a time."""

import pytest
import torch
from dpfast_kernels import weighted_sum
from dpfast_kernels.weighted_sum import squared_norms, weighted_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# aligned and not, smaller and larger than a block, a scalar, an empty one; more tensors than one launch takes
SHAPES = [(32,), (7, 5), (), (3, 0), (4, 4, 4), (300,), (16,), (2, 33), (48, 2), (1,)]


def tensors(B, device, dtypes=DTYPES):
    return [torch.randn(B, *shape, device=device).to(dtype) for dtype in dtypes for shape in SHAPES]


def check_sums(sums, samples, factors):
    """Float32 sums err by at most a few units of Σ_i |factor_i g_i|, more where more samples are added."""
    assert len(sums) == len(samples)
    for k, (total, g) in enumerate(zip(sums, samples, strict=True)):
        row = (factors if factors.dim() == 1 else factors[k]).double()
        terms = [f * g_i.double() for f, g_i in zip(row, g, strict=True) if f != 0]
        expected = sum(terms, torch.zeros(g.shape[1:], dtype=torch.float64, device=g.device))
        magnitude = sum((term.abs() for term in terms), torch.zeros_like(expected))
        assert total.dtype == torch.float32 and total.shape == g.shape[1:]
        assert ((total - expected).abs() <= (len(g) / 8 + 8) * 2**-24 * magnitude).all()


@pytest.mark.parametrize("B", [0, 1, 3])
def test_weighted_sums(B, device):
    samples, factors = tensors(B, device), torch.rand(B, device=device)
    check_sums(weighted_sums(samples, factors), samples, factors)


def test_second_launch(device):
    B = 2 * weighted_sum.ROWS + 3
    samples, factors = (
        [torch.randn(B, 48, device=device), torch.randn(B, 5, device=device)],
        torch.rand(B, device=device),
    )
    check_sums(weighted_sums(samples, factors), samples, factors)


def test_factors_of_each_tensor(device):
    samples = tensors(5, device)
    factors = torch.rand(len(samples), 10, device=device)[:, ::2]
    check_sums(weighted_sums(samples, factors), samples, factors)


def test_views(device):
    whole = torch.randn(9, 4, 40, device=device)
    samples, factors = [whole.transpose(0, 1), whole[1:5, :, 3:], whole[:4, 0, 1]], torch.rand(4, device=device)
    check_sums(weighted_sums(samples, factors), samples, factors)
    assert torch.equal(squared_norms(samples), squared_norms([side.contiguous() for side in samples]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_zero_leaves_out(dtype, device):
    samples = tensors(4, device, [dtype])
    factors = torch.tensor([0.5, 0, 1, 0], device=device)
    for g in samples:
        g[1], g[3] = torch.nan, torch.inf
    check_sums(weighted_sums(samples, factors), samples, factors)
    check_sums(weighted_sums(samples, torch.zeros_like(factors)), samples, torch.zeros_like(factors))


@pytest.mark.parametrize("B", [1, 4])
def test_squared_norms(B, device):
    samples = [*tensors(B, device), torch.randn(B, 3 * weighted_sum.PIECE + 5, device=device)]
    squared = squared_norms(samples)
    expected = torch.stack([g.double().reshape(B, g[0].numel()).square().sum(1) for g in samples])
    assert squared.dtype == torch.float32 and squared.shape == (len(samples), B)
    assert ((squared - expected).abs() <= 8 * 2**-24 * expected).all()


def test_squared_norms_of_no_samples(device):
    assert squared_norms(tensors(0, device)).shape == (3 * len(SHAPES), 0)


def test_no_sample_reaches_another(device):
    samples = tensors(3, device)
    clean = squared_norms(samples)
    for g in samples:
        g[1] = torch.nan
    spoiled = squared_norms(samples)
    assert torch.equal(clean[:, [0, 2]], spoiled[:, [0, 2]])
    assert torch.equal(spoiled[:, 1].isnan(), torch.tensor([g[1].numel() > 0 for g in samples], device=device))


def test_ops(device):
    samples, factors = (
        [torch.randn(3, 16, device=device), torch.randn(3, 2, 3, device=device)],
        torch.rand(3, device=device),
    )
    torch.library.opcheck(weighted_sums, (samples, factors))
    torch.library.opcheck(squared_norms, (samples,))
