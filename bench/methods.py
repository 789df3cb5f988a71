"""The ways of training that are compared, behind one face: prepare a model, then take steps.

Everything goes through make_private, as a user's script would; nothing here knows how a method works inside.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.workloads import sequence_loss


@dataclass(frozen=True)
class Method:
    """A way of training; engine is "module:class" and None means without privacy."""

    name: str
    title: str
    engine: str | None = None
    mode: str = ""

    @property
    def private(self) -> bool:
        return self.engine is not None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("nonprivate", "non-private"),
        Method("dpfast", "dpfast", "dpfast:PrivacyEngine", "fused"),
        Method("hooks", "Opacus hooks", "opacus:PrivacyEngine", "hooks"),
        Method("ghost", "Opacus ghost", "opacus:PrivacyEngine", "ghost"),
    )
}


def fixed_loader(x: Tensor, y: Tensor) -> DataLoader:
    """A loader whose one batch is everything: make_private reads the expected batch size from it."""
    return DataLoader(TensorDataset(x, y), batch_size=len(x))


def quiet_peers() -> None:
    """Silence remarks that say nothing about a result and break the progress bars."""
    for message in (
        "Secure RNG turned off",  # on purpose: the fast generator is what everyone is compared with
        "Full backward hook is firing",  # the first layer's input has no gradient, as always
        "Optimal order is the largest alpha",  # the PRV accountant's first guess of its domain, not its answer
    ):
        warnings.filterwarnings("ignore", message=message)


@dataclass
class Trainer:
    """A model made ready by one method, and the loop body that its user would write."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    criterion: Any
    engine: Any
    ghost: bool

    def step(self, x: Tensor, y: Tensor) -> Any:
        """One whole step; returns the loss as the method's criterion gives it (reading it is the caller's cost)."""
        loss = sequence_loss(self.criterion, self.model(x), y, ghost=self.ghost)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def prepare(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    poisson_sampling: bool,
) -> Trainer:
    """Hand the user's objects to the method's privacy engine (or to nobody) and wrap what comes back."""
    criterion: Any = nn.CrossEntropyLoss()
    if method.engine is None:
        return Trainer(model, optimizer, loader, criterion, None, ghost=False)
    module_name, class_name = method.engine.split(":")
    engine = getattr(importlib.import_module(module_name), class_name)(secure_mode=False)
    ghost = method.mode == "ghost"
    parts = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        poisson_sampling=poisson_sampling,
        grad_sample_mode=method.mode,
        **({"criterion": criterion} if ghost else {}),
    )
    if ghost:
        model, optimizer, criterion, loader = parts
    else:
        model, optimizer, loader = parts
    return Trainer(model, optimizer, loader, criterion, engine, ghost)
