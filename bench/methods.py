"""The ways of training that are compared, behind one face: prepare a model, then take steps.

Everything goes through each library's own engine, as a user's script would; nothing here knows how a method works.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.functional import private_gradients
from bench.workloads import Workload, sequence_loss
from dpfast.planning.planner import WAYS

NOISE_MULTIPLIER = 1.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-3

Plan = Mapping[str, str]  # layer → way


@dataclass(frozen=True)
class Method:
    """A way of training; ``library`` is what has its engine, and None means without privacy."""

    name: str
    title: str
    library: str | None = None
    mode: str = ""
    compiled: bool = False
    recorded: bool = False  # the step is recorded once and replayed; ``compiled``: its forward and backward by Inductor
    layerwise: bool = False  # each layer is clipped on its own, to C/√M for M of them
    any_variant: bool = False  # others can only be given the plain model

    @property
    def private(self) -> bool:
        return self.library is not None

    @property
    def why_not(self) -> str | None:
        """Why it cannot be measured here."""
        if self.library is not None and importlib.util.find_spec(self.library) is None:
            return f"no module named {self.library}"
        return None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("nonprivate", "non-private"),
        Method("nonprivate-compiled", "non-private, compiled", compiled=True),
        Method("dpfast", "dpfast", "dpfast", "fused"),
        Method("dpfast-compiled", "dpfast, compiled", "dpfast", "fused", compiled=True),
        Method("dpfast-graphed", "dpfast, recorded", "dpfast", "fused", recorded=True),
        Method("dpfast-graphed-compiled", "dpfast, recorded and compiled", "dpfast", "fused", True, recorded=True),
        Method("hooks", "Opacus hooks", "opacus", "hooks", any_variant=True),
        Method("functorch", "Opacus functorch", "opacus", "functorch", any_variant=True),
        Method("ghost", "Opacus ghost", "opacus", "ghost", any_variant=True),
        Method("fastdp", "fastDP", "fastDP", any_variant=True),
        Method("opake", "Opake", "opake", any_variant=True),
        Method("flashdp", "per-layer, FlashDP-style (ours)", "bench", layerwise=True, any_variant=True),
    )
}


def absent() -> dict[str, str]:
    """Methods whose library is not installed, and why they are not measured."""
    found = {method.name: method.why_not for method in METHODS.values()}
    return {name: reason for name, reason in found.items() if reason is not None}


def fixed_loader(x: Tensor, y: Tensor) -> DataLoader:
    """A loader whose one batch is everything: make_private reads the expected batch size from it."""
    return DataLoader(TensorDataset(x, y), batch_size=len(x))


def quiet_peers() -> None:
    """Silence remarks that say nothing about a result and break the progress bars."""
    for message in (
        "Secure RNG turned off",  # on purpose: the fast generator is what everyone is compared with
        "Full backward hook is firing",  # the first layer's input has no gradient, as always
        "Optimal order is the largest alpha",  # the PRV accountant's first guess of its domain, not its answer
        "`torch.jit",  # the compiler's own
        "Using a non-full backward hook",  # fastDP's
        "There is a performance drop",  # vmap over attention
        "In CPU autocast",  # Opacus' functorch asks for none
    ):
        warnings.filterwarnings("ignore", message=message)


@dataclass
class Trainer:
    """A model made ready by one method, and the loop body that its user would write."""

    model: nn.Module
    optimizer: Any
    loader: DataLoader
    criterion: Any
    engine: Any
    ghost: bool = False
    summed: bool = False  # the loss is a sum over the samples
    recorded: Callable[..., Tensor] | None = None  # forward, loss and backward in one call

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Any:
        """As the method's criterion gives it."""
        loss = sequence_loss(self.criterion, model(x), y, ghost=self.ghost)
        return loss * len(x) if self.summed else loss

    def step(self, x: Tensor, y: Tensor) -> Any:
        """One whole step; returns the loss (reading it is the caller's cost)."""
        if self.recorded is not None:
            loss = self.recorded(x, y)
        else:
            loss = self.loss(self.model, x, y)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        x.grad = None  # of inputs that stand for another layer's output
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
    plan: Plan | None = None,
) -> Trainer:
    """Hand the user's objects to the method's privacy engine (or to nobody) and wrap what comes back.

    ``plan`` is which way dpfast goes in each layer; without one, its planner chooses.
    """
    criterion: Any = nn.CrossEntropyLoss()
    settings = dict(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    if method.library is None:
        trainer = Trainer(model, optimizer, loader, criterion, None)
    elif method.library in ("bench", "fastDP"):
        attach = _fastdp if method.library == "fastDP" else _flashdp
        trainer = Trainer(model, optimizer, loader, criterion, attach(model, optimizer, loader, **settings))
    elif method.library == "opake":
        trainer = Trainer(model, optimizer, loader, criterion, None)
        one = functools.partial(sequence_loss, criterion)
        trainer.recorded = private_gradients(model, one, loader.batch_size or 1, **settings)
    else:
        engine = importlib.import_module(method.library).PrivacyEngine(secure_mode=False)
        ghost = method.mode == "ghost"
        # In 16 bits backprops of a mean are rounded after their division, so they depend on how many samples there are.
        summed = method.library == "dpfast" and next(model.parameters()).dtype.itemsize < 4
        parts = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            poisson_sampling=poisson_sampling,
            grad_sample_mode=method.mode,
            **settings,
            **({"criterion": criterion} if ghost else {}),
            **({"loss_reduction": "sum"} if summed else {}),
            **({"plan": plan} if plan and method.library == "dpfast" else {}),
        )
        if ghost:
            model, optimizer, criterion, loader = parts
        else:
            model, optimizer, loader = parts
        trainer = Trainer(model, optimizer, loader, criterion, engine, ghost, summed)
    if method.recorded:
        trainer.recorded = importlib.import_module("dpfast").graphed(
            trainer.model, trainer.loss, compiled=method.compiled
        )
    elif method.compiled:
        trainer.model = torch.compile(trainer.model)  # type: ignore[assignment]
    return trainer


