"""Rows that are not one per sample, inputs that are not one per sample: exact, or refused; never mixed up."""

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import F64
from tests.privacy.judging import TIGHT, Private, examine, examine_or_refuse, refuse

B, T, D = 8, 4, 5
WHOSE = "whose|batch size"  # every refusal to attribute rows says one of these


def weighted(output: Tensor, y: Tensor) -> Tensor:
    """The backprops are ``y / B``: one sample can be as loud as one likes."""
    return (output * y).mean()


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y)


def loud(n: int = B) -> Tensor:
    """One outlier among quiet samples."""
    return torch.cat([torch.full((1,), -10.0), 1 + torch.rand(n - 1)])


def classes(n: int = B) -> Tensor:
    return torch.randint(3, (n,))


class Positions(nn.Module):
    def __init__(self, first: str):
        super().__init__()
        self.first = first
        self.pos, self.tok, self.head = nn.Embedding(T, 6), nn.Embedding(10, 6), nn.Linear(6, 1)

    def forward(self, ids, position_ids):
        if self.first == "positions":
            h = self.pos(position_ids) + self.tok(ids)
        else:
            h = self.tok(ids) + self.pos(position_ids)
        return self.head(h.mean(1)).squeeze(1)


@pytest.mark.parametrize("n", [8, 6, 4, 3, 1])
@pytest.mark.parametrize("shape", [(1, T), (T,)], ids=["[1, T]", "[T]"])
@pytest.mark.parametrize("first", ["positions", "tokens"])
def test_batch_size_from_shared_inputs(first, shape, n):
    """Exact; as many samples as positions may be refused, for a [T] input is then as long as the batch."""
    position_ids = torch.arange(T).view(shape)
    ids = torch.randint(10, (n, T))
    args = (Positions(first).double(), (ids,), loud(n).double(), weighted)

    def call(model, ids):
        return model(ids, position_ids)

    if n == T and shape == (T,):
        examine_or_refuse(*args, WHOSE, call=call)
    else:
        examine(*args, call=call)


class TwoViews(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, a, b):
        return self.net(torch.cat([a, b])).chunk(2)


@pytest.mark.parametrize("kind", ["random", "equal views, one loud"])
def test_two_views_along_the_batch(kind):
    """Exact: rows k and B + k of the tower belong to sample k."""
    a = torch.randn(B, D)
    b = a.clone() if "equal" in kind else torch.randn(B, D)
    target = loud() if "equal" in kind else torch.ones(B)

    def loss(out, y):
        return ((out[0] + (1 if "equal" in kind else -1) * out[1]).square().sum(1) * y).mean()

    examine(TwoViews(), (a, b), target, loss)


class TimeMajor(nn.Module):
    """Rows ``T·B``, time first: the T rows of one sample lie B apart."""

    def __init__(self, zero_head: bool = False):
        super().__init__()
        self.a, self.head = nn.Linear(D, 7), nn.Linear(7, 3)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def rows(self, x):
        return torch.tanh(self.a(x.transpose(0, 1).reshape(-1, D)))

    def forward(self, x):
        return self.head(self.rows(x).view(T, len(x), 7).mean(0))


class ReturnsLoss(TimeMajor):
    def forward(self, x, y):
        return F.cross_entropy(super().forward(x), y)


class ReturnsRows(TimeMajor):
    def forward(self, x):
        return self.head(self.rows(x))


class ReturnsTimeFirst(TimeMajor):
    def forward(self, x):
        return self.head(self.rows(x).view(T, len(x), 7))


class FifthOutput(TimeMajor):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, 4)

    def forward(self, x):
        return (*self.first(x.mean(1)).unbind(1), super().forward(x))


class InADict(TimeMajor):
    def forward(self, x):
        return {"inputs": x, "logits": super().forward(x)}


def test_time_major_rows():
    """Exact."""
    examine(TimeMajor(), (torch.randn(B, T, D),), classes(), cross_entropy)


def test_a_head_that_starts_at_zero():
    """Exact, after steps too: no gradient reaches the layer before the first one, so nothing can be concluded."""
    x, y = torch.randn(B, T, D, dtype=F64), classes()
    private = Private(TimeMajor(zero_head=True).double(), TIGHT, lr=10.0)
    for _ in range(3):
        cross_entropy(private.wrapped(x), y).backward()
        private.optimizer.step()
        private.optimizer.zero_grad()
    trained = TimeMajor().double()
    trained.load_state_dict(private.model.state_dict())
    assert trained.head.weight.any()
    examine(trained, (x,), y, cross_entropy, before=((x,), y))
    rest = private.backward((x[1:],), y[1:], cross_entropy)
    whole = private.backward((x,), y, cross_entropy)
    moved = sum((whole[n] - rest[n]).square().sum() for n in whole).sqrt().item()
    assert moved <= TIGHT * (1 + 1e-6)


def test_a_model_that_returns_its_loss():
    """Exact: the mean over the batch of what it returns for each sample is what it returns for the batch."""
    y = classes()
    examine_or_refuse(ReturnsLoss().double(), (torch.randn(B, T, D, dtype=F64), y), y, lambda out, _: out, WHOSE)


