"""Where the authors' code departs from their papers, ours follows the papers.

The published code is restated here from a description of what it does; none of it is copied.
"""

import copy

import pytest
import torch
from torch.optim import SGD

import dpfast
from tests.optim.ascending import B, C, Net, Plain, Private, data, loss_of

RHO, KAPPA = 0.1, 0.7


def clipped_sum(model, w, batch):
    """``Σ_i clip_C(∇ℓ_i(w))``, flat."""
    twin = copy.deepcopy(model)
    params = list(twin.parameters())
    torch.nn.utils.vector_to_parameters(w, params)
    total = torch.zeros_like(w)
    for k in range(len(batch[0])):
        one = [x[k : k + 1] for x in batch]
        g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(twin(*one), one[1]), params)])
        total += g * min(1, C / float(g.norm()))
    return total


def published_dpsat(model, steps, rho, lr):
    """Every physical batch shifts the weights by ρĝ before its gradients; only the step takes one shift back."""
    w, direction = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone(), None
    for parts in steps:
        total = torch.zeros_like(w)
        for part in parts:
            if direction is not None:
                w += rho * direction
            total += clipped_sum(model, w, part)
        if direction is not None:
            w -= rho * direction
        gradient = total / B
        direction = gradient / gradient.norm()
        w -= lr * gradient
    return w


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_shift_is_left_in_the_weights(k):
    """k physical batches end where one does. The published code ends (k − 1) · ρ further along ĝ, each step."""
    model, lr, size = Net().double(), 0.01, B // k
    batches = [data() for _ in range(3)]
    steps = [[(image[i : i + size], ids[i : i + size]) for i in range(0, B, size)] for image, ids in batches]
    run = Private(copy.deepcopy(model), lambda p: SGD(p, lr=lr), ascent=dpfast.DPSAT(RHO), noise_multiplier=0.0)
    plain = Plain(model, lambda p: SGD(p, lr=lr), 0.0, rho=RHO)
    for parts, batch in zip(steps, batches, strict=True):
        run.step(*parts)
        plain.step(batch)
    torch.testing.assert_close(weights(run.model), weights(plain.model), rtol=1e-7, atol=1e-7)
    apart = float((published_dpsat(model, steps, RHO, lr) - weights(run.model)).norm())
    shifted = len(steps) - 1  # all but the first
    if k == 1:
        assert apart < 1e-6
    else:
        assert (k - 1) * RHO * shifted / 2 < apart < 1.1 * (k - 1) * RHO * shifted


def test_disk_weighs_the_new_gradient_by_kappa():
    """As its text does. The published code gives the new gradient 1 − κ and the old ones κ."""
    model, make = Net().double(), lambda p: SGD(p, lr=0.01)
    run = Private(copy.deepcopy(model), make, ascent=dpfast.DiSK(KAPPA), noise_multiplier=0.0)
    text, gradients = Plain(model, make, 0.0, kappa=KAPPA), []
    for _ in range(2):
        batch = data()
        # DiSK's gradients are taken at w + shift, whatever they are then weighted by.
        at = weights(text.model) + torch.cat([s.reshape(-1) for s in text.shift])
        gradients.append(clipped_sum(model, at, batch) / B)
        run.step(batch)
        text.step(batch)
    found = torch.cat([p.grad.reshape(-1) for p in run.model.parameters()])
    first, second = gradients
    torch.testing.assert_close(found, (1 - KAPPA) * first + KAPPA * second, rtol=1e-7, atol=1e-8)
    published = KAPPA * first + (1 - KAPPA) * second
    assert float((found - published).norm()) > 0.1 * float(found.norm())
