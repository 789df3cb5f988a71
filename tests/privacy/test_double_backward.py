"""Gradients of gradients: penalties on the gradient of an input, and forces. Exact at any batch size, and of one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from dpfast import DPSAT
from tests import oracle
from tests.helpers import F64, make_private, sums_of
from tests.oracle import Verdict
from tests.privacy.judging import TIGHT, Called, Private, examine, plainly

B, D = 4, 3


def with_gradient(model, x, *rest):
    """What the model returns, and its gradient for its input, both with a graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = model(x, *rest)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out, gradient


def wgan_gp(output, target):
    """The critic's score and its penalty."""
    out, gradient = output
    penalty = (gradient.flatten(1).square().sum(1) + 1e-6).sqrt() - 1
    return (out.flatten(1).sum(1) * target).mean() + 10 * penalty.square().mean()


def r1(output, target):
    """The penalty alone: no output of the model is in the loss."""
    return (output[1].flatten(1).square().sum(1) * target).mean()


def forces(output, target):
    energy, gradient = output
    return F.mse_loss(-gradient, torch.ones_like(gradient)) + (energy.flatten(1).sum(1) - target).square().mean()


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(D, 5), nn.Parameter(torch.rand(5)), nn.Linear(5, 1)

    def forward(self, x):
        return self.b((self.a(x) * self.scale).tanh())


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x):
        return self.b(self.a(self.a(x).tanh()).sin())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=True)[0].mean(1))


class BySample(nn.Module):
    """The batch is folded into another dimension: run sample by sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.b(self.a(x.transpose(0, 1)).tanh().mean(0))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.b(checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=False))


class HalfFrozen(Twice):
    def __init__(self):
        super().__init__()
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)


def convolutional(conv, norm, n):
    return nn.Sequential(
        conv(2, 4, 2, stride=1, padding=1), norm, nn.SiLU(), conv(4, 2, 2, groups=2), nn.Flatten(), nn.LazyLinear(1)
    )


MODELS = {
    "one layer": (lambda: nn.Linear(D, 1), (D,)),
    "without bias": (lambda: nn.Sequential(nn.Linear(D, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)), (D,)),
    "perceptron": (lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1)), (D,)),
    "piecewise linear": (lambda: nn.Sequential(nn.Linear(D, 5), nn.LeakyReLU(0.2), nn.Linear(5, 1)), (D,)),
    "positions": (lambda: nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)), (6, D)),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(D, 5), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 1)), (D,)),
    "Conv1d": (lambda: convolutional(nn.Conv1d, nn.GroupNorm(2, 4), 1), (2, 5)),
    "Conv2d": (lambda: convolutional(nn.Conv2d, nn.InstanceNorm2d(4, affine=True), 2), (2, 4, 4)),
    "ConvTranspose1d": (lambda: convolutional(nn.ConvTranspose1d, nn.GroupNorm(4, 4), 1), (2, 4)),
    "bare parameter": (Bare, (D,)),
    "layer used twice": (Twice, (D,)),
    "attention": (Attention, (3, 4)),
    "run by sample": (BySample, (5, D)),
    "checkpoint": (Checkpointed, (D,)),
    "half frozen": (HalfFrozen, (D,)),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(D, 5)), nn.Tanh(), nn.Linear(5, 1)), (D,)),
}
LOSSES = {"WGAN-GP": wgan_gp, "R1": r1, "forces": forces}


def specimen(name):
    make, shape = MODELS[name]
    torch.manual_seed(3)
    model = make().double()
    x = torch.randn(B, *shape, dtype=F64)
    with torch.no_grad():
        model(x)  # lazy layers take their shapes
    return model, x, torch.rand(B, dtype=F64) + 0.5


@pytest.mark.parametrize("name", MODELS)
def test_gradient_penalty(name):
    """Exact in a batch, and within C when a sample is left out."""
    model, x, y = specimen(name)
    examine(model, (x,), y, wgan_gp, with_gradient)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_of_gradients(loss):
    model, x, y = specimen("perceptron")
    examine(model, (x,), y, loss, with_gradient)


class Forces(nn.Module):
    """Differentiates within its own forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 5), nn.SiLU(), nn.Linear(5, 1))

    def forward(self, x):
        energy, gradient = with_gradient(self.net, x)
        return -gradient, energy


def test_forces_within_the_model():
    def loss(output, target):
        return (output[0].square().sum(1) * target).mean() + output[1].mean()

    examine(Forces().double(), (torch.randn(B, D, dtype=F64),), torch.rand(B, dtype=F64), loss, differentiating)


def differentiating(model, x):
    with torch.enable_grad():
        return model(x)


