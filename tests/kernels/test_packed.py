"""Kernels on the segments of packed rows, each against the sample alone in float64."""

import pytest
import torch
from dpfast_kernels import common, packed_ghost, sample_gradients, weight_gradient
from dpfast_kernels.segments import Segments

from tests.kernels import test_ghost, test_sample_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AWKWARD = [1, 15, 0, 16, 129, 2, 17, 0, 1]
LENGTHS = [[0, 0], [], [40], [3, 33]]


def rows(device, lengths, dtype=torch.float32, d=21, p=18, gap=0):
    """A [1, R, d] and G [1, R, p], NaN in ``gap`` positions before each segment and at the end; and the segments."""
    bounds, end = [], 0
    for n in lengths:
        bounds.append((end + gap, end + gap + n))
        end = bounds[-1][1]
    A, G = (torch.full((1, end + gap, n), torch.nan, device=device) for n in (d, p))
    for first, end in bounds:
        A[0, first:end], G[0, first:end] = torch.randn(end - first, d), torch.randn(end - first, p)
    return A.to(dtype), G.to(dtype), Segments(bounds)


def alone(A, G, segments):
    return [(A[:, first:end], G[:, first:end]) for first, end in segments.bounds]


def check_norms(A, G, segments):
    """Ghost norms and norm-GEMM of each segment."""
    ghosts, gemms = packed_ghost.packed_ghost_norms([A], [G], segments)[0], norm_gemm(A, G, segments)
    for stats, check in ((ghosts.float(), test_ghost.check), (gemms, test_sample_gradients.check_stats)):
        assert stats.shape == (4, len(segments)) and stats.isfinite().all()
        for n, (a, g) in enumerate(alone(A, G, segments)):
            check(a, g, stats[:, n : n + 1])


def norm_gemm(A, G, segments):
    return sample_gradients.packed_gradient_norm(A, G, segments)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""

    def filled(made):
        return lambda *args, **kw: (x := made(*args, **kw)).fill_(torch.nan if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(device, dtype):
    A, G, segments = rows(device, AWKWARD, dtype)
    check_norms(A, G, segments)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_few_segments(device, lengths):
    A, G, segments = rows(device, lengths)
    check_norms(A, G, segments)


def test_positions_of_nobody(device):
    """Padding is not read, whatever it holds: before, between and behind segments."""
    A, G, segments = rows(device, [5, 17, 1], gap=3)
    check_norms(A, G, segments)
    factors = torch.tensor([0.5, 0.0, 2.0], device=device)
    summed = weight_gradient.packed_clipped_weight_gradient(A, G, factors, segments)
    check_sum(A, G, factors, segments, summed)


def test_one_segment_alone(device):
    """What is not finite in one segment changes no bit of another's."""
    A, G, segments = rows(device, [20, 3, 18])

    def all_of_them():
        samples, squares = sample_gradients.packed_sample_gradients(A, G, torch.float32, segments)
        stats = packed_ghost.packed_ghost_norms([A], [G], segments)[0], norm_gemm(A, G, segments)
        return [*(each.T for each in stats), samples, squares]

    before = all_of_them()
    A[0, 21, 3], G[0, 22, 1] = torch.nan, torch.inf
    after = all_of_them()
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]]) and not y[1].isfinite().all()


def test_each_segment_alone_to_the_bit(device):
    """Others beside it change nothing: what a sample's norm is raised by, and its factor, do not depend on them."""
    A, G, segments = rows(device, [20, 3, 18])
    whole = packed_ghost.packed_ghost_norms([A], [G], segments)[0], norm_gemm(A, G, segments)
    for n, (a, g) in enumerate(alone(A, G, segments)):
        own = Segments([(0, a.shape[1])])
        for stats, single in zip(
            whole, (packed_ghost.packed_ghost_norms([a], [g], own)[0], norm_gemm(a, g, own)), strict=True
        ):
            assert torch.equal(stats[:, n], single[:, 0])


def test_layers_on_one_input(device):
    A, G, segments = rows(device, [20, 3, 33])
    other = torch.randn_like(A)
    found = packed_ghost.packed_ghost_norms([A, other, A], [G, G, G.flip(1)], segments)
    for A_k, G_k, stats in zip([A, other, A], [G, G, G.flip(1)], found, strict=True):
        assert torch.equal(stats, packed_ghost.packed_ghost_norms([A_k], [G_k], segments)[0])


