"""Optimizers whose own step must run: the same noisy gradients, bit for bit."""

import functools
import types

import pytest
import torch
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dpfast.optim.fused_update import why_not_fused
from tests.helpers import make_private
from tests.ops.noisy import F64, same
from tests.optim.private import OPTIMIZERS, B, Plain, Run, assert_close, batch, each_optimizer, net


class Subclass(SGD):
    def step(self, closure=None):
        self.called = getattr(self, "called", 0) + 1
        return super().step(closure)


def replaced(optimizer):
    """A step of the user's own, as a bound method on the instance, which torch's schedulers want."""
    real = type(optimizer).step

    def step(self, closure=None):
        self.called = getattr(self, "called", 0) + 1
        return real(self, closure)

    optimizer.step = types.MethodType(step, optimizer)


def wrapped(optimizer):
    """A function around the step that looks like it, as decorators make it."""
    real = optimizer.step

    @functools.wraps(real)
    def step(*args, **kw):
        optimizer.called = getattr(optimizer, "called", 0) + 1
        return real(*args, **kw)

    optimizer.step = step


def count(optimizer, *_):
    optimizer.called = getattr(optimizer, "called", 0) + 1


def on_optimizer(register):
    return lambda optimizer: getattr(optimizer, register)(count)


def replaced_and_scheduled(optimizer):
    replaced(optimizer)
    StepLR(optimizer, 100)


def scheduled_and_replaced(optimizer):
    StepLR(optimizer, 100)
    replaced(optimizer)


def scheduled_and_wrapped(optimizer):
    StepLR(optimizer, 100)
    wrapped(optimizer)


PREPARED = {
    "pre hook": on_optimizer("register_step_pre_hook"),
    "post hook": on_optimizer("register_step_post_hook"),
    "replaced": replaced,
    "replaced, then a scheduler": replaced_and_scheduled,
    "a scheduler, then replaced": scheduled_and_replaced,
    "wrapped": wrapped,
    "a scheduler, then wrapped": scheduled_and_wrapped,
}


@each_optimizer
@pytest.mark.parametrize("way", PREPARED)
def test_what_the_user_put_around_step_is_called(way, name, passes):
    """Once a step; gradients have the bits of the fused way, parameters are within ulps."""
    model, make = net(), OPTIMIZERS[name]
    twin, start = Plain(model, make), [p.detach().clone() for p in model.parameters()]
    optimizer, data = make(model.parameters()), batch()
    PREPARED[way](optimizer)
    run, fused = Run(model, optimizer), Run(twin.model, make)
    for this in (data, None, None):
        assert same(run.step(this), fused.step(this))
    assert optimizer.called == 3
    assert passes == [6] * 3, "the other run's"
    assert_close(run, fused, start, 3, name)


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers(register, passes):
    run, called = Run(net(), OPTIMIZERS["adam"]), []
    handle = register(lambda optimizer, *_: called.append(optimizer))
    try:
        run.step(batch())
    finally:
        handle.remove()
    assert called == [run.optimizer.original_optimizer] and passes == []
    run.step(batch())
    assert len(called) == 1 and len(passes) == 1


OTHERS = {
    "RMSprop": lambda params: RMSprop(params, lr=0.01),
    "a subclass": lambda params: Subclass(params, lr=0.1),
    "lr as a tensor": lambda params: AdamW(params, lr=torch.tensor(0.01)),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "NAdam": lambda params: torch.optim.NAdam(params),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers(name, passes):
    """torch's own step on the very gradients that the fused way makes."""
    model = net()
    plain, fused = Plain(model, OTHERS[name]), Run(Plain(model, OTHERS[name]).model, OPTIMIZERS["sgd"])
    run = Run(model, OTHERS[name])
    assert why_not_fused(run.optimizer.original_optimizer)
    for data in (batch(), None, None):
        grads = run.step(data)
        assert same(grads, fused.step(data))
        plain.step(grads)
    assert len(passes) == 3
    assert same(run.values(), plain.values())


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
def test_float64_models(name, passes):
    """Gradients are float64, from the same normals; torch's own step."""
    model, make = net().double(), (OPTIMIZERS | OTHERS)[name]
    plain, narrow = Plain(model, make), Run(Plain(model, make).model.float(), OPTIMIZERS["sgd"])
    run = Run(model, make)
    for data in (batch(dtype=F64), None):
        grads = run.step(data)
        assert all(g.dtype == F64 for g in grads)
        plain.step(grads)
    assert same(run.values(), plain.values())
    narrow.step(None)
    for g, h in zip(grads, narrow.step(None), strict=True):
        # float64's normals have more bits, 2⁻²¹ and below; the gradients are divided by B
        torch.testing.assert_close(g, h.double(), rtol=2**-22, atol=0.5 / B * 2.0**-20)
    assert passes == [6, 6], "the float32 run's"


FLAGS = [
    ("sgd", "differentiable"),
    *((name, flag) for name in ("adam", "adamw") for flag in ("capturable", "differentiable")),
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_that_need_torchs_own_step(name, flag, passes):
    """torch's own step runs, or refuses as it does for anyone."""

    def make(params):
        return OPTIMIZERS[name](params, **{flag: True})

    model, outcomes = net(), []
    plain = Plain(model, make)
    run = Run(model, make)
    for step in (lambda: plain.step([torch.ones_like(p) for p in plain.model.parameters()]), lambda: run.step(batch())):
        try:
            step()
            outcomes.append(None)
        except (RuntimeError, AssertionError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    assert passes == []


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_a_step_that_cannot_be_accounted_releases_nothing(name):
    """Where the accountant refuses, parameters, sums and the noise's step stay as they were; a retry is whole."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    wrapped, optimizer, _ = make_private(model, optimizer=optimizer, noise_multiplier=1.0)
    wrapped(torch.randn(4, 3)).sum(1).mean().backward()
    account = optimizer.accounting

    def refuse(_):
        raise ValueError("no more budget")

    before = [p.detach().clone() for p in model.parameters()], [p.summed_grad.clone() for p in model.parameters()]
    optimizer.accounting = refuse
    optimizer.attach_step_hook(refuse)
    with pytest.raises(ValueError, match="no more budget"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before[0], strict=True))
    assert all(torch.equal(p.summed_grad, old) for p, old in zip(model.parameters(), before[1], strict=True))
    assert optimizer.noise.step == 0 and all(p.grad is None for p in model.parameters())
    optimizer.accounting = account
    optimizer.attach_step_hook(account)
    optimizer.step()
    assert optimizer.noise.step == 1 and all(p.grad.any() for p in model.parameters())


def test_a_second_optimizer_with_other_parameters_is_refused():
    """It would end the first one's logical batch: sums that wait would get noise for another sensitivity."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    wrapped, first, _ = make_private(model, optimizer=SGD(model.parameters(), lr=0.1))
    for params in (model[0].parameters(), [p for p in model.parameters()][:3]):
        with pytest.raises(ValueError, match="another private optimizer of this model"):
            make_private(wrapped, optimizer=SGD(params, lr=0.1))
    _, again, _ = make_private(wrapped, optimizer=SGD(model.parameters(), lr=0.1))
    assert again is not first
