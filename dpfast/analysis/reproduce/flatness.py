"""DP-SAT against DP-SGD on images: is the minimum flatter, is less clipped, and is the model more accurate?

From scratch, and fine-tuned: the paper starts from networks that were pretrained on public images of other kinds. Here
the odd classes stand for these: a net is trained on them without privacy, gets a new last layer, and is fine-tuned on
the even classes, which it has never seen. The data is the same for all seeds, which draw weights, batches and noise;
two methods with the same seed have these in common.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from dpfast.analysis.plots import Curve, curves
from dpfast.analysis.reproduce.common import (
    Data,
    Job,
    Table,
    Verdict,
    accuracy,
    logits_of,
    mean_error,
    progress,
    student,
    train,
    written,
)
from dpfast.analysis.reproduce.datasets import MissingData, check_images, folder_of, idx_data
from dpfast.analysis.sharpness import sharpness
from dpfast.optim.ascent import DPSAT, Ascent, DPSATMomentum

CE = nn.functional.cross_entropy
EPSILONS = (2.0, 3.0)
CLIP = 0.1
SETTINGS: dict[str, Any] = dict(max_grad_norm=CLIP, learning_rate=2.0, momentum=0.9)  # the authors' own
BATCH = 2048
BASE = "DP-SGD"
RADII = (0.03, 0.1)
METHODS: dict[str, Ascent | None] = {BASE: None} | {f"DP-SAT, ρ = {rho:g}": DPSAT(rho) for rho in RADII}
FULL_METHODS = METHODS | {"DP-SAT Momentum, ρ = 0.1": DPSATMomentum(0.1)}
SCRATCH, TUNED = "from scratch", "fine-tuned"
STARTS = (SCRATCH, TUNED)
EPOCHS = {"quick": (1, 1), "usual": (8, 6), "full": (30, 30)}  # from scratch, and of fine-tuning
START_EPOCHS, START_BATCH, START_RATE = 5, 128, 0.1
LOOKED_AT = 2000  # training images, for curvature and norms
RISE_AT = 0.1  # ρ of the rise, the same for all methods


@dataclass(frozen=True)
class Run:
    """A trained model: test accuracy, curvature and per-sample norms at its last weights, and the time of a step."""

    accuracy: float
    top: float
    rise: float
    norm: float
    clipped: float
    seconds: float
    converged: bool


@dataclass(frozen=True)
class Measure:
    """A column: an attribute of :class:`Run`, how it is written, and whether the paper wants it lower or higher."""

    name: str
    of: str
    spec: str
    scale: float = 1.0
    better: int = 0

    def values(self, runs: Sequence[Run]) -> list[float]:
        return [self.scale * float(getattr(one, self.of)) for one in runs]


MEASURES = (
    Measure("test accuracy, %", "accuracy", ".2f", 100, +1),
    Measure("top eigenvalue", "top", ".2f", 1, -1),
    Measure("L(w + ρĝ) − L(w)", "rise", ".4f", 1, -1),
    Measure("per-sample norm", "norm", ".3f", 1, -1),
    Measure("clipped, %", "clipped", ".2f", 100, -1),
    Measure("step, ms", "seconds", ".1f", 1000),
)
Found = Mapping[tuple[str, float, str], Sequence[Run]]  # by start, ε and method; one a seed


def check(job: Job) -> None:
    """Refuse images that are not there, or that have too few classes."""
    check_images(job.data)
    if (classes := idx_data(folder_of(job.data), 0).classes) < 4:
        raise MissingData(
            f"--data {job.data}: {classes} classes; dpsat takes 4, two to start from and two to fine-tune"
        )


def run(job: Job) -> list[Table | Verdict]:
    """Tables and the verdict; the plot goes to ``job.out``."""
    data = idx_data(folder_of(job.data), 0)
    public, private = halves(data)
    methods = FULL_METHODS if job.full else METHODS
    epochs = dict(zip(STARTS, EPOCHS["quick" if job.quick else "full" if job.full else "usual"], strict=True))
    starts = [start_of(public, private.classes, seed) for seed in progress(range(job.seeds), "non-private starts")]
    found: dict[tuple[str, float, str], list[Run]] = {}
    todo = [
        (start, e, seed, name) for start in STARTS for e in EPSILONS for seed in range(job.seeds) for name in methods
    ]
    for start, epsilon, seed, method in progress(todo, "DP-SGD and DP-SAT"):
        torch.manual_seed(seed)
        model = cnn(data.features, data.classes) if start == SCRATCH else copy.deepcopy(starts[seed][0])
        part = data if start == SCRATCH else private
        one = _run(model, part, seed, epsilon, epochs[start], methods[method])
        found.setdefault((start, epsilon, method), []).append(one)
    tables = [_table(start, found, epochs[start], job.seeds, list(methods)) for start in STARTS]
    tables[1].notes.append(
        f"The start: {START_EPOCHS} epochs without privacy on the odd classes, {len(public[0])} images; accuracy on "
        f"their test images {written((right for _, right in starts), '.1f', 100)} %. The private part: the even "
        f"classes, {len(private.train)} images."
    )
    _draw(found, job.out / "flatness.png")
    return [*tables, _verdict(found, job.seeds)]


def cnn(features: int, classes: int) -> nn.Sequential:
    """Two strided convolutions with tanh, as private training likes it (Tramèr and Boneh, ICLR 2021), and small."""
    side = math.isqrt(features)
    left = (side // 2 - 1) // 2 + 1
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * left * left, classes),
    )


def halves(data: Data) -> tuple[tuple[TensorDataset, TensorDataset], Data]:
    """The odd classes' images, to train and to test, as if they were public; and the data of the even classes."""

    def of(part: TensorDataset, odd: bool) -> TensorDataset:
        x, y = part.tensors
        mine = y % 2 == odd
        return TensorDataset(x[mine], y[mine] // 2)

    train_, holdout, test = (of(part, False) for part in (data.train, data.holdout, data.test))
    private = Data(train_, holdout, test, data.features, (data.classes + 1) // 2, data.delta)
    return (of(data.train, True), of(data.test, True)), private


def start_of(public: tuple[TensorDataset, TensorDataset], classes: int, seed: int) -> tuple[nn.Sequential, float]:
    """A net trained without privacy, with a new last layer for ``classes``; and its accuracy before it got that."""
    images, test = public
    torch.manual_seed(seed)
    model = cnn(images.tensors[0].shape[1], int(images.tensors[1].max()) + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=START_RATE, momentum=0.9)
    for _ in range(START_EPOCHS):
        for x, y in DataLoader(images, batch_size=START_BATCH, shuffle=True):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    right = accuracy(logits_of(model, test), test.tensors[1])
    model[-1] = nn.Linear(model[-1].in_features, classes)  # type: ignore[arg-type]
    return model, right


def _run(model: nn.Module, data: Data, seed: int, epsilon: float, epochs: int, ascent: Ascent | None) -> Run:
    trained = train(
        model,
        data.train,
        seed=seed,
        epsilon=epsilon,
        epochs=epochs,
        batch_size=min(BATCH, max(1, len(data.train) // 4)),
        delta=data.delta,
        ascent=ascent,
        **SETTINGS,
    )
    x, y = (part[:LOOKED_AT] for part in data.train.tensors)
    look = sharpness(model, CE, x, y, rho=RISE_AT, tolerance=3e-3)
    norms = sample_norms(model, x, y)
    return Run(
        accuracy=accuracy(trained.logits(data.test), data.test.tensors[1]),
        top=look.top_eigenvalue,
        rise=look.rise,
        norm=float(norms.mean()),
        clipped=float((norms > CLIP).double().mean()),
        seconds=trained.step_seconds,
        converged=look.converged,
    )


def sample_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Per-sample gradient norms ``[n]`` of the cross-entropy."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(at: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return CE(functional_call(model, at, (x.unsqueeze(0),)), y.unsqueeze(0))

    rows = vmap(grad(loss), (None, 0, 0), chunk_size=500)(weights, x, y)
    return torch.stack([row.flatten(1).square().sum(1) for row in rows.values()]).sum(0).sqrt()


def _table(start: str, found: Found, epochs: int, seeds: int, methods: Sequence[str]) -> Table:
    table = Table(
        f"{start}, {epochs} epochs, {seeds} paired seeds: DP-SGD (mean ± standard error), and what DP-SAT adds to it",
        ["ε", "method", *(measure.name for measure in MEASURES)],
    )
    for epsilon in EPSILONS:
        base = found[start, epsilon, BASE]
        for method in methods:
            runs, row = found[start, epsilon, method], []
            for measure in MEASURES:
                values = measure.values(runs)
                if method == BASE:
                    row.append(written(values, measure.spec))
                    continue
                added = _differences(measure, runs, base)
                row.append(written(added, f"+{measure.spec}") + ("\\*" if sign(added) else ""))
            table.rows.append([f"{epsilon:g}" if method == BASE else "", method, *row])
    table.notes.append(
        f"\\* beyond chance: |t| > {student(seeds - 1):.2f}, the 5 % level of a paired t-test. Curvature and norms are "
        f"those of {LOOKED_AT} training images at the last weights, with ρ = {RISE_AT:g} for all methods; C = {CLIP:g}."
    )
    if missed := sum(not one.converged for runs in found.values() for one in runs):
        table.notes.append(f"The power iteration did not converge in {missed} runs of all starts.")
    return table


def _differences(measure: Measure, runs: Sequence[Run], base: Sequence[Run]) -> list[float]:
    return [a - b for a, b in zip(measure.values(runs), measure.values(base), strict=True)]


def sign(differences: Sequence[float]) -> int:
    """+1 or −1 if the mean is beyond chance at the 5 % level, else 0."""
    mean, error = mean_error(differences)
    if math.isnan(error) or abs(mean) <= student(len(differences) - 1) * error:
        return 0
    return 1 if mean > 0 else -1


def _draw(found: Found, path: Path) -> None:
    """Over ρ: accuracy in points, curvature and rise in percent of DP-SGD's."""

    def points(runs: Sequence[Run], base: Sequence[Run]) -> list[float]:
        return _differences(MEASURES[0], runs, base)

    def percent(of: str) -> Callable[[Sequence[Run], Sequence[Run]], list[float]]:
        return lambda runs, base: [100 * (getattr(a, of) / getattr(b, of) - 1) for a, b in zip(runs, base, strict=True)]

    panels: dict[str, dict[str, Curve]] = {}
    for title, change in (
        ("test accuracy − DP-SGD's, points", points),
        ("top eigenvalue − DP-SGD's, %", percent("top")),
        ("L(w + ρĝ) − L(w), change in %", percent("rise")),
    ):
        panels[title] = {}
        for start in STARTS:
            for epsilon in EPSILONS:
                base = found[start, epsilon, BASE]
                ends = [mean_error(change(found[start, epsilon, f"DP-SAT, ρ = {rho:g}"], base)) for rho in RADII]
                y, error = [0.0, *(m for m, _ in ends)], [0.0, *(e if e == e else 0.0 for _, e in ends)]
                panels[title][f"{start}, ε = {epsilon:g}"] = Curve([0.0, *RADII], y, error)
    curves(panels, path, x_name="ρ", legend=2)


def _verdict(found: Found, seeds: int) -> Verdict:
    says = (
        "At the same ε, and in the time of DP-SGD, DP-SAT finds flatter minima, so that clipping takes less away, and "
        "its models are more accurate, from scratch and fine-tuned. (The authors' notebooks have 87.14 → 87.48 % on "
        "Fashion-MNIST at ε = 2, one run each, with a larger net.)"
    )
    pairs = [(runs, found[start, epsilon, BASE]) for (start, epsilon, method), runs in found.items() if method != BASE]
    if seeds < 2:
        return Verdict(says, "One seed was run.", "None: one seed tells nothing of chance.")
    counts, seen = {}, []
    for measure in MEASURES[:-1]:
        signs = [sign(_differences(measure, *pair)) for pair in pairs]
        counts[measure.of] = signs.count(measure.better), signs.count(-measure.better)
        seen.append(f"{measure.name.partition(',')[0]}: lower in {signs.count(-1)}, higher in {signs.count(1)}")
    points = [mean_error(_differences(MEASURES[0], *pair))[0] for pair in pairs]
    times = statistics.median(a.seconds / b.seconds for pair in pairs for a, b in zip(*pair, strict=True))
    here = (
        f"Of {len(pairs)} comparisons, beyond chance: {'; '.join(seen)}. The mean differences in accuracy go from "
        f"{min(points):+.2f} to {max(points):+.2f} points. A step takes {times:.2f} times that of DP-SGD (median)."
    )
    told = {
        "A lower top eigenvalue": counts["top"],
        "a smaller rise": counts["rise"],
        "smaller per-sample norms": counts["norm"],
        "fewer samples clipped": counts["clipped"],
        "more accuracy": counts["accuracy"],
    }
    return Verdict(says, here, "; ".join(f"{name}: {word(*n, len(pairs))}" for name, n in told.items()) + ".")


def word(agree: int, against: int, comparisons: int) -> str:
    """What ``comparisons`` say of a claim that some bear out, and some contradict, beyond chance."""
    if agree and against:
        return "both ways"
    if against:
        return "the opposite" if 2 * against > comparisons else "the opposite in part"
    return "confirmed" if 2 * agree > comparisons else "in part" if agree else "not seen"
