"""Clipping and noise along the gradient flow: Bu et al. (arXiv 2106.07830) on small nets.

1. Noise: how far a noisy run ends from the noiseless one as the step η shrinks, at a fixed noise multiplier σ, and at a
   fixed privacy budget, for which σ has to grow with the number of steps.
2. Clipping: the tangent kernel of a small net under several ways to clip, at the start and after training.
3. The flow itself under the same ways: does the loss fall, and how far?

Each part ends in what the paper says of it, what was seen here, and whether the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.analysis.flow import Trajectory, simulate
from dpfast.analysis.ntk import (
    FALLING,
    FULL_RANK,
    NOT_NEGATIVE,
    QUADRATIC,
    REAL,
    SYMMETRIC,
    ConvergenceReport,
    convergence_report,
)
from dpfast.analysis.plots import Curve, curves, spectra
from dpfast.analysis.reproduce.common import Data, Job, Table, Verdict, mean_error, progress, split, written
from dpfast.analysis.reproduce.convergence_verdicts import flow_verdict, kernel_verdict, noise_verdict

CE = nn.CrossEntropyLoss()
HORIZON, SLOWEST = 0.4, 0.02  # of the noisy runs, and their largest η, in units of time
EPSILON, DELTA = 8.0, 1e-4
NOISE = 1.0  # σ at the largest η, in both halves of the first experiment
NOISY_SAMPLES, KERNEL_SAMPLES = 64, 24
PROPERTIES = {  # with the heads of their columns
    SYMMETRIC: "symmetric",
    REAL: "real",
    NOT_NEGATIVE: "not negative",
    FULL_RANK: "H's rank",
    QUADRATIC: "quadratic form ≥ 0",
    FALLING: "loss falls",
}


@dataclass(frozen=True)
class Way:
    """A way to clip; R is a share of the median per-sample norm, or absolute."""

    name: str
    settings: dict[str, Any]
    share: float | None = None

    def at(self, median: float) -> dict[str, Any]:
        norm = None if self.share is None else self.share * median
        return {"max_grad_norm": norm, **self.settings}


LARGE, SMALL = Way("flat, R large", {}, 1000.0), Way("flat, R small", {}, 0.1)
LAYERS = Way("per layer, R small", {"clipping": "per_layer"}, 0.1)
DROPPED = Way("0/1, R = median", {"clipping_fn": "global"}, 1.0)
WAYS = (
    Way("no clipping", {}),
    LARGE,
    SMALL,
    LAYERS,
    DROPPED,
    Way("AUTO-S", {"clipping_fn": "automatic"}, 0.1),
)


def run(job: Job) -> list[Table | Verdict]:
    """Tables and verdicts; plots go to ``job.out``."""
    return [*_noise(job), *_kernels(job), *_flows(job)]


@lru_cache
def cancer(seed: int) -> Data:
    """569 patients, 30 features, 2 classes."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return split(x, y, seed)


@lru_cache
def synthetic(seed: int) -> Data:
    """1000 samples of 3 classes, 10 features, a tenth of the labels drawn anew."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        1000, 10, n_informative=6, n_redundant=0, n_classes=3, flip_y=0.1, class_sep=1.0, random_state=seed
    )
    return split(x, y, seed, drawn=True)


def _start(data: Data, samples: int, seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A net, the loss, and the first samples."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(data.features, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, data.classes)
    )
    return net, CE, data.train.tensors[0][:samples], data.train.tensors[1][:samples]


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ at which a Gaussian mechanism of sensitivity/σ = μ is exactly (ε, δ)-DP (Balle and Wang 2018)."""

    def delta_of(mu: float) -> float:
        a, b = torch.special.ndtr(torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64))
        return float(a - math.exp(epsilon) * b)

    low, high = 1e-6, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) < delta else (low, middle)
    return low


