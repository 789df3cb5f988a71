"""What is refused names its cause and a remedy, and the remedy is exact: parameters, losses, methods, optimizers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tests.helpers import (
    F64,
    assert_exact,
    assert_refused,
    assert_sensitivity,
    follow,
    make_private,
    mse,
    sums_of,
)
from tests.oracle import Verdict
from tests.privacy.judging import TIGHT

B, D = 4, 3


def perceptron():
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def data(n=B, width=2):
    return torch.randn(n, D, dtype=F64), torch.randn(n, width, dtype=F64)


def examined(model, inputs, target, loss=mse):
    """Exact, and within C when a sample is left out."""
    run = assert_exact(model, inputs, target, loss)
    assert_sensitivity(model, (inputs, target), loss, run.norms.median().item() / 2)


def refused(model, loss, *words):
    """The forward or backward of ``loss()`` says all of ``words``; nothing is summed up."""
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        loss().backward()
    for word in words:
        assert word in str(refusal.value), f"{word!r} is not in: {refusal.value}"
    assert not any(s.any() for s in sums_of(model).values())
    return str(refusal.value)


class Complex(nn.Module):
    def __init__(self, real):
        super().__init__()
        self.real, self.head = real, nn.Linear(4, 2)
        w = torch.randn(D, 4, dtype=torch.cdouble)
        self.filter = nn.Parameter(torch.view_as_real(w) if real else w)

    def forward(self, x):
        w = torch.view_as_complex(self.filter) if self.real else self.filter
        return self.head((x.to(w.dtype) @ w).abs())


class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.modes, self.head = nn.Parameter(torch.randn(2, 3, 4, 2)), nn.Linear(16, 2)

    def forward(self, x):
        modes = torch.einsum("bck,cko->bok", torch.fft.rfft(x), torch.view_as_complex(self.modes))
        return self.head(torch.fft.irfft(modes, n=4).flatten(1))


class AsComplex(nn.Module):
    def forward(self, w):
        return torch.view_as_complex(w)


class ComplexWeight(nn.Module):
    """The parametrised weight of an ordinary layer is complex."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 2, bias=False)
        self.layer.weight = nn.Parameter(torch.randn(2, D, 2))
        parametrize.register_parametrization(self.layer, "weight", AsComplex(), unsafe=True)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)).abs()


@pytest.mark.parametrize("kw", [{}, dict(max_physical_batch_size=1)], ids=["batch", "alone"])
def test_complex_parameters_are_refused_by_name(kw):
    model = nn.Sequential(nn.Linear(D, D), Complex(real=False), nn.Linear(2, 2, dtype=torch.cfloat))
    assert_refused(model, "1.filter", "[3, 4, 2]", "2.weight", "2.bias", "view_as_complex", **kw)


def test_a_frozen_complex_parameter():
    model = Complex(real=False)
    model.head.double()
    model.filter.requires_grad_(False)
    x, y = data()
    wrapped, _, _ = make_private(model, max_grad_norm=TIGHT)
    mse(wrapped(x), y).backward()
    features = (x.to(torch.cdouble) @ model.filter).abs()
    verdict = Verdict(model.head, (features,), y, mse, TIGHT)
    verdict.check_sums(sums_of(model.head))


@pytest.mark.parametrize(
    "model, shape",
    [(lambda: Complex(real=True), (D,)), (ComplexWeight, (D,)), (Fourier, (2, 4))],
    ids=["bare", "parametrised", "Fourier"],
)
def test_view_as_complex_is_exact(model, shape):
    examined(model().double(), (torch.randn(B, *shape, dtype=F64),), torch.randn(B, 2, dtype=F64))


