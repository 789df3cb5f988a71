"""Bare parameters, leaf modules nobody has heard of, and a user's own subclasses: the generic path."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.helpers import F32, F64, assert_exact_or_refused, check_layer, mse, run_fused


class Vit(nn.Module):
    """A class token, a position embedding [1, T, d] and a scale [d], between ordinary layers."""

    def __init__(self, d=6, tokens=5):
        super().__init__()
        self.patch = nn.Linear(4, d)
        self.cls = nn.Parameter(torch.randn(1, 1, d))
        self.pos = nn.Parameter(torch.randn(1, tokens + 1, d))
        self.scale = nn.Parameter(torch.rand(d) + 0.5)
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.patch(x)], 1)
        return self.head(torch.tanh((x + self.pos) * self.scale))


class Scalar(nn.Module):
    """A temperature without dimensions."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.lin(x) / self.temperature.exp()


class Bare(nn.Module):
    """Nothing but parameters: by matmul, F.linear, einsum and in a ParameterList and a ParameterDict."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5))
        self.v = nn.Parameter(torch.randn(6, 5))
        self.many = nn.ParameterList([torch.randn(6), torch.randn(6)])
        self.named = nn.ParameterDict({"left": torch.randn(2, 6), "right": torch.randn(2)})

    def forward(self, x):
        h = F.linear(torch.tanh(x @ self.w), self.v) * self.many[0] + self.many[1]
        return torch.einsum("...d,kd->...k", h, self.named["left"]) + self.named["right"]


class Position(nn.Module):
    """A table of positions [T, d] that never meets the batch until it is added."""

    def __init__(self, T=5):
        super().__init__()
        self.table = nn.Parameter(torch.randn(T, 4))
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(x) + torch.tanh(self.table)[: x.shape[1]]


class Gated(nn.Module):
    """Parameters of a module with children used after the children, in two places."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.gate.sigmoid() + self.inner(x) * (1 - self.gate.sigmoid())


BARE = {"vit": Vit, "scalar": Scalar, "bare": Bare, "position": Position, "gated": Gated}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("model", BARE.values(), ids=BARE)
def test_bare_parameters(model, dtype):
    check_layer(model(), (torch.randn(4, 5, 4),), dtype)


@pytest.mark.parametrize("model", [Vit, Position])
def test_as_many_tokens_as_samples(model):
    """B equal to T: a broadcast over the batch must not be taken for one over tokens."""
    check_layer(model(), (torch.randn(5, 5, 4),), F64)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix = nn.Linear(4, 3), nn.Bilinear(3, 4, 5)

    def forward(self, x):
        return self.mix(self.first(x), x)


class Polynomial(nn.Module):
    """A leaf of the user's, with a keyword and two parameters."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4))
        self.b = nn.Parameter(torch.randn(()))

    def forward(self, x, *, power=2):
        return self.a * x**power + self.b * x


LEAVES = {
    "bilinear": TwoInputs,
    "prelu": lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)),
    "prelu by channel": lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5, init=0.1)),
    "polynomial": lambda: nn.Sequential(nn.Linear(4, 4), Polynomial()),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_unknown_leaves(make, dtype):
    check_layer(make(), (torch.randn(4, 4),), dtype)


class Inherited(nn.Linear):
    """Only the name is new."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + x.mean(-1, keepdim=True)


class Normalised(nn.Linear):
    """The weight is not used as it is stored: the formula of a linear layer would be wrong."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Extra(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_features) + 0.5)

    def forward(self, x):
        return super().forward(x) * self.gain


class Standardised(nn.Conv2d):
    """Weight standardisation, as in big-transfer ResNets."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-3), self.bias)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kind", [Inherited, Doubled, Normalised, Extra], ids=lambda k: k.__name__)
def test_subclasses_of_linear(kind, dtype):
    check_layer(nn.Sequential(nn.Linear(4, 4), kind(4, 3)), (torch.randn(4, 5, 4),), dtype)


def test_subclass_of_conv():
    check_layer(nn.Sequential(nn.Conv2d(2, 3, 1), Standardised(3, 4, 3)), (torch.randn(4, 2, 5, 5),), F64)


class Sometimes(nn.Module):
    """A bare parameter that the forward does not use, and one that it uses every other time."""

    def __init__(self):
        super().__init__()
        self.lin, self.never = nn.Linear(4, 3), nn.Parameter(torch.randn(3))
        self.gain = nn.Parameter(torch.randn(3))
        self.on = True

    def forward(self, x):
        return self.lin(x) * self.gain if self.on else self.lin(x)


@pytest.mark.parametrize("on", [True, False])
def test_parameters_that_are_not_used(on):
    model = Sometimes()
    model.on = on
    check_layer(model, (torch.randn(4, 4),), F64)


class DataDependent(nn.Module):
    """A loop whose length is in the data: torch.func cannot run it, and no layer of ours is in it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4) / 4)

    def forward(self, x):
        for _ in range(int(x.abs().sum().item()) % 3 + 1):
            x = torch.tanh(x @ self.w)
        return x


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.loop = nn.Linear(4, 4), DataDependent()

    def forward(self, x):
        return self.loop(self.lin(x))


def test_a_module_that_no_path_serves():
    """Refused by name, and a physical batch of one is offered."""
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="max_physical_batch_size") as refusal:
        run_fused(Wrapped(), ((torch.randn(4, 4),), torch.randn(4, 4)), mse, 1.0)
    assert "loop" in str(refusal.value)


def test_replaced_forward():
    """A ``forward`` set on the instance, as accelerate and quantisation tools do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 3, dtype=F64)
    layer = model[1]
    model.double()
    layer.forward = MethodType(lambda self, x: 3 * F.linear(x, self.weight, self.bias), layer)
    assert_exact_or_refused(model, (x,), y, mse, "1")


def test_parametrised_weights():
    model = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 3))).double()
    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 3, dtype=F64)
    assert_exact_or_refused(model, (x,), y, mse, "1")


class Borrowed(nn.Module):
    """The parent reads its child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(torch.tanh(self.enc(x)), self.enc.weight.t())


def test_a_weight_used_outside_its_layer():
    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 4, dtype=F64)
    assert_exact_or_refused(Borrowed().double(), (x,), y, mse, "enc.weight")