def _noise(job: Job) -> list[Table | Verdict]:
    """Full batches, so that k steps at σ are one Gaussian mechanism with μ = √k/σ, and the budget is exact."""
    halvings = 2 if job.quick else 7
    rates = [SLOWEST / 2**k for k in range(halvings)]
    mu = gaussian_mu(EPSILON, DELTA)
    still: dict[tuple[float, int], Trajectory] = {}
    away: dict[tuple[str, float], list[float]] = {}
    rise: dict[tuple[str, float], list[float]] = {}
    regimes = ("fixed σ", f"fixed ε = {EPSILON:g}")
    todo = [(rate, seed) for rate in rates for seed in range(job.seeds)]
    for rate, seed in progress(todo, "breast cancer: noise against η"):
        problem = _start(cancer(seed), NOISY_SAMPLES, seed)
        steps = round(HORIZON / rate)
        how: dict[str, Any] = dict(learning_rate=rate, steps=steps, max_grad_norm=1.0)
        base = still[rate, seed] = simulate(*problem, **how)
        for regime, sigma in zip(regimes, (NOISE, math.sqrt(steps) / mu), strict=True):
            noisy = simulate(*problem, **how, noise_multiplier=sigma, seed=seed)
            away.setdefault((regime, rate), []).append(float((noisy.parameters - base.parameters).norm()))
            excess = (noisy.losses[-1] - base.losses[-1]) / NOISY_SAMPLES
            rise.setdefault((regime, rate), []).append(float(excess))
    table = Table(
        f"noise against the step η, breast cancer, {NOISY_SAMPLES} samples, R = 1, time {HORIZON:g}, {job.seeds} seeds",
        ["η", "steps", *(f"{what}, {regime}" for regime in regimes for what in ("distance", "loss − noiseless"))],
    )
    for rate in rates:
        cells = [written(part[regime, rate], ".3f") for regime in regimes for part in (away, rise)]
        table.rows.append([f"{rate:g}", str(round(HORIZON / rate)), *cells])
    slopes = [_slope(rates, [mean_error(away[regime, rate])[0] for rate in rates]) for regime in regimes]
    panels: dict[str, dict[str, Curve]] = {}
    for title, part in (("distance to the noiseless run", away), ("loss above the noiseless run, nats", rise)):
        panels[title] = {}
        for regime in regimes:
            found = [mean_error(part[regime, rate]) for rate in rates]
            panels[title][regime] = Curve(rates, [m for m, _ in found], [e if e == e else 0.0 for _, e in found])
    first = panels["distance to the noiseless run"][regimes[0]].y[0]
    guide = Curve(rates, [first * math.sqrt(rate / rates[0]) for rate in rates])
    curves(
        panels,
        job.out / "noise.png",
        x_name="Euler step η",
        log={"distance to the noiseless run": "xy", "loss above the noiseless run, nats": "x"},
        guides={"distance to the noiseless run": {"√η": guide}},
    )
    return [table, noise_verdict(slopes, f"σ = {NOISE:g}", f"ε = {EPSILON:g}, δ = {DELTA:g}, σ = √steps / {mu:.2f}")]


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y over log x, by least squares."""
    a, b = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a @ a))


def _kernels(job: Job) -> list[Table | Verdict]:
    """The paper's properties over seeds and data, before and after training without clipping."""
    tables: list[Table | Verdict] = []
    every: dict[str, list[ConvergenceReport]] = {way.name: [] for way in WAYS}
    for name, make in (("breast cancer", cancer), ("make_classification", synthetic)):
        for when, steps in (("at the start", 0), ("after training", 100 if job.quick else 400)):
            found: dict[str, list[ConvergenceReport]] = {way.name: [] for way in WAYS}
            for seed in progress(range(job.seeds), f"{name}: kernels {when}"):
                net, loss, x, y = _start(make(seed), KERNEL_SAMPLES, seed)
                if steps:
                    _fit(net, x, y, steps)
                median = float(convergence_report(net, loss, x, y, max_grad_norm=None).norms.median())
                for way in WAYS:
                    found[way.name].append(convergence_report(net, loss, x, y, **way.at(median)))
            tables.append(_properties(f"{name}, {when}", found, job.seeds))
            for way_name, reports in found.items():
                every[way_name] += reports
            if not steps:
                path = job.out / f"spectra_{name.replace(' ', '_')}.png"
                spectra({way.name: found[way.name][0].eigenvalues.tolist() for way in WAYS[1:]}, path)
    unclipped, (small, layer, drop) = (
        every[WAYS[0].name] + every[LARGE.name],
        (every[w.name] for w in (SMALL, LAYERS, DROPPED)),
    )
    return [*tables, kernel_verdict(unclipped, small, layer, drop)]