class Spare(nn.Module):
    """Its last layer is not used in the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.spare = nn.Linear(D, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.a(x)


PENALTIES = {
    "all": lambda model: 0.01 * sum(p.square().sum() for p in model.parameters()),
    "one": lambda model: model[0].weight.abs().sum(),
    "orthogonality": lambda model: (model[0].weight.T @ model[0].weight - torch.eye(D)).square().sum(),
    "distance": lambda model: F.mse_loss(model[2].bias, torch.ones(2, dtype=F64)),
    "largest norm": lambda model: F.relu(model[0].weight.norm(dim=1) - 0.1).sum(),
}
NAMED = {
    "all": ["'0.weight', '0.bias', '2.weight' and 1 more"],
    "one": ["parameter '0.weight' got"],
    "orthogonality": ["parameter '0.weight' got"],
    "distance": ["parameter '2.bias' got"],
    "largest norm": ["parameter '0.weight' got"],
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_on_parameters_is_refused_by_name(name):
    model = perceptron()
    wrapped, optimizer, _ = make_private(model)
    x, y = data()
    refused(model, lambda: mse(wrapped(x), y) + PENALTIES[name](model), *NAMED[name], "weight_decay", "autograd.grad")
    assert all(p.grad is None for p in model.parameters())
    optimizer.zero_grad()
    mse(wrapped(x), y).backward()  # it trains on
    assert all(s.any() for s in sums_of(model).values())


def test_a_penalty_on_what_the_forward_does_not_use():
    model = Spare().double()
    wrapped, _, _ = make_private(model)
    x, y = data()
    refused(model, lambda: mse(wrapped(x), y) + model.spare.weight.sum(), "'spare.weight'", "weight_decay")


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("kw", [{}, dict(max_physical_batch_size=1)], ids=["one by chance", "alone"])
def test_a_penalty_at_a_batch_of_one(name, kw):
    """There it is a part of the sample's gradient, and clipped with it."""
    model = perceptron()
    twin = copy.deepcopy(model)
    wrapped, _, _ = make_private(model, max_grad_norm=TIGHT, **kw)
    x, y = data(1)
    (mse(wrapped(x), y) + PENALTIES[name](model)).backward()
    (mse(twin(x), y) + PENALTIES[name](twin)).backward()
    norm = sum(p.grad.square().sum() for p in twin.parameters()).sqrt()
    for got, p in zip(sums_of(model).values(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, TIGHT * p.grad / norm)


@pytest.mark.parametrize("kw", [{}, dict(max_physical_batch_size=1)], ids=["one by chance", "alone"])
def test_a_penalty_on_an_unused_parameter_at_a_batch_of_one(kw):
    model = Spare().double()
    wrapped, _, _ = make_private(model, max_grad_norm=1e3, **kw)
    x, y = data(1)
    (mse(wrapped(x), y) + 2 * model.spare.bias.sum()).backward()
    torch.testing.assert_close(sums_of(model)["spare.bias"], torch.full((2,), 2.0, dtype=F64))


def test_weight_decay_is_what_the_penalty_was_to_be():
    model = perceptron()
    twin = copy.deepcopy(model)
    x, y = data()
    verdict = Verdict(twin, (x,), y, mse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=2 * 0.01)
    wrapped, optimizer, _ = make_private(model, optimizer=optimizer, max_grad_norm=verdict.max_grad_norm)
    mse(wrapped(x), y).backward()
    optimizer.step()
    for (name, q), p in zip(twin.named_parameters(), model.parameters(), strict=True):
        penalty = torch.autograd.grad(PENALTIES["all"](twin), q)[0]
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * (verdict.sums[name] / B + penalty))


@pytest.mark.parametrize("kw, n", [({}, B), (dict(max_physical_batch_size=1), 1)], ids=["batch", "alone"])
def test_the_gradient_of_a_penalty_may_be_taken(kw, n):
    """As the refusal advises: after the step, by ``torch.autograd.grad``; it is no backward and leaves no sums."""
    model = perceptron()
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=TIGHT, lr=0.1, poisson_sampling=True, **kw)
    for _ in range(2):
        x, y = data(n)
        verdict = Verdict(follow(twin, model), (x,), y, mse, TIGHT)
        mse(wrapped(x), y).backward()
        verdict.check_sums(sums_of(model))
        optimizer.step()
        optimizer.zero_grad()
        parameters = list(model.parameters())
        found = torch.autograd.grad(PENALTIES["all"](model), parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, found, strict=True):
                torch.testing.assert_close(gradient, 0.02 * p)
                p -= 0.1 * gradient
        assert not any(s.any() for s in sums_of(model).values())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.blocks = nn.Embedding(7, D), nn.Sequential(*[nn.Linear(D, D) for _ in range(6)])
        self.head = nn.Linear(D, 2)

    def hidden(self, ids):
        return self.blocks(self.words(ids))

    def forward(self, ids):
        return self.head(self.words(ids).mean(1))