def one_at_a_time(model, inputs, target, loss, call=plainly, **kw):
    """With ``max_physical_batch_size=1`` every sample's norm and clipped gradient are the oracle's."""
    for i in range(len(target)):
        x, y = oracle.take((inputs, target), [i])
        for bound in (TIGHT, 1e3):
            verdict = Verdict(Called(model, call), x, y, loss, bound)
            private = Private(model, bound, call, max_physical_batch_size=1, size=1, **kw)
            verdict.check_sums(private.backward(x, y, loss))
            verdict.check_norms(private.wrapped.per_sample_gradient_norms)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", ["perceptron", "Conv1d", "bare parameter", "layer used twice", "half frozen"])
def test_a_physical_batch_of_one(name, loss):
    model, x, y = specimen(name)
    one_at_a_time(model, (x[:2],), y[:2], loss, with_gradient)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRUCell(D, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.rnn(x[:, t], h)
        return self.head(h)


class Held(nn.Module):
    """Parameters in a list, and one under a reentrant checkpoint."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterList([torch.rand(D) for _ in range(2)])
        self.a, self.b = nn.Linear(D, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.b(checkpoint(lambda x: self.a(x).tanh(), x * self.factors[0] + self.factors[1], use_reentrant=True))


@pytest.mark.parametrize(
    "model", [Recurrent, Held, lambda: nn.LSTM(D, 2, batch_first=True)], ids=["cell", "list", "LSTM"]
)
def test_one_at_a_time_without_a_gradient_penalty(model):
    def loss(output, target):
        out = output[0] if isinstance(output, tuple) else output
        return (out.flatten(1).sum(1) * target).square().mean()

    one_at_a_time(model().double(), (torch.randn(2, 3, D, dtype=F64),), torch.rand(2, dtype=F64), loss)


def test_a_step_towards_a_gradient_alone():
    """MAML with a task as a sample: the inner gradient, for parameters, is no training; the outer backward is."""

    def adapted(model, x):
        with torch.enable_grad():
            inner = model(x).square().mean()
            (g,) = torch.autograd.grad(inner, next(iter(model.parameters())), create_graph=True)
            return model(x) * g.sum()

    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    one_at_a_time(
        model, (torch.randn(2, D, dtype=F64),), torch.rand(2, dtype=F64), lambda o, y: (o * y).mean(), adapted
    )


@pytest.mark.parametrize("kw", [{}, dict(max_physical_batch_size=1)], ids=["batch", "alone"])
def test_a_penalty_at_shifted_weights(kw):
    """An ascent's point is where both gradients are taken."""
    model, x, y = specimen("perceptron")
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=1e3, ascent=DPSAT(rho=0.5), lr=0.1, size=1, **kw)
    wgan_gp(with_gradient(wrapped, x[:1]), y[:1]).backward()
    optimizer.step()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = sum(g.square().sum() for g in gradients.values()).sqrt()
    optimizer.zero_grad()
    wgan_gp(with_gradient(wrapped, x[1:2]), y[1:2]).backward()
    with torch.no_grad():
        for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            q.copy_(p + 0.5 * gradients[n] / norm)
    wgan_gp(with_gradient(twin, x[1:2]), y[1:2]).backward()
    for (n, got), q in zip(sums_of(model).items(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, q.grad, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("kw", [{}, dict(max_physical_batch_size=1)], ids=["batch", "alone"])
def test_an_empty_batch_has_no_gradient(kw):
    model, x, y = specimen("perceptron")
    wrapped, optimizer, _ = make_private(model, **kw)
    wgan_gp(with_gradient(wrapped, x[:0]), y[:0]).backward()
    assert not any(s.any() for s in sums_of(model).values())
    optimizer.step()


@pytest.mark.parametrize("kw", [{}, dict(max_physical_batch_size=1)], ids=["batch", "alone"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["perceptron", "checkpoint"])
def test_the_gradient_of_an_input_is_no_backward(name, create_graph, kw):
    """``torch.autograd.grad`` for an input trains nothing, and does not count as a backward before a step."""
    model, x, y = specimen(name)
    x = x[:1] if kw else x
    wrapped, optimizer, _ = make_private(model, poisson_sampling=True, max_grad_norm=TIGHT, **kw)
    given = x.clone().requires_grad_()
    out = wrapped(given)
    (first,) = torch.autograd.grad(out.sum(), given, retain_graph=True, create_graph=create_graph)
    assert not any(s.any() for s in sums_of(model).values())
    (out.flatten(1).sum(1) * y[: len(x)]).mean().backward()
    verdict = Verdict(copy.deepcopy(model), (x,), y[: len(x)], lambda o, y: (o.flatten(1).sum(1) * y).mean(), TIGHT)
    verdict.check_sums(sums_of(model))
    optimizer.step()
    assert first.shape == x.shape


def curvature(model, x):
    """What the model returns, and second derivatives of it: a differential equation's residual."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = model(x)
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return out, first, second


def residual(output, target):
    out, first, second = (x.flatten(1).sum(1) for x in output)
    return ((second + first * out - target) ** 2).mean()


@pytest.mark.parametrize("name", ["perceptron", "positions", "Conv1d", "bare parameter", "half frozen"])
def test_second_derivatives(name):
    model, x, y = specimen(name)
    examine(model, (x,), y, residual, curvature)


def test_second_derivatives_alone():
    model, x, y = specimen("perceptron")
    one_at_a_time(model, (x[:2],), y[:2], residual, curvature)


def jacobian(model, x):
    return torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, create_graph=True).square().sum()


def hessian(model, x):
    return torch.autograd.functional.hessian(lambda x: model(x).sum(), x, create_graph=True).square().sum()


def func_grad(model, x):
    return torch.func.grad(lambda x: model(x).square().sum())(x).square().sum()


def func_jvp(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1].square().sum()


def ordinary(model, loss, x):
    gradients = torch.autograd.grad(loss(model, x), list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True)]


@pytest.mark.parametrize(
    "loss, kw, n",
    [
        (jacobian, {}, B),
        (hessian, {}, B),
        (jacobian, dict(max_physical_batch_size=1), 1),
        (hessian, dict(max_physical_batch_size=1), 1),
        (func_grad, dict(max_physical_batch_size=1), 1),
        (func_jvp, dict(max_physical_batch_size=1), 1),
    ],
)
def test_other_ways_to_a_gradient(loss, kw, n):
    """Not clipped, the clipped sum is the ordinary gradient."""
    model, x, _ = specimen("perceptron")
    expected = ordinary(copy.deepcopy(model), loss, x[:n])
    wrapped, _, _ = make_private(model, max_grad_norm=1e9, loss_reduction="sum", **kw)
    loss(wrapped, x[:n]).backward()
    for got, want in zip(sums_of(model).values(), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "loss, kw",
    [
        (func_grad, {}),
        (func_jvp, {}),
        (lambda model, x: torch.func.vmap(lambda x: model(x[None]))(x).sum(), {}),
        (lambda model, x: torch.func.vmap(lambda x: model(x[None]))(x).sum(), dict(max_physical_batch_size=1)),
        (
            lambda model, x: torch.func.vmap(lambda x: func_grad(model, x[None]))(x).sum(),
            dict(max_physical_batch_size=1),
        ),
    ],
)
def test_transforms_that_hide_samples_are_refused_by_name(loss, kw):
    """What vmap hands to the model looks like a batch of one."""
    model, x, _ = specimen("perceptron")
    wrapped, _, _ = make_private(model, **kw)
    with pytest.raises(RuntimeError, match=r"inside of torch.func.*torch.autograd.grad\(..., create_graph=True\)"):
        loss(wrapped, x).backward()
    assert not any(s.any() for s in sums_of(model).values())


def test_a_gradient_for_parameters_is_refused_by_name():
    """In a batch it would be a sum over samples."""
    model, x, _ = specimen("perceptron")
    wrapped, _, _ = make_private(model)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match=r"layer '2'.*max_physical_batch_size=1"):
            torch.autograd.grad(wrapped(x).sum(), list(model.parameters()), create_graph=create_graph)


def test_a_penalty_under_autocast():
    """As exact as bfloat16 is, and clipped."""
    model, x, y = specimen("positions")
    model, x, y = model.float(), x.float(), y.float()
    twin = copy.deepcopy(model)
    wrapped, _, _ = make_private(model, max_grad_norm=1e3, loss_reduction="sum")
    for one in (wrapped, twin):
        with torch.autocast("cpu", torch.bfloat16):
            out = with_gradient(one, x)
        (B * wgan_gp([part.float() for part in out], y)).backward()
    got = torch.cat([s.flatten() for s in sums_of(model).values()])
    want = torch.cat([p.grad.flatten() for p in twin.parameters()])
    assert (got - want).norm() < 0.05 * want.norm()


def test_what_vmap_cannot_run_twice_is_refused_by_name(monkeypatch):
    from dpfast.layers.linear import Linear

    model, x, y = specimen("perceptron")
    wrapped, _, _ = make_private(model)
    out = with_gradient(wrapped, x)
    monkeypatch.setattr(Linear, "forward", lambda self, call, x, *params: torch.nonzero(x))
    with pytest.raises(RuntimeError, match=r"layer '[02]' \(Linear\).*create_graph.*max_physical_batch_size=1"):
        wgan_gp(out, y).backward()
    assert not any(s.any() for s in sums_of(model).values())
