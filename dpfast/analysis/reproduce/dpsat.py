"""DP-SAT against DP-SGD (Park, Kim, Choi, Lee, ICML 2023), seed by seed; and what two gradients a step would cost.

On digits with an MLP and a small CNN here, on images in :mod:`dpfast.analysis.reproduce.flatness`. Two methods with the
same seed have the same split, first weights, batches and noise; their difference is the shift's doing alone. The
privacy is the same by construction: the shift is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from dpfast.analysis.plots import Curve, curves
from dpfast.analysis.reproduce import flatness
from dpfast.analysis.reproduce.chance import ONE_SEED, judged
from dpfast.analysis.reproduce.common import (
    Data,
    Job,
    Table,
    Trained,
    Verdict,
    accuracy,
    digits,
    logits_of,
    mean_error,
    mlp,
    progress,
    student,
    train,
    written,
)
from dpfast.analysis.reproduce.price import price
from dpfast.optim.ascent import DPSAT, Ascent, DPSATMomentum

EPSILON = 3.0
SETTINGS = dict(epsilon=EPSILON, max_grad_norm=0.1, momentum=0.9)
EPOCHS, FULL_EPOCHS, RATE = 20, 30, 2.0
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
    if job.data != "digits":
        flatness.check(job)


def run(job: Job) -> list[Table | Verdict]:
    """Tables and a verdict; plots go to ``job.out``."""
    *tables, verdict = _on_digits(job) if job.data == "digits" else flatness.run(job)
    return [*tables, price(), verdict]


def _on_digits(job: Job) -> list[Table | Verdict]:
    epochs = 3 if job.quick else FULL_EPOCHS if job.full else EPOCHS
    tables, panels, differ = [], {}, {}
    for net in NETS:
        todo = [(seed, method) for seed in range(job.seeds) for method in METHODS]
        scores: dict[str, list[list[float]]] = {method: [] for method in METHODS}  # by seed, by epoch
        gaps: dict[str, list[float]] = {method: [] for method in METHODS}
        for seed, method in progress(todo, f"digits, {net}"):
            trained, gap = _run(net, seed, METHODS[method], epochs)
            scores[method].append(trained.watched)
            gaps[method].append(gap)
        table, differ[net] = _table(net, scores, gaps, job.seeds)
        tables.append(table)
        panels[f"{net}: test accuracy, %"] = {method: _line(paths) for method, paths in scores.items()}
        panels[f"{net}: minus DP-SGD, points"] = {
            method: _line(
                [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(paths, scores[BASE], strict=True)]
            )
            for method, paths in scores.items()
        }
    curves(panels, job.out / "accuracy.png", legend=1)
    tables[0].notes.append(_equal_at_zero(epochs))
    return [*tables, _verdict(differ, job.seeds)]


def _line(paths: list[list[float]]) -> Curve:
    """The mean over seeds, in points, after each epoch."""
    found = [mean_error((100 * path[k] for path in paths), digits(0).resplit) for k in range(len(paths[0]))]
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


def _table(
    net: str, scores: dict[str, list[list[float]]], gaps: dict[str, list[float]], seeds: int
) -> tuple[Table, dict[str, float]]:
    """The table, and by how many points the methods are better than DP-SGD where that is beyond chance."""
    again, critical = digits(0).resplit, student(seeds - 1)
    table = Table(
        f"digits, {net}: ε = {EPSILON:g}, {seeds} paired seeds (mean ± standard error)",
        ["method", "test accuracy, %", "minus DP-SGD, points", "t", "better on", "test − training loss"],
    )
    base = [path[-1] for path in scores[BASE]]
    differ = {}
    for method, paths in scores.items():
        last = [path[-1] for path in paths]
        difference = [100 * (a - b) for a, b in zip(last, base, strict=True)]
        mean, error = mean_error(difference, again)
        t = mean / error if error and error == error else math.nan
        row = [method, written(last, ".2f", 100, again)]
        if method == BASE:
            row += ["", "", ""]
        else:
            row += [
                written(difference, "+.2f", resplit=again),
                "" if math.isnan(t) else f"{t:+.1f}",
                f"{sum(d > 0 for d in difference)} of {seeds}",
            ]
            if abs(t) > critical:
                differ[method] = mean
        table.rows.append([*row, written(gaps[method], ".3f", resplit=again)])
    table.notes.append(
        f"The seeds split the same images anew, so errors are corrected: variance × (1/{seeds} + n_test/n_train) "
        f"(Nadeau and Bengio 2003). Beyond chance is |t| > {critical:.2f}, the 5 % level of a paired t-test."
    )
    return table, differ


def _verdict(differ: dict[str, dict[str, float]], seeds: int) -> Verdict:
    says = "DP-SAT's models are more accurate than those of DP-SGD at the same ε."
    if seeds < 2:
        return Verdict(says, "One seed was run.", ONE_SEED)
    comparisons = sum(len(METHODS) - 1 for _ in differ)
    clear = [f"{net}, {method} ({by:+.2f} points)" for net, of in differ.items() for method, by in of.items()]
    here = f"Of {comparisons} comparisons on digits, beyond chance: {'; '.join(clear) or 'none'}."
    gains = [by > 0 for of in differ.values() for by in of.values()]
    return Verdict(says, here, f"More accuracy: {judged(sum(gains), len(gains) - sum(gains), comparisons)}.")


def _equal_at_zero(epochs: int) -> str:
    """The equality that correctness stands on, rather than accuracy."""
    ends = []
    for ascent in (None, DPSAT(rho=0.0), DPSATMomentum(rho=0.0)):
        trained, _ = _run("MLP", 0, ascent, min(epochs, 3))
        ends.append(torch.cat([p.detach().reshape(-1) for p in trained.model.parameters()]))
    same = all(torch.equal(ends[0], end) for end in ends[1:])
    return f"ρ = 0 {'is' if same else 'IS NOT'} bit-equal to DP-SGD (MLP, seed 0, both ascents)."
