"""One fine-tune of ``reproduce finetune``: a way of training, a budget and a seed, to how well it does."""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from opacus.accountants import create_accountant
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast.accounting.epsilon import epsilon_of, noise_multiplier_for
from dpfast.analysis.calibration import calibration_report
from dpfast.analysis.reproduce.sentences import Classifier, features, with_adapters
from dpfast.data.physical_batches import BatchMemoryManager
from dpfast.engine import PrivacyEngine

DELTA = 1e-5  # below one over the number of sentences
ACCOUNTANT = "prv"
ROWS_AT_ONCE = 32  # a physical batch, and a batch of ordinary training


@dataclass(frozen=True)
class Way:
    """What trains, and for how long.

    Attributes:
        encoder: "frozen" (its features are computed once), "adapters" or "trained".
        batch: expected sentences of a private step.
        epochs, plain_epochs: passes over the training sentences, of private training and of ordinary training.
        rate, plain_rate: learning rates of what is pretrained, or of its adapters.
        head_rate, plain_head_rate: of the head.
        probe_first: share of the steps that train the head alone.
        norm: that each sentence's gradient is clipped to.
    """

    encoder: str
    batch: int
    epochs: float
    plain_epochs: float
    head_rate: float
    plain_head_rate: float
    rate: float = 0.0
    plain_rate: float = 0.0
    probe_first: float = 0.0
    norm: float = 1.0


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences and a pretrained encoder.

    Attributes:
        parts: ids, mask and labels of "train", "holdout" (to choose learning rates by) and "test".
    """

    encoder: Any
    parts: dict[str, TensorDataset]

    @cached_property
    def features(self) -> dict[str, TensorDataset]:
        """The encoder's features of all parts, and the labels."""
        model = Classifier(self.encoder)
        found = {}
        for name, part in self.parts.items():
            ids, mask, labels = part.tensors
            found[name] = TensorDataset(features(model, ids, mask), labels)
        return found

    def of(self, way: Way, part: str) -> TensorDataset:
        """What the model that trains sees of a part, and the labels."""
        return self.features[part] if way.encoder == "frozen" else self.parts[part]

    def digest(self) -> str:
        """Another one for other sentences and for another encoder."""
        found = hashlib.sha256()
        for part in self.parts.values():
            for x in part.tensors:
                found.update(x.numpy().tobytes())
        for p in self.encoder.parameters():
            found.update(p.detach().numpy().tobytes())
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: accuracy and ECE on the part that judges (0 to 1), the ε spent, and seconds of training."""

    accuracy: float
    ece: float
    epsilon: float | None
    steps: int
    seconds: float


def fine_tuned(data: Sentences, way: Way, epsilon: float | None, seed: int, judge: str = "test") -> Outcome:
    """Train a copy of the encoder with a new head.

    Args:
        epsilon: to spend at δ = 1e-5 for one sentence; None trains without privacy.
        seed: of the head, the batches and the noise.
        judge: the part of the data to judge by; "holdout" is for choosing learning rates.
    """
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(data.encoder))
    if way.encoder == "adapters":
        with_adapters(model)
    net: nn.Module = model.head if way.encoder == "frozen" else model
    train, (*inputs, labels) = data.of(way, "train"), data.of(way, judge).tensors
    started, spent = time.perf_counter(), None
    if epsilon is None:
        steps = _plainly(net, train, way, seed)
    else:
        spent, steps = _privately(net, train, way, epsilon, seed)
    seconds = time.perf_counter() - started
    report = calibration_report(logits(net, *inputs), labels, min_count=1, resamples=0)
    return Outcome(report.accuracy.value, report.ece.value, spent, steps, seconds)


@torch.no_grad()
def logits(net: nn.Module, *inputs: Tensor, rows: int = 256) -> Tensor:
    """``[n, classes]``."""
    net.eval()
    return torch.cat([net(*(x[k : k + rows] for x in inputs)) for k in range(0, len(inputs[0]), rows)])


def _plainly(net: nn.Module, data: TensorDataset, way: Way, seed: int) -> int:
    """Adam on shuffled batches; returns its steps."""
    shuffled = torch.Generator().manual_seed(seed)
    loader: DataLoader = DataLoader(data, batch_size=ROWS_AT_ONCE, shuffle=True, generator=shuffled)
    steps = max(2, round(way.plain_epochs * len(loader)))
    optimizer = optimizer_of(net, way.plain_rate, way.plain_head_rate)
    done = 0
    while done < steps:
        for *inputs, labels in loader:
            _set_phase(net, way, done, steps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(*inputs), labels).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return done


def _privately(net: nn.Module, data: TensorDataset, way: Way, epsilon: float, seed: int) -> tuple[float, int]:
    """DP-SGD with Adam's update, on Poisson batches that are run a physical batch at a time; ε and the steps."""
    loader: DataLoader = DataLoader(data, batch_size=way.batch)
    steps = max(2, round(way.epochs * len(loader)))
    engine = PrivacyEngine(accountant=ACCOUNTANT)
    private, optimizer, batches = engine.make_private(
        module=net,
        optimizer=optimizer_of(net, way.rate, way.head_rate),
        data_loader=loader,
        noise_multiplier=noise_for(epsilon, 1 / len(loader), steps),
        max_grad_norm=way.norm,
        noise_generator=torch.Generator().manual_seed(seed),
    )

    def done() -> int:
        return sum(count for *_, count in engine.accountant.history)

    while done() < steps:
        with BatchMemoryManager(
            data_loader=batches, max_physical_batch_size=ROWS_AT_ONCE, optimizer=optimizer
        ) as pieces:
            for *inputs, labels in pieces:
                _set_phase(net, way, done(), steps)
                optimizer.zero_grad()
                nn.functional.cross_entropy(private(*inputs), labels).backward()
                optimizer.step()
                if done() == steps:
                    break
    private.to_standard_module()
    return _spent(tuple(engine.accountant.history)), steps


def _set_phase(net: nn.Module, way: Way, done: int, steps: int) -> None:
    """All but the head frozen for the steps of a probe: exact, as each step is clipped by what trains in it."""
    if way.probe_first and isinstance(net, Classifier):
        net.encoder.requires_grad_(done >= round(way.probe_first * steps))


def optimizer_of(net: nn.Module, rate: float, head_rate: float) -> torch.optim.Optimizer:
    """AdamW with one rate for the encoder and one for the head."""
    if not isinstance(net, Classifier):
        return torch.optim.AdamW(net.parameters(), lr=head_rate, weight_decay=0.0)
    encoder = [p for p in net.encoder.parameters() if p.requires_grad]
    groups = [{"params": encoder, "lr": rate}, {"params": [*net.head.parameters()], "lr": head_rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


@lru_cache
def _spent(history: tuple[tuple[float, float, int], ...]) -> float:
    """ε at δ = 1e-5 of steps as the accountant counted them; the search takes longer than some of the runs."""
    accountant = create_accountant(ACCOUNTANT)
    accountant.history = list(history)
    return epsilon_of(accountant, DELTA)


@lru_cache
def noise_for(epsilon: float, sample_rate: float, steps: int) -> float:
    """The noise multiplier that spends ε at δ = 1e-5."""
    return noise_multiplier_for(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=sample_rate, steps=steps, accountant=ACCOUNTANT
    )
