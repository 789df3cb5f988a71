"""Losses made of gradients alone, and ``torch.autograd.grad``, which is no backward."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import F64, follow, sse
from tests.privacy.once import TWICE, B, Net, batch, check, expected, private

# ---------------------------------------------------------------- losses made of gradients alone


def penalty(wrapped, x):
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(wrapped(leaf).square().sum(), leaf, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("physical", [None, 1])
def test_a_loss_of_gradients_is_a_backward_of_the_same_samples(physical):
    loader = DataLoader(TensorDataset(*batch(4)), batch_size=physical or B)
    _, _, wrapped, optimizer, loader = private(loader=loader, max_physical_batch_size=physical)
    x, y = next(iter(loader))
    for first, second in itertools.product((True, False), repeat=2):
        (penalty(wrapped, x) if first else sse(wrapped(x), y)).backward()
        with pytest.raises(ValueError, match=TWICE):
            (penalty(wrapped, x) if second else sse(wrapped(x), y)).backward()
        optimizer.zero_grad()


def test_a_loss_of_gradients_of_different_samples():
    _, _, wrapped, _, loader = private()
    x, _ = next(iter(loader))
    with pytest.raises(ValueError, match="one backward pass of two forwards"):
        (penalty(wrapped, x[:3]) + penalty(wrapped, x[3:])).backward()
    with pytest.raises(ValueError, match="one backward pass of two forwards"):
        (penalty(wrapped, x[:3]) + wrapped(x[3:]).sum()).backward()


# ---------------------------------------------------------------- torch.autograd.grad is no backward


def of_inputs(wrapped, model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(sse(wrapped(x), y), x)


def of_activations(wrapped, model, x, y):
    loss = sse(wrapped(x), y)
    return torch.autograd.grad(loss, model.hidden)


def of_the_output(wrapped, model, x, y):
    out = wrapped(x)
    return torch.autograd.grad(sse(out, y), out)


def of_what_is_not_used(wrapped, model, x, y):
    other = torch.zeros(2, dtype=F64, requires_grad=True)
    x = x.clone().requires_grad_()
    return torch.autograd.grad(sse(wrapped(x), y), [x, other], allow_unused=True)


def with_inputs_named(wrapped, model, x, y):
    x = x.clone().requires_grad_()
    sse(wrapped(x), y).backward(inputs=[x])
    return (x.grad,)


def in_a_loop_without_gradients(wrapped, model, x, y):
    with torch.no_grad():
        for _ in range(2):
            with torch.enable_grad():
                (g,) = of_inputs(wrapped, model, x, y)
    return (g,)


def of_an_empty_batch(wrapped, model, x, y):
    return of_inputs(wrapped, model, x[:0], y[:0])


GRADS = [
    of_inputs,
    of_activations,
    of_the_output,
    of_what_is_not_used,
    with_inputs_named,
    in_a_loop_without_gradients,
    of_an_empty_batch,
]


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("take", GRADS, ids=lambda take: take.__name__)
def test_gradients_of_other_things(take, poisson):
    """No backward of the step: neither its sums nor its divisor change, and it takes none's place."""
    model, twin, wrapped, optimizer, _ = private(poisson_sampling=poisson, loss_reduction="mean")
    x, y = batch()

    def mean(out, y):
        return sse(out, y) / len(out)

    for _ in range(3):
        assert all(g is None or g.isfinite().all() for g in take(wrapped, model, x, y))
    with pytest.raises(ValueError, match="no backward pass"):
        if take is not of_an_empty_batch:
            optimizer.step()
        else:
            raise ValueError("no backward pass: an empty batch needs none")
    optimizer.zero_grad()
    mean(wrapped(x), y).backward()
    norms = wrapped.per_sample_gradient_norms.clone()
    take(wrapped, model, *batch())
    assert torch.equal(norms, wrapped.per_sample_gradient_norms)
    check(model, twin, (x, y))
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected(twin, (x, y))[name] / B)


def test_gradient_first_and_backward_of_the_same_forward():
    """As for a penalty or a saliency map: the one backward counts once."""
    model, twin, wrapped, optimizer, _ = private()
    x, y = batch()
    leaf = x.clone().requires_grad_()
    loss = sse(wrapped(leaf), y)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    loss.backward()
    check(model, twin, (x, y))
    optimizer.step()


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_training(steps, poisson):
    """FGSM and PGD: exact on the samples as they were attacked."""
    model, twin, wrapped, optimizer, loader = private(poisson_sampling=poisson)
    for x, y in loader:
        attacked = x.clone()
        for _ in range(steps):
            attacked.requires_grad_()
            (g,) = torch.autograd.grad(sse(wrapped(attacked), y), attacked)
            attacked = (attacked + 0.01 * g.sign()).detach()
        optimizer.zero_grad()
        sse(wrapped(attacked), y).backward()
        if len(x):
            check(model, follow(twin, model), (attacked, y))
        optimizer.step()


def test_gradients_of_frozen_layers():
    """Nothing of what the pass runs through is trained."""
    model = Net()
    model.a.requires_grad_(False)
    _, _, wrapped, optimizer, _ = private(model)
    x = batch()[0].requires_grad_()
    torch.autograd.grad(wrapped(x).sum(), x)
    with pytest.raises(ValueError, match="no backward pass"):
        optimizer.step()


class Skips(Net):
    """Leaves its parameters out where it is told to."""

    skips = False

    def forward(self, x):
        return x[:, :2] if self.skips else super().forward(x)


def test_a_backward_that_reaches_no_parameter_is_one():
    model, _, wrapped, optimizer, _ = private(Skips())
    x, y = batch()
    sse(wrapped(x), y).backward()
    optimizer.zero_grad()
    model.skips = True
    wrapped((x + 1000).requires_grad_()).sum().backward()
    optimizer.step()
    assert not any(p.grad.any() for p in model.parameters())
