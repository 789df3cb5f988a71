"""The top eigenvalue against the dense Hessian, the rise against its definition; and the model is as it was."""

import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from dpfast.analysis.sharpness import sharpness
from tests.helpers import F32, F64, loader_of, make_private

CE = nn.functional.cross_entropy


class Attends(nn.Module):
    """Fused attention, which has no second derivative of its own, and a weight used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.q = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, ids):
        h = self.norm(self.embed(ids)).unsqueeze(1)
        h = nn.functional.scaled_dot_product_attention(self.q(h), h, h).squeeze(1)
        return h.mean(1) @ self.embed.weight.T


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x, y):
        return torch.tanh(self.a(x)) * self.b(y)


def nets():
    """Models with inputs for them, all of 6 samples."""
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Softplus(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))
    frozen = copy.deepcopy(mlp)
    frozen[0].requires_grad_(False)
    x = torch.randn(6, 3)
    return {
        "mlp": (mlp, x),
        "dropout": (nn.Sequential(mlp, nn.Dropout(0.5)), x),
        "convolution": (conv, torch.randn(6, 1, 3, 3)),
        "frozen": (frozen, x),
        "attention, tied": (Attends(), torch.randint(5, (6, 3))),
        "positional": (Two(), (x, torch.randn(6, 2))),
        "by name": (Two(), UserDict(y=torch.randn(6, 2), x=x)),
    }


def dense(model, inputs, targets):
    """The Hessian ``[P, P]`` of the mean loss in float64, the loss as a function of the weights, and these, ``[P]``."""
    model = copy.deepcopy(model).double().eval()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in weights.values()]
    inputs = dict(inputs) if isinstance(inputs, UserDict) else inputs
    wide = torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
    args, kwargs = ((), wide) if isinstance(wide, dict) else (wide if isinstance(wide, tuple) else (wide,), {})

    def loss(flat):
        at = {n: part.view_as(p) for (n, p), part in zip(weights.items(), flat.split(sizes), strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return CE(functional_call(model, at, args, kwargs), targets)

    flat = torch.cat([p.reshape(-1) for p in weights.values()])
    return hessian(loss, flat), loss, flat


def slope(loss, flat):
    flat = flat.clone().requires_grad_()
    return torch.autograd.grad(loss(flat), flat)[0]


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("name", nets())
def test_against_the_dense_hessian(name, batch_size):
    (model, inputs), targets = nets()[name], torch.randint(4, (6,))
    H, loss, w = dense(model, inputs, targets)
    gradient, v, step = slope(loss, w), torch.randn_like(w), 1e-5
    ahead, behind = (slope(loss, w + sign * step * v) for sign in (1, -1))
    torch.testing.assert_close(H @ v, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    found = sharpness(
        model, CE, inputs, targets, rho=0.3, dtype=F64, tolerance=1e-6, max_iterations=1000, batch_size=batch_size
    )
    top = float(torch.linalg.eigvalsh(H).max())
    assert found.converged and found.residual <= 1.001e-6 * float(torch.linalg.matrix_norm(H, 2))
    assert found.top_eigenvalue == pytest.approx(top, rel=1e-9)
    assert found.loss == pytest.approx(float(loss(w)), rel=1e-12)
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert found.rise == pytest.approx(float(loss(w + 0.3 * gradient / gradient.norm()) - loss(w)), rel=1e-9)
    narrow = sharpness(model, CE, inputs, targets, rho=0.3, tolerance=1e-3, max_iterations=1000)
    assert narrow.top_eigenvalue == pytest.approx(top, rel=1e-3)
    assert narrow.rise == pytest.approx(found.rise, rel=1e-4)


class Quadratic(nn.Module):
    """Its output is ``½ wᵀ H w + gᵀ w``, whatever the input."""

    def __init__(self, eigenvalues, slope=0.0):
        super().__init__()
        size = len(eigenvalues)
        Q = torch.linalg.qr(torch.randn(size, size, dtype=F64))[0]
        self.register_buffer("H", Q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ Q.T)
        self.slope = slope
        self.w = nn.Parameter(torch.randn(size, dtype=F64))

    def forward(self, x):
        return (0.5 * self.w @ self.H @ self.w + self.slope * self.w.sum()).expand(len(x))


def of_quadratic(eigenvalues, slope=0.0, **kw):
    return sharpness(Quadratic(eigenvalues, slope), lambda out, _: out, torch.zeros(2, 1), None, **kw)


SPECTRA = {
    "positive": [3.0, 1.0, 0.5],
    "a negative one is larger in magnitude": [1.0, 0.2, -5.0],
    "one of each sign": [2.0, 0.1, -2.0],
    "almost one of each sign": [2.0, 0.1, -1.96],
    "all negative": [-1.0, -2.0, -3.0],
    "twice the same": [2.0, 2.0, 1.0],
    "none but zero above": [0.0, -1.0, -4.0],
    "tiny": [3e-9, 1e-9, -2e-9],
    "huge": [3e9, 1e9, -4e9],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_not_the_largest_in_magnitude(name):
    spectrum = SPECTRA[name]
    scale = max(map(abs, spectrum))
    found = of_quadratic(spectrum, tolerance=1e-6, max_iterations=400)
    assert found.converged
    assert found.top_eigenvalue == pytest.approx(max(spectrum), rel=1e-9, abs=1e-9 * scale)
    assert found.residual <= 1e-6 * scale * (1 + 1e-9)


def test_it_says_whether_it_converged():
    """Eigenvalues that are near to each other take many products."""
    spectrum = [1.0, 0.98, 0.97, 0.9, -0.5]
    short = of_quadratic(spectrum, tolerance=1e-6, max_iterations=3)
    assert not short.converged and short.iterations == 6 and "not converged" in str(short)
    assert min(abs(short.top_eigenvalue - value) for value in spectrum) <= short.residual
    long = of_quadratic(spectrum, tolerance=1e-6, max_iterations=2000)
    assert long.converged and "not converged" not in str(long)


def test_a_loss_without_curvature():
    """A linear loss has a Hessian of zeros, which the graph of its gradient does not even know of."""
    model = nn.Linear(3, 1)
    found = sharpness(model, lambda out, _: out, torch.randn(4, 3), None, rho=0.5, dtype=F64)
    assert (found.top_eigenvalue, found.residual, found.converged) == (0.0, 0.0, True)
    assert found.rise == pytest.approx(0.5 * found.gradient_norm, rel=1e-12)


def test_at_a_minimum_there_is_no_way_up():
    model = Quadratic([2.0, 1.0])
    nn.init.zeros_(model.w)
    found = sharpness(model, lambda out, _: out, torch.zeros(2, 1), None)
    assert (found.gradient_norm, found.rise) == (0.0, 0.0)
    assert found.top_eigenvalue == pytest.approx(2.0, rel=1e-5)


def test_the_model_is_as_it_was():
    """To the bit: weights, buffers, gradients, modes, and torch's random numbers."""
    model, inputs = nets()["convolution"]
    model.train()
    CE(model(inputs), torch.randint(4, (6,))).backward()
    before = copy.deepcopy(model.state_dict())
    grads, random = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    sharpness(model, CE, inputs, torch.randint(4, (6,), generator=torch.Generator().manual_seed(0)), rho=1e6)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_private_model_is_what_it_is_without(dtype):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype), torch.randn(6, 3).to(dtype)
    targets = torch.randint(4, (6,))
    plain = sharpness(model, CE, x, targets)
    private, _, _ = make_private(model, data_loader=loader_of(6), noise_multiplier=1.0, max_grad_norm=1.0)
    assert sharpness(private, CE, x, targets) == plain
    assert plain.top_eigenvalue == pytest.approx(
        sharpness(copy.deepcopy(model).double(), CE, x, targets, tolerance=1e-6).top_eigenvalue, rel=1e-3
    )


