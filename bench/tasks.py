"""The demo's tasks: a model, real data that needs no download, and hyperparameters with which it learns privately."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.architectures import GPT, GroupNormCNN
from bench.methods import METHODS
from bench.workloads import SEED


@dataclass(frozen=True)
class Task:
    """A model, its data, and hyperparameters with which it learns privately."""

    name: str
    title: str
    build: Callable[[str], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    test_size: int
    batch_size: int
    steps: int
    learning_rate: float
    max_grad_norm: float
    target_epsilon: float
    score: str  # "accuracy" or "loss"
    opacus_variant: str = "plain"

    def model(self, method: str) -> nn.Module:
        """The same random weights for every method; stock Opacus is given a variant where it needs one."""
        torch.manual_seed(SEED)
        return self.build(self.opacus_variant if METHODS[method].mode == "hooks" else "plain")

    @functools.cached_property
    def split(self) -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
        """Training set and test batch, shuffled with a fixed seed."""
        x, y = self.data()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
        train, test = order[self.test_size :], order[: self.test_size]
        return TensorDataset(x[train], y[train]), (x[test], y[test])


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits of 8x8."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(bunch.target)


def documentation(length: int = 128) -> tuple[Tensor, Tensor]:
    """CPython's documentation topics as bytes, cut into sequences; the target is the next byte."""
    from pydoc_data.topics import topics

    text = torch.frombuffer(bytearray("\n\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    pieces = text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits",
            title="GroupNorm CNN on digits",
            build=lambda variant: GroupNormCNN(
                channels=(32, 64, 64), strides=(1, 2, 1), groups=8, pool=2, in_channels=1
            ),
            data=digits,
            test_size=297,
            batch_size=300,
            steps=120,
            learning_rate=1e-2,
            max_grad_norm=1.0,
            target_epsilon=5.0,
            score="accuracy",
        ),
        Task(
            name="gpt",
            title="small GPT on CPython's documentation (bytes)",
            build=lambda variant: GPT(vocabulary=256, width=128, layers=2, heads=4, length=128, variant=variant),
            data=documentation,
            test_size=128,
            batch_size=32,
            steps=120,
            learning_rate=4e-3,
            max_grad_norm=1.0,
            target_epsilon=6.0,
            score="loss",
            opacus_variant="expanded",
        ),
    )
}
