"""A private run step by step, and a plain optimizer that is fed the noisy gradients of such a run."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tests.helpers import loader_of, make_private
from tests.ops.noisy import apart, same

B, D = 8, 6
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda params, **kw: SGD(params, **dict(lr=0.1) | kw),
    "sgd momentum": lambda params, **kw: SGD(params, **dict(lr=0.1, momentum=0.9, weight_decay=0.01) | kw),
    "nesterov": lambda params, **kw: SGD(params, **dict(lr=0.1, momentum=0.9, nesterov=True) | kw),
    "adam": lambda params, **kw: Adam(params, **dict(lr=0.01, weight_decay=0.1) | kw),
    "adamw": lambda params, **kw: AdamW(params, **dict(lr=0.01) | kw),
    "amsgrad": lambda params, **kw: AdamW(params, **dict(lr=0.01, amsgrad=True, maximize=True) | kw),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 3))


def batch(n: int = B, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, D).to(dtype), torch.randint(3, (n,))


class Run:
    """A model made private; the noise repeats for the same ``seed``."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | Callable, seed: int = 3, **kw):
        self.model = model
        optimizer = optimizer if isinstance(optimizer, Optimizer) else optimizer(model.parameters())
        if not kw.pop("unseeded", False):
            kw["noise_generator"] = torch.Generator().manual_seed(seed)
        options = dict(optimizer=optimizer, noise_multiplier=1.0, max_grad_norm=0.5, data_loader=loader_of(B))
        self.wrapped, self.optimizer, _ = make_private(model, **(options | kw))
        self.reduction = kw.get("loss_reduction", "mean")

    def backward(self, data: tuple[Tensor, Tensor]) -> None:
        F.cross_entropy(self.wrapped(data[0]).float(), data[1], reduction=self.reduction).backward()

    def step(self, data: tuple[Tensor, Tensor] | None = None) -> list[Tensor | None]:
        """One step, of an empty batch if none is given; the gradients that it leaves."""
        self.optimizer.zero_grad()
        if data is None:
            self.optimizer.expect_no_samples()
        else:
            self.backward(data)
        self.optimizer.step()
        return self.grads()

    def grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


class Plain:
    """A copy of a model, before it is private, and torch's own optimizer on it."""

    def __init__(self, model: nn.Module, optimizer: Callable):
        self.model = copy.deepcopy(model)
        self.optimizer = optimizer(self.model.parameters())

    def step(self, grads: list[Tensor | None]) -> None:
        for p, g in zip(self.model.parameters(), grads, strict=True):
            p.grad = None if g is None else g.clone()
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def assert_close(run: Run, plain: Plain, start: list[Tensor], steps: int, name: str = "", size: float = 0.02) -> None:
    """Two units of the largest number that took part, updates (``size``) among them, for each step; SGD to the bit."""
    for p, q, first in zip(run.values(), plain.values(), start, strict=True):
        if name in ("sgd", "sgd momentum", "nesterov") and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            assert same(p, q)
        assert apart(p, q, first, p - first, torch.full_like(p, size)) <= 2 * steps
