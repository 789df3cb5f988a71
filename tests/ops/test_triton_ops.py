"""The ops on Triton's kernels, in the interpreter where there is no GPU: within their bounds, and models exact."""

import importlib

import pytest
import torch
from torch import nn

from dpfast import native, ops, reference
from dpfast.clipping.thresholds import Clipping
from dpfast.planning import planner
from dpfast.planning.unmeasured import CUDA
from tests.helpers import F32, assert_exact, assert_sensitivity, mse
from tests.zoo import TinyGPT

BF16, F16 = torch.bfloat16, torch.float16
BACKENDS = importlib.import_module("dpfast.ops.backends")  # ops.backends is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Everything that a kernel can do is done by one: no compiled library."""
    monkeypatch.setenv("DPFAST_NATIVE", "0")
    monkeypatch.setattr(BACKENDS, "TRITON_DEVICES", {DEVICE})
    monkeypatch.setattr(planner, "rates_of", lambda *_: CUDA["linear", 16])  # to measure takes hours in the interpreter
    native.reset()
    if reason := BACKENDS.why_no_triton():
        pytest.skip(f"no Triton: {reason}")
    yield
    monkeypatch.undo()
    native.reset()


def sides(dtype, B=3, groups=1, T=20, d=11, p=7):
    return (torch.randn(B, groups, T, n, device=DEVICE).to(dtype) for n in (d, p))


def gradients(A, G):
    return torch.einsum("bgtp,bgtd->bgpd", G.double(), A.double()).flatten(1, 2)


@pytest.mark.parametrize("op", [ops.ghost_squared_norm, ops.tile_squared_norm])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("groups, T", [(1, 1), (1, 40), (3, 20)])
def test_norms_are_within_their_bounds(op, dtype, groups, T):
    A, G = sides(dtype, groups=groups, T=T)
    squared, bound = op(A, G)
    want = gradients(A, G).square().sum((1, 2))
    assert squared.dtype == bound.dtype == torch.float64
    assert ((squared - want).abs() <= bound).all() and (bound <= 0.01 * want).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_long_rows_are_aligned_a_few_at_a_time(monkeypatch, dtype):
    """Of a vocabulary that is no multiple of 16 there is never a copy as a whole."""
    A, G = sides(dtype, p=40)
    factors = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    want = gradients(A, G)
    monkeypatch.setattr(ops.matmul, "WIDE", 16)
    monkeypatch.setattr(ops.matmul, "MOST_COPIED", 4000)
    copied, pad = [], ops.matmul.F.pad
    monkeypatch.setattr(ops.matmul.F, "pad", lambda x, *args: copied.append(x.nbytes) or pad(x, *args))
    for op in (ops.ghost_squared_norm, ops.tile_squared_norm):
        squared, bound = op(A, G)
        assert ((squared - want.square().sum((1, 2))).abs() <= bound).all()
    summed = ops.clipped_weight_gradient(A, G, factors)
    rough = 1e-5 if dtype == F32 else 1e-4
    torch.testing.assert_close(summed.double(), (0.5 * want[0] + 2 * want[2]), rtol=rough, atol=rough)
    assert copied and max(copied) <= 4000


class Heads(nn.Module):
    """Three layers on one input, of which one has another size, and a fourth on what they give."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.q(x)) * self.k(x)) + self.v(x)


def test_layers_on_one_input(monkeypatch):
    """All their ghost norms are of one op, which forms the Gram matrix of the input of the two that are alike once."""
    from dpfast_kernels import ghost, ghost_tiles

    launched = []
    made = ghost.launch
    monkeypatch.setattr(ghost, "launch", lambda *args, **kw: launched.append(args[1]) or made(*args, **kw))
    x, target = torch.randn(3, 20, 6), torch.randn(3, 20, 3)
    assert_exact(Heads(), (x,), target, mse, 100.0, plan={"": "ghost"})
    pairs = ghost_tiles.pairs_of(20, 16)
    # q and k are of one shape and of one input, v and out of another shape and of two
    assert sorted(launched) == [(3 * pairs,), (2 * 3 * pairs,)] or torch.cuda.is_available()


def test_norms_that_cancel():
    """Positions that cancel to almost nothing: the ghost sum is noise, and its bound says so."""
    A, G = sides(F32, T=32)
    A = torch.cat([A, A * (1 + 1e-6)], 2)
    G = torch.cat([G, -G], 2)
    squared, bound = ops.ghost_squared_norm(A, G)
    assert (squared + bound >= gradients(A, G).square().sum((1, 2))).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("groups, T", [(1, 40), (3, 5)])
def test_samples_and_clipped_sums(dtype, groups, T):
    A, G = sides(dtype, groups=groups, T=T)
    want, factors = gradients(A, G), torch.tensor([0.3, 0.0, 0.9], device=DEVICE)
    samples, squares = ops.grad_samples(A, G)
    torch.testing.assert_close(samples.double(), want, rtol=1e-5, atol=1e-5)
    squared, bound = (rows[0] for rows in ops.certified(squares.unsqueeze(0), [samples]))
    assert ((squared - samples.double().square().sum((1, 2))).abs() <= bound).all()
    A[1], G[1] = torch.nan, torch.inf  # left out, not multiplied
    summed = ops.clipped_weight_gradient(A, G, factors)
    kept = torch.einsum("b,bpd->pd", factors[[0, 2]].double(), want[[0, 2]])
    torch.testing.assert_close(summed.double(), kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op, dtype", [(ops.ghost_squared_norm, BF16), (ops.tile_squared_norm, F32)])
def test_no_contribution_exceeds_C(op, dtype):
    """Samples of far different norms in columns of their own: each one's part of the clipped sum is seen alone."""
    B, T, C = 10, 32, 0.5
    sizes = torch.tensor([1e-15, 3.0, 0.0, 1e12, 0.5, 0.5 + 1e-7, 1e-3, 1e9, torch.nan, 1.0], device=DEVICE)
    A = torch.zeros(B, 1, T, 2 * B, device=DEVICE)
    for i in range(B):
        A[i, :, :, 2 * i : 2 * i + 2] = torch.rand(T, 2, device=DEVICE)
    G = (sizes.view(B, 1, 1, 1) * (1 + torch.rand(B, 1, T, 3, device=DEVICE))).to(dtype)
    A = A.to(dtype)

    def clipped_sum(rows):
        squared, bound = op(A[rows], G[rows])
        assert not (bound < squared * 2 * 514 * 2**-24).any()  # at least what ratios of factors take
        (factors,), _ = Clipping.flat(C).factors(squared.unsqueeze(0), bound.unsqueeze(0), 1.0)
        return ops.clipped_weight_gradient(A[rows], G[rows], factors.float()).double(), factors

    whole, factors = clipped_sum(list(range(B)))
    parts = whole.unflatten(1, (B, 2)).norm(dim=(0, 2))
    norms = gradients(A, G).flatten(1).norm(dim=1)
    assert (parts <= C).all() and parts[8] == factors[8] == 0
    kept = norms.isfinite()
    torch.testing.assert_close(parts[kept], norms[kept].clamp(max=C), rtol=1e-3, atol=0)
    for i in (1, 7):
        moved = (whole - clipped_sum([k for k in range(B) if k != i])[0]).norm()
        assert moved <= C * (1 + B * 2.0**-22)


