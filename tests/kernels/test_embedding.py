"""Embedding norms, clipped sums and the tied head's cross-term against float64, one sample at a time."""

import math

import pytest
import torch
from dpfast_kernels import embedding
from dpfast_kernels.embedding import Tiles, choose, embedding_squared_norm, norm_from_pairs, norm_from_runs
from dpfast_kernels.embedding_cross_term import cross_term_with, embedding_cross_term
from dpfast_kernels.embedding_sum import embedding_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = {"pairs": norm_from_pairs, "runs": norm_from_runs}
# (B, T, d, vocabulary): all ids different or the same, runs over several pieces, T and d of no tile's size
SHAPES = [(2, 1, 5, 3), (3, 19, 37, 1000), (2, 21, 17, 3), (2, 50, 3, 1), (0, 4, 5, 9), (2, 0, 5, 9), (2, 4, 0, 9)]


def inputs(B, T, d, V, dtype, device):
    return torch.randint(V, (B, T), device=device), torch.randn(B, T, d, device=device).to(dtype)


def gradients(ids, G, V):
    """Float64 ``[B, V, d]``."""
    out = torch.zeros(len(ids), V, G.shape[2], dtype=torch.float64, device=G.device)
    for g, row, sample in zip(out, ids, G.double(), strict=True):
        for v, value in zip(row.tolist(), sample, strict=True):
            g[v] += value
    return out


def units(d):
    return math.sqrt(d) + d / 32 + 8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_squared_norm(shape, dtype, way, device):
    ids, G = inputs(*shape, dtype, device)
    squared, absolute = WAYS[way](ids, G)
    expected = gradients(ids, G, shape[3]).square().sum((1, 2))
    assert squared.dtype == absolute.dtype == torch.float32 and squared.shape == absolute.shape == expected.shape
    assert ((squared - expected).abs() <= (units(shape[2]) * absolute + 8 * expected) * 2**-24).all()


@pytest.mark.parametrize("way", WAYS)
def test_what_cancels_is_within_the_bound(way, device):
    G = torch.randn(3, 40, 24, device=device)
    G[:, 20:] = -G[:, :20] * (1 + 1e-6 * torch.rand(3, 20, 1, device=device))
    ids = torch.zeros(3, 40, dtype=torch.int64, device=device)
    squared, absolute = WAYS[way](ids, G)
    expected = gradients(ids, G, 1).square().sum((1, 2))
    assert (expected < 1e-3 * G.double().square().sum((1, 2))).all()
    assert ((squared - expected).abs() <= (units(24) * absolute + 8 * expected) * 2**-24).all()


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_views(way, device):
    whole = torch.randn(30, 6, 40, device=device)
    ids, G = torch.randint(5, (30, 3), device=device).t(), whole.transpose(0, 1)[::2, :, 5:22]
    for view, copied in zip(WAYS[way](ids, G), WAYS[way](ids.contiguous(), G.contiguous()), strict=True):
        assert torch.equal(view, copied)