class Tied(Words):
    """The remedy for a loss that computes with the table: the model's forward does."""

    def forward(self, ids):
        return F.linear(self.hidden(ids), self.words.weight).mean(1)


class Hidden(Words):
    """The remedy for a loss of hidden states: forward returns them."""

    def forward(self, ids):
        h = self.hidden(ids)
        return torch.cat([self.head(h.mean(1)), h.mean(1)], 1)


@pytest.mark.parametrize("remedy, width", [(Tied, 7), (Hidden, 5)])
def test_losses_of_what_forward_returns_are_exact(remedy, width):
    examined(remedy().double(), (torch.randint(7, (B, 4)),), torch.randn(B, width, dtype=F64))


def test_a_loss_that_computes_with_a_table():
    model = Words().double()
    wrapped, _, _ = make_private(model)
    ids = torch.randint(7, (B, 4))

    def loss():
        wrapped(ids)
        return F.linear(torch.randn(B, D, dtype=F64), model.words.weight).square().mean()

    refused(model, loss, "'words.weight'", "the loss", "F.linear(x, model.embedding.weight)", "the model's forward")


def test_a_submodule_called_by_the_loss():
    model = Words().double()
    wrapped, _, _ = make_private(model)
    ids = torch.randint(7, (B, 4))

    def loss():
        return wrapped(ids).square().mean() + model.words(ids).square().mean()

    said = refused(model, loss, "'words' was called outside", "let the model's forward return that too")
    assert "loss called" not in said
    with torch.no_grad():
        model.words(ids)


class Kept(Words):
    """Nine parameters get gradients from a loss of what forward has left in an attribute."""

    def forward(self, ids):
        self.auxiliary = self.hidden(ids)
        return self.head(ids.double().mean(1, keepdim=True).expand(-1, D))


def test_an_auxiliary_loss_names_three_layers():
    model = Kept().double()
    wrapped, _, _ = make_private(model)
    ids = torch.randint(7, (B, 4))

    def loss():
        return wrapped(ids).square().mean() + model.auxiliary.square().mean()

    refused(model, loss, "layers 'blocks.0', 'blocks.1', 'blocks.2' and 4 more", "part of the loss", "return that part")


def test_two_losses_of_one_batch():
    model = perceptron()
    wrapped, _, _ = make_private(model, poisson_sampling=True)
    out = wrapped(data()[0])
    out.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="Add several losses of a batch up"):
        out.square().sum().backward()


def test_batches_of_two_sizes_in_one_loss():
    model = perceptron()
    wrapped, _, _ = make_private(model)

    def loss():
        return wrapped(data(4)[0]).mean() + wrapped(data(6)[0]).mean()

    refused(model, loss, "sizes: 4 (by '0.bias') and 6 (by '0.bias')", "backward() for each batch alone")


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D))
        self.location, self.log_scale = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return self.net(x) + x

    def log_prob(self, x):
        z = (self.net(x) + x - self.location) * torch.exp(-self.log_scale)
        return -0.5 * z.square().sum(-1) - self.log_scale.sum()

    def likelihood(this, x):
        return this.log_prob(x)

    def base(self, x):
        return (x - self.location).square().sum(-1)

    def score(self, x):
        return self(x).square().sum(-1)

    @torch.no_grad()
    def sample(self, n):
        return self.net(torch.randn(n, D, dtype=F64))


