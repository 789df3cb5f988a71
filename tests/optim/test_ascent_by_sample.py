"""Models that run one sample at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from tests.helpers import F64, loader_of
from tests.optim.ascending import RHO, Private, sgd
from tests.optim.test_ascent import close


class BySample(nn.Module):
    """The batch is folded into another dimension: this is run sample by sample."""

    def __init__(self):
        super().__init__()
        self.fc, self.bare = nn.Linear(3, 3), nn.Parameter(torch.rand(3))

    def forward(self, x):
        return (self.fc(x.transpose(0, 1)) * self.bare).transpose(0, 1)


class Recurrent(nn.Module):
    """What only a physical batch of one serves."""

    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


class Past(nn.Module):
    """A weight is used past its module."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) + F.linear(x, self.fc.weight)


def squares(run, x):
    run.optimizer.zero_grad()
    run.wrapped(x).square().mean().backward()
    run.optimizer.step()


def shifted_by_hand(model, optimizer, x):
    """Weights after a step at σ = 0 on the one sample ``x``, whose gradient is not clipped."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q += optimizer.shift.get(p, 0)
    grads = torch.autograd.grad(twin(x).square().mean(), list(twin.parameters()))
    norm = sum(g.square().sum() for g in grads).sqrt()
    optimizer.shift = {p: 0.3 * g / norm for p, g in zip(model.parameters(), grads, strict=True)}
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize(
    "make, kw",
    [(Recurrent, dict(max_physical_batch_size=1)), (BySample, dict(max_physical_batch_size=1)), (BySample, {})],
)
def test_one_sample_at_a_time(make, kw):
    """Modules without a per-sample path, whose parameters are not tapped, are shifted all the same."""
    model = make().double()
    plain = copy.deepcopy(model)
    optimizer = SGD(plain.parameters(), lr=0.3)
    optimizer.shift = {}
    options = dict(noise_multiplier=0.0, max_grad_norm=100.0, data_loader=loader_of(1))
    run = Private(model, lambda params: SGD(params, lr=0.3), ascent=RHO, **options, **kw)
    for _ in range(4):
        x = torch.randn(1, 5, 3, dtype=F64)
        squares(run, x)
        shifted_by_hand(plain, optimizer, x)
    close(run.values(), [p.detach() for p in plain.parameters()], 1e-7)
    copy.deepcopy(run.wrapped)
    torch.testing.assert_close(run.wrapped.eval()(x), plain.eval()(x))


def test_sample_by_sample():
    """Under vmap, too, layers compute at the point, and the check that vmap changes nothing holds at any step."""
    run = Private(BySample().double(), sgd, ascent=RHO, data_loader=loader_of(4))
    x = torch.randn(4, 5, 3, dtype=F64)
    for _ in range(2):
        squares(run, x)
    twin = BySample().double()
    with torch.no_grad():
        for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
            q.copy_(p + run.optimizer.ascending.shift.shifts[p])
    torch.testing.assert_close(run.wrapped(x), twin(x))
    squares(run, torch.randn(4, 6, 3, dtype=F64))
    fresh = Private(BySample().double(), sgd, ascent=RHO, data_loader=loader_of(4))
    fresh.optimizer.ascending.load_state_dict(run.optimizer.ascending.state_dict())
    squares(fresh, x)


def test_a_parameter_past_its_module_is_refused_by_name():
    kw = dict(max_physical_batch_size=1, data_loader=loader_of(1))
    squares(Private(Past().double(), sgd, **kw), torch.randn(1, 3, dtype=F64))
    run = Private(Past().double(), sgd, ascent=RHO, **kw)
    with pytest.raises(RuntimeError, match=r"'fc.weight' was used outside"):
        squares(run, torch.randn(1, 3, dtype=F64))
