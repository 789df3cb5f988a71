"""DP-SAT, its momentum form and DiSK against the algorithms written plainly; and what must change nothing."""

import copy

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.optim import SGD, AdamW, RMSprop
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from tests.helpers import BF16, F32, F64, engine_of, make_private
from tests.ops.noisy import require, same
from tests.optim.ascending import B, C, Net, Plain, Private, data, loss_of, run_of

OPTIMIZERS = {
    "sgd": lambda params: SGD(params, lr=0.3),
    "sgd momentum": lambda params: SGD(params, lr=0.3, momentum=0.9, weight_decay=0.05),
    "adamw": lambda params: AdamW(params, lr=0.05),
    "RMSprop": lambda params: RMSprop(params, lr=0.02),  # has no update in the noise's pass
}
RULES = {
    "DPSAT": (dpfast.DPSAT(0.3), dict(rho=0.3)),
    "DPSATMomentum": (dpfast.DPSATMomentum(0.3), dict(momentum_rho=0.3)),
    "DiSK": (dpfast.DiSK(0.7), dict(kappa=0.7)),
}
each_rule = pytest.mark.parametrize("rule", RULES)
each_ascent = pytest.mark.parametrize("ascent", [rule[0] for rule in RULES.values()], ids=RULES)


def close(found, expected, tolerance=1e-9):
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@each_rule
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_against_the_algorithm(noise_multiplier, name, rule):
    """Five steps in float64, one of an empty batch."""
    model, (ascent, plainly) = Net().double(), RULES[rule]
    plain = Plain(model, OPTIMIZERS[name], noise_multiplier, **plainly)
    unshifted = Plain(model, OPTIMIZERS[name], noise_multiplier, rho=0.0)
    run = Private(model, OPTIMIZERS[name], ascent=ascent, noise_multiplier=noise_multiplier)
    for batch in (data(), data(), None, data(3), data()):
        run.step(batch) if batch is not None else run.step()
        plain.step(batch)
        unshifted.step(batch)
        close(run.values(), plain.values(), 1e-7)  # torch's states are float64; the certified norm is a little larger
    assert max(float((p - q).abs().max()) for p, q in zip(plain.values(), unshifted.values(), strict=True)) > 1e-4


@pytest.mark.parametrize("ascent", [dpfast.DPSAT(0.0), dpfast.DPSATMomentum(0), dpfast.DiSK(1.0)], ids=repr)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_no_ascent_at_all_is_dp_sgd_to_the_bit(dtype, ascent):
    model, steps = Net().to(dtype), [data(dtype=dtype) for _ in range(3)]
    make = OPTIMIZERS["sgd momentum"]
    assert same(run_of(steps, copy.deepcopy(model), make), run_of(steps, copy.deepcopy(model), make, ascent=ascent))


@each_ascent
def test_the_first_step_is_dp_sgd(ascent):
    model, steps = Net().double(), [data()]
    make = OPTIMIZERS["sgd"]
    assert same(run_of(steps, copy.deepcopy(model), make), run_of(steps, copy.deepcopy(model), make, ascent=ascent))


@each_ascent
def test_float32_is_float64_rounded(ascent):
    model, steps = Net(), [data() for _ in range(4)]
    narrow = [(image.float(), ids) for image, ids in steps]
    wide = run_of(steps, copy.deepcopy(model).double(), OPTIMIZERS["sgd momentum"], ascent=ascent)
    found = run_of(narrow, copy.deepcopy(model), OPTIMIZERS["sgd momentum"], ascent=ascent)
    close([p.double() for p in found], wide, 1e-5)


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
def test_bfloat16_computes_at_the_rounded_point(low_precision):
    """A layer's output is that of weights ``(w + shift)`` rounded once; the weights themselves are as the update left
    them."""
    if low_precision != "nearest":
        require("noisy_sgd_")
    run = Private(
        Net().to(BF16), OPTIMIZERS["sgd"], ascent=dpfast.DPSAT(0.5), low_precision=low_precision, loss_reduction="sum"
    )
    for _ in range(2):
        batch = data(dtype=BF16)
        run.step(batch)
    values, grads = run.values(), [p.grad.double() for p in run.model.parameters()]
    norm = sum(g.square().sum() for g in grads).sqrt()
    moved = Net().to(BF16)
    with torch.no_grad():
        for p, w, g in zip(moved.parameters(), values, grads, strict=True):
            p.copy_((w.double() + 0.5 * g / norm).to(BF16))
    found = run.wrapped(*batch)
    torch.testing.assert_close(found, moved(*batch), rtol=0.02, atol=0.02)
    assert not torch.equal(found, run.model.eval()(*batch))
    assert same(run.values(), values)


@each_ascent
@pytest.mark.parametrize("k", [2, 3, 6])
def test_physical_batches(k, ascent):
    """One shift for all of them: k physical batches are one, up to the order of a float64 sum."""
    model, steps = Net().double(), [data() for _ in range(4)]
    make = OPTIMIZERS["sgd momentum"]
    whole = run_of(steps, copy.deepcopy(model), make, ascent=ascent)
    run = Private(copy.deepcopy(model), make, ascent=ascent)
    size = B // k
    for image, ids in steps:
        run.step(*((image[i : i + size], ids[i : i + size]) for i in range(0, B, size)))
    close(run.values(), whole, 1e-12)


def test_batch_memory_manager():
    model, make = Net().double(), OPTIMIZERS["sgd"]
    images, ids = data(4 * B)
    loader = DataLoader(TensorDataset(images, ids), batch_size=B)
    ends = []
    for most in (B, 2):
        run = Private(copy.deepcopy(model), make, ascent=dpfast.DPSAT(0.3), data_loader=loader)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=most, optimizer=run.optimizer) as parts:
            for batch in parts:
                run.optimizer.zero_grad()
                run.backward(batch)
                run.optimizer.step()
        ends.append(run.values())
    close(*ends, 1e-12)


@each_ascent
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_blocks(reentrant, ascent):
    """What is computed again in the backward is computed at the same point, and so is a forward without gradients."""
    steps, ends = [data() for _ in range(4)], []
    start = Net().state_dict()
    for way in (None, reentrant):
        model = Net(way)
        model.load_state_dict(start)
        ends.append(run_of(steps, model.double(), OPTIMIZERS["sgd"], ascent=ascent))
    close(*ends, 1e-12)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_the_whole_model_in_a_checkpoint(reentrant):
    model, steps, ends = Net().double(), [data() for _ in range(4)], []
    for whole in (True, False):
        run = Private(copy.deepcopy(model), OPTIMIZERS["sgd"], ascent=dpfast.DPSAT(0.3))
        for image, ids in steps:
            run.optimizer.zero_grad()
            if whole:
                image = image.clone().requires_grad_()
                out = torch.utils.checkpoint.checkpoint(run.wrapped, image, ids, use_reentrant=reentrant)
            else:
                out = run.wrapped(image, ids)
            loss_of(out, ids).backward()
            run.optimizer.step()
        ends.append(run.values())
    close(*ends, 1e-12)


@each_ascent
def test_epsilon_is_that_of_dp_sgd(ascent):
    histories = []
    for kw in ({}, dict(ascent=ascent)):
        engine, model = engine_of(), Net().double()
        _, optimizer, _ = make_private(model, engine=engine, size=B, noise_multiplier=1.0, max_grad_norm=C, **kw)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.expect_no_samples()
            optimizer.step()
        histories.append((engine.accountant.history, engine.get_epsilon(1e-5)))
    assert histories[0] == histories[1]