REFUSED = {
    "rho": (dict(rho=0.0), "rho=0.0"),
    "rho too": (dict(rho=float("nan")), "rho=nan"),
    "tolerance": (dict(tolerance=-1.0), "tolerance=-1.0"),
    "iterations": (dict(max_iterations=0), "max_iterations=0"),
    "batch": (dict(batch_size=0), "batch_size=0"),
    "flag": (dict(batch_size=True), "batch_size=True"),
    "dtype": (dict(dtype=torch.float16), "dtype=torch.float16"),
    "rows": (dict(targets=torch.zeros(5).long()), "shapes [[6, 3], [5]]"),
    "no rows": (dict(inputs=torch.zeros(0, 3), targets=None), "shapes [[0, 3]]"),
    "no tensor": (dict(inputs=(), targets=None), "shapes []"),
    "loss": (dict(loss_fn=lambda out, y: 1.0), "loss_fn: it returned float"),
    "detached": (dict(loss_fn=lambda out, y: out.detach().sum()), "do not depend on the model's trained parameters"),
    "not finite": (dict(loss_fn=lambda out, y: out.sum() / 0), "its loss here is"),
    "nothing trained": (dict(model=nn.Linear(3, 4).requires_grad_(False)), "no parameter has requires_grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    changed, message = REFUSED[name]
    given = dict(model=nn.Linear(3, 4), loss_fn=CE, inputs=torch.randn(6, 3), targets=torch.zeros(6).long()) | changed
    with pytest.raises(ValueError) as error:
        sharpness(**given)
    assert message in str(error.value)