def test_pairs_of_one_segment_alone():
    """As many programs as there are pairs of tiles within segments: T² of a row is nowhere."""
    segments = Segments([(0, 16), (16, 49), (49, 49), (49, 50)])
    assert segments.pairs(16) == [1, 6, 0, 1]
    owners, firsts = segments.owners(16, torch.device("cpu"))
    assert owners.tolist() == [0, *[1] * 6, 3] and firsts.tolist() == [0, 1, 7, 7, 8]


@pytest.mark.parametrize(
    "dtype, stored", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_samples(device, dtype, stored):
    A, G, segments = rows(device, [1, 17, 0, 16], dtype)
    samples, squares = sample_gradients.packed_sample_gradients(A, G, stored, segments)
    for n, (a, g) in enumerate(alone(A, G, segments)):
        test_sample_gradients.check_samples(a, g, stored, samples[n : n + 1], squares[n : n + 1])


def check_sum(A, G, factors, segments, summed):
    right, size = torch.zeros(2, *summed.shape, dtype=torch.float64, device=A.device)
    for factor, (a, g) in zip(factors.double(), alone(A, G, segments), strict=True):
        if factor:
            right += factor * (g[0].double().T @ a[0].double())
            size += factor * (g[0].double().abs().T @ a[0].double().abs())
    positions = sum(segments.lengths)
    assert summed.dtype == torch.float32
    assert ((summed.double() - right).abs() <= (positions + 4 * len(segments) + 8) * 2**-24 * size).all()


@pytest.mark.parametrize(
    "lengths, dtype", [*((AWKWARD, dtype) for dtype in DTYPES), *((its, torch.float32) for its in LENGTHS)]
)
def test_clipped_sums(device, lengths, dtype):
    A, G, segments = rows(device, lengths, dtype)
    factors = 10.0 ** torch.linspace(-6, 0, len(lengths), device=device)
    factors[1::4] = 0
    summed = weight_gradient.packed_clipped_weight_gradient(A, G, factors, segments)
    check_sum(A, G, factors, segments, summed)


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_splits(device, splits):
    """Of three, the last has no segments."""
    A, G, segments = rows(device, [20, 3, 33, 1], torch.bfloat16)
    factors = torch.tensor([0.5, 1e-3, 2.0, 0.9], device=device)
    weight = torch.full((18, 21), torch.nan, device=device)
    shape = (16, 16, 16) if common.INTERPRETED else (64, 64, 64)
    config = weight_gradient.Config(*shape, 8, 3, splits)
    weight_gradient.run(A, G, factors, weight, None, config, segments=segments)
    check_sum(A, G, factors, segments, weight)


def test_left_out(device):
    """A segment of factor 0 leaves no trace, whatever it holds."""
    A, G, segments = rows(device, [20, 18, 3])
    factors = torch.tensor([0.5, 0.0, 2.0], device=device)
    before = weight_gradient.packed_clipped_weight_gradient(A, G, factors, segments)
    A[0, 20:38], G[0, 20:38] = torch.nan, torch.inf
    assert torch.equal(before, weight_gradient.packed_clipped_weight_gradient(A, G, factors, segments))


@pytest.mark.parametrize("dim", [1, 2])
def test_far_apart(device, far_apart, dim):
    A, G, segments = rows(device, [5, 17, 1], torch.float16, d=17, p=17)
    A, G = far_apart(A, dim), far_apart(G, dim)
    check_norms(A, G, segments)
    factors = torch.tensor([0.5, 0.1, 2.0], device=device)
    check_sum(A, G, factors, segments, weight_gradient.packed_clipped_weight_gradient(A, G, factors, segments))


def test_strides(device):
    """Columns of a wider tensor, and two dtypes."""
    A, G, segments = rows(device, [20, 3], d=42, p=18)
    A, G = A[:, :, ::2], G.bfloat16()
    check_norms(A, G, segments)
    factors = torch.tensor([0.5, 0.1], device=device)
    check_sum(A, G, factors, segments, weight_gradient.packed_clipped_weight_gradient(A, G, factors, segments))
