"""Models and modules that run one sample at a time: the same function, exact; or refused in words."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import F64
from tests.privacy.judging import examine, examine_or_refuse

B, T, D = 6, 4, 5


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    """The mean over samples of each one's own loss."""
    return (output.flatten(1) - target.view(-1, 1)).square().sum(1).mean()


def exact(model: nn.Module, *inputs: Tensor, count: int = B, **kw) -> None:
    examine(model, inputs, torch.randn(count), mean_square, **kw)


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, 3)


class OwnParameterList(WithHead):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(D)) for _ in range(2)])

    def forward(self, x):
        for scale in self.scales:
            x = x * scale
        return self.head(x)


class OwnParameterDict(WithHead):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.randn(D))})

    def forward(self, x):
        return self.head(x * self.scales["a"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(D))])

    def forward(self, x):
        return x * self.scales[0]


@pytest.mark.parametrize(
    "model", [OwnParameterList, OwnParameterDict, lambda: nn.Sequential(Block(), nn.Linear(D, 3))],
    ids=["of the model", "a dict", "of a child"],
)  # fmt: skip
def test_containers_of_parameters(model):
    """Exact."""
    exact(model(), torch.randn(B, D))


class RepeatedPositions(WithHead):
    def __init__(self):
        super().__init__()
        self.pos = nn.Embedding(T, D)

    def forward(self, x):
        return self.head(torch.tanh(x + self.pos(torch.arange(T)[None]).repeat(len(x), 1, 1)))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(T, D))

    def forward(self, length):
        return self.table[:length]


class FromATable(WithHead):
    def __init__(self):
        super().__init__()
        self.pos = Table()

    def forward(self, x):
        return self.head(torch.tanh(x + self.pos(x.shape[1])))


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))

    def forward(self):
        return self.t.exp()


class Tempered(WithHead):
    def __init__(self):
        super().__init__()
        self.t = Temperature()

    def forward(self, x):
        return self.head(x) * self.t()


class WindowBias(nn.Module):
    """Attention in windows that lie along the batch, with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.bias, self.qkv = nn.Parameter(torch.randn(T, T)), nn.Linear(D, D)

    def forward(self, x):
        h = self.qkv(x)
        return (h @ h.transpose(1, 2) + self.bias).softmax(-1) @ h


class Windows(WithHead):
    def __init__(self):
        super().__init__()
        self.attention = WindowBias()

    def forward(self, x):
        n = len(x)
        return self.head(self.attention(x.view(2 * n, T // 2, D).repeat(1, 2, 1)).view(n, 2 * T, D).mean(1))


@pytest.mark.parametrize("n", [B, T, 1])
@pytest.mark.parametrize("model", [RepeatedPositions, FromATable, Windows])
def test_what_all_samples_share(model, n):
    """Exact, also where there are as many samples as positions."""
    exact(model(), torch.randn(n, T, D), count=n)


def test_a_module_that_returns_a_scalar():
    """Exact."""
    exact(Tempered(), torch.randn(B, D))


class FromAVector(WithHead):
    def __init__(self):
        super().__init__()
        self.register_buffer("z", torch.randn(8))
        self.hyper = nn.Linear(8, D)

    def forward(self, x):
        return self.head(x * self.hyper(self.z))


@pytest.mark.parametrize("n", [8, 4, 3, 1], ids=lambda n: f"B={n}")
def test_a_layer_on_a_vector(n):
    """Exact, whether the batch size divides the vector's length, is it, or neither."""
    exact(FromAVector(), torch.randn(n, D), count=n)


class Pooled(nn.Module):
    """Time first at the input, one row per sample at the head."""

    def __init__(self):
        super().__init__()
        self.e, self.head = nn.Linear(D, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.e(x)).mean(0))


@pytest.mark.parametrize("n", [3, 4, 8, 1], ids=lambda n: f"B={n}")
def test_a_pooled_head_with_the_batch_second(n):
    """Exact, also where the head's width is the batch size."""
    x, y = torch.randn(6, n, D, dtype=F64), torch.randn(1, n, dtype=F64)
    examine(Pooled(), (x,), y, lambda out, y: (out.sum(1) * y.view(-1)).mean(), batch_first=False)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def circular() -> nn.Conv2d:
    conv = nn.Conv2d(3, 4, 3)
    conv._conv_forward = types.MethodType(
        lambda self, x, w, b: F.conv2d(F.pad(x, (1, 1, 0, 0), mode="circular"), w, b), conv
    )
    return conv


@pytest.mark.parametrize("conv", [lambda: Standardised(3, 4, 3), circular], ids=["subclass", "patched instance"])
def test_a_convolution_with_its_own_conv_forward(conv):
    """Exact, for the function that is computed, not for nn.Conv2d's."""
    exact(nn.Sequential(conv(), nn.Tanh()), torch.randn(B, 3, 5, 5))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D))

    def forward(self, q, k):
        return (q * self.w) @ k.transpose(1, 2) @ k / 10


class Induced(WithHead):
    """One module, called with points that all samples share, then with the samples' own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("points", torch.randn(1, 3, D))
        self.m = Attends()

    def forward(self, x):
        return self.head(self.m(x, self.m(self.points, x)).mean(1))


@pytest.mark.parametrize("n", [B, 3, 1])
def test_a_module_called_with_shared_then_with_batched_inputs(n):
    """Exact."""
    exact(Induced(), torch.randn(n, 6, D), count=n)


class AddsShared(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(D))

    def forward(self, x, shared):
        return torch.tanh(x * self.w + shared)


class SharedInput(WithHead):
    def __init__(self):
        super().__init__()
        self.r = AddsShared()
        self.register_buffer("pe", torch.randn(T, D))

    def forward(self, x):
        return self.head(self.r(x, self.pe))


@pytest.mark.parametrize("n", [3, T], ids=["T != B", "T == B"])
def test_a_shared_input_without_a_batch_dimension(n):
    """Exact, or refused: it cannot be told from a batched one where T == B."""
    examine_or_refuse(
        SharedInput().double(), (torch.randn(n, T, D, dtype=F64),), torch.randn(n, dtype=F64), mean_square,
        "one sample at a time|whose",
    )  # fmt: skip
