"""Norms of tiles of G_nᵀA_n, and the tiles stored, against float64."""

import pytest
import torch
from dpfast_kernels import sample_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """[N, p, d] in float64, one sample at a time."""
    each = [g.T @ a for a, g in zip(A.double(), G.double(), strict=True)]
    return torch.stack(each) if each else torch.zeros(0, G.shape[2], A.shape[2], dtype=torch.float64, device=A.device)


def inputs(device: str, N: int, T: int, d: int, p: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, T, d, device=device).to(dtype), torch.randn(N, T, p, device=device).to(dtype)


def check_norm(A: torch.Tensor, G: torch.Tensor) -> None:
    check_stats(A, G, sample_gradients.gradient_norm(A, G))


def check_stats(A: torch.Tensor, G: torch.Tensor, stats: torch.Tensor) -> None:
    """Each sum is off by at most a float32 rounding a term, of terms as large as can be."""
    assert stats.dtype == torch.float32
    squared = gradients(A, G).square().sum((1, 2))
    energy_A, energy_G = A.double().square().sum((1, 2)), G.double().square().sum((1, 2))
    product = energy_A * energy_G
    error = (stats.double() - torch.stack([squared, squared, energy_A, energy_G])).abs()
    limit = (2 * A.shape[1] + 32) * 2**-24 * torch.stack([product, product, energy_A, energy_G])
    assert (error <= limit).all(), error / limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 37, 41, 18), (2, 64, 16, 50), (5, 1, 7, 3), (1, 17, 33, 1)])
def test_norm(device, dtype, sizes):
    check_norm(*inputs(device, *sizes, dtype))


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (3, 0, 4, 3), (3, 5, 0, 3), (3, 5, 4, 0)])
def test_norm_of_nothing(device, sizes):
    """The side that has elements has its energy all the same."""
    check_norm(*inputs(device, *sizes, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 37, 41, 18), (4, 1, 7, 3)])
def test_samples(device, dtype, stored, sizes):
    A, G = inputs(device, *sizes, dtype)
    check_samples(A, G, stored, *sample_gradients.sample_gradients(A, G, stored))


def check_samples(A, G, stored, samples, squared):
    assert samples.dtype == stored
    expected = gradients(A, G)
    terms = gradients(A.abs(), G.abs())
    rounding = 0 if stored == torch.float32 else 2**-7  # the interpreter cuts off where a GPU rounds
    error = (samples.double() - expected).abs()
    assert (error <= rounding * expected.abs() + (A.shape[1] + 2) * 2**-24 * terms).all()
    # the norm of what was stored
    torch.testing.assert_close(squared.double(), samples.double().square().sum((1, 2)), rtol=2**-19, atol=0)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3), (3, 0, 4, 3), (3, 5, 0, 3), (3, 5, 4, 0)])
def test_samples_of_nothing(device, sizes):
    A, G = inputs(device, *sizes, torch.float32)
    samples, squared = sample_gradients.sample_gradients(A, G, torch.bfloat16)
    assert samples.shape == (sizes[0], sizes[3], sizes[2])
    assert not samples.any()
    assert torch.equal(squared, torch.zeros(sizes[0], device=device))


def test_strides(device):
    """Transposed, sliced and expanded views; two dtypes."""
    A = torch.randn(20, 3, 22, device=device)[:, :, ::2].transpose(0, 1)
    G = torch.randn(1, 6, 40, device=device).bfloat16().expand(3, 6, 40)[:, :, 1::2].transpose(1, 2)
    check_norm(A, G)
    samples, _ = sample_gradients.sample_gradients(A, G, torch.float32)
    torch.testing.assert_close(samples.double(), gradients(A, G), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_far_apart(device, far_apart, dim):
    A, G = inputs(device, 3, 17, 17, 17, torch.float16)
    check_norm(far_apart(A, dim), far_apart(G, dim))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_sample_alone(device, value):
    """What is not finite in one sample changes no bit of another's."""
    A, G = inputs(device, 3, 20, 9, 5, torch.float32)
    before = sample_gradients.gradient_norm(A, G), *sample_gradients.sample_gradients(A, G, torch.float32)
    A[1, 19, 8] = value
    G[1, 19, 4] = value
    after = sample_gradients.gradient_norm(A, G), *sample_gradients.sample_gradients(A, G, torch.float32)
    assert not after[0][:, 1].isfinite().any()
    assert not after[2][1].isfinite()
    for x, y in zip((before[0].T, *before[1:]), (after[0].T, *after[1:]), strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])


def test_ops(device):
    A, G = inputs(device, 2, 20, 9, 5, torch.float32)
    torch.library.opcheck(sample_gradients.gradient_norm, (A, G))
    torch.library.opcheck(sample_gradients.sample_gradients, (A, G, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(30, 513, 1040, 272), (30, 512, 333, 50), (1, 512, 1024, 256)])
def test_large_tiles(gpu, dtype, sizes):
    A, G = inputs(gpu, *sizes, dtype)
    check_norm(A, G)
    check_samples(A, G, torch.bfloat16, *sample_gradients.sample_gradients(A, G, torch.bfloat16))


@pytest.mark.gpu
def test_captured(gpu, replayed):
    A, G = inputs(gpu, 3, 20, 9, 5, torch.float32)
    assert torch.equal(replayed(lambda: sample_gradients.gradient_norm(A, G)), sample_gradients.gradient_norm(A, G))
    check_samples(A, G, torch.float32, *replayed(lambda: sample_gradients.sample_gradients(A, G, torch.float32)))
