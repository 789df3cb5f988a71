"""Layers of other libraries, told by what they compute, and subclasses with a forward of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from dpfast.layers import family
from dpfast.layers.linear import TransposedLinear
from dpfast.layers.overridden import OverriddenEmbedding, OverriddenLinear
from dpfast.layers.rms_norm import ForeignRMSNorm
from tests.helpers import BF16, F32, F64, assert_exact, assert_sensitivity, check_layer, make_private, mse

D = 6
NORMS = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "t5": T5LayerNorm}


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def with_norm(kind):
    return randomised(nn.Sequential(nn.Linear(5, D), kind(D, eps=0.1), nn.Linear(D, 3)))


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
def test_rms_norms(kind, dtype, shape):
    model = with_norm(kind)
    assert isinstance(family(model[1]), ForeignRMSNorm)
    check_layer(model, (torch.randn(shape),), dtype)


@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
def test_rms_norms_within_c(kind):
    """In float64, where they compute in float32 within."""
    batch = ((torch.randn(4, 3, 5, dtype=F64),), torch.randn(4, 3, 3, dtype=F64))
    assert_sensitivity(with_norm(kind).double(), batch, mse, 0.1)


@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
def test_rms_norms_compute_what_they_did(kind):
    """To the bit in the dtypes that models are trained in: nobody's activations change under private training."""
    for dtype in (F32, BF16):
        model = with_norm(kind)[1].to(dtype)
        x = torch.randn(4, 3, D, dtype=dtype)
        wrapped, _, _ = make_private(copy.deepcopy(model))
        torch.testing.assert_close(wrapped(x).detach(), model(x).detach(), rtol=torch.finfo(dtype).eps, atol=0)


class LooksAlike(nn.Module):
    """One weight and an ε."""

    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def scaled(self, x, mean):
        return self.weight * (x * torch.rsqrt(mean + self.eps))


class MeanOfAbs(LooksAlike):
    def forward(self, x):
        return self.scaled(x, x.abs().mean(-1, keepdim=True) ** 2)


class OverPositions(LooksAlike):
    """Right for one position."""

    def forward(self, x):
        return self.scaled(x, x.square().mean((-1, -2), keepdim=True))


class EpsOutside(LooksAlike):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Centred(LooksAlike):
    def forward(self, x):
        return self.scaled(x - x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0))


class SquaredWeight(LooksAlike):
    def forward(self, x):
        return self.weight**2 * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Gated(LooksAlike):
    def forward(self, x, gate=None):
        return self.scaled(x, x.square().mean(-1, keepdim=True)).tanh()


@pytest.mark.parametrize("kind", [MeanOfAbs, OverPositions, EpsOutside, Centred, SquaredWeight, Gated])
def test_what_only_looks_like_an_rms_norm(kind):
    """Not taken for one; exact by the generic path."""
    model = with_norm(kind)
    assert family(model[1]) is None
    check_layer(model, (torch.randn(4, 3, 5),), F64)


def transposed():
    return randomised(nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7)))


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_transposed_linear(dtype, shape):
    model = transposed()
    assert isinstance(family(model[0]), TransposedLinear)
    check_layer(model, (torch.randn(shape),), dtype)


@pytest.mark.parametrize("trained", ["0.weight", "0.bias"])
def test_a_part_of_a_transposed_linear(trained):
    model = transposed()
    for name, p in model.named_parameters():
        p.requires_grad_(name == trained)
    check_layer(model, (torch.randn(4, 3, 5),), F64)


class Scaled(nn.Linear):
    """The op on own parameters, in a forward that does more."""

    def forward(self, x):
        return 3 * F.linear(torch.tanh(x), self.weight) + self.bias.detach() + super().forward(x).sin()


class Keywords(nn.Linear):
    def forward(self, x):
        return F.linear(bias=self.bias, weight=self.weight, input=x)


class Mixed(nn.Linear):
    """Another matrix first, of the same shape."""

    def forward(self, x):
        return super().forward(F.linear(x, self.weight.detach().roll(1, 0)).tanh() @ torch.ones(3, 4, dtype=x.dtype))


class Elsewhere(nn.Linear):
    """The weight is used by another op too."""

    def forward(self, x):
        return super().forward(x) + (x @ self.weight.T).tanh()


class BiasAlone(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.detach()) + self.bias


@pytest.mark.parametrize("kind", [Scaled, Keywords, Mixed, Elsewhere, BiasAlone])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_linear_layers_with_a_forward_of_their_own(kind, dtype):
    model = nn.Sequential(nn.Linear(5, 4), kind(4, 3))
    assert isinstance(family(model[1]), OverriddenLinear)
    if kind is BiasAlone:
        model[1].weight.requires_grad_(False)
    check_layer(model, (torch.randn(4, 3, 5),), dtype)


