"""DP-SAT against DP-SGD (Park, Kim, Choi, Lee, ICML 2023) on digits, with an MLP and a small CNN, seed by seed.

Two methods with the same seed have the same split, first weights, batches and noise; their difference is the shift's
doing alone. The privacy is the same by construction: the shift is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from dpfast.analysis.plots import Curve, curves
from dpfast.analysis.reproduce.common import (
    Data,
    Job,
    Table,
    Trained,
    accuracy,
    digits,
    logits_of,
    mean_error,
    mlp,
    progress,
    train,
    written,
)
from dpfast.analysis.reproduce.datasets import check_images
from dpfast.optim.ascent import DPSAT, Ascent, DPSATMomentum

EPSILON = 3.0
SETTINGS = dict(epsilon=EPSILON, max_grad_norm=0.1, momentum=0.9)
EPOCHS, RATE = 20, 2.0
BASE = "DP-SGD"
METHODS: dict[str, Ascent | None] = {
    BASE: None,
    "DP-SAT, ρ = 0.03": DPSAT(rho=0.03),
    "DP-SAT, ρ = 0.1": DPSAT(rho=0.1),
    "DP-SAT, ρ = 0.5": DPSAT(rho=0.5),
    "DP-SAT Momentum, ρ = 0.1": DPSATMomentum(rho=0.1),
}


def cnn(data: Data) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, data.classes),
    )


NETS: dict[str, Callable[[Data], nn.Sequential]] = {"MLP": mlp, "CNN": cnn}


def check(job: Job) -> None:
    """Refuse data that is not there."""
    check_images(job.data)


def run(job: Job) -> list[Table]:
    """Tables; plots go to ``job.out``."""
    epochs = 3 if job.quick else EPOCHS
    tables, panels = [], {}
    for net in NETS:
        todo = [(seed, method) for seed in range(job.seeds) for method in METHODS]
        scores: dict[str, list[list[float]]] = {method: [] for method in METHODS}  # by seed, by epoch
        gaps: dict[str, list[float]] = {method: [] for method in METHODS}
        for seed, method in progress(todo, f"digits, {net}"):
            trained, gap = _run(net, seed, METHODS[method], epochs)
            scores[method].append(trained.watched)
            gaps[method].append(gap)
        tables.append(_table(net, scores, gaps, job.seeds))
        panels[f"{net}: test accuracy, %"] = {method: _line(paths) for method, paths in scores.items()}
        panels[f"{net}: minus DP-SGD, points"] = {
            method: _line(
                [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(paths, scores[BASE], strict=True)]
            )
            for method, paths in scores.items()
        }
    curves(panels, job.out / "accuracy.png", legend=1)
    tables[0].notes.append(_equal_at_zero(epochs))
    return tables


def _line(paths: list[list[float]]) -> Curve:
    """The mean over seeds, in points, after each epoch."""
    found = [mean_error(100 * path[k] for path in paths) for k in range(len(paths[0]))]
    x = list(range(1, len(found) + 1))
    return Curve(x, [m for m, _ in found], [e if e == e else 0.0 for _, e in found])


def _run(net: str, seed: int, ascent: Ascent | None, epochs: int) -> tuple[Trained, float]:
    """The trained model with its test accuracy after each epoch, and test minus training loss at the end."""
    data = digits(seed)
    torch.manual_seed(seed)
    model = NETS[net](data)
    trained = train(
        model,
        data.train,
        seed=seed,
        learning_rate=RATE,
        epochs=epochs,
        watch=lambda m: accuracy(logits_of(m, data.test), data.test.tensors[1]),
        ascent=ascent,
        **SETTINGS,  # type: ignore[arg-type]
    )
    losses = [float(nn.functional.cross_entropy(trained.logits(d), d.tensors[1])) for d in (data.test, data.train)]
    return trained, losses[0] - losses[1]


def _table(net: str, scores: dict[str, list[list[float]]], gaps: dict[str, list[float]], seeds: int) -> Table:
    table = Table(
        f"digits, {net}: ε = {EPSILON:g}, {seeds} paired seeds (mean ± standard error)",
        ["method", "test accuracy, %", "minus DP-SGD, points", "t", "better on", "test − training loss"],
    )
    base = [path[-1] for path in scores[BASE]]
    seen = []
    for method, paths in scores.items():
        last = [path[-1] for path in paths]
        difference = [100 * (a - b) for a, b in zip(last, base, strict=True)]
        mean, error = mean_error(difference)
        t = mean / error if error and error == error else math.nan
        row = [method, written(last, ".2f", 100)]
        if method == BASE:
            row += ["", "", ""]
        else:
            row += [
                written(difference, "+.2f").replace("± +", "± "),
                "" if math.isnan(t) else f"{t:+.1f}",
                f"{sum(d > 0 for d in difference)} of {seeds}",
            ]
            seen.append((method, mean, t))
        table.rows.append([*row, written(gaps[method], ".3f")])
    critical = student(seeds - 1)
    clear = ", ".join(f"{method} ({mean:+.2f})" for method, mean, t in seen if abs(t) > critical)
    table.notes += [
        "Expected: no gain seen on digits with an MLP; a small CNN to be tried.",
        f"Seen: {clear or 'no method'} differs from DP-SGD at the 5 % level of a paired t-test (|t| > {critical:.2f}; "
        f"with {len(seen)} methods about one table in {round(20 / len(seen))} would show one by chance).",
    ]
    return table


def student(freedom: int) -> float:
    """What |t| exceeds 5 % of the time by chance."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom)) if freedom > 0 else math.inf


def _equal_at_zero(epochs: int) -> str:
    """The equality that correctness stands on, rather than accuracy."""
    ends = []
    for ascent in (None, DPSAT(rho=0.0), DPSATMomentum(rho=0.0)):
        trained, _ = _run("MLP", 0, ascent, min(epochs, 3))
        ends.append(torch.cat([p.detach().reshape(-1) for p in trained.model.parameters()]))
    same = all(torch.equal(ends[0], end) for end in ends[1:])
    return f"ρ = 0 {'is' if same else 'IS NOT'} bit-equal to DP-SGD (MLP, seed 0, both ascents)."