class Training(nn.Module):
    """The remedy."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.log_prob(x)


def likelihood(output, target):
    return -(output * target).mean()


@pytest.mark.parametrize("kw", [{}, dict(wrap_model=False), dict(max_physical_batch_size=1)], ids=str)
@pytest.mark.parametrize("method", ["log_prob", "likelihood"])
def test_a_method_is_refused_by_name(method, kw):
    """The layers are named first; a method of bare parameters alone when it comes to the backward."""
    model = Flow().double()
    wrapped, _, _ = make_private(model, **kw)
    called = getattr(model if kw.get("wrap_model") is False else wrapped, method)
    x = data(1)[0] if "max_physical_batch_size" in kw else data()[0]
    refused(
        model, lambda: called(x).mean(), f"Flow.{method} called 'net.0'", f"self.model.{method}(*inputs)", "no_grad()"
    )
    with torch.no_grad():
        assert called(x).shape == (len(x),)


def test_a_method_of_bare_parameters_is_refused_by_name():
    model = Flow().double()
    wrapped, _, _ = make_private(model)
    refused(model, lambda: wrapped.base(data()[0]).mean(), "'location'", "a method other than forward")


def test_a_method_as_forward_is_exact():
    examined(Training(Flow()).double(), (data()[0],), torch.rand(B, dtype=F64) + 0.5, likelihood)


def test_a_method_that_calls_the_model_is_exact():
    model = Flow().double()
    x = data()[0]
    verdict = Verdict(copy.deepcopy(model), (x,), None, lambda out, _: out.square().sum(-1).mean(), TIGHT)
    wrapped, _, _ = make_private(model, max_grad_norm=TIGHT)
    wrapped.score(x).mean().backward()
    verdict.check_sums(sums_of(model))
    assert wrapped.sample(2).shape == (2, D)


def test_what_is_no_method_is_as_in_opacus():
    wrapped, _, _ = make_private(Flow().double())
    for name in ("nothing", "__len__", "location"):
        with pytest.raises(AttributeError):
            getattr(wrapped, name)
    assert wrapped.net is wrapped._module.net
    copy.deepcopy(wrapped)


def added(optimizer, inner, parameters, how):
    if how == "inner":
        inner.add_param_group({"params": parameters})
    elif how == "original_optimizer":
        optimizer.original_optimizer.add_param_group({"params": parameters})
    elif how == "param_groups":
        optimizer.param_groups.append(optimizer.param_groups[0] | {"params": parameters})
    else:
        inner.param_groups[0]["params"].extend(parameters)


@pytest.mark.parametrize("how", ["inner", "original_optimizer", "param_groups", "params"])
@pytest.mark.parametrize("fused", [True, False], ids=["SGD", "Adagrad"])
def test_parameters_added_to_the_wrapped_optimizer(how, fused):
    """Refused by name before a step; the remedy in the message trains them."""
    model = perceptron()
    twin = copy.deepcopy(model)
    inner = (torch.optim.SGD if fused else torch.optim.Adagrad)(model[0].parameters(), lr=0.1)
    wrapped, optimizer, _ = make_private(model, optimizer=inner, max_grad_norm=1e3, noise_multiplier=1.0)
    added(optimizer, inner, list(model[2].parameters()), how)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = data()
    mse(wrapped(x), y).backward()
    with pytest.raises(ValueError, match=r"'2.weight', '2.bias'.*wrapped optimizer.*add_param_group of the private"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if how == "params":
        del inner.param_groups[0]["params"][2:]
    else:
        del optimizer.original_optimizer.param_groups[-1]
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.zero_grad()
    mse(wrapped(x), y).backward()
    Verdict(twin, (x,), y, mse, 1e3).check_sums(sums_of(model))
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_parameters_of_no_model():
    model = perceptron()
    _, optimizer, _ = make_private(model, lr=0.1)
    stranger = nn.Parameter(torch.zeros(7, dtype=F64))
    with pytest.raises(ValueError, match=r"shapes \[\[7\]\].*make_private"):
        optimizer.add_param_group({"params": [stranger]})
    optimizer.original_optimizer.add_param_group({"params": [stranger]})
    with pytest.raises(ValueError, match=r"of shape \[7\], none of the model's"):
        optimizer.step()
