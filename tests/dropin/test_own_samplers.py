"""Grad samplers that users register in Opacus are called in the fused mode."""

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import nn

from dpfast.model.forwards import GenericForward
from dpfast.refusals import LayoutError, RuleError
from tests import oracle
from tests.helpers import SLACK, make_private, mse


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.scale + self.shift


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), Scale(), nn.Tanh(), nn.Linear(3, 2))


@pytest.fixture
def called():
    """A sampler for ``Scale``, and what it was called with."""
    before, calls = dict(GradSampleHooks.GRAD_SAMPLERS), []

    @register_grad_sampler(Scale)
    def sampler(layer, activations, backprops):
        calls.append((layer, [a.shape for a in activations], backprops.shape))
        x = activations[0]
        dims = tuple(range(1, x.dim() - 1))
        return {
            layer.scale: (x * backprops).sum(dims) if dims else x * backprops,
            layer.shift: backprops.sum(dims) if dims else backprops,
        }

    yield calls
    GradSampleHooks.GRAD_SAMPLERS.clear()
    GradSampleHooks.GRAD_SAMPLERS.update(before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 4), (5, 6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_called_and_exact(called, shape, reduction, dtype):
    x, y = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 2).to(dtype)
    loss = lambda out, y: F.mse_loss(out, y, reduction=reduction)  # noqa: E731
    grads = oracle.per_sample_gradients(net().double(), (x.double(),), y.double(), loss)
    model, optimizer, _ = make_private(net().to(dtype), size=5, max_grad_norm=0.1, loss_reduction=reduction)
    loss(model(x), y).backward()
    assert called[-1] == (model._module[1], [torch.Size((*shape[:-1], 3))], torch.Size((*shape[:-1], 3)))
    for p, want in zip(model.parameters(), oracle.clipped_sum(grads, 0.1).values(), strict=True):
        torch.testing.assert_close(p.summed_grad.double(), want, rtol=1e-4, atol=1e-6)
    optimizer.step()


def test_its_result_counts(called):
    """What it returns is what is clipped, also where it is not the gradient: C holds for that."""
    GradSampleHooks.GRAD_SAMPLERS[Scale] = lambda layer, activations, G: {
        layer.scale: 1e4 * G, layer.shift: torch.zeros_like(G)
    }  # fmt: skip
    model, *_ = make_private(net().double(), size=5, max_grad_norm=1.0)
    sums = []
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    for rows in (slice(None), slice(1, None)):
        F.mse_loss(model(x[rows]), y[rows], reduction="mean").backward()
        sums.append(torch.cat([p.summed_grad.flatten() for p in model.parameters()]).double())
        model.set_grad_sample_to_none()
    assert 0.99 < torch.linalg.vector_norm(sums[0] - sums[1]) <= SLACK


def test_one_that_mixes_samples_is_refused(called):
    """The looks at the samples see what it returns."""
    GradSampleHooks.GRAD_SAMPLERS[Scale] = lambda layer, activations, G: {layer.scale: G - G.mean(0), layer.shift: G}
    model, *_ = make_private(net(), size=5)
    with pytest.raises(LayoutError, match=r"several samples meet in .1."):
        F.mse_loss(model(torch.randn(5, 4)), torch.randn(5, 2)).backward()


def test_opacus_own_samplers_are_not_used():
    model, *_ = make_private(net())
    assert type(vars(model._module[0])["forward"]).__name__ == "LayerForward"
    assert isinstance(vars(model._module[1])["forward"], GenericForward)


def test_frozen_and_empty(called):
    model = net()
    model[1].shift.requires_grad_(False)
    model, optimizer, _ = make_private(model, size=5)
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    grads = oracle.per_sample_gradients(net().double(), (x.double(),), y.double(), mse)
    F.mse_loss(model(x), y).backward()
    scale, shift = model._module[1].scale, model._module[1].shift
    assert getattr(shift, "summed_grad", None) is None
    clipped = oracle.clipped_sum({name: g for name, g in grads.items() if name != "1.shift"}, 1.0)
    torch.testing.assert_close(scale.summed_grad.double(), clipped["1.scale"], rtol=1e-4, atol=1e-6)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.expect_no_samples()
    optimizer.step()


@pytest.mark.parametrize("returned", [{}, "short"])
def test_results_that_are_none(called, returned):
    GradSampleHooks.GRAD_SAMPLERS[Scale] = lambda layer, activations, G: (
        {layer.scale: G[1:], layer.shift: G} if returned else {}
    )
    model, *_ = make_private(net(), size=5)
    with pytest.raises(RuleError, match=r"grad sampler .* of layer '1'.*\[5, 3\]"):
        F.mse_loss(model(torch.randn(5, 4)), torch.randn(5, 2)).backward()


@pytest.mark.parametrize("changed", [True, False])
def test_an_input_that_is_changed_in_place(called, changed):
    """Plain autograd refuses it as well: the gradient would be computed from other numbers."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = Scale(), nn.Linear(3, 2)

        def forward(self, x):
            x = x * 1
            out = self.scale(x)
            if changed:
                x += out
            return self.head(x + out)

    model, *_ = make_private(Residual().double(), size=5)
    backward = lambda: mse(model(torch.randn(5, 3).double()), torch.randn(5, 2).double()).backward()  # noqa: E731
    if not changed:
        backward()
        return
    with pytest.raises(RuntimeError, match="the input of layer 'scale' was modified in place"):
        backward()
    assert all(getattr(p, "summed_grad", None) is None for p in model.parameters())
