"""``LossCheck``: losses that are each sample's own pass, whatever the layers; others are found, gaps or none."""

import pytest
import torch
from torch import Tensor, nn

from dpfast.separation import LossCheck, Verdict
from tests.helpers import F32
from tests.zoo import every_layer, specimen

B = 6


def squares(out: Tensor) -> Tensor:
    return out.flatten(1).square().sum(1)


def check(model: nn.Module, loss, *batch) -> Verdict:
    @torch.no_grad()
    def losses(batch, count: int) -> Tensor:
        return loss(model, *batch)

    return LossCheck(losses, model, batch, B).verdict()


@every_layer
def test_every_layer(name):
    model, inputs, _ = specimen(name, B, F32)
    verdict = check(model.train(), lambda model, *inputs: squares(model(*inputs)), *inputs)
    assert not verdict.mixed and not verdict.untried


class Last(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0][:, -1]


OTHERS = {  # no per-sample gradients, or operators that run in evaluation alone
    "LSTM": lambda: Last(nn.LSTM(4, 4, batch_first=True)),
    "GRU": lambda: Last(nn.GRU(4, 4, batch_first=True)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)),
    "fixed BatchNorm": lambda: nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(20).eval()),
    "attention in evaluation": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name):
    verdict = check(OTHERS[name](), lambda model, x: squares(model(x)), torch.randn(B, 5, 4))
    assert not verdict.mixed and not verdict.untried


def through_numpy(x: Tensor) -> Tensor:
    """Where no operator shows what is done."""
    return torch.from_numpy(x.numpy().copy())


MIXING = {
    "a mean": lambda m, x: squares(m(x - x.mean(0))),
    "a neighbour": lambda m, x: squares(m(x)) + 0.1 * squares(m(x)).roll(1),
    "one sample for all": lambda m, x: squares(m(x)) * x[0].sum(),
    "a mean behind numpy": lambda m, x: squares(m(x)) * through_numpy(x).mean(0).sum(),
    "a neighbour behind numpy": lambda m, x: through_numpy(squares(m(x))) + through_numpy(squares(m(x))).roll(1),
    "the last neighbour behind numpy": lambda m, x: torch.cat(
        [through_numpy(squares(m(x)))[:-1], through_numpy(squares(m(x)))[-2:].sum(0, True)]
    ),
    "a branch": lambda m, x: squares(m(x)) * (1 if x.max() < 100 else 2),
    "a sample twice": lambda m, x: squares(m(x))[[0, 0, 1, 2, 3, 4]],
    "the number of samples": lambda m, x: squares(m(x)) / len(x),
    "a sort": lambda m, x: squares(m(x)).sort().values,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_found(name):
    assert check(nn.Linear(4, 3), MIXING[name], torch.randn(B, 5, 4)).mixed


def test_gaps_are_said():
    verdict = check(nn.Linear(4, 3), lambda m, x: squares(m(through_numpy(x))), torch.randn(B, 5, 4))
    assert not verdict.mixed and verdict.gaps
