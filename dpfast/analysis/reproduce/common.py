"""What the reproductions share: data, private training, and tables with standard errors."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import tables
from dpfast.engine import PrivacyEngine

DELTA = 1e-4  # below one over the size of each of the small training sets


@dataclass(frozen=True)
class Job:
    """What the command line asked for."""

    seeds: int
    out: Path
    quick: bool
    full: bool = False
    data: str = "digits"
    model: Path | None = None


@dataclass(frozen=True)
class Data:
    """Three disjoint parts: the model's training data, the temperature's, and what both are judged by.

    Attributes:
        delta: δ, of the data's size.
        resplit: test samples over training samples where seeds split one small data set anew, for
            :func:`mean_error`; 0 where they do not.
    """

    train: TensorDataset
    holdout: TensorDataset
    test: TensorDataset
    features: int
    classes: int
    delta: float = DELTA
    resplit: float = 0.0


class Rows(TensorDataset):
    """Hands out a batch at once, collated: row by row takes longer than a step of a small net."""

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[rows] for tensor in self.tensors)


def as_it_is(batch: Any) -> Any:
    """The batch of :class:`Rows`, which is collated."""
    return batch


@dataclass
class Table:
    """A title, columns, rows of texts, and what is to be said about them."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Markdown, in columns that line up as plain text too."""
        notes = [f"- {note}" for note in self.notes]
        table = tables.markdown(self.columns, self.rows)
        return "\n".join([f"## {self.title}", "", table, "", *notes, *([""] if notes else [])])


@dataclass(frozen=True)
class Verdict:
    """What a report ends in: the paper's claim, the figures seen here, and whether they agree."""

    says: str
    here: str
    verdict: str

    def __str__(self) -> str:
        return f"*The paper says.* {self.says}\n\n*Here.* {self.here}\n\n*Verdict.* {self.verdict}\n"


def mean_error(values: Iterable[float], resplit: float = 0.0) -> tuple[float, float]:
    """The mean and its standard error; NaN for the latter with fewer than two values.

    Seeds that split one data set anew have most of their samples in common, so their results hang together, and the
    variance of the mean is that of one result times ``1/n + n_test/n_train`` instead of ``1/n`` (Nadeau and Bengio,
    *Inference for the Generalization Error*, Machine Learning 52, 2003).

    Args:
        values: one a seed.
        resplit: ``n_test/n_train`` for such seeds (:attr:`Data.resplit`), else 0.
    """
    found = list(values)
    mean = sum(found) / len(found)
    if len(found) < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in found) / (len(found) - 1)
    return mean, math.sqrt(variance * (1 / len(found) + resplit))


def written(values: Iterable[float], spec: str = ".1f", scale: float = 1.0, resplit: float = 0.0) -> str:
    """``mean ± standard error`` of the values times ``scale``; only the mean gets the sign of a "+" in ``spec``."""
    mean, error = mean_error([scale * value for value in values], resplit)
    return f"{mean:{spec}}" if math.isnan(error) else f"{mean:{spec}} ± {error:{spec.lstrip('+')}}"


def student(freedom: int) -> float:
    """What |t| exceeds 5 % of the time by chance."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom)) if freedom > 0 else math.inf


def progress(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items, with a progress bar."""
    from tqdm import tqdm

    return tqdm(items, title, leave=True, dynamic_ncols=True)


def split(x: Any, y: Any, seed: int, scaled: bool = True, drawn: bool = False) -> Data:
    """60 % to train on, 15 % held out for the temperature, 25 % to test on; a stratified split by the seed.

    Args:
        drawn: whether the seed has drawn the samples too, so that no two seeds share any.
        scaled: whether features are standardised, with the mean and deviation of all data: public statistics, as the
            experiments take them to be.
    """
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    if scaled:
        x = StandardScaler().fit_transform(x)
    x1, rest, y1, y_rest = train_test_split(x, y, train_size=0.6, random_state=seed, stratify=y)
    x2, x3, y2, y3 = train_test_split(rest, y_rest, train_size=0.375, random_state=seed, stratify=y_rest)
    parts = [
        TensorDataset(torch.as_tensor(a).float(), torch.as_tensor(b).long()) for a, b in ((x1, y1), (x2, y2), (x3, y3))
    ]
    resplit = 0.0 if drawn else len(parts[2]) / len(parts[0])
    return Data(parts[0], parts[1], parts[2], x.shape[1], int(y.max()) + 1, resplit=resplit)


def digits(seed: int) -> Data:
    """1797 images of 8 × 8, 10 classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split(x / 16.0, y, seed, scaled=False)


def hard(seed: int) -> Data:
    """5000 samples of 4 classes that overlap, 20 % of the labels drawn anew."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        5000, 20, n_informative=10, n_redundant=0, n_classes=4, flip_y=0.2, class_sep=1.0, random_state=seed
    )
    return split(x, y, seed, drawn=True)


def mlp(data: Data, width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(data.features, width), nn.ReLU(), nn.Linear(width, data.classes))


@lru_cache
def noise_for(epsilon: float, sample_rate: float, epochs: int, delta: float = DELTA) -> float:
    """The noise multiplier that spends 98 to 100 % of ε at δ (RDP accountant)."""
    return get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=delta,
        sample_rate=sample_rate,
        epochs=epochs,
        accountant="rdp",
        epsilon_tolerance=0.02 * epsilon,
    )


@dataclass(frozen=True)
class Trained:
    """A private model after training.

    Attributes:
        epsilon: what was spent.
        watched: what ``watch`` returned after each epoch.
        step_seconds: the median time of a step, from ``zero_grad`` to ``step``.
    """

    model: nn.Module
    epsilon: float
    watched: list[Any]
    step_seconds: float

    def logits(self, data: TensorDataset) -> Tensor:
        return logits_of(self.model, data)


def logits_of(model: nn.Module, data: TensorDataset) -> Tensor:
    """``[n, classes]``, in eval mode; the model is left in the mode it was in."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = model(data.tensors[0])
    model.train(was)
    return found


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def train(
    model: nn.Module,
    data: TensorDataset,
    *,
    seed: int,
    epsilon: float,
    max_grad_norm: float,
    learning_rate: float,
    epochs: int,
    batch_size: int = 256,
    momentum: float = 0.0,
    delta: float = DELTA,
    watch: Callable[[nn.Module], Any] | None = None,
    **private: Any,
) -> Trained:
    """DP-SGD on Poisson batches with a cross-entropy loss; further arguments go to ``make_private``."""
    torch.manual_seed(seed)  # batches, and below noise: the same for two methods with the same seed
    loader = DataLoader(Rows(*data.tensors), batch_size=batch_size, collate_fn=as_it_is)
    engine = PrivacyEngine(accountant="rdp")
    module, optimizer, batches = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum),
        data_loader=loader,
        noise_multiplier=noise_for(epsilon, 1 / len(loader), epochs, delta),
        max_grad_norm=max_grad_norm,
        noise_generator=torch.Generator().manual_seed(seed),
        **private,
    )
    watched, seconds = [], []
    for _ in range(epochs):
        for x, y in batches:
            started = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        if watch is not None:
            watched.append(watch(model))
    module.to_standard_module()
    return Trained(model, _spent(tuple(engine.accountant.history), delta), watched, statistics.median(seconds))


@lru_cache
def _spent(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """ε at δ of steps as the accountant counted them; the search takes longer than some of the runs."""
    accountant = RDPAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta))