@pytest.mark.parametrize("n", [B, T, 2])
@pytest.mark.parametrize("model", [ReturnsRows, ReturnsTimeFirst])
def test_outputs_with_time_first(model, n):
    """Exact, or refused: sample by sample, such a model returns another order of rows."""

    def loss(out, y):
        return F.cross_entropy(out.reshape(-1, 3), y.repeat(T))

    examine_or_refuse(model().double(), (torch.randn(n, T, D, dtype=F64),), classes(n), loss, WHOSE)


@pytest.mark.parametrize(("model", "pick"), [(FifthOutput, 4), (InADict, "logits")])
def test_any_output_may_be_the_one(model, pick):
    """Exact."""
    examine(model(), (torch.randn(B, T, D),), classes(), lambda out, y: F.cross_entropy(out[pick], y))


class TwoLayouts(nn.Module):
    """One layer: one row per sample for an output, time-major rows for another."""

    def __init__(self):
        super().__init__()
        self.p = nn.Linear(D, 3)

    def forward(self, x):
        return self.p(x.mean(1)), self.p(x.transpose(0, 1).reshape(-1, D)).view(T, len(x), 3).mean(0)


def test_a_layer_shared_by_two_layouts():
    """Exact."""

    def loss(out, y):
        return F.cross_entropy(out[0] * 0.01, y) + F.cross_entropy(out[1], y)

    examine(TwoLayouts(), (3 * torch.randn(B, T, D),), classes(), loss)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 1)

    def forward(self, images):
        return self.head(torch.relu(self.conv(torch.stack(images))).mean((2, 3))).squeeze(1)


@pytest.mark.parametrize("n", [6, 3, 4])
def test_a_list_of_images(n):
    """Exact, or refused: dimension 0 of an image is its channels."""
    x = torch.rand(1, 3, 6, 6, dtype=F64).repeat(n, 1, 1, 1)
    y = loud(n).double()
    examine_or_refuse(Images().double(), (x,), y, weighted, WHOSE, call=lambda m, x: m(list(x)))


@dataclass
class Batch:
    x: Tensor


class FromObject(nn.Module):
    """Rows ``B·T``, samples first, from a batch that is an object."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(D, 1)

    def forward(self, batch):
        x = batch["x"] if isinstance(batch, UserDict) else batch.x
        return self.f(torch.tanh(x).flatten(0, 1)).view(len(x), -1).sum(1)


@pytest.mark.parametrize("wrap", [lambda x: Batch(x), lambda x: UserDict(x=x)], ids=["dataclass", "UserDict"])
def test_a_batch_in_a_container(wrap):
    """Exact."""
    x = torch.ones(B, T, D) + 0.1 * torch.randn(B, T, D)
    examine(FromObject(), (x,), loud(), weighted, call=lambda m, x: m(wrap(x)))


def test_a_batch_in_an_unknown_object():
    """Refused: what it holds is not seen."""
    x = torch.randn(B, T, D)
    refuse(FromObject(), (x,), loud(), weighted, "batch size", call=lambda m, x: m(SimpleNamespace(x=x)))


class StochasticDepth(TimeMajor):
    """Only samples with ``keep`` reach the time-major layer."""

    def __init__(self):
        super().__init__()
        self.o = nn.Linear(D, 3)

    def forward(self, x, keep):
        return super().forward(x) * keep[:, None] + self.o(x.mean(1))


@pytest.mark.parametrize("dropped", [[B - 1], [0, B - 1], [0, 1, B // 2, B - 1], list(range(B))], ids=str)
def test_a_layer_that_some_samples_do_not_reach(dropped):
    """Exact, or refused where none of the samples that were tried reaches the layer."""
    x, y, keep = torch.randn(B, T, D, dtype=F64), classes(), torch.ones(B, dtype=F64)
    first = keep.clone()
    first[dropped] = 0
    private = Private(StochasticDepth().double(), TIGHT)
    private.backward((x, first), y, cross_entropy)
    examine_or_refuse(StochasticDepth().double(), (x, first), y, cross_entropy, "no check has shown")
    examine(StochasticDepth(), (x, keep), y, cross_entropy, before=((x, first), y))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model", [TimeMajor, lambda: TimeMajor(zero_head=True)], ids=["", "zero head"])
def test_the_whole_model_in_a_checkpoint(model, reentrant):
    """Exact: what is recomputed is checked, too."""

    def call(model, x):
        return checkpoint(model, x.detach().requires_grad_(), use_reentrant=reentrant)

    examine(model(), (torch.randn(B, T, D),), classes(), cross_entropy, call=call)


class OffTheMean(nn.Module):
    """Samples meet in the outputs alone, linearly: in no layer does a gradient change for fixed output gradients."""

    def __init__(self, scale: float):
        super().__init__()
        self.l, self.scale = nn.Linear(D, 3), scale

    def forward(self, x):
        out = self.l(x.mean(1)) * self.scale
        return out - out.mean(0, keepdim=True)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_outputs_that_samples_meet_in_linearly(scale):
    refuse(OffTheMean(scale).double(), (torch.randn(B, T, D, dtype=F64),), classes(), cross_entropy, "meet in 'l'")
