"""Weights that are computed from parameters alone: parametrizations, the older hooks of weight norm, and pruning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from dpfast import DPSAT
from tests.helpers import F64, assert_exact, assert_sensitivity, make_private, mse, run_fused, sums_of
from tests.oracle import Verdict

B, D = 4, 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*run sample by sample"),
]


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


class LowRank(nn.Module):
    """An adapter with parameters of its own, and a layer that elsewhere would be tapped."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Parameter(torch.randn(5, 2))

    def forward(self, w):
        return w + self.b @ self.a.weight + self.a(w) @ self.b.T @ w


def adapted(freeze=False):
    layer = nn.Linear(D, 5)
    layer.weight.requires_grad_(not freeze)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


def symmetric(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class Pruned(nn.Linear):
    def __init__(self):
        super().__init__(D, 5)
        prune.random_unstructured(self, "weight", 0.4)
        prune.l1_unstructured(self, "bias", 2)


class Within(nn.Module):
    """The parametrised layer is a part of what runs under vmap."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.rand(D))

    def forward(self, x):
        return self.layer(x * self.scale)


class Folded(nn.Module):
    """Run sample by sample as a whole."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.last = layer, nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.layer(x.transpose(0, 1))).transpose(0, 1)


class Read(nn.Module):
    """The weight is read by another module than its own, and cached for that."""

    def __init__(self):
        super().__init__()
        self.table = weight_norm(nn.Embedding(5, 4))

    def forward(self, ids):
        with parametrize.cached():
            return F.linear(self.table(ids).mean(1), self.table.weight)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D))
        orthogonal(self, "w")

    def forward(self, x):
        return x @ self.w


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = weight_norm(nn.MultiheadAttention(4, 2, batch_first=True), "in_proj_weight")

    def forward(self, x):
        return self.attention(x, x, x)[0]


def dense(layer, width=5):
    return lambda: (nn.Sequential(nn.Linear(D, D), nn.Tanh(), layer(), nn.Tanh(), nn.Linear(width, 2)), (B, D))


WITHOUT_BUFFERS = {
    "weight norm": dense(lambda: weight_norm(nn.Linear(D, 5))),
    "weight norm, no bias": dense(lambda: weight_norm(nn.Linear(D, 5, bias=False), dim=1)),
    "orthogonal": dense(lambda: orthogonal(nn.Linear(D, 5))),
    "orthogonal, matrix exponential": dense(lambda: orthogonal(nn.Linear(D, D), orthogonal_map="matrix_exp"), D),
    "two in a row": dense(lambda: symmetric(weight_norm(nn.Linear(D, D))), D),
    "one of ours, no bias": dense(lambda: symmetric(nn.Linear(D, D, bias=False)), D),
    "adapter": dense(adapted),
    "adapter on a frozen weight": dense(lambda: adapted(True)),
    "the older weight norm": dense(lambda: old_weight_norm(nn.Linear(D, 5))),
    "pruned": dense(Pruned),
    "convolution": lambda: (nn.Sequential(weight_norm(nn.Conv1d(2, 4, 2, groups=2)), nn.Flatten()), (B, 2, 4)),
    "the older, of a convolution": lambda: (nn.Sequential(old_weight_norm(nn.Conv1d(2, 3, 2))), (B, 2, 4)),
    "a parameter of its own": lambda: (Own(), (B, D)),
    "attention": lambda: (Attention(), (B, 2, 4)),
    "within": lambda: (Within(weight_norm(nn.Linear(D, 2))), (B, D)),
    "within, the older": lambda: (Within(old_weight_norm(nn.Linear(D, 2))), (B, D)),
    "by sample": lambda: (Folded(weight_norm(nn.Linear(D, 5))), (B, 6, D)),
    "by sample, the older": lambda: (Folded(old_weight_norm(nn.Linear(D, 5))), (B, 6, D)),
    "read by another": lambda: (Read(), None),
}


def specimen(make):
    model, shape = make()
    model = model.double()
    x = torch.randint(5, (B, 3)) if shape is None else torch.randn(shape, dtype=F64)
    with torch.no_grad():
        out = model(x)  # so that what older hooks have set can be copied
    return model, x, 2 * torch.randn(out.shape, dtype=F64)


@pytest.mark.parametrize("name", WITHOUT_BUFFERS)
def test_a_function_of_parameters(name):
    """Exact, and within C when a sample is left out."""
    model, x, y = specimen(WITHOUT_BUFFERS[name])
    run = assert_exact(model, (x,), y, mse)
    assert_sensitivity(model, ((x[:3],), y[:3]), mse, run.norms.min().item() / 2)


