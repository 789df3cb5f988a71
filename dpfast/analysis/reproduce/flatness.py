"""DP-SAT against DP-SGD on images: is the minimum flatter, is less clipped, and is the model more accurate?

From scratch, and fine-tuned: the paper starts from networks that were pretrained on public images of other kinds. Here
the odd classes stand for these: a net is trained on them without privacy, gets a new last layer, and is fine-tuned on
the even classes, which it has never seen. The data is the same for all seeds, which draw weights, batches and noise;
two methods with the same seed have these in common.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from dpfast.analysis.reproduce.common import Data, Job, Table, Verdict, accuracy, logits_of, progress, train, written
from dpfast.analysis.reproduce.datasets import MissingData, check_images, folder_of, idx_data
from dpfast.analysis.reproduce.flatness_report import BASE, Run, comparison, draw, verdict
from dpfast.analysis.sharpness import sharpness
from dpfast.optim.ascent import DPSAT, Ascent, DPSATMomentum

CE = nn.functional.cross_entropy
EPSILONS = (2.0, 3.0)
CLIP = 0.1
SETTINGS: dict[str, Any] = dict(max_grad_norm=CLIP, learning_rate=2.0, momentum=0.9)  # the authors' own
RADII = {f"DP-SAT, ρ = {rho:g}": rho for rho in (0.03, 0.1)}
METHODS: dict[str, Ascent | None] = {BASE: None} | {name: DPSAT(rho) for name, rho in RADII.items()}
FULL_METHODS = METHODS | {"DP-SAT Momentum, ρ = 0.1": DPSATMomentum(0.1)}
STARTS = SCRATCH, TUNED = "from scratch", "fine-tuned"
LENGTHS = {  # batch, epochs from scratch, epochs of fine-tuning
    "quick": (512, 1, 1),
    "usual": (512, 8, 4),  # as many steps from scratch as the authors take
    "full": (2048, 30, 10),  # from scratch the authors' own
}
START_EPOCHS, START_BATCH, START_RATE = 5, 128, 0.1
LOOKED_AT = 2000  # training images, for curvature and norms
RISE_AT = 0.1  # ρ of the rise, the same for all methods


def check(job: Job) -> None:
    """Refuse images that are not there, or that have too few classes."""
    check_images(job.data)
    classes = idx_data(folder_of(job.data), 0).train.tensors[1].unique().tolist()
    if any(sum(one % 2 == odd for one in classes) < 2 for odd in (0, 1)):
        raise MissingData(
            f"--data {job.data}: classes {classes}: dpsat takes two odd ones to start from and two even ones to "
            f"fine-tune on, at least"
        )


def run(job: Job) -> list[Table | Verdict]:
    """Tables and the verdict; the plot goes to ``job.out``."""
    data = centred(idx_data(folder_of(job.data), 0))
    public, private = halves(data)
    methods = FULL_METHODS if job.full else METHODS
    batch, *lengths = LENGTHS["quick" if job.quick else "full" if job.full else "usual"]
    epochs = dict(zip(STARTS, lengths, strict=True))
    starts = [start_of(public, private.classes, seed) for seed in progress(range(job.seeds), "non-private starts")]
    found: dict[tuple[str, float, str], list[Run]] = {}
    todo = [
        (start, e, seed, name) for start in STARTS for e in EPSILONS for seed in range(job.seeds) for name in methods
    ]
    for start, epsilon, seed, method in progress(todo, "DP-SGD and DP-SAT"):
        torch.manual_seed(seed)
        model = cnn(data.features, data.classes) if start == SCRATCH else copy.deepcopy(starts[seed][0])
        part = data if start == SCRATCH else private
        one = _run(model, part, seed, methods[method], epsilon=epsilon, epochs=epochs[start], batch_size=batch)
        found.setdefault((start, epsilon, method), []).append(one)
    tables = [comparison(start, found, f"{epochs[start]} epochs, batches of {batch}") for start in STARTS]
    tables[0].notes.append(
        f"Curvature and norms are those of {LOOKED_AT} training images at the last weights, with ρ = {RISE_AT:g} for "
        f"the rise of all methods. C = {CLIP:g}, δ = {data.delta:g}."
    )
    tables[1].notes.append(
        f"The start: {START_EPOCHS} epochs without privacy on the odd classes, {len(public[0])} images; accuracy on "
        f"their test images {written((right for _, right in starts), '.1f', 100)} %. The private part: the even "
        f"classes, {len(private.train)} images."
    )
    draw(found, RADII, job.out / "flatness.png")
    return [*tables, verdict(found)]


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


def centred(data: Data) -> Data:
    """With mean 0 and deviation 1 over all pixels to train on: public figures, as the authors take them to be."""
    pixels = data.train.tensors[0]
    mean, deviation = pixels.mean(), pixels.std().clamp(min=1e-6)
    parts = [
        TensorDataset((part.tensors[0] - mean) / deviation, part.tensors[1])
        for part in (data.train, data.holdout, data.test)
    ]
    return replace(data, train=parts[0], holdout=parts[1], test=parts[2])


def halves(data: Data) -> tuple[tuple[TensorDataset, TensorDataset], Data]:
    """The odd classes' images, to train and to test, as if they were public; and the data of the even classes."""

    def of(part: TensorDataset, odd: bool) -> TensorDataset:
        x, y = part.tensors
        mine = y % 2 == odd
        return TensorDataset(x[mine], y[mine] // 2)

    train_, holdout, test = (of(part, False) for part in (data.train, data.holdout, data.test))
    private = replace(data, train=train_, holdout=holdout, test=test, classes=(data.classes + 1) // 2)
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


def _run(
    model: nn.Module, data: Data, seed: int, ascent: Ascent | None, *, epsilon: float, epochs: int, batch_size: int
) -> Run:
    trained = train(
        model,
        data.train,
        seed=seed,
        epsilon=epsilon,
        epochs=epochs,
        batch_size=min(batch_size, max(1, len(data.train) // 4)),
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
