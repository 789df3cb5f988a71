"""The trainings that the calibration tables are made of: one for each way to clip, R, lr · R and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpfast.analysis.calibration import CalibrationReport, calibration_report
from dpfast.analysis.reproduce.common import (
    Data,
    _spent,
    accuracy,
    logits_of,
    mean_error,
    mlp,
    noise_for,
    progress,
    train,
)
from dpfast.analysis.temperature import fit_temperature

FLAT, LAYERS, DROPPED = "flat", "per layer", "0/1"
STYLES: dict[str, dict[str, Any]] = {FLAT: {}, LAYERS: {"clipping": "per_layer"}, DROPPED: {"clipping_fn": "global"}}
LOSS_SAMPLES = 10_000  # of the training data, at most: for the training-loss curves
TEMPERATURE_EPOCHS, TEMPERATURE_BATCH = 20, 256


@dataclass(frozen=True)
class Plan:
    """What is tried on one data set.

    Attributes:
        name: of the data.
        make: from a seed to the three parts.
        seeds: how many.
        net: from the data to a model.
        norms: R, from small to large.
        products: lr · R; the noise that a step adds to the weights is the same for all R at one of them.
        fixed: that of the products at which all R are compared.
        epsilon, epochs, batch_size: of each training.
        resplit: as in ``Data``.
    """

    name: str
    make: Callable[[int], Data]
    seeds: int
    net: Callable[[Data], nn.Module] = mlp
    norms: Sequence[float] = (0.1, 1.0, 3.0, 10.0, 30.0)
    products: Sequence[float] = (1.0, 3.0, 10.0)
    fixed: float = 3.0
    epsilon: float = 8.0
    epochs: int = 20
    batch_size: int = 256
    resplit: float = 0.0

    @property
    def slug(self) -> str:
        return self.name.replace(" ", "_").replace("-", "_").lower()


@dataclass(frozen=True)
class Run:
    """One trained model.

    Attributes:
        test: its calibration on the test data.
        held_out: its accuracy on the samples held out.
        losses: its mean training loss before training and after each epoch, nats.
        held_out_logits, test_logits: ``[n, classes]``.
        epsilon: spent.
    """

    test: CalibrationReport
    held_out: float
    losses: Sequence[float]
    held_out_logits: Tensor
    test_logits: Tensor
    epsilon: float


@dataclass(frozen=True)
class Tempered:
    """A model's calibration with its logits over a temperature fitted under DP, and the best temperature without."""

    temperature: float
    best: float
    test: CalibrationReport


Grid = Mapping[tuple[str, float, float], Sequence[Run]]  # by clipping, R and lr · R: a run a seed
Choice = Mapping[tuple[str, float], float]  # lr · R by clipping and R


def grid(plan: Plan) -> Grid:
    """All trainings of a plan. Those of one seed have the same data, first weights, batches and noise."""
    found: dict[tuple[str, float, float], list[Run]] = {}
    todo = [
        (seed, style, norm, product)
        for seed in range(plan.seeds)
        for style in STYLES
        for norm in plan.norms
        for product in plan.products
    ]
    data, of = None, None
    for seed, style, norm, product in progress(todo, f"{plan.name}: clipping × R × lr"):
        if data is None or of != seed:
            data, of = plan.make(seed), seed
        found.setdefault((style, norm, product), []).append(_run(plan, data, seed, style, norm, product))
    return found


def _run(plan: Plan, data: Data, seed: int, style: str, norm: float, product: float) -> Run:
    torch.manual_seed(seed)
    model = plan.net(data)
    part = TensorDataset(*(tensor[:LOSS_SAMPLES] for tensor in data.train.tensors))

    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(logits_of(model, part), part.tensors[1]))

    first = loss(model)
    trained = train(
        model,
        data.train,
        seed=seed,
        epsilon=plan.epsilon,
        delta=data.delta,
        max_grad_norm=norm,
        learning_rate=product / norm,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        watch=loss,
        **STYLES[style],
    )
    held, test = trained.logits(data.holdout), trained.logits(data.test)
    return Run(
        calibration_report(test, data.test.tensors[1], resamples=0),
        accuracy(held, data.holdout.tensors[1]),
        [first, *trained.watched],
        held,
        test,
        trained.epsilon,
    )


def chosen(plan: Plan, found: Grid) -> Choice:
    """The lr · R of the largest mean accuracy on held-out samples, for each way to clip and R; the smaller if equal."""

    def held_out(style: str, norm: float, product: float) -> float:
        return mean_error(run.held_out for run in found[style, norm, product])[0]

    return {
        (style, norm): max(plan.products, key=lambda product: held_out(style, norm, product))
        for style in STYLES
        for norm in plan.norms
    }


def composed(plan: Plan, trainings: int) -> float:
    """ε of so many trainings of a plan on the same data, at the δ of one."""
    data = plan.make(0)
    batches = math.ceil(len(data.train) / plan.batch_size)
    sigma = noise_for(plan.epsilon, 1 / batches, plan.epochs, data.delta)
    return _spent(((sigma, 1 / batches, trainings * plan.epochs * batches),), data.delta)


def tempered(plan: Plan, run: Run, seed: int) -> Tempered:
    """DP temperature scaling on the held-out samples, with the ε of the model."""
    data = plan.make(seed)
    labels = data.holdout.tensors[1]
    torch.manual_seed(seed)
    batches = math.ceil(len(labels) / TEMPERATURE_BATCH)
    fit = fit_temperature(
        run.held_out_logits,
        labels,
        noise_multiplier=noise_for(plan.epsilon, 1 / batches, TEMPERATURE_EPOCHS, data.delta),
        target_delta=data.delta,
        epochs=TEMPERATURE_EPOCHS,
        batch_size=TEMPERATURE_BATCH,
        noise_generator=torch.Generator().manual_seed(seed),
    )
    report = calibration_report(run.test_logits / fit.temperature, data.test.tensors[1], resamples=0)
    return Tempered(fit.temperature, best_temperature(run.held_out_logits, labels), report)


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The one of the smallest NLL, on a grid of 1 % steps from 0.1 to 20, without privacy."""
    steps = torch.exp(torch.arange(math.log(0.1), math.log(20), 0.01))
    losses = [nn.functional.cross_entropy(logits / T, labels) for T in steps]
    return float(steps[int(torch.stack(losses).argmin())])