def _fastdp(model: nn.Module, optimizer: Any, loader: DataLoader, **settings: float) -> Any:
    import fastDP

    size = len(loader.dataset)  # type: ignore[arg-type]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it finds
        engine = fastDP.PrivacyEngine(
            model, batch_size=loader.batch_size, sample_size=size, epochs=1, clipping_fn="Abadi", **settings
        )
        engine.attach(optimizer)
    return engine


def _flashdp(model: nn.Module, optimizer: Any, loader: DataLoader, **settings: float) -> Any:
    from bench.flashdp import clip_each_layer

    return clip_each_layer(model, loader.batch_size or 1, **settings)


@dataclass(frozen=True)
class Training:
    """A step of a trainer on data of its own."""

    trainer: Trainer
    x: Tensor
    y: Tensor

    def __call__(self) -> object:
        return self.trainer.step(self.x, self.y)

    @property
    def plan(self) -> Plan | None:
        """The way that dpfast goes in each layer that has a choice, if it is the same in all its uses; None for the
        other methods.
        """
        clipped_sum = getattr(self.trainer.model, "clipped_sum", None)
        if clipped_sum is None:
            return None
        root = self.trainer.model._module  # a tap calls it by its type, a plan by the empty name
        names = {name: name for name, _ in root.named_modules()} | {type(root).__name__: ""}
        ways: dict[str, set[str]] = {}
        for layer, _, way in clipped_sum.planner.state_dict()["plans"]:
            if layer in names and way in WAYS:
                ways.setdefault(names[layer], set()).add(way)
        return {layer: way for layer, (way, *more) in ways.items() if not more}


def start_training(
    work: Workload,
    method: str,
    variant: str,
    device: torch.device,
    size: int | None = None,
    plan: Plan | None = None,
) -> Callable[[], Training]:
    """Build the model and the data; what is returned makes the model private and returns the step.

    On a GPU everyone has the AdamW that serves it best: torch's fused one, but for dpfast, whose own step is fused.
    """
    model = work.model(variant, device)
    x, y = work.batch(size, device)
    if work.inner:
        x.requires_grad_(x.is_floating_point())

    def start() -> Training:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if device.type == "cuda":
            fused = None if METHODS[method].library == "dpfast" else True
            optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=fused)
        else:
            optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
        trainer = prepare(
            METHODS[method],
            model,
            optimizer,
            fixed_loader(x.detach(), y),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            poisson_sampling=False,
            plan=plan,
        )
        return Training(trainer, x, y)

    return start
