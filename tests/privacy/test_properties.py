"""Properties over random small networks: within C for every sample left out, and in agreement with the oracle."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis", reason="hypothesis is not installed: no random networks are drawn")
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import F32, F64, Run, assert_exact, distance, follow, make_private, mse, run_fused, sums_of
from tests.oracle import Verdict, take

D = 4  # every sequence block maps [B, T, D] to [B, T, D]


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(1, 1, D))

    def forward(self, x):
        return x * self.scale + self.shift


class Attend(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.att = nn.MultiheadAttention(D, 2, batch_first=True, **kw)

    def forward(self, x):
        return x + self.att(x, x, x, need_weights=False)[0]


class Conv(nn.Module):
    """A convolution over the sequence that keeps its length."""

    def __init__(self, **kw):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding="same", **kw)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Channels(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


BLOCKS = {
    "linear": lambda: nn.Linear(D, D),
    "no bias": lambda: nn.Linear(D, D, bias=False),
    "wide": lambda: nn.Sequential(nn.Linear(D, 11), nn.GELU(), nn.Linear(11, D)),
    "layer norm": lambda: nn.LayerNorm(D),
    "rms norm": lambda: nn.RMSNorm(D),
    "group norm": lambda: Channels(nn.GroupNorm(2, D)),
    "conv": Conv,
    "depthwise": lambda: Conv(groups=D, dilation=2),
    "circular": lambda: Conv(padding_mode="circular"),
    "attention": Attend,
    "bias_kv": lambda: Attend(add_bias_kv=True, bias=False),
    "prelu": lambda: Channels(nn.PReLU(D, init=0.3)),
    "bare": Bare,
    "again": None,  # the block before, a second time
    "shared": None,  # a new linear layer with the weight of the first
}


class Net(nn.Module):
    """An embedding or a linear layer, random blocks, and a head that may be tied to the embedding."""

    def __init__(self, blocks, words, tied, residual):
        super().__init__()
        self.first = nn.Embedding(7, D) if words else nn.Linear(3, D)
        self.blocks = nn.ModuleList()
        linears = []
        for name in blocks:
            if name == "again" and len(self.blocks):
                self.blocks.append(self.blocks[-1])
                continue
            block = (BLOCKS[name] or BLOCKS["linear"])()
            if name == "shared" and linears:
                block.weight = linears[0].weight
            if type(block) is nn.Linear:
                linears.append(block)
            self.blocks.append(block)
        self.head = nn.Linear(D, 7, bias=not (words and tied))
        if words and tied:
            self.head.weight = self.first.weight
        self.residual = residual

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = torch.tanh(block(h)) + (h if self.residual else 0)
        return self.head(h)


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    blocks = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4))
    words = draw(st.booleans())
    model = Net(blocks, words, draw(st.booleans()), draw(st.booleans()))
    for name, p in model.named_parameters():
        if draw(st.integers(0, 9)) == 0 and "head" not in name:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):  # the head may be tied to a frozen table
        model.requires_grad_(True)
    B, T = draw(st.integers(1, 5)), draw(st.integers(3, 6))
    x = torch.randint(7, (B, T)) if words else torch.randn(B, T, 3, dtype=F64)
    sizes = 10.0 ** torch.randint(-3, 4, (B, 1, 1))  # samples of very different weight
    return model.double(), x, torch.randn(B, T, 7, dtype=F64) * sizes


quantile = st.sampled_from([0.1, 0.5, 0.9, 2.0])  # of the norms: from all clipped to none


@settings(max_examples=100)
@given(networks(), quantile)
def test_no_sample_moves_the_sum_by_more_than_c(network, q):
    """``‖sum(batch) − sum(batch without i)‖ ≤ C(1 + 1e-6)`` for every i."""
    model, x, y = network
    bound = Verdict(model, (x,), y, mse, 1.0).norms.quantile(min(q, 1.0)).item() * max(q, 1.0)
    model_copy = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model_copy, max_grad_norm=bound)

    def summed(rows):
        optimizer.zero_grad()
        batch, target = take((x, y), rows)
        mse(wrapped(batch), target).backward()
        return sums_of(model_copy)

    whole = summed(range(len(x)))
    for i in range(len(x)):
        moved = distance(whole, summed([j for j in range(len(x)) if j != i]))
        assert moved <= bound * (1 + 1e-6), f"sample {i} moved the sum by {moved / bound} C"


@settings(max_examples=100)
@given(networks(), st.sampled_from([F64, F32]))
def test_agreement_with_the_oracle(network, dtype):
    model, x, y = network
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    assert_exact(model, (x,), y.to(dtype), mse)


@settings(max_examples=40)
@given(networks(), st.lists(st.integers(0, 4), min_size=2, max_size=4))
def test_steps_of_any_batch_size(network, sizes):
    """One private model through batches of 0 to 4 samples: each as exact as the first."""
    model, x, y = network
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=0.1, lr=0.01)
    for n in sizes:
        batch, target = x[:n], y[:n]
        verdict = Verdict(follow(twin, model), (batch,), target, mse, 0.1)
        mse(wrapped(batch), target).backward()
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(model))
        optimizer.step()
        optimizer.zero_grad()


@settings(max_examples=40)
@given(networks(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(network, random):
    model, x, y = network
    order = list(range(len(x)))
    random.shuffle(order)
    there: Run = run_fused(model, ((x,), y), mse, 0.1)
    back: Run = run_fused(model, ((x[order],), y[order]), mse, 0.1)
    verdict = Verdict(model, (x,), y, mse, 0.1)
    verdict.check_norms(back.norms[torch.tensor(order).argsort()])
    verdict.check_sums(there.sums)
    verdict.check_sums(back.sums)
