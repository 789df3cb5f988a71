"""Case 9: submodules called with keywords, outputs that are tuples or dicts, inputs that need no gradient."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import F64, assert_exact, check_layer, make_private, mse, sums_of
from tests.oracle import Verdict


class Keywords(nn.Module):
    """Every layer by keyword, as Transformers calls them."""

    def __init__(self):
        super().__init__()
        self.emb, self.bag = nn.Embedding(7, 4), nn.EmbeddingBag(7, 4, mode="sum")
        self.norm, self.conv = nn.LayerNorm(4), nn.Conv1d(4, 4, 3, padding=1)
        self.att, self.lin = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids, *, weights=None):
        h = self.norm(input=self.emb(input=ids))
        h = h + self.conv(input=h.transpose(1, 2)).transpose(1, 2)
        h = h + self.att(key=h, value=h, query=h, need_weights=False)[0]
        return self.lin(input=h + self.bag(input=ids, per_sample_weights=weights).unsqueeze(1))


def test_layers_called_with_keywords():
    check_layer(Keywords(), (torch.randint(7, (4, 5)),), F64)


def test_the_model_called_with_keywords():
    model = Keywords().double()
    ids, weights = torch.randint(7, (4, 5)), torch.rand(4, 5, dtype=F64)
    target = torch.randn(4, 5, 3, dtype=F64)

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids, weights):
            return self.inner(ids, weights=weights)

    verdict = Verdict(Positional(), (ids, weights), target, mse, 0.1)
    wrapped, _, _ = make_private(model, max_grad_norm=0.1)
    mse(wrapped(ids=ids, weights=weights), target).backward()
    verdict.check_norms(wrapped.per_sample_gradient_norms)
    verdict.check_sums({f"inner.{n}": s for n, s in sums_of(model).items()})


Pair = namedtuple("Pair", ["hidden", "logits"])


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


FORMS = {
    "tuple": (lambda h, o: (h, o), lambda out: (out[0], out[1])),
    "list": (lambda h, o: [h, o], lambda out: (out[0], out[1])),
    "dict": (lambda h, o: {"h": h, "o": o}, lambda out: (out["h"], out["o"])),
    "ordered dict": (lambda h, o: OrderedDict(h=h, o=o), lambda out: (out["h"], out["o"])),
    "named tuple": (Pair, lambda out: (out.hidden, out.logits)),
    "dataclass": (Output, lambda out: (out.hidden, out.logits)),
    "nested": (lambda h, o: {"a": [(h,), None], "b": o}, lambda out: (out["a"][0][0], out["b"])),
}


class Form(nn.Module):
    """Makes and takes apart each kind of output, inside the model and at its end."""

    def __init__(self, make, own: bool):
        super().__init__()
        self.a, self.b, self.make = nn.Linear(4, 5), nn.Linear(5, 2), make
        self.scale = nn.Parameter(torch.rand(5) + 0.5) if own else 1.0

    def forward(self, x):
        h = torch.tanh(self.a(x)) * self.scale
        return self.make(h, self.b(h))


class Outer(nn.Module):
    def __init__(self, make, read, own):
        super().__init__()
        self.inner, self.last, self.make, self.read = Form(make, own), nn.Linear(5, 2), make, read

    def forward(self, x):
        hidden, logits = self.read(self.inner(x))
        return self.make(hidden, logits + self.last(hidden))


@pytest.mark.parametrize(
    ("form", "own"), [(f, own) for f in FORMS for own in (False, True) if not (own and f == "dataclass")]
)
def test_outputs_of_any_form(form, own):
    """Also from a module with a parameter of its own, which torch.func runs: it knows tuples and dicts."""
    make, read = FORMS[form]
    model = Outer(make, read, own).double()
    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 2, dtype=F64)

    def loss(out, y):
        hidden, logits = read(out)
        return mse(logits, y) + hidden.square().mean()

    run = assert_exact(model, (x,), y, loss)
    assert type(run.output) is type(make(x, y))


def test_inputs_of_any_form():
    """A dict, a tuple and plain numbers go in."""

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, batch, pair, power, flag):
            h = self.a(batch["x"]) * batch["gain"].unsqueeze(1) + self.b(pair[1])
            return h**power if flag else h

    inputs = (
        {"x": torch.randn(4, 4, dtype=F64), "gain": torch.rand(4, dtype=F64)},
        (None, torch.randn(4, 2, dtype=F64)),
        2,
        True,
    )
    assert_exact(Takes().double(), inputs, torch.randn(4, 3, dtype=F64), mse)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 3), (4, 4)),
        (lambda: nn.Conv2d(2, 3, 3), (4, 2, 5, 5)),
        (lambda: nn.LayerNorm(4), (4, 3, 4)),
        (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (4, 3, 4)),
    ],
    ids=["linear", "conv", "norm", "attention"],
)
def test_the_first_layer(make, shape, needs_grad):
    """With an input that needs no gradient, and with one that does, and gets it."""
    layer = make().double()

    def call(layer, x):
        return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)

    x = torch.randn(shape, dtype=F64).requires_grad_(needs_grad)
    with torch.no_grad():
        target = torch.randn_like(call(layer, x))

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return call(self.layer, x)

    assert_exact(Only(), (x,), target, mse)
    if needs_grad:
        plain = torch.autograd.grad(mse(call(layer, x), target), x)[0]
        torch.testing.assert_close(x.grad, plain)


def test_functional_losses_inside_the_model():
    """A model that returns its own loss, as Transformers do when labels are given."""

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x, labels):
            logits = self.lin(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    inputs = (torch.randn(4, 4, dtype=F64), torch.randint(3, (4,)))
    assert_exact(WithLoss().double(), inputs, None, lambda out, _: out["loss"])
