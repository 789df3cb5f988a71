"""Calls past the model's forward, rows in another order, nested checkpoints: exact, or refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import F64
from tests.privacy.judging import TIGHT, Private, examine

B, T, D = 8, 6, 5
OUTSIDE = "outside of the private model's forward"


def weighted(output: Tensor, y: Tensor) -> Tensor:
    return (output * y).mean()


def loud(n: int = B) -> Tensor:
    """One outlier among quiet samples."""
    return torch.cat([torch.full((1,), -10.0, dtype=F64), 1 + torch.rand(n - 1, dtype=F64)])


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(D, 4), nn.Linear(4, D)

    def forward(self, x):
        return self.dec(torch.tanh(self.enc(x)))

    def scores(self, x):
        return AutoEncoder.forward(self, x.flatten(0, 1)).view(len(x), -1).sum(1)


@pytest.mark.parametrize("seen", [None, 4, B, 1, 0], ids=lambda n: f"after a forward of {n}")
@pytest.mark.parametrize("how", ["method", "submodules"])
def test_called_past_the_forward(how, seen):
    """Refused, whatever batch the model's own forward saw last; nothing is summed up."""
    private = Private(AutoEncoder().double(), TIGHT)
    if seen is not None:
        private.backward((torch.randn(seen, D, dtype=F64),), torch.tensor(1.0), weighted)
    x, y = torch.randn(B, T, D, dtype=F64), loud()
    with pytest.raises(RuntimeError, match=OUTSIDE):
        if how == "method":
            out = private.model.scores(x)
        else:
            out = private.model.dec(torch.tanh(private.model.enc(x))).sum((1, 2))
        weighted(out, y).backward()
    assert private.nothing_summed()


def test_a_submodule_called_on_what_the_forward_returned():
    """Refused."""
    private = Private(AutoEncoder().double(), TIGHT)
    out = private.wrapped(torch.randn(B, D, dtype=F64))
    with pytest.raises(RuntimeError, match=f"'enc'.*{OUTSIDE}"):
        private.model.enc(out)
    assert private.nothing_summed()


class PastItsModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.f = nn.Linear(D, D), nn.Linear(D, 1)
        self.past = False

    def forward(self, x):
        h = torch.tanh(x)
        return (F.linear(h, self.f.weight) if self.past else self.f(h)).squeeze(1)


@pytest.mark.parametrize("later", [1, 0, B])
def test_a_parameter_past_its_module_and_a_later_forward(later):
    """Refused: it is the batch of the gradient's own forward that counts, not that of the last one."""
    private = Private(PastItsModule().double(), TIGHT)
    x, y = torch.ones(B, D, dtype=F64), loud()
    private.backward((x,), y, weighted)
    private.model.past = True
    loss = weighted(private.wrapped(x), y)
    private.wrapped(x[:later].clone())
    with pytest.raises(RuntimeError, match=r"f\.weight"):
        loss.backward()
    assert private.nothing_summed()


def test_a_parameter_past_its_module_in_a_batch_of_one():
    """Exact, with a larger batch forward later: the ordinary gradient is the sample's."""
    model = PastItsModule()
    model.past = True
    examine(model, (torch.randn(1, D),), torch.ones(1), weighted)


def by_argsort(n: Tensor) -> Tensor:
    return n.argsort(descending=True, stable=True)


def by_sort(n: Tensor) -> Tensor:
    return torch.sort(n, descending=True).indices


def by_topk(n: Tensor) -> Tensor:
    return n.topk(len(n)).indices


class Sorted(nn.Module):
    """Rows in the order of lengths inside, and back."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x, lengths):
        h = torch.tanh(self.a(x))
        order = self.order(lengths)
        back = torch.zeros_like(order).scatter(0, order, torch.arange(len(order)))
        return self.b(h[order])[back].squeeze(1)


@pytest.mark.parametrize("dtype", [F64, torch.long])
@pytest.mark.parametrize("order", [by_argsort, by_sort, by_topk])
def test_rows_that_are_sorted(order, dtype):
    """Exact, though the first batch happened to be in order."""
    x, y = 3 * torch.randn(B, D, dtype=F64), loud()
    in_order = torch.arange(B, 0, -1).to(dtype)
    shuffled = in_order[torch.randperm(B)]
    examine(Sorted(order), (x, shuffled), y, weighted, before=((x, in_order), y))


def by_kind(n: Tensor) -> Tensor:
    return torch.cat([(n % 2 == 0).nonzero()[:, 0], (n % 2 == 1).nonzero()[:, 0]])


def test_rows_in_groups_of_a_kind():
    """Exact, or refused: in the first batch all samples are of one kind, so the order is the batch's own."""
    x, y = 3 * torch.randn(B, D, dtype=F64), loud()
    alike, mixed = 2 * torch.arange(B, dtype=F64), torch.arange(B, dtype=F64).flip(0)
    try:
        examine(Sorted(by_kind), (x, mixed), y, weighted, before=((x, alike), y))
    except (ValueError, RuntimeError) as refusal:
        assert "whose" in str(refusal), refusal


class Nested(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.depth = depth
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x):
        run = self.b
        for _ in range(self.depth):
            run = self.checkpointed(run)
        return run(torch.tanh(self.a(x))).squeeze(1)

    @staticmethod
    def checkpointed(run):
        return lambda h: checkpoint(run, h, use_reentrant=True)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("poisson", [False, True])
def test_nested_reentrant_checkpoints(depth, poisson):
    """Exact: however many passes are nested, samples are clipped once, with one backward to account for."""
    x, y = torch.randn(B, D, dtype=F64), loud()
    examine(Nested(depth), (x,), y, weighted)
    private = Private(Nested(depth).double(), TIGHT, poisson_sampling=poisson)
    weighted(private.wrapped(x), y).backward()
    private.optimizer.step()
    assert private.optimizer.accumulated_iterations == 1
