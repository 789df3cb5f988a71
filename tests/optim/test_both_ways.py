"""What holds whether or not the update is made in the noise's pass: hooks, closures, empty batches, plain PyTorch."""

import pytest
import torch
from torch import nn
from torch.optim import RMSprop

from dpfast import native
from tests.ops.noisy import apart, same
from tests.optim.private import OPTIMIZERS, B, D, Plain, Run, assert_close, batch, each_optimizer, net


@each_optimizer
@pytest.mark.parametrize("data", [None, batch], ids=["empty", "full"])
def test_pre_step_alone(data, name):
    """It leaves the gradients that a whole step leaves, and no parameter changed; then torch's step can follow."""
    model, make = net(), OPTIMIZERS[name]
    other = Plain(model, make)
    run, whole = Run(model, make), Run(other.model, make)
    data, start = data and data(), run.values()
    want = whole.step(data)
    if data is not None:
        run.backward(data)
    else:
        run.optimizer.expect_no_samples()
    assert run.optimizer.pre_step() is True
    assert same(run.grads(), want) and same(run.values(), start)
    run.optimizer.original_optimizer.step()
    assert_close(run, whole, start, 1, name)
    with pytest.raises(ValueError, match="zero_grad"):
        run.optimizer.pre_step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_hook_sees_the_noisy_gradients(name):
    """As in Opacus: it is called after the noise and before the update."""
    run, seen = Run(net(), OPTIMIZERS[name]), []
    account = run.optimizer.step_hook

    def hook(optimizer):
        account(optimizer)
        seen.append((run.grads(), run.values()))

    run.optimizer.attach_step_hook(hook)
    start = run.values()
    grads = run.step(batch())
    assert len(seen) == 1 and same(seen[0][1], start)
    assert all(g is not None for g in seen[0][0]), "no gradients yet"
    assert same(seen[0][0], grads)


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], RMSprop], ids=["sgd", "RMSprop"])
def test_a_closure_is_called_once(make):
    run, data, called = Run(net(), make), batch(), []

    def closure():
        called.append(torch.is_grad_enabled())
        run.backward(data)

    start = run.values()
    with torch.no_grad():
        run.optimizer.step(closure)
    assert called == [True]
    assert not any(same(p, q) for p, q in zip(run.values(), start, strict=True))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 300), nn.Linear(D, 300)

    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], RMSprop], ids=["sgd", "RMSprop"])
def test_empty_batches_and_parameters_out_of_reach(make):
    """All get noise of the same size, with and without a batch: within 5 standard errors."""
    for data in (None, batch(0), batch()):
        run = Run(Heads(), make, max_grad_norm=0.25, noise_multiplier=2.0)
        start, empty = run.values(), data is None or len(data[0]) == 0
        for k, (g, p, first) in enumerate(zip(run.step(data), run.values(), start, strict=True)):
            n = g.numel()
            # a clipped sum, of at most 0.25 / 8 in all, hardly counts beside
            room = 0 if empty or k > 1 else 0.25
            assert abs(g.norm() * B - 0.5 * n**0.5) <= 5 * 0.5 / 2**0.5 + room * B
            assert (g != 0).all() and (p != first).sum() > 0.9 * n


def test_without_the_compiled_library(passes, monkeypatch):
    """The same runs in plain PyTorch: parameters to a few units in the last place."""

    def runs():
        torch.manual_seed(3)
        found = {}
        for name, make in OPTIMIZERS.items():
            run = Run(net(), make)
            start = run.values()
            found[name] = start, [run.step(batch() if k % 2 else None) for k in range(4)], run.values()
        return found

    with_library = runs()
    assert len(passes) == 4 * len(with_library)
    monkeypatch.setattr(native, "available", lambda device: False)
    for name, (_, grads, values) in runs().items():
        start, ours, mine = with_library[name]
        equal = torch.cat([torch.eq(g, h).flatten() for g, h in zip(grads[0], ours[0], strict=True)])
        assert equal.double().mean() > 0.95, "a step without a batch is noise alone"
        for p, q, first in zip(values, mine, start, strict=True):
            assert apart(p, q, first, p - first, torch.full_like(p, 0.1)) <= 16, name
    assert len(passes) == 4 * len(with_library)


@pytest.mark.parametrize("way", ["stochastic", "master"])
def test_a_step_hook_does_not_change_how_16_bits_are_updated(way, passes):
    """The option holds, or is refused; it is never dropped without a word."""

    def run_of():
        torch.manual_seed(5)
        return Run(net().bfloat16(), OPTIMIZERS["sgd"], low_precision=way, loss_reduction="sum")

    plain, hooked = run_of(), run_of()
    account = hooked.optimizer.step_hook
    hooked.optimizer.attach_step_hook(lambda optimizer: account(optimizer))
    plain.step()
    try:
        hooked.step()
    except ValueError as refusal:
        assert f"low_precision={way!r}" in str(refusal)
    else:
        assert same(hooked.values(), plain.values())
        assert [len(s) for s in hooked.optimizer.state.values()] == [len(s) for s in plain.optimizer.state.values()]
