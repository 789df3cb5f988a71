"""nn.Linear on inputs of two to five dimensions."""

import pytest
import torch
from torch import nn

from tests.helpers import BF16, F32, F64, assert_exact, check_layer, mse, sse

SHAPES = [(5, 7), (4, 3, 7), (4, 1, 7), (3, 2, 5, 7), (3, 2, 1, 3, 7)]


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d-{s[1]}")
def test_exact_on_every_shape(shape, bias, dtype):
    check_layer(mlp(bias), (torch.randn(shape),), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}d-{s[1]}")
def test_a_loss_that_is_a_sum(shape):
    check_layer(mlp(), (torch.randn(shape),), F64, loss=sse, loss_reduction="sum")


@pytest.mark.parametrize("dims", [(1, 1), (1, 9), (9, 1), (33, 65), (257, 3)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 37])
def test_odd_sizes(T, dims):
    check_layer(nn.Linear(*dims), (torch.randn(3, T, dims[0]),), F32)


@pytest.mark.parametrize("shape", [(3, 5), (2, 40, 5), (6, 3, 7, 5)], ids=str)
def test_sequence_first(shape):
    """``batch_first=False``: the batch is the second dimension everywhere."""
    x = torch.randn(shape[0], 4, *shape[1:]) if len(shape) > 2 else torch.randn(shape[0], 4, shape[1])
    check_layer(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)), (x,), F64, batch_first=False)


class Strided(nn.Module):
    """Inputs that are not contiguous: transposed, sliced and expanded."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(3, 4), nn.Linear(6, 4)

    def forward(self, x):  # [B, T, 6]
        turned = self.a(x.transpose(1, 2).contiguous().transpose(1, 2))
        sliced = self.b(x[:, ::2, ::2])
        pooled = self.c(x.mean(1, keepdim=True).expand_as(x))
        return torch.cat([turned, sliced, pooled], 1)


def test_inputs_that_are_not_contiguous():
    check_layer(Strided(), (torch.randn(4, 5, 6),), F64)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_frozen_parameter_is_left_out(frozen):
    model = mlp().double()
    model.get_parameter(frozen).requires_grad_(False)
    x, y = torch.randn(5, 7).double(), torch.randn(5, 3).double()
    run = assert_exact(model, (x,), y, mse)
    assert frozen not in run.sums
    assert getattr(run.model.get_parameter(frozen), "summed_grad", None) is None


def test_only_biases_trained():
    """BitFiT: no weight needs its activations."""
    model = mlp()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    check_layer(model, (torch.randn(4, 3, 7),), F64)


def test_backprops_that_are_expanded():
    """``sum()`` gives a gradient of one element, expanded."""
    model = mlp().double()
    assert_exact(model, (torch.randn(4, 3, 7).double(),), None, lambda out, _: out.sum(), loss_reduction="sum")


def test_weights_as_they_are_used_not_as_they_are_stored():
    """A weight that is a transposed view (as after loading some checkpoints)."""
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.randn(6, 4).t())
    check_layer(layer, (torch.randn(3, 2, 6),), F64)