SPECTRAL = {
    "linear": dense(lambda: spectral_norm(nn.Linear(D, 5))),
    "no bias, several iterations": dense(lambda: spectral_norm(nn.Linear(D, 5, bias=False), n_power_iterations=3)),
    "convolution": lambda: (nn.Sequential(spectral_norm(nn.Conv1d(2, 3, 2)), nn.Flatten()), (B, 2, 4)),
    "embedding": lambda: (nn.Sequential(spectral_norm(nn.Embedding(5, 3)), nn.Linear(3, 2)), None),
    "within": lambda: (Within(spectral_norm(nn.Linear(D, 2))), (B, D)),
    "by sample": lambda: (Folded(spectral_norm(nn.Linear(D, 5))), (B, 6, D)),
    "the older": dense(lambda: old_spectral_norm(nn.Linear(D, 5))),
    "within, the older": lambda: (Within(old_spectral_norm(nn.Linear(D, 2))), (B, D)),
    "by sample, the older": lambda: (Folded(old_spectral_norm(nn.Linear(D, 5))), (B, 6, D)),
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_norm(name):
    """A forward goes on by one power iteration, whatever was checked before it, and is exact for what that leaves."""
    model, x, y = specimen(SPECTRAL[name])
    twin = copy.deepcopy(model)
    private = copy.deepcopy(model)
    verdict = None
    for _ in range(2):
        with torch.no_grad():
            twin(x)
        twin.eval()
        verdict = Verdict(twin, (x,), y, mse, None if verdict is None else verdict.max_grad_norm)
        twin.train()
        if private is not None:
            wrapped, _, _ = make_private(private, max_grad_norm=verdict.max_grad_norm)
            trained, private = private, None
        mse(wrapped(x), y).backward()
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(trained))
        for p in trained.parameters():
            p.summed_grad = None
        for (key, got), want in zip(trained.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(got, want, msg=lambda m, key=key: f"{key}: {m}")
    assert_sensitivity(model, ((x[:3],), y[:3]), mse, verdict.norms.min().item() / 2)


@pytest.mark.parametrize("layer", [weight_norm, spectral_norm, orthogonal, old_weight_norm, old_spectral_norm])
def test_a_physical_batch_of_one(layer):
    model, x, y = specimen(dense(lambda: layer(nn.Linear(D, 5))))
    with torch.no_grad():
        (twin := copy.deepcopy(model))(x)
    verdict = Verdict(twin.eval(), (x[:1],), y[:1], mse)
    run = run_fused(model, ((x[:1],), y[:1]), mse, verdict.max_grad_norm, max_physical_batch_size=1)
    verdict.check_norms(run.norms)
    verdict.check_sums(run.sums)


@pytest.mark.parametrize("layer", [weight_norm, orthogonal, old_weight_norm])
def test_at_shifted_weights(layer):
    """An ascent's point is where the weight is made and where its gradient is pulled back."""
    model, x, y = specimen(dense(lambda: layer(nn.Linear(D, 5))))
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=1e3, ascent=DPSAT(rho=0.5), lr=0.1)
    mse(wrapped(x), y).backward()
    optimizer.step()
    gradients = [p.grad.clone() for p in model.parameters()]
    norm = sum(g.square().sum() for g in gradients).sqrt()
    optimizer.zero_grad()
    mse(wrapped(x), y).backward()
    with torch.no_grad():
        for p, q, g in zip(model.parameters(), twin.parameters(), gradients, strict=True):
            q.copy_(p + 0.5 * g / norm)
    mse(twin(x), y).backward()
    for (n, got), q in zip(sums_of(model).items(), twin.parameters(), strict=True):
        torch.testing.assert_close(got / B, q.grad, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("layer", [weight_norm, spectral_norm, old_spectral_norm])
def test_a_frozen_one(layer):
    """Its layer's bias alone trains."""
    model, x, y = specimen(dense(lambda: layer(nn.Linear(D, 5))))
    for name, p in model[2].named_parameters():
        p.requires_grad_(name == "bias")
    with torch.no_grad():
        (twin := copy.deepcopy(model))(x)
    verdict = Verdict(twin.eval(), (x,), y, mse)
    run = run_fused(model, ((x,), y), mse, verdict.max_grad_norm)
    verdict.check_norms(run.norms)
    verdict.check_sums(run.sums)


class Conditional(nn.Module):
    """Scales a weight by what the model has just computed."""

    def forward(self, w):
        return w * self.scale


def test_a_weight_that_depends_on_data_is_refused_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, 2)
            self.conditional = [Conditional()]
            self.conditional[0].scale = torch.ones(())
            parametrize.register_parametrization(self.second, "weight", self.conditional[0])

        def forward(self, x):
            h = self.first(x)
            self.conditional[0].scale = h.square().mean()
            return self.second(h)

    model = Model().double()
    wrapped, _, _ = make_private(model)
    with pytest.raises(RuntimeError, match=r"'second.parametrizations.weight'.*more than the parameters.*original"):
        mse(wrapped(torch.randn(B, D, dtype=F64)), torch.randn(B, 2, dtype=F64)).backward()
    assert not any(s.any() for s in sums_of(model).values())


def test_taken_apart_again():
    """``to_standard_module`` gives a parametrised model back as it was."""
    model, x, y = specimen(dense(lambda: spectral_norm(nn.Linear(D, 5))))
    wrapped, _, _ = make_private(model)
    mse(wrapped(x), y).backward()
    wrapped.to_standard_module()
    parametrize.remove_parametrizations(model[2], "weight")
    assert "forward" not in vars(model[2])
    assert model(x).shape == y.shape
