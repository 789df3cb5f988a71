"""What the tests of samples that count once share: a small model, its private twin, and the judge of both."""

import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import F64, make_private, sse, sums_of
from tests.oracle import clipped_sum, per_sample_gradients

B, D, C = 6, 4, 0.05
TWICE = "a second backward pass over samples"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        self.hidden = torch.tanh(self.norm(self.a(x)))
        return self.b(self.hidden)


class Heads(Net):
    def forward(self, x):
        out = super().forward(x)
        return self.hidden, out


def batch(n=B):
    return torch.randn(n, D, dtype=F64), torch.randn(n, 2, dtype=F64)


def private(model=None, loader=None, **kw):
    model = (Net() if model is None else model).double()
    twin = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(*batch(2 * B)), batch_size=B) if loader is None else loader
    options = dict(loss_reduction="sum", max_grad_norm=C, data_loader=loader) | kw
    wrapped, optimizer, loader = make_private(model, **options)
    return model, twin, wrapped, optimizer, loader


def expected(twin, *batches):
    parts = [clipped_sum(per_sample_gradients(twin, (x,), y, sse), C) for x, y in batches]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def check(model, twin, *batches):
    want = expected(twin, *batches)
    for name, got in sums_of(model).items():
        torch.testing.assert_close(got, want[name])
