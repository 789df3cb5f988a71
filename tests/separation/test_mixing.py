"""Models that let samples meet, in ways that one batch does not show: refused by operator and module, or run apart."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import F64, SLACK, distance, mse
from tests.oracle import take
from tests.privacy.judging import TIGHT, Private

B, D = 16, 8


class Two(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(D, D), nn.Linear(D, D), mix

    def forward(self, x, *rest):
        return self.b(self.mix(self, self.a(x), x, *rest))


def batch(*rest):
    return (torch.randn(B, D, dtype=F64), *rest), torch.randn(B, D, dtype=F64)


def refused_or_apart(model, inputs, target, *words, loss=mse, steps=1):
    """Refused in words that name the operator, or no sample left out moves the sum by more than C."""
    private = Private(model.double(), TIGHT)
    try:
        for _ in range(steps):
            whole = private.backward(inputs, target, loss)
    except RuntimeError as refusal:
        for word in words:
            assert word in str(refusal), refusal
        assert private.nothing_summed()
        return
    assert private.wrapped.runs_by_sample
    for i in range(B):
        rest = take((inputs, target), [j for j in range(B) if j != i])
        assert distance(whole, private.backward(*rest, loss)) <= TIGHT * SLACK


def scaled_and_drawn(m, h, x, *rest):
    return h + 0.01 * torch.randn_like(h)


class ScaledFirst(Two):
    """Scaled by the largest of the batch before the layers."""

    def forward(self, x, *rest):
        return super().forward(x / x.abs().max(), *rest)


@pytest.mark.parametrize("drawn", [True, False], ids=["a draw as in a VAE", "no draw"])
@pytest.mark.parametrize("labels", [True, False], ids=["sorted labels", "no labels"])
def test_scaled_by_the_largest_of_the_batch(drawn, labels):
    mix = scaled_and_drawn if drawn else lambda m, h, x, *rest: h
    inputs, y = batch(*([torch.arange(B) // 4] if labels else []))
    refused_or_apart(ScaledFirst(mix), inputs, y, "aten.max", "ScaledFirst")


class Graph(nn.Module):
    """One layer over the edges of the batch: nodes are samples, and neighbours meet."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, edge_index):
        h = self.a(x)
        a = torch.zeros(len(x), len(x), dtype=x.dtype)
        a[edge_index[0], edge_index[1]] = 1
        return self.b(a @ h + h)


def test_a_graph_whose_last_node_has_no_edges():
    edges = torch.randint(0, B - 1, (2, 30))
    inputs, y = batch(edges)
    private = Private(Graph().double(), TIGHT)
    with pytest.raises(RuntimeError):
        private.backward(inputs, y, mse)
    assert private.nothing_summed()


RARELY = 0.001


def torchs(m, h, x):
    return h - h.mean(0) if m.training and torch.rand(1) < RARELY else h


def torchs_number(m, h, x):
    return h - h.mean(0) if torch.rand(()).item() > 1 - RARELY else h


def torchs_integer(m, h, x):
    return h - h.mean(0) if torch.randint(2, (1,)).item() == 1 else h


def pythons(m, h, x):
    return h - h.mean(0) if random.random() < RARELY else h


def pythons_high(m, h, x):
    return h - h.mean(0) if random.uniform(0, 1) > 1 - RARELY else h


def numpys(m, h, x):
    return h - h.mean(0) if np.random.rand() < RARELY else h


def within_an_operator(m, h, x):
    return torch.where(torch.rand(1) < RARELY, h - h.mean(0), h)


@pytest.mark.parametrize(
    "mix", [torchs, torchs_number, torchs_integer, pythons, pythons_high, numpys, within_an_operator]
)
def test_by_chance(mix):
    random.seed(0)  # a draw below RARELY in one of two forwards that are compared would be a difference of its own
    np.random.seed(0)
    refused_or_apart(Two(mix), *batch(), "aten.mean", "Two")


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / (1 + 1e-30 * g.norm())


def hooked(m, h, x):
    h = h.clone()
    h.register_hook(lambda g: g - 0 * g.mean(0))
    return h