@pytest.mark.parametrize("way", WAYS)
def test_no_sample_reaches_another(way, device):
    ids, G = inputs(3, 30, 20, 4, torch.bfloat16, device)
    clean = WAYS[way](ids, G)
    G[1, 3, 2], G[1, 29, 19] = torch.nan, torch.inf
    for before, after in zip(clean, WAYS[way](ids, G), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not after[1].isfinite()


def test_tiles_do_not_matter_much(device):
    ids, G = inputs(2, 70, 33, 6, torch.float32, device)
    expected = gradients(ids, G, 6).square().sum((1, 2))
    squared, absolute = norm_from_pairs(ids, G, Tiles(32, 16, 4, 1))
    assert ((squared - expected).abs() <= (units(33) * absolute + 8 * expected) * 2**-24).all()


def test_choice():
    assert choose(64, 16, 64, torch.bfloat16) == "pairs"
    assert choose(64, 4096, 4096, torch.bfloat16) == choose(64, 4096, 4096, torch.float32) == "runs"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum(shape, dtype, device):
    ids, G = inputs(*shape, dtype, device)
    factors = torch.rand(shape[0], device=device)
    table = embedding_sum(ids, G, factors, shape[3])
    terms = gradients(ids, G, shape[3]) * factors.double().view(-1, 1, 1)
    magnitude = (gradients(ids, G.abs(), shape[3]) * factors.double().view(-1, 1, 1)).sum(0)
    assert table.dtype == torch.float32 and table.shape == (shape[3], shape[2])
    assert ((table - terms.sum(0)).abs() <= (ids.numel() / 8 + 8) * 2**-24 * magnitude).all()


@pytest.mark.parametrize("V", [1, 2, 7])
def test_sum_of_long_runs(V, device):
    """Runs of many pieces, that begin and end anywhere in them; the same bits in every call."""
    ids, G = inputs(3, 9 * embedding.PIECE + 5, 5, V, torch.float32, device)
    factors = torch.rand(3, device=device)
    table = embedding_sum(ids, G, factors, V + 1)
    expected = (gradients(ids, G, V + 1) * factors.double().view(-1, 1, 1)).sum(0)
    assert torch.allclose(table.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(table, embedding_sum(ids, G, factors, V + 1))


def test_sum_leaves_out_factor_zero(device):
    ids, G = inputs(4, 25, 18, 5, torch.bfloat16, device)
    factors = torch.tensor([1, 0, 0.25, 0], device=device)
    clean = embedding_sum(ids[::2], G[::2], factors[::2], 5)
    G[1], G[3] = torch.nan, torch.inf
    assert torch.allclose(embedding_sum(ids, G, factors, 5), clean, rtol=1e-5, atol=1e-5)
    assert (embedding_sum(ids, G, 0 * factors, 5) == 0).all()


def test_sum_of_views(device):
    ids, G = inputs(6, 11, 20, 5, torch.float32, device)
    ids, G, factors = ids.t()[::2], G.transpose(0, 1)[::2, :, 3:], torch.rand(12, device=device)[::2]
    copies = (side.contiguous() for side in (ids, G, factors))
    assert torch.equal(embedding_sum(ids, G, factors, 5), embedding_sum(*copies, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 5, 4), (3, 19, 35, 37, 50), (1, 40, 3, 17, 9), (0, 3, 3, 5, 9), (2, 0, 3, 5, 9)]
)
def test_cross_term(shape, dtype, device):
    B, T, S, d, V = shape
    ids, E = inputs(B, T, d, V, dtype, device)
    A, G = torch.randn(B, S, d, device=device).to(dtype), torch.randn(V, B, S, device=device).to(dtype).permute(1, 2, 0)
    term, absolute = embedding_cross_term(ids, E, A, G)
    head = torch.einsum("bsv,bsd->bvd", G.double(), A.double())
    expected = (head * gradients(ids, E, V)).sum((1, 2))
    assert term.dtype == absolute.dtype == torch.float32 and term.shape == absolute.shape == (B,)
    lengths = torch.einsum("bs,bt->bst", A.double().norm(dim=2), E.double().norm(dim=2))
    gathered = torch.stack([g[:, row] for g, row in zip(G.double(), ids, strict=True)]) if B else lengths
    reach = (lengths * gathered.abs()).sum((1, 2))
    assert ((term - expected).abs() <= 2**-24 * units(d) * absolute).all()
    torch.testing.assert_close(absolute.double(), reach, rtol=1e-5, atol=0)


def test_cross_term_contained(device):
    ids, E = inputs(3, 20, 18, 7, torch.float32, device)
    A, G = torch.randn(3, 20, 18, device=device), torch.randn(3, 20, 7, device=device).to(torch.bfloat16)
    clean = embedding_cross_term(ids, E, A, G)
    A[1, 19, 17] = torch.nan
    for before, after in zip(clean, embedding_cross_term(ids, E, A, G), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]]) and after[1].isnan()
    other, _ = cross_term_with(ids[::2], E[::2], A[::2], G[::2], Tiles(32, 32, 4, 1))
    assert torch.allclose(other, clean[0][::2], rtol=1e-4, atol=1e-4)


def test_ops(device):
    ids, G = inputs(2, 5, 6, 4, torch.float32, device)
    torch.library.opcheck(embedding_squared_norm, (ids, G))
    torch.library.opcheck(embedding_sum, (ids, G, torch.rand(2, device=device), 4))
    torch.library.opcheck(embedding_cross_term, (ids, G, G, torch.randn(2, 5, 4, device=device)))