def test_long_rows_of_odd_length():
    """A vocabulary that is no multiple of 16 is read through an aligned copy."""
    A, G = sides(BF16, T=33, d=20, p=1027)
    want = gradients(A, G)
    squared, bound = ops.ghost_squared_norm(A, G)
    assert ((squared - want.square().sum((1, 2))).abs() <= bound).all()
    summed = ops.clipped_weight_gradient(A, G, torch.ones(3, device=DEVICE))
    assert summed.shape == (1027, 20) and summed.is_contiguous()
    torch.testing.assert_close(summed.double(), want.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_embeddings(dtype):
    ids, G = torch.randint(6, (3, 40), device=DEVICE), torch.randn(3, 40, 9, device=DEVICE).to(dtype)
    squared, bound = ops.embedding_squared_norm(ids, G)
    want = reference.embedding_grad_samples(ids, G.double(), 6)
    assert ((squared - want.square().sum((1, 2))).abs() <= bound).all()
    factors = torch.rand(3, device=DEVICE)
    summed = ops.embedding_sum(ids, G, factors, 6)
    torch.testing.assert_close(summed.double(), torch.einsum("b,bvd->vd", factors.double(), want), rtol=1e-4, atol=1e-4)
    A, H = torch.randn(3, 1, 12, 9, device=DEVICE).to(dtype), torch.randn(3, 1, 12, 6, device=DEVICE).to(dtype)
    term, slack = ops.embedding_cross_term(ids, G, A, H)
    exact = (want * gradients(A, H)).sum((1, 2))
    assert ((term - exact).abs() <= slack).all()


CONVOLUTIONS = {
    "2d": nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "1d": nn.Conv1d(3, 5, 3, dilation=2),
    "transposed": nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    module = CONVOLUTIONS[name]
    x = torch.randn(3, module.in_channels, *[9] * (module.weight.dim() - 2))
    assert_exact(nn.Sequential(module, nn.Tanh()), (x,), module(x).detach() + 1, mse)


@pytest.mark.parametrize("module", [nn.GroupNorm(2, 4), nn.LayerNorm(6), nn.RMSNorm(6)], ids=str)
def test_normalisation(module):
    x = torch.randn(3, 4, 6)
    assert_exact(nn.Sequential(module, nn.Tanh()), (x,), torch.randn(3, 4, 6), mse)


def test_a_transformer_with_a_tied_head():
    ids, target = torch.randint(9, (3, 5)), torch.randn(3, 5, 9)
    assert_exact(TinyGPT(), (ids,), target, mse)
    assert_sensitivity(TinyGPT(), ((ids,), target), mse, 0.1)


def test_the_doctor_names_them():
    rows = {op: backend for op, device, backend, _ in ops.backends() if device == DEVICE}
    assert rows["ghost_squared_norm"] == rows["embedding_sum"] == "triton"
    assert rows["noisy_grad_"] == "reference (plain PyTorch)"


def test_float64_is_not_for_them():
    A, G = sides(torch.float64)
    squared, _ = ops.ghost_squared_norm(A, G)
    torch.testing.assert_close(squared, gradients(A, G).square().sum((1, 2)), rtol=1e-12, atol=0)