def in_groups(m, h, x):
    groups = h.view(4, B // 4, D)
    return (groups + 0 * groups.std(1, keepdim=True)).view(B, D)


def written_in_place(m, h, x):
    out = torch.zeros_like(h)
    out[1:] = 1e-30 * h[:-1]
    return out + h


def statistics_written(m, h, x):
    mean, variance = torch.zeros(D).to(h), torch.ones(D).to(h)
    F.batch_norm(h, mean, variance, training=True)
    return h - 0 * mean


def decided_in_the_backward(m, h, x):
    h = h.clone()
    h.register_hook(lambda g: g / g.norm() if g.abs().max() > 50 else g)
    return h


def a_part_of_picked_rows(m, h, x):
    rows = (x[:, 0] > -9).nonzero().squeeze(1)[:3]
    return h.index_add(0, rows, 1e-30 * h[rows])


BEHIND_ZEROS = {
    "a layer norm's weight": lambda m, h, x: F.layer_norm(h, (D,), weight=1 + 0 * h.mean(0)),
    "a group norm's weight": lambda m, h, x: F.group_norm(h, 2, weight=1 + 0 * h.mean(0)),
    "statistics that are given": lambda m, h, x: h + 0 * F.batch_norm(h, h.mean(0).detach(), h.var(0).detach()),
    "statistics that are written": statistics_written,
    "a draw around a mean": lambda m, h, x: h + 0 * torch.normal(h.mean(0).expand_as(h), 1.0),
    "a range up to the largest": lambda m, h, x: h + 0 * torch.linspace(0, h.max(), D),
    "decided in the backward": decided_in_the_backward,
    "a part of picked rows": a_part_of_picked_rows,
    "roll": lambda m, h, x: h + torch.where(x[:, :1] > 99, torch.roll(h, 1, 0), torch.zeros_like(h)),
    "cumsum": lambda m, h, x: h + (x.abs().amax(1, keepdim=True) > 99).to(h).cumsum(0) * h,
    "topk": lambda m, h, x: h + 0 * h.topk(2, 0).values.sum(0),
    "median": lambda m, h, x: h + 0 * h.median(0).values,
    "softmax": lambda m, h, x: h + 0 * torch.softmax(h, 0),
    "maximum, a branch": lambda m, h, x: h * 2 if x.max() > 9 else h,
    "maximum, as a number": lambda m, h, x: h * 2 if x.max().item() > 9 else h,
    "any, a branch": lambda m, h, x: h * 2 if (x > 9).any() else h,
    "flip": lambda m, h, x: h + 0 * h.flip(0),
    "sort": lambda m, h, x: h + 0 * h.sort(0).values,
    "gram": lambda m, h, x: h + 0 * (h @ h.mT) @ h,
    "a sample of its own": lambda m, h, x: h + 0 * h[0],
    "neighbours": lambda m, h, x: torch.stack([h[i] + 0 * h[i - 1] for i in range(len(h))]),
    "shifted": lambda m, h, x: torch.cat([h[:1], h[1:] + 0 * h[:-1]]),
    "norm over the batch": lambda m, h, x: h / (1 + 0 * h.norm()),
    "batch norm": lambda m, h, x: h + 0 * F.batch_norm(h, None, None, training=True),
    "in groups": in_groups,
    "nearest of the batch": lambda m, h, x: h + 0 * h[torch.cdist(h, h).fill_diagonal_(9).argmin(1)],
    "attention over samples": lambda m, h, x: h + 0 * F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "a convolution over samples": lambda m, h, x: (
        h + 0 * F.conv1d(h.mT[:, None], torch.ones(1, 1, 3).to(h), padding=1)[:, 0].mT
    ),
    "in the backward, a function": lambda m, h, x: Backwards.apply(h),
    "in the backward, a hook": hooked,
    "in place": written_in_place,
    "a variance": lambda m, h, x: h * (1 + 0 * h.var()),
    "scatter": lambda m, h, x: h + 0 * torch.zeros_like(h).scatter_add(0, (x > 9).long(), h),
    "einsum": lambda m, h, x: h + 0 * torch.einsum("bd,cd->bd", h, h),
    "fft over the batch": lambda m, h, x: h + 0 * torch.fft.fft(h, dim=0).real,
}


@pytest.mark.parametrize("way", BEHIND_ZEROS)
def test_what_is_zero_today(way):
    refused_or_apart(Two(BEHIND_ZEROS[way]), *batch(), "Two")


APART = {
    "loop": lambda m, h, x: torch.stack([row * row.sum() for row in h]),
    "time first": lambda m, h, x: (
        torch.tanh(h.view(B, 2, 4).transpose(0, 1).reshape(2 * B, 4)).view(2, B, 4).mT.reshape(B, -1)
        if False
        else torch.tanh(h.view(-1, 2, 4).transpose(0, 1)).transpose(0, 1).reshape(-1, D)
    ),
    "gathered": lambda m, h, x: h + h[torch.arange(len(h)), (x[:, 0] > 0).long()][:, None],
    "picked and put back": lambda m, h, x: (
        torch.zeros_like(h).index_put((torch.where(x[:, 0] > 0)[0],), h[x[:, 0] > 0]) + h
    ),
    "in place": lambda m, h, x: torch.zeros_like(h).copy_(h).mul_(2),
    "slices": lambda m, h, x: torch.cat([h[:, 4:], h[:, :4]], 1),
    "interleaved": lambda m, h, x: h.repeat_interleave(3, 0).view(len(h), 3, D).sum(1),
    "draws": lambda m, h, x: h + torch.randn_like(h),
    "dropout": lambda m, h, x: F.dropout(h, 0.3, m.training),
    "a draw that decides": lambda m, h, x: h * 2 if torch.rand(1) < 0.3 else h,
    "Python's draw": lambda m, h, x: h * 2 if random.random() < 0.3 else h,
    "asserted": lambda m, h, x: h if not torch.isnan(h).any() else 1 / 0,
    "one hot": lambda m, h, x: h + F.one_hot((x[:, 0] > 0).long(), D).to(h),
    "attention": lambda m, h, x: F.scaled_dot_product_attention(*[h.view(len(h), 2, 4, 1)] * 3, dropout_p=0.2).flatten(
        1
    ),
    "written into memory": lambda m, h, x: h.new_empty(len(h), D).copy_(h),
    "norm of each": lambda m, h, x: h / h.norm(dim=1, keepdim=True),
    "each by its own statistics": lambda m, h, x: F.instance_norm(h[:, None])[:, 0],
    "trimmed": lambda m, h, x: h[:, : int((x[0] < 99).sum())],
    "metrics": lambda m, h, x: (setattr(m, "largest", h.detach().abs().max()), h)[1],
}


@pytest.mark.parametrize("way", APART)
def test_no_false_alarm(way):
    """Trained in layers."""
    inputs, y = batch()
    private = Private(Two(APART[way]).double(), TIGHT)
    private.backward(inputs, y, mse)
    assert not private.wrapped.runs_by_sample
