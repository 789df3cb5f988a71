"""Segments of packed rows where they lie: norms within their bounds, sums within C, and models exact, on both backends.

Triton's kernels run in the interpreter where there is no GPU.
"""

import importlib

import pytest
import torch

from dpfast import native, ops
from dpfast.clipping.thresholds import Clipping
from dpfast.planning import planner
from dpfast.planning.unmeasured import CUDA
from tests.helpers import BF16, F32, F64, distance
from tests.privacy.packed import Segmented, check_moves, judge, packed, tokens
from tests.privacy.test_packed import Block

BACKENDS = importlib.import_module("dpfast.ops.backends")  # ops.backends is the function
AWKWARD = [1, 16, 37, 2]


@pytest.fixture
def on_triton(monkeypatch):
    """Everything that a kernel can do is done by one: no compiled library."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("DPFAST_NATIVE", "0")
    monkeypatch.setattr(BACKENDS, "TRITON_DEVICES", {device})
    monkeypatch.setattr(planner, "rates_of", lambda *_: CUDA["linear", 16])  # to measure takes hours in the interpreter
    native.reset()
    if reason := BACKENDS.why_no_triton():
        pytest.skip(f"no Triton: {reason}")
    yield device
    monkeypatch.undo()
    native.reset()


@pytest.fixture(params=["cpu", "triton"])
def device(request):
    return "cpu" if request.param == "cpu" else request.getfixturevalue("on_triton")


def norms_of(device, A, G, places):
    """By every op that there is."""
    squared, bounds = ops.packed_ghost_squared_norms([(A, G)], places)
    found = [(squared[0], bounds[0])]
    if ops.has_tiles(A, G):
        found.append(ops.packed_tile_squared_norm(A, G, places))
    return found


def packed_sides(device, lengths=AWKWARD, dtype=F32, d=11, p=7, gap=2):
    """Sides of segments with NaN in ``gap`` positions before each, where they lie, and the gradient of each."""
    bounds, end = [], 0
    for n in lengths:
        bounds.append((end + gap, end + gap + n))
        end = bounds[-1][1]
    A, G = (torch.full((1, end, n), torch.nan) for n in (d, p))
    for first, end in bounds:
        A[0, first:end], G[0, first:end] = torch.randn(end - first, d), torch.randn(end - first, p)
    A, G = A.to(device, dtype), G.to(device, dtype)
    gradients = [G[0, first:end].double().T @ A[0, first:end].double() for first, end in bounds]
    return A, G, ops.Places(bounds, A.shape[1]), torch.stack(gradients)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norms_are_within_their_bounds(device, dtype):
    A, G, places, gradients = packed_sides(device, dtype=dtype)
    want = gradients.square().sum((1, 2))
    for squared, bound in norms_of(device, A, G, places):
        assert squared.dtype == bound.dtype == F64
        assert ((squared - want).abs() <= bound).all() and (bound <= 0.01 * want).all()


def test_float64():
    A, G, places, gradients = packed_sides("cpu", dtype=F64)
    ((squared, _),) = norms_of("cpu", A, G, places)
    torch.testing.assert_close(squared, gradients.square().sum((1, 2)), rtol=1e-12, atol=0)


def test_norms_that_cancel(device):
    """Positions that cancel to almost nothing: the ghost sum is noise, and its bound says so."""
    A, G, places, _ = packed_sides(device, [32, 5], gap=0)
    A, G = torch.cat([A, A * (1 + 1e-6)], 1), torch.cat([G, -G], 1)
    first = torch.cat([torch.arange(32), torch.arange(32) + 37, torch.arange(5) + 32, torch.arange(5) + 69])
    A, G, places = A[:, first], G[:, first], ops.Places([(0, 64), (64, 74)], 74)
    want = [(G[0, s].double().T @ A[0, s].double()).square().sum() for s in (slice(0, 64), slice(64, 74))]
    for squared, bound in norms_of(device, A, G, places):
        assert (squared + bound >= torch.stack(want)).all()


def test_how_long_others_are_changes_no_bound(device):
    A, G, places, _ = packed_sides(device, [5, 60], gap=0)
    alone = ops.Places([(0, 5)], 5)
    for whole, single in zip(norms_of(device, A, G, places), norms_of(device, A[:, :5], G[:, :5], alone), strict=True):
        for one, other in zip(whole, single, strict=True):
            torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sums_and_samples(device, dtype):
    A, G, places, gradients = packed_sides(device, dtype=dtype)
    factors = torch.linspace(0.2, 0.9, len(places), device=device)
    factors[2] = 0
    first, end = places.bounds[2]
    samples, squares = ops.packed_grad_samples(A, G, places)
    torch.testing.assert_close(samples.double(), gradients, rtol=1e-5, atol=1e-5)
    if squares is not None:
        torch.testing.assert_close(squares.double(), gradients.square().sum((1, 2)), rtol=1e-4, atol=1e-5)
    A[0, first:end], G[0, first:end] = torch.nan, torch.inf  # left out, not multiplied
    summed = ops.packed_clipped_weight_gradient(A, G, factors, places)
    kept = torch.einsum("b,bpd->pd", factors.double(), gradients)
    torch.testing.assert_close(summed.double(), kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_no_contribution_exceeds_C(device, which):
    """Segments of far different norms in columns of their own: each one's part of the clipped sum is seen alone."""
    lengths, C = [3, 17, 1, 5, 2, 8, 2, 1], 0.5
    sizes = [1e-15, 3.0, 0.0, 1e12, 0.5, 0.5 + 1e-7, torch.nan, 1.0]
    A, G, places, _ = packed_sides(device, lengths, d=2 * len(lengths), gap=0)
    A.zero_()
    for i, (first, end) in enumerate(places.bounds):
        A[0, first:end, 2 * i : 2 * i + 2] = torch.rand(end - first, 2)
        G[0, first:end] = sizes[i] * (1 + torch.rand(end - first, G.shape[2]))
    gradients = torch.stack([G[0, a:b].double().T @ A[0, a:b].double() for a, b in places.bounds])

    def clipped_sum(left_out=None):
        kept = [k for k in range(len(lengths)) if k != left_out]
        its = ops.Places([places.bounds[k] for k in kept], places.size)
        found = norms_of(device, A, G, its)
        squared, bound = found[min(which, len(found) - 1)]
        (factors,), _ = Clipping.flat(C).factors(squared.unsqueeze(0), bound.unsqueeze(0), 1.0)
        return ops.packed_clipped_weight_gradient(A, G, factors.float(), its).double(), factors

    whole, factors = clipped_sum()
    parts = whole.unflatten(1, (len(lengths), 2)).norm(dim=(0, 2))
    norms = gradients.flatten(1).norm(dim=1)
    assert (parts <= C).all() and parts[6] == factors[6] == 0
    finite = norms.isfinite()
    torch.testing.assert_close(parts[finite], norms[finite].clamp(max=C), rtol=1e-3, atol=0)
    assert (whole - clipped_sum(3)[0]).norm() <= C * (1 + len(lengths) * 2.0**-22)


def test_rows_that_kernels_would_read_through_a_copy(on_triton, monkeypatch):
    """They are put beside each other instead, some at a time."""
    monkeypatch.setattr(ops.matmul, "WIDE", 16)
    A, G, _, _ = packed_sides(on_triton, p=40)
    assert not ops.has_packed(A, G) and ops.has_packed(A, G[..., :32])


@pytest.mark.parametrize("way", ["ghost", "norm-GEMM", "instantiate"])
def test_a_model(on_triton, way):
    """Kernels raise norms for the ratios of factors that their sums are multiplied by, in units of float32."""
    model, samples = Block().to(on_triton), tokens([4, 1])
    verdict = judge(model, samples)
    C = verdict.max_grad_norm
    private = Segmented(model, C, plan={"": way})
    whole = private.backward(packed(samples))
    verdict.check_norms(private.wrapped.per_sample_gradient_norms)
    assert distance(whole, verdict.sums) < 1e-4 * C
    if way == "ghost":
        check_moves(private, samples, whole, C, slack=1 + 1e-5)
