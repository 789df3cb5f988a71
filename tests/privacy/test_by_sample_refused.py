"""What mixes the samples of a batch is refused in words; what checks for that leaves no trace."""

import pytest
import torch
from torch import nn

from tests.helpers import BF16, F32, F64
from tests.privacy.judging import TIGHT, Private, refuse
from tests.privacy.test_by_sample import B, D, WithHead, exact, mean_square


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(D, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return self.head(h - h.mean(0))


class BatchNormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * self.w + self.b


class SoftmaxOverBatch(WithHead):
    def forward(self, x):
        return self.head(x * x.softmax(0))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "model", [Centred, lambda: nn.Sequential(BatchNormByHand(), nn.Linear(D, 3)), SoftmaxOverBatch],
    ids=["centred", "batch norm by hand", "softmax over the batch"],
)  # fmt: skip
def test_a_forward_that_mixes_the_batch(model, dtype):
    """Refused in every dtype: there are no per-sample gradients."""
    x, y = torch.randn(B, D).to(dtype), torch.randn(B).to(dtype)
    refuse(model().to(dtype), (x,), y, mean_square, "mixes samples|one sample at a time")


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * self.w


class Counts(WithHead):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.module(x))


@pytest.mark.parametrize("module", [nn.Identity, Scales], ids=["layers only", "a parameter of its own"])
def test_buffers_advance_once_a_forward(module):
    """What checks a layout leaves no trace."""
    private = Private(Counts(module()).double(), TIGHT)
    for forwards in (1, 2, 3):
        private.backward((torch.randn(B, D, dtype=F64),), torch.randn(B, dtype=F64), mean_square)
        assert private.model.calls.item() == forwards


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model[:2].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, 3)),
        lambda: nn.Sequential(nn.BatchNorm1d(D, affine=False, track_running_stats=False).eval(), nn.Linear(D, 3)),
        frozen,
    ],
    ids=["affine=False", "no running statistics", "frozen"],
)
def test_batch_norm_without_trained_parameters(model):
    """Refused by name; its running statistics are as they were."""
    model = model()
    before = {name: b.clone() for name, b in model.named_buffers()}
    refuse(model, (torch.randn(B, D),), torch.randn(B), mean_square, "BatchNorm1d.*normalises every sample")
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


def test_a_frozen_batch_norm_in_eval():
    """Exact: it uses no statistics of the batch."""
    model = frozen()
    model[1].eval()
    exact(model, torch.randn(B, D))
