"""Samples that meet in ways which the first batch does not show, or which only other sizes do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import oracle
from tests.helpers import F32, F64, SLACK, assert_exact, distance, mse
from tests.privacy.judging import TIGHT, Private, examine

B, T, D = 4, 6, 5


class Two(nn.Module):
    """Two layers, with ``between`` in between."""

    def __init__(self, between, dropout=0.0):
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(3, D), nn.Dropout(dropout), nn.Linear(D, 2)
        self.between = between

    def forward(self, x, *rest):
        return self.second(self.between(self.dropout(self.first(x).tanh()), *rest))


def batch(*rest):
    return (torch.randn(B, T, 3, dtype=F64), *rest), torch.randn(B, T, 2, dtype=F64)


def masked(padded):
    mask = torch.ones(B, T, dtype=torch.long)
    if padded:
        mask[1, 3:] = mask[2, 1:] = 0
    return mask


def refused_by_then(model, first, then):
    """Refused at the first batch or at the second; or run sample by sample, and each moves the sum by at most C."""
    private = Private(model.double(), TIGHT)
    try:
        private.backward(*first, mse)
        whole = private.backward(*then, mse)
    except RuntimeError as refusal:
        assert "gradients" in str(refusal)
        assert private.nothing_summed()
        return
    assert private.wrapped.runs_by_sample
    for i in range(B):
        rest = oracle.take(then, [j for j in range(B) if j != i])
        assert distance(whole, private.backward(*rest, mse)) <= TIGHT * SLACK


def kept_within_c(model, first, then, change=None):
    """Each sample left out of the second batch moves the sum by at most C."""
    private = Private(model.double(), TIGHT)
    private.backward(*first, mse)
    if change is not None:
        change(private.model)
    whole = private.backward(*then, mse)
    for i in range(B):
        rest = oracle.take(then, [j for j in range(B) if j != i])
        moved = distance(whole, private.backward(*rest, mse))
        assert moved <= TIGHT * SLACK, f"without sample {i} the clipped sum moved by {moved / TIGHT} C"


def by_mask(h, mask=None):
    return h if mask is None else h * mask[..., None] * (T / mask.sum())


def by_mean(h):
    return h * h.detach().mean(0)


def test_a_first_batch_of_equal_samples():
    (x,), y = batch()
    refused_by_then(Two(by_mean), ((x[:1].expand(B, -1, -1).clone(),), y), ((x,), y))


def test_masks_without_padding_first():
    """What the mask does shows with the first padding."""

    def most(h, mask):
        return h * mask[..., None] * mask.double().mean(1).min()

    (x,), y = batch()
    refused_by_then(Two(most), ((x, masked(False)), y), ((x, masked(True)), y))


def test_a_mask_that_comes_later():
    (x,), y = batch()
    refused_by_then(Two(by_mask), ((x,), y), ((x, masked(True)), y))


def test_no_check_is_repeated_without_need(monkeypatch):
    """Constant inputs stay unchecked, and are looked at only."""
    from dpfast.model import model_forward

    checks, check = [], model_forward.Check.whole
    monkeypatch.setattr(model_forward.Check, "whole", lambda self: checks.append(1) or check(self))
    (x,), y = batch()
    private = Private(Two(lambda h, mask: h * mask[..., None]).double(), TIGHT)
    for padded, expected in ((False, 1), (False, 1), (True, 2), (True, 2), (False, 2)):
        private.backward((x, masked(padded)), y, mse)
        assert len(checks) == expected


def refused(model, inputs, target, match="how many or which other samples|several samples meet"):
    private = Private(model.double(), TIGHT)
    with pytest.raises(RuntimeError, match=match):
        private.backward(inputs, target, mse)
    assert private.nothing_summed()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_by_the_size_of_the_batch(dropout):
    inputs, y = batch()
    refused(Two(lambda h: h / len(h), dropout), inputs, y)


@pytest.mark.parametrize("by", [lambda n: n.max(), lambda n: n.sum()], ids=["longest", "all"])
def test_by_lengths(by):
    inputs, y = batch(torch.tensor([6, 3, 2, 4]))
    refused(Two(lambda h, n: h * (n / by(n))[:, None, None]), inputs, y)


def test_beside_a_sample_that_is_a_billion_times_larger():
    """In units of the largest, what meets is nothing."""

    class Mixed(Two):
        def forward(self, x):
            h = self.first(x)
            return self.second(h * h + h.detach().tanh().mean(0))

    (x,), y = batch()
    far = x.clone()
    far[0] *= 1e9
    private = Private(Mixed(None).double(), TIGHT)
    private.backward((far,), y, mse)
    assert private.wrapped.runs_by_sample  # which that sample hides, too: to rounding, this computes the same


class Gated(nn.Module):
    """A zero layer, whose outputs meet in second order only."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.second = nn.Linear(3, D), nn.Linear(D, D), nn.Linear(D, 2)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x):
        h = self.first(x)
        z = self.gate(h.tanh())
        return self.second(h + z + z * z.mean(0))