def _fit(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        CE(net(x), y).backward()
        optimizer.step()


def _properties(name: str, found: dict[str, list[ConvergenceReport]], seeds: int) -> Table:
    table = Table(
        f"{name}: in how many of {seeds} seeds a property holds (* guaranteed; {KERNEL_SAMPLES} samples; in ‖HC‖)",
        ["way", *PROPERTIES.values(), "smallest symmetric eigenvalue", "largest imaginary part"],
    )
    for way, reports in found.items():
        row = [way]
        for name_ in PROPERTIES:
            guaranteed = all(one.guaranteed for report in reports for one in report.properties if one.name == name_)
            row.append(f"{sum(report.holds(name_) for report in reports)}{'*' if guaranteed else ''}")
        sizes = [float(report.eigenvalues.abs().max()) for report in reports]
        low = [report.smallest_symmetric / size for report, size in zip(reports, sizes, strict=True)]
        imaginary = [
            float(report.eigenvalues.imag.abs().max()) / size for report, size in zip(reports, sizes, strict=True)
        ]
        table.rows.append([*row, written(low, ".1e"), f"{max(imaginary):.0e}"])
    return table


def _flows(job: Job) -> list[Table | Verdict]:
    """Noiseless training of all weights under each way, all with the same first ‖dw/dt‖, so that times compare."""
    steps = 60 if job.quick else 600
    table = Table(
        f"noiseless training on {KERNEL_SAMPLES} samples of make_classification, {steps} steps, {job.seeds} seeds",
        ["way", "last loss / first", "dL/dt > 0 somewhere", "loss rose in a step", "largest rise, % of the first loss"],
    )
    lines: dict[str, Curve] = {}
    ends: dict[str, list[float]] = {}
    climbs: dict[str, int] = {}
    for way in WAYS:
        paths = []
        for seed in progress(range(job.seeds), f"flow: {way.name}"):
            problem = _start(synthetic(seed), KERNEL_SAMPLES, seed)
            median = float(convergence_report(*problem, max_grad_norm=None).norms.median())
            share = 1.0 if way.share is None or way.share > 1 else way.share
            paths.append(simulate(*problem, learning_rate=0.01 / share, steps=steps, **way.at(median)))
        relative = [path.losses / path.losses[0] for path in paths]
        rises = [max(0.0, 100 * float(one.diff().max())) for one in relative]
        uphill, rose = sum(bool((p.slopes > 0).any()) for p in paths), sum(not p.monotone for p in paths)
        climbs[way.name] = uphill
        ends[way.name] = [float(one[-1]) for one in relative]
        last = written(ends[way.name], ".2g")
        counts = [f"{count} of {job.seeds}" for count in (uphill, rose)]
        table.rows.append([way.name, last, *counts, written(rises, ".2g")])
        every = range(0, steps + 1, max(1, steps // 100))
        found = [mean_error(float(one[k]) for one in relative) for k in every]
        lines[way.name] = Curve(list(every), [m for m, _ in found], [e if e == e else 0.0 for _, e in found])
    curves({"training loss / first loss": lines}, job.out / "flows.png", x_name="step", log="y")
    table.notes.append(
        "Where the loss rose in a step and dL/dt was nowhere above 0, it is the step's length: gradients of constant "
        "length overshoot near a minimum."
    )
    small, large = SMALL.name, LARGE.name
    return [table, flow_verdict(ends[small], ends[large], climbs[small], climbs[large])]
