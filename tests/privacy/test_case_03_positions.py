"""Case 3: position ids of shape [1, T], expanded [B, T], and 1-D ids even when T equals B."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import (
    F32,
    F64,
    assert_exact,
    assert_sensitivity,
    check_layer,
    make_private,
    sums_of,
    token_loss,
)
from tests.oracle import Verdict
from tests.zoo import TinyGPT

FORMS = ["flat", "row", "expanded", "late"]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("B", [5, 3, 1])
@pytest.mark.parametrize("positions", FORMS)
def test_default_positions(positions, B, tied, dtype):
    """T is 5: B is as large, another size, or one."""
    model = TinyGPT(T=5, positions=positions, tied=tied).to(dtype)
    ids, targets = torch.randint(9, (B, 5)), torch.randint(9, (B, 5))
    assert_exact(model, (ids,), targets, token_loss)
    if dtype == F64:
        assert_sensitivity(model, ((ids,), targets), token_loss, 0.05)


@pytest.mark.parametrize("positions", FORMS)
def test_one_position(positions):
    ids = torch.randint(9, (4, 1))
    assert_exact(TinyGPT(T=1, positions=positions).double(), (ids,), ids, token_loss)


@pytest.mark.parametrize("positions", FORMS)
@pytest.mark.parametrize("T", [5, 3])
def test_a_longer_table_than_used(T, positions):
    ids = torch.randint(9, (5, T))
    assert_exact(TinyGPT(T=8, positions=positions).double(), (ids,), ids, token_loss)


@pytest.mark.parametrize("positions", FORMS)
def test_lengths_that_change_between_steps(positions):
    """B and T meet and part from step to step; what an earlier step showed must not decide a later one."""
    model = TinyGPT(T=6, positions=positions).double()
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=0.05)
    for B, T in ((3, 5), (5, 5), (5, 3), (1, 1), (4, 4)):
        ids = torch.randint(9, (B, T))
        verdict = Verdict(twin, (ids,), ids, token_loss, 0.05)
        token_loss(wrapped(ids), ids).backward()
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(model))
        optimizer.zero_grad()


class Labelled(nn.Module):
    """1-D ids that are one id for each sample: a class embedding, with as many samples as tokens."""

    def __init__(self):
        super().__init__()
        self.tok, self.cls, self.wpe = nn.Embedding(9, 4), nn.Embedding(3, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 9)

    def forward(self, ids, label):
        h = self.tok(ids) + self.cls(label).unsqueeze(1) + self.wpe(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("B", [5, 4, 1])
def test_ids_of_samples_beside_ids_of_positions(B):
    check_layer(Labelled(), (torch.randint(9, (B, 5)), torch.randint(3, (B,))), F64)


class Grid(nn.Module):
    """Rows and columns of an image, each with its table, looked up in 1-D and broadcast against it."""

    def __init__(self):
        super().__init__()
        self.lin, self.rows, self.cols = nn.Linear(3, 4), nn.Embedding(4, 4), nn.Embedding(4, 4)

    def forward(self, x):  # [B, 4, 4, 3]
        side = torch.arange(x.shape[1])
        return torch.tanh(self.lin(x) + self.rows(side)[:, None] + self.cols(side)[None, :])


@pytest.mark.parametrize("B", [4, 2])
def test_two_tables_on_a_grid(B):
    check_layer(Grid(), (torch.randn(B, 4, 4, 3),), F64)


class Processed(nn.Module):
    """Positions go through a layer of their own before they meet the batch."""

    def __init__(self):
        super().__init__()
        self.tok, self.wpe, self.mix = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9)

    def forward(self, ids):
        positions = torch.tanh(self.mix(self.wpe(torch.arange(ids.shape[1]))))
        return self.head(self.tok(ids) * positions)


@pytest.mark.parametrize("B", [5, 3])
def test_a_layer_between_positions_and_batch(B):
    ids = torch.randint(9, (B, 5))
    assert_exact(Processed().double(), (ids,), ids, token_loss)


def test_relative_positions():
    """A [T, T] table of biases that is never in touch with a batch."""

    class Relative(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.lin = nn.Embedding(9, 1), nn.Linear(4, 4)

        def forward(self, x):
            T = x.shape[1]
            steps = torch.arange(T)[:, None] - torch.arange(T)[None] + 4
            scores = x @ x.transpose(1, 2) + self.bias(steps).squeeze(-1)
            return self.lin(scores.softmax(-1) @ x)

    for B in (5, 3):
        check_layer(Relative(), (torch.randn(B, 5, 4),), F64)