@torch.no_grad()
def opened(model):
    model.gate.weight.normal_()


def test_layers_that_are_zero_at_first():
    whole = batch()
    try:
        kept_within_c(Gated(), whole, whole, opened)
    except RuntimeError as error:
        assert "gradients" in str(error)


def test_the_check_leaves_parameters_at_zero():
    private = Private(Two(lambda h: h).double(), TIGHT)
    with torch.no_grad():
        private.model.second.weight.zero_()
    versions = [p._version for p in private.model.parameters()]
    private.backward(*batch(), mse)
    assert versions == [p._version for p in private.model.parameters()]
    assert not private.model.second.weight.any()


@pytest.mark.parametrize("dtype", [F64, F32])
def test_what_keeps_samples_apart_is_not_refused(dtype):
    """Dropout, biases that cancel before a norm, padding, lengths, and zero layers."""

    class Fine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm, self.head = nn.Linear(3, D), nn.GroupNorm(D, D), nn.Linear(D, 2)
            self.dropout = nn.Dropout(0.0)

        def forward(self, x, mask, lengths):
            h = self.norm(self.inner(x).mT).mT * mask[..., None] / lengths[:, None, None]
            return self.head(self.dropout(F.dropout(h, 0.0, self.training)))

    (x, mask, lengths), y = batch(masked(True), torch.tensor([6, 3, 1, 6]))
    model = Fine().to(dtype)
    nn.init.zeros_(model.head.bias)
    assert_exact(model, (x.to(dtype), mask, lengths), y.to(dtype), mse)
    twin = copy.deepcopy(model)
    twin.dropout.p = 0.5
    private = Private(twin.double(), TIGHT)
    private.backward((x, mask, lengths), y, mse)
    assert not private.wrapped.runs_by_sample


class Counting(nn.Module):
    """Keeps an average of activations, and fails on nobody."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("seen", torch.ones(2))

    def forward(self, x):
        self.steps += 1
        y = self.inner(x)
        y.detach().amax()
        self.seen.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)
        return y


def test_nobody_leaves_no_trace_in_buffers():
    (x,), y = batch()
    private = Private(Counting().double(), TIGHT)
    private.backward((x[:0],), y[:0], lambda out, target: (out - target).square().sum())
    assert private.model.steps == 0
    assert (private.model.seen == 1).all()


class Norm(nn.Module):
    """One class, several functions."""

    def __init__(self, kind):
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.rand(D) + 0.5), 1e-2, kind

    def forward(self, x):
        if self.kind == "clamped":
            x = x.clamp(-0.5, 0.5)
        y = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))
        return y.tanh() if self.kind == "squashed" or (self.kind == "training" and self.training) else y


@pytest.mark.parametrize("kind", ["squashed", "clamped", "training"])
def test_norms_of_one_class(kind):
    """The first of its class is an RMS norm; the other is not."""
    inputs, y = batch()
    examine(nn.Sequential(nn.Linear(3, D), Norm("plain"), nn.Linear(D, D), Norm(kind), nn.Linear(D, 2)), inputs, y, mse)


class Renormed(nn.Embedding):
    def forward(self, ids):
        return F.embedding(ids, self.weight, None, 2.0)


def test_a_table_that_renormalises_is_refused():
    model = nn.Sequential(Renormed(9, D), nn.Linear(D, 2))
    refused(model, (torch.randint(0, 9, (B, T)),), batch()[1], "max_norm")
