"""Case 10: a batch of one; a sequence of one; a layer with zero outputs used in the loss."""

import pytest
import torch
from torch import nn

from tests.helpers import F32, F64, assert_exact, assert_sensitivity, check_layer, token_loss
from tests.zoo import TinyGPT, every_layer, loss_of, specimen


@pytest.mark.parametrize("dtype", [F64, F32])
@every_layer
def test_a_batch_of_one_for_every_layer(name, dtype):
    model, inputs, target = specimen(name, B=1, dtype=dtype)
    run = assert_exact(model, inputs, target, loss_of(name))
    assert run.norms.shape == (1,)
    if dtype == F64:  # and of none, next to it
        assert_sensitivity(model, (inputs, target), loss_of(name), run.norms.item() / 2)


@every_layer
def test_a_batch_of_one_with_room_to_spare(name):
    """Not clipped: the clipped sum is the ordinary gradient."""
    model, inputs, target = specimen(name, B=1)
    run = assert_exact(model, inputs, target, loss_of(name), 1e9)
    grads = torch.autograd.grad(loss_of(name)(model(*inputs), target), list(model.parameters()), allow_unused=True)
    for got, want in zip(run.sums.values(), grads, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


@pytest.mark.parametrize("B", [1, 4])
def test_a_sequence_of_one(B):
    ids = torch.randint(9, (B, 1))
    assert_exact(TinyGPT(T=1).double(), (ids,), ids, token_loss)


class Zero(nn.Module):
    """A layer with nothing to say, added up in the output all the same."""

    def __init__(self, layer):
        super().__init__()
        self.lin, self.none = nn.Linear(4, 3), layer

    def forward(self, x):
        return self.lin(x) + self.none(x).sum(-1, keepdim=True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(4, 4), (4, 5, 4), (1, 1, 4)], ids=str)
def test_zero_outputs(shape):
    check_layer(Zero(nn.Linear(4, 0)), (torch.randn(shape),), F64)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_inputs():
    """Only its bias is there."""

    class Cut(Zero):
        def forward(self, x):
            return self.lin(x) + self.none(x[..., :0])

    check_layer(Cut(nn.Linear(0, 3)), (torch.randn(4, 5, 4),), F64)


def test_sequences_of_none():
    """T = 0 in a part of the model: the bias has no gradient there."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.none = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.lin(x) + self.none(x[:, :0]).sum(1, keepdim=True)

    check_layer(Part(), (torch.randn(4, 5, 4),), F64)


def test_an_embedding_of_no_width():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.none, self.lin = nn.Embedding(7, 4), nn.Embedding(7, 0), nn.Linear(4, 2)

        def forward(self, ids):
            return self.lin(torch.cat([self.emb(ids), self.none(ids)], -1))

    check_layer(Empty(), (torch.randint(7, (4, 5)),), F64)
