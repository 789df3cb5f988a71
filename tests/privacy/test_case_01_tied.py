"""Case 1: tied weights, a module called twice in one forward, a module frozen or unfrozen between steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import (
    F32,
    F64,
    assert_exact,
    assert_exact_or_refused,
    assert_sensitivity,
    check_layer,
    follow,
    make_private,
    mse,
    sums_of,
    token_loss,
)
from tests.oracle import Verdict
from tests.zoo import TinyGPT


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("T", [1, 5])
def test_embedding_tied_to_the_head(T, dtype):
    model = TinyGPT(T=T).to(dtype)
    ids, targets = torch.randint(9, (4, T)), torch.randint(9, (4, T))
    assert_exact(model, (ids,), targets, token_loss)
    if dtype == F64:
        assert_sensitivity(model, (((ids,)), targets), token_loss, 0.1)


def test_tied_weights_are_counted_once():
    """The cross-term makes the norm of the sum of both uses; not the sum, not the root of their squares."""
    model = TinyGPT().double()
    ids = torch.randint(9, (4, 5))
    run = assert_exact(model, (ids,), ids, token_loss)
    twin = TinyGPT(tied=False).double()
    twin.load_state_dict(model.state_dict())
    apart = Verdict(twin, (ids,), ids, token_loss).norms
    assert ((run.norms - apart).abs() > 1e-3 * apart).all(), "the test needs a cross-term that counts"


def test_tied_with_padding():
    """The padding row gets no gradient from the embedding, but does from the head."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(7, 4, padding_idx=0)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.emb(ids)))

    model = Padded().double()
    nn.init.normal_(model.emb.weight)
    ids = torch.randint(3, (4, 6))
    run = assert_exact(model, (ids,), torch.randint(7, (4, 6)), token_loss)
    assert run.sums["emb.weight"][0].any()


class Shared(nn.Module):
    """Any two layers, one after the other, that share what ``tie`` names."""

    def __init__(self, first, second, *tie):
        super().__init__()
        self.first, self.second = first, second
        for name in tie:
            setattr(self.second, name, getattr(self.first, name))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


TIES = {
    "linear with linear": (lambda: Shared(nn.Linear(4, 4), nn.Linear(4, 4), "weight"), (5, 3, 4)),
    "linear with linear, bias too": (
        lambda: Shared(nn.Linear(4, 4), nn.Linear(4, 4), "weight", "bias"),
        (5, 4),
    ),
    "bias alone": (lambda: Shared(nn.Linear(4, 4), nn.Linear(4, 4), "bias"), (5, 3, 4)),
    "convolutions": (
        lambda: Shared(
            nn.Conv2d(2, 2, 3, padding=1),
            nn.Conv2d(2, 2, 3, padding=2, dilation=2, padding_mode="circular"),
            "weight",
        ),
        (4, 2, 5, 5),
    ),
    "grouped convolutions": (
        lambda: Shared(nn.Conv1d(4, 4, 3, groups=2, padding=1), nn.Conv1d(4, 4, 3, groups=2), "weight", "bias"),
        (4, 4, 6),
    ),
    "norms": (lambda: Shared(nn.LayerNorm(4), nn.LayerNorm(4), "weight", "bias"), (5, 3, 4)),
    "layer norm with rms norm": (lambda: Shared(nn.LayerNorm(4), nn.RMSNorm(4), "weight"), (5, 3, 4)),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", TIES)
def test_other_ties(name, dtype):
    make, shape = TIES[name]
    check_layer(make(), (torch.randn(shape),), dtype)


def test_two_embeddings_of_one_table():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.src, self.dst = nn.Embedding(6, 4), nn.Embedding(6, 4, padding_idx=2)
            self.dst.weight = self.src.weight

        def forward(self, a, b):
            return torch.cat([self.src(a), self.dst(b).tanh()], 1)

    check_layer(Both(), (torch.randint(6, (4, 3)), torch.randint(6, (4, 5))), F64)


class Twice(nn.Module):
    """The same modules on inputs of other lengths, and recurrently."""

    def __init__(self, norm):
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 4), norm

    def forward(self, x):
        h = self.norm(torch.tanh(self.lin(x)))
        return self.norm(self.lin(h[:, :2])) + self.lin(h.mean(1, keepdim=True))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.Identity])
def test_a_module_called_twice(norm):
    check_layer(Twice(norm(4)), (torch.randn(4, 5, 4),), F64)


def test_an_embedding_called_twice():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(6, 4), nn.Linear(4, 3)

        def forward(self, a, b):
            return self.out(self.emb(a).mean(1) * self.emb(b).sum(1))

    check_layer(Siamese(), (torch.randint(6, (4, 3)), torch.randint(6, (4, 5))), F64)


def test_a_convolution_called_twice():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            h = torch.tanh(self.conv(x))
            return self.conv(h) + self.conv(F.avg_pool2d(h, 2)).mean((2, 3), keepdim=True)

    check_layer(Pyramid(), (torch.randn(4, 2, 4, 4),), F64)


def test_a_table_used_as_a_matrix_as_well():
    """The head is ``h @ emb.weight.T``, without a module: exact, or refused by the parameter's name."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.mid = nn.Embedding(7, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return F.linear(self.mid(self.emb(ids)), self.emb.weight)

    ids = torch.randint(7, (4, 5))
    assert_exact_or_refused(Functional().double(), (ids,), ids, token_loss, "emb.weight")


@pytest.mark.parametrize("layer", ["0", "2", "2.bias"])
def test_frozen_and_unfrozen_between_steps(layer):
    """What trains is decided at each step, as in linear probing followed by full fine-tuning."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(model)
    changing = [p for n, p in model.named_parameters() if n.startswith(layer)]
    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 3, dtype=F64)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=0.1, lr=0.1)
    for trained in (True, False, False, True):
        for p in changing:
            p.requires_grad_(trained)
        verdict = Verdict(follow(twin, model), (x,), y, mse, 0.1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        mse(wrapped(x), y).backward()
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(model))
        optimizer.step()
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (not p.requires_grad), n
        optimizer.zero_grad()


def test_frozen_from_the_start_and_unfrozen_later():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    twin = copy.deepcopy(model)
    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 3, dtype=F64)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=0.1, lr=0.1)
    for _ in range(2):
        verdict = Verdict(follow(twin, model), (x,), y, mse, 0.1)
        mse(wrapped(x), y).backward()
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(model))
        optimizer.step()
        optimizer.zero_grad()
        model.requires_grad_(True)