def test_a_linear_layer_alone_with_a_forward_of_its_own():
    """It is the whole model."""
    for kind in (Scaled, Elsewhere):
        check_layer(kind(4, 3), (torch.randn(5, 2, 4),), F64)


class Table(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, nn.Linear(D, 3)

    def forward(self, ids):
        return self.head(self.table(ids).tanh())


class Soft(nn.Embedding):
    """Distances to the whole table: not only a look-up."""

    def forward(self, ids):
        return super().forward(ids) + torch.softmax(self.weight, 0).mean(0)


TABLES = {
    "gemma": lambda: GemmaTextScaledWordEmbedding(9, D, 0, 2.0),
    "soft": lambda: Soft(9, D, padding_idx=2),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_tables_with_a_forward_of_their_own(make, dtype):
    """Repeated ids and padding; a table that is used in another way gets copies."""
    model = Table(make()).to(dtype)
    ids = torch.randint(0, 9, (4, 5))
    ids[0] = model.table.padding_idx
    assert isinstance(family(model.table), OverriddenEmbedding)
    assert_exact(model, (ids,), torch.randn(4, 5, 3, dtype=dtype), mse)
    if dtype == F64:
        assert_sensitivity(model, ((ids,), torch.randn(4, 5, 3, dtype=dtype)), mse, 0.01)


def test_no_per_sample_table_is_written(monkeypatch):
    """A scaled embedding is as cheap as a plain one: rows, not ``[B, V, d]``."""
    from dpfast.capture.forms import EmbeddingRows
    from dpfast.capture.recorder import Recorder

    forms, record = [], Recorder.record_call
    monkeypatch.setattr(
        Recorder,
        "record_call",
        lambda self, call, given: forms.extend(form for _, form in given) or record(self, call, given),
    )
    model = Table(GemmaTextScaledWordEmbedding(9, D, 0, 2.0))
    model.head.requires_grad_(False)
    assert_exact(model, (torch.randint(0, 9, (4, 5)),), torch.randn(4, 5, 3), mse)
    assert forms and all(isinstance(form, EmbeddingRows) for form in forms)


def test_a_table_with_an_offset():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.table = nn.Linear(3, D), OPTLearnedPositionalEmbedding(12, D)

        def forward(self, x, mask):
            return self.inner(x) * self.table(mask).sin()

    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 3:] = 0
    model = Positions().double()
    assert isinstance(family(model.table), OverriddenEmbedding)
    assert_exact(model, (torch.randn(4, 5, 3, dtype=F64), mask), torch.randn(4, 5, D, dtype=F64), mse)


class Borrowing(nn.Module):
    """Reads a child's weight without calling it, and in a deeper module another's bias."""

    def __init__(self):
        super().__init__()
        self.encode, self.mixer = nn.Linear(5, D), Mixer()

    def forward(self, x):
        return F.linear(self.mixer(self.encode(x).tanh()), self.encode.weight.T)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.step, self.gain = nn.Linear(D, D), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return x * F.softplus(x @ self.step.weight + self.step.bias) * self.gain + self.step(x).sin()


def test_borrowed_parameters():
    check_layer(Borrowing(), (torch.randn(4, 3, 5),), F64)
    check_layer(nn.Sequential(nn.Linear(5, D), Mixer()), (torch.randn(4, 3, 5),), F64)


class Shared(nn.Module):
    """A layer's bias is a bare parameter of its parent too, which uses it as well: the layer keeps its tap."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, D)
        self.bias = self.layer.bias

    def forward(self, x):
        return self.layer(x).tanh() * self.bias


@pytest.mark.parametrize("length", [4, 3])
def test_a_parameter_shared_with_its_parent(length):
    """As many positions as samples, too."""
    check_layer(Shared(), (torch.randn(4, length, 5),), F64)


class Positions(nn.Module):
    """Position ids from a buffer, and a head that joins later."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(8, D), nn.Linear(D, 3), nn.Linear(D, 3)
        self.register_buffer("ids", torch.arange(8)[None])
        self.on = False

    def forward(self, x):
        rows = self.table(self.ids[:, : x.shape[1]].expand(len(x), -1)) * x
        return self.first(rows) + (self.second(rows).sin() if self.on else 0)


def test_a_check_after_the_forward_leaves_buffers_alone():
    """What a graph has saved of them stays valid."""
    model, x = Positions(), torch.randn(4, 5, D)
    wrapped, _, _ = make_private(model)
    wrapped(x).sum().backward()
    wrapped.zero_grad()
    model.on = True
    wrapped(x).sum().backward()
    assert wrapped.per_sample_gradient_norms.shape == (4,)
