"""Bare parameters that broadcast over the batch are served without vmap, and whatever else is done with one by vmap."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.refusals import LayoutError
from tests.helpers import (
    F64,
    assert_exact,
    check_layer,
    make_private,
    mse,
)
from tests.privacy.judging import examine

B, T, D = 3, 4, 6


class Uses(nn.Module):
    """``use(x, p)`` between two linear layers, ``x [B, T, D]``."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor], *shape: int, into: int = D):
        super().__init__()
        self.one, self.two = nn.Linear(4, D), nn.Linear(into, 2)
        self.p = nn.Parameter(torch.rand(shape) + 0.5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.use(self.one(x).tanh(), self.p))


def rows(batch: int = B, length: int = T) -> Tensor:
    return torch.randn(batch, length, 4)


def targets(batch: int = B) -> Tensor:
    return 2 * torch.randn(batch, 2)


def cat(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([token, x], 1)


def added_in_place(x: Tensor, p: Any) -> Tensor:
    y = x * 1
    y += p
    return y.mul_(p)


def multiplied(x: Tensor, p: Any) -> Tensor:
    for each in p:
        x = x * each
    return x


SERVED: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "expand": (lambda x, p: cat(x, p.expand(len(x), -1, -1)), (1, 1, D)),
    "expand by a tuple": (lambda x, p: cat(x, p.expand((x.shape[0], 2, D))), (1, 1, D)),
    "expand from fewer dimensions": (lambda x, p: cat(x, p.expand(x.size(0), 2, -1)), (D,)),
    "expand_as": (lambda x, p: x * p.expand_as(x), (T, D)),
    "broadcast_to": (lambda x, p: x + torch.broadcast_to(p, x.shape), (1, T, D)),
    "repeat": (lambda x, p: cat(x, p.repeat(len(x), 2, 1)), (1, 1, D)),
    "repeat from fewer dimensions": (lambda x, p: x + p.repeat(len(x), T, 1), (D,)),
    "repeat by itself first": (lambda x, p: x + p.repeat(1, T, 1), (1, 1, D)),
    "expand by itself first": (lambda x, p: x + p.expand(-1, T, -1), (1, 1, D)),
    "add": (lambda x, p: x + p, (1, T, D)),
    "added to": (lambda x, p: p + x, (T, D)),
    "sub": (lambda x, p: (x - p) * (p - x), (D,)),
    "mul": (lambda x, p: torch.mul(x, p), (D,)),
    "div": (lambda x, p: x / p + 1 / p * x, (1, 1, D)),
    "divided": (lambda x, p: p / (2 + x), (1, D)),
    "in place": (added_in_place, (T, D)),
    "a scalar": (lambda x, p: x * p.exp() / (1 + p), ()),
    "of one element": (lambda x, p: x * p, (1,)),
    "channels": (lambda x, p: (x.transpose(1, 2).unsqueeze(3) * p).squeeze(3).transpose(1, 2), (1, D, 1, 1)),
    "sliced": (lambda x, p: x + p[:, : x.shape[1]] + p[:, -1:], (1, T + 2, D)),
    "indexed": (lambda x, p: x * p[1] + p[None, 0, ..., :], (2, D)),
    "iterated": (multiplied, (2, D)),
    "reshaped": (lambda x, p: x + p.view(T, -1).unsqueeze(0) + p.reshape(-1, D).flatten(0).view(1, T, D), (T * D,)),
    "permuted": (lambda x, p: x + p.permute(1, 0) + p.transpose(-1, 0), (D, T)),
    "squeezed": (lambda x, p: x * p.squeeze(0) + p.squeeze() + p.squeeze(-3), (1, 1, D)),
    "by element": (lambda x, p: x * p.sigmoid() + F.softplus(p) * torch.tanh(x) - (-p) ** 2 * x, (D,)),
    "numbers": (lambda x, p: x * (2 * p - 1) / (3 - p / 5) + p.clamp(min=0.7), (D,)),
    "of another dtype": (lambda x, p: x * p.to(x.dtype) + p.to(dtype=x.dtype) / 2, (D,)),
    "what is asked of it": (lambda x, p: x + p[: p.shape[0] - 1, : p.size(1)].view(p.numel() // D - 1, D), (T + 1, D)),
}


class Everything(nn.Module):
    """All uses, or some, one after the other."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, D), nn.Linear(D, 2)
        self.each = [SERVED[name] for name in names or SERVED]
        self.ps = nn.ParameterList([torch.rand(shape) + 0.5 for _, shape in self.each])

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        for (use, _), p in zip(self.each, self.ps, strict=True):
            x = (x + use(x, p)[:, :T]).tanh()
        return self.two(x).sum(1)


@pytest.mark.parametrize("use, shape", SERVED.values(), ids=SERVED)
def test_served_where_it_is_used(use, shape, vmaps):
    """Exact for three samples, for one and for none."""
    model, x = Uses(use, *shape).double(), rows().double()
    y = torch.randn(copy.deepcopy(model)(x).shape, dtype=F64)
    for batch in (B, 1, 0):
        assert_exact(model, (x[:batch],), y[:batch], mse)
    assert not vmaps


@pytest.mark.parametrize("length", [B, 1])
@pytest.mark.parametrize("name", ["expand", "add", "sliced", "mul"])
def test_as_many_positions_as_samples(name, length, vmaps):
    """Or one of them: what broadcasts over the batch is not taken for what broadcasts over positions."""
    use, shape = SERVED[name]
    shape = tuple(length if size == T else size for size in shape)
    check_layer(Uses(use, *shape), (rows(B, length),), F64, empty=False)
    assert not vmaps


def test_all_uses_are_within_the_sensitivity(vmaps):
    examine(Everything(), (rows(),), targets(), mse)
    assert not vmaps


UNSERVED: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "matmul": (lambda x, p: x @ p, (D, D)),
    "matmul from the left": (lambda x, p: p @ x, (T, T)),
    "linear": (lambda x, p: F.linear(x, p), (D, D)),
    "picked by a tensor": (lambda x, p: x + p[torch.arange(T)], (T + 1, D)),
    "cat": (lambda x, p: x + torch.cat([p, p], 2), (1, 1, D // 2)),
    "beside a buffer": (lambda x, p: x + p * torch.linspace(0, 1, T, dtype=x.dtype).unsqueeze(1), (D,)),
    "beside itself": (lambda x, p: x * (p * p), (D,)),
    "softmax": (lambda x, p: x * p.softmax(0), (D,)),
    "reduced": (lambda x, p: x * (p - p.mean()), (D,)),
    "positions first": (lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1), (1, D)),
    "positions first, of each": (lambda x, p: (x.transpose(0, 1) * p).transpose(0, 1), (T, 1, D)),
    "all rows at once": (lambda x, p: (x.flatten(0, 1) * p).view_as(x), (D,)),
    "interpolated": (lambda x, p: x + F.interpolate(p, size=D), (1, T, D // 2)),
    "in place of itself": (lambda x, p: x * F.relu(p * 1, True), (D,)),
    "einsum": (lambda x, p: torch.einsum("btd,d->btd", x, p), (D,)),
    "where": (lambda x, p: torch.where(x > 0, p, x), (D,)),
    "a method that tensors lack": (
        lambda x, p: x * getattr(p, "gain", p.detach) if hasattr(p, "gain") else x @ p,
        (D, D),
    ),
    "looked at for its kind": (lambda x, p: x * p if isinstance(p, Tensor) else x - 1, (D,)),
}


@pytest.mark.parametrize("use, shape", UNSERVED.values(), ids=UNSERVED)
def test_all_else_is_served_by_vmap(use, shape, vmaps):
    x = rows().double()
    assert_exact(Uses(use, *shape).double(), (x,), torch.randn(B, T, 2).double(), mse)
    assert vmaps


# With as many positions as samples, the number of rows does not tell that they are not the samples.
AMBIGUOUS: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "positions first": (lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1), (1, 1, D)),
    "positions first, by feature": (lambda x, p: (x.transpose(0, 1) * p).transpose(0, 1), (D,)),
    "expanded to positions": (lambda x, p: x + p.expand(x.shape[1], -1), (1, D)),
    "expanded to positions first": (lambda x, p: x + p.expand(x.shape[1], 1, -1).transpose(0, 1), (1, 1, D)),
    "repeated for positions": (lambda x, p: x * p.repeat(x.shape[1], 1), (D,)),
    "beside a buffer": (lambda x, p: x + p * torch.linspace(0, 1, B, dtype=x.dtype).unsqueeze(1), (D,)),
    "one copy for all": (lambda x, p: x + p.expand(len(x), -1, -1)[0], (1, 1, D)),
    "copies in another order": (lambda x, p: x * p.expand(len(x), -1, -1).flip(0), (1, 1, D)),
    "copies moved on by one": (lambda x, p: x * p.expand(len(x), -1, -1).roll(1, 0), (1, 1, D)),
    "a mean of copies": (lambda x, p: x + p.expand(len(x), -1, -1).mean(0), (1, 1, D)),
}


@pytest.mark.parametrize("use, shape", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_rows_that_only_look_like_samples(use, shape, vmaps):
    try:
        check_layer(Uses(use, *shape), (rows(B, B),), F64, empty=False)
    finally:
        assert vmaps


@pytest.mark.parametrize("use", [lambda x, p: p.expand(x.shape[1], -1), lambda x, p: p * torch.ones(B, 1)])
def test_a_table_that_is_returned(use):
    """A loss that computes with it, for every sample, would move all rows of it by each."""
    model = Uses(lambda x, p: x * p, 1, D)
    model.forward = lambda x: (model.two(model.one(x) * model.p), use(x, model.p))
    private, *_ = make_private(model, size=B)
    with pytest.raises(LayoutError, match="one sample at a time"):
        private(rows(B, B))
