"""Sums over positions and normalised sums against float64, one sample at a time."""

import pytest
import torch
from dpfast_kernels.normalization import (
    Config,
    channel_sums,
    join_slices,
    normalised_sums,
    slices_of,
    sum_positions,
    sums_with,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one tile or less; several of each; so few programs that T is cut in slices; nothing at all
SHAPES = [(3, 1, 5), (2, 19, 37), (1, 129, 17), (2, 300, 3), (0, 4, 5), (2, 0, 5), (2, 4, 0)]


def inputs(shape, dtype, device, groups=None):
    B, T, _ = shape
    G, x = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    mean = torch.randn(B, groups or T, device=device)
    return G, x + 3, mean, torch.rand(B, groups or T, device=device) + 0.5


def check(result, expected, terms):
    """Sums of ``terms`` [B, T, d] err by at most a few units of Σ_t |term|; the norms are of the sums as written."""
    samples, squared = result
    assert samples.dtype == squared.dtype == torch.float32
    assert samples.shape == expected.shape and squared.shape == expected.shape[:1]
    bound = (terms.shape[1] / 8 + 8) * 2**-24 * terms.abs().sum(1)
    assert ((samples - expected).abs() <= bound).all()
    written = samples.double().square().sum(1)
    assert ((squared - written).abs() <= 16 * 2**-24 * written).all()


def test_some_shapes_are_cut():
    assert slices_of(129, 2, 8) > 1 and slices_of(19, 6, 8) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_positions(shape, dtype, device):
    G = torch.randn(shape, device=device).to(dtype)
    wide = G.double()
    check(sum_positions(G), wide.sum(1), wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_normalised_sums(shape, centred, dtype, device):
    G, x, mean, rstd = inputs(shape, dtype, device)
    result = normalised_sums(G, x, mean if centred else None, rstd)
    wide = x.double() - (mean.double().unsqueeze(2) if centred else 0)
    terms = G.double() * wide * rstd.double().unsqueeze(2)
    magnitude = G.double() * (x.double().abs() + mean.abs().unsqueeze(2)) * rstd.double().unsqueeze(2)
    check(result[:2], terms.sum(1), magnitude)
    check(result[2:], G.double().sum(1), G.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 1), (3, 12, 35), (1, 6, 260), (0, 6, 4), (2, 6, 0)])
def test_channel_sums(shape, dtype, device):
    G, x, mean, rstd = inputs(shape, dtype, device, groups=3)
    result = channel_sums(G, x, mean, rstd)
    mean, rstd = (side.repeat_interleave(shape[1] // 3, 1).unsqueeze(2).double() for side in (mean, rstd))
    terms = G.double() * (x.double() - mean) * rstd
    magnitude = G.double() * (x.double().abs() + mean.abs()) * rstd
    check(result[:2], terms.sum(2), magnitude.transpose(1, 2))
    check(result[2:], G.double().sum(2), G.double().transpose(1, 2))


def test_views_and_mixed_dtypes(device):
    G, x, mean, rstd = inputs((40, 3, 18), torch.float32, device)
    G, x = G.transpose(0, 1)[:, 1:, ::2], x.to(torch.bfloat16).permute(1, 0, 2)[:, 1:, 9:]
    mean, rstd = (side.t()[:, 1:] for side in (mean, rstd))
    for result, copied in zip(
        normalised_sums(G, x, mean, rstd),
        normalised_sums(*(side.contiguous() for side in (G, x, mean, rstd))),
        strict=True,
    ):
        assert torch.equal(result, copied)


def test_no_sample_reaches_another(device):
    G, x, mean, rstd = inputs((3, 150, 20), torch.bfloat16, device)
    clean = normalised_sums(G, x, mean, rstd)
    G[1, 3, 2], x[1, 149, 19], mean[1, 0], rstd[1, 7] = torch.nan, torch.inf, -torch.inf, torch.nan
    spoiled = normalised_sums(G, x, mean, rstd)
    for before, after in zip(clean, spoiled, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not after[1].isfinite().all()


def test_blocks_do_not_matter_much(device):
    G = torch.randn(2, 70, 40, device=device)
    for config in (Config(16, 64, 4, 1), Config(1, 8, 1, 1)):
        check(sums_with(G, config=config), G.double().sum(1), G.double())


def test_join_slices(device):
    partials = torch.randn(5, 3, 70, device=device)
    check(join_slices(partials), partials.double().sum(0), partials.double().transpose(0, 1))


def test_ops(device):
    G, x, mean, rstd = inputs((2, 6, 5), torch.float32, device)
    torch.library.opcheck(sum_positions, (G,))
    torch.library.opcheck(normalised_sums, (G, x, mean, rstd))
    torch.library.opcheck(normalised_sums, (G, x, None, rstd))
    torch.library.opcheck(channel_sums, (G, x, mean[:, :2], rstd[:, :2]))
