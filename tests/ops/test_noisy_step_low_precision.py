"""bfloat16 and float16 parameters: updated in float32 and rounded once, through master copies or at random."""

import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from dpfast import ops
from dpfast.noise.parts import StepNoise
from dpfast.optim.fused_update import MASTER, noisy_step, why_not_fused
from tests.ops.noisy import BF16, F16, MODES, apart, new_noise, require, same, units

SIZES = (0, 1, 127, 129, 1000, 40_001)
RULES = {
    "sgd": (SGD, dict(lr=0.1)),
    "sgd momentum": (SGD, dict(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, maximize=True)),
    "nesterov": (SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "adam": (Adam, dict(lr=0.01, weight_decay=0.1, eps=1e-4)),
    "adamw": (AdamW, dict(lr=0.01, amsgrad=True, maximize=True, eps=1e-4)),
}
each_rule = pytest.mark.parametrize("rule", RULES)
each_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def compiled():
    require("noisy_sgd_")
    require("noisy_adam_")


def step(optimizer, params, sums, noise, low_precision="nearest", key=(1, 2)):
    assert why_not_fused(optimizer) is None
    index = {p: k for k, p in enumerate(params)}
    with torch.no_grad():
        summed = {p: x.clone() for p, x in zip(params, sums, strict=True)}
        noisy_step(optimizer, summed, index, StepNoise([noise]), low_precision, key)


def wide_step(rule, params, states, grads, variant):
    """Torch's own float32 optimizer, from parameters and states as they are."""
    cls, options = RULES[rule]
    params = [p.detach().float().clone().requires_grad_() for p in params]
    optimizer = cls(params, **options, **variant)
    for p, state, grad in zip(params, states, grads, strict=True):
        p.grad = grad.clone()
        kept = {name: value.detach().float().clone() for name, value in state.items() if name != MASTER}
        optimizer.state[p].update(kept)
    optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params]


@each_rule
@each_dtype
@each_mode
@pytest.mark.parametrize("low_precision", ["nearest", "master"])
def test_float32_arithmetic_and_one_rounding(rule, dtype, mode, low_precision):
    """Against torch on float32 copies, step by step: no rounding but that of what is kept."""
    cls, options = RULES[rule]
    params = [torch.randn(n).to(dtype).requires_grad_() for n in SIZES]
    optimizer = cls(params, **options)
    for t in range(3):
        noise, sums = new_noise(mode), [3 * torch.randn(n) for n in SIZES]
        wide, narrow = ([torch.full((n,), math.nan, dtype=d) for n in SIZES] for d in (torch.float32, dtype))
        for grads in (wide, narrow):
            ops.noisy_grad_(sums, grads, list(range(len(SIZES))), noise)
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
        before = [s[MASTER] if MASTER in s else p.detach().clone() for p, s in zip(params, states, strict=True)]
        want, _ = wide_step(rule, before, states, wide, dict(fused=True))
        _, moments = wide_step(rule, before, states, wide, dict(foreach=False))
        step(optimizer, params, sums, noise, low_precision)
        assert same([p.grad for p in params], narrow)
        for p, start, exact, moment in zip(params, before, want, moments, strict=True):
            state = optimizer.state[p]
            if low_precision == "master":
                assert apart(state[MASTER], exact, start, exact - start.float()) <= 2
                assert same(p.detach(), state[MASTER].to(dtype))
            else:
                assert MASTER not in state
                room = 2 * units(torch.float32, start, exact, exact - start.float())
                low, high = ((exact.double() + sign * room).float().to(dtype) for sign in (-1, 1))
                assert ((low <= p) & (p <= high)).all()
                assert (p == exact.to(dtype)).double().mean() > 0.99 or not p.numel()
            assert state.keys() - {MASTER} == moment.keys()
            for name in moment:
                assert state[name].dtype == (torch.float32 if name == "step" else dtype)
                if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # else torch's float32 adds otherwise
                    assert same(state[name], moment[name].to(state[name].dtype)), (name, t)


@each_dtype
def test_a_master_copy_keeps_what_the_parameter_cannot(dtype):
    """A hundred updates of a tenth of the parameter's unit add up; rounded to the nearest each is lost."""
    for low_precision, moved in (("nearest", 0.0), ("master", 10.0)):
        p = torch.ones(300, dtype=dtype, requires_grad=True)
        optimizer = SGD([p], lr=torch.finfo(dtype).eps / 10)
        for _ in range(100):
            step(optimizer, [p], [torch.full((300,), -1.0)], new_noise(std=0.0, scale=1.0), low_precision)
        assert (p == 1 + moved * torch.finfo(dtype).eps).all()


@each_dtype
def test_a_parameter_set_from_outside_wins(dtype):
    """Where the parameter is not its copy's rounding; elsewhere the copy goes on, with all its bits."""
    p = torch.randn(500).to(dtype).requires_grad_()
    optimizer = SGD([p], lr=1e-3)
    for _ in range(3):
        step(optimizer, [p], [torch.randn(500)], new_noise(), "master")
    kept = optimizer.state[p][MASTER].clone()
    at = torch.randperm(500)[:100]
    values = torch.randn(100).to(dtype)
    values[:3] = torch.tensor([math.inf, 0.0, -0.0])
    with torch.no_grad():
        p[at] = values
    start = kept.index_copy(0, at, values.float())
    sums, noise = torch.randn(500), new_noise()
    g = sums.clone()
    ops.noisy_grad_([g], [g], [0], noise)
    step(optimizer, [p], [sums], noise, "master")
    got = optimizer.state[p][MASTER]
    assert same(got, (start.double() - torch.tensor(1e-3).double() * g.double()).float())
    assert same(p.detach(), got.to(dtype))


def neighbours(exact, dtype):
    """The two numbers of ``dtype`` around a float32 one, the smaller in size first; one unit apart if it is exact."""
    size = exact.abs()
    near = size.to(dtype)
    low = (near.view(torch.int16) - (near.float() > size).to(torch.int16)).view(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    return low.float(), high.float()


@each_dtype
@pytest.mark.parametrize("size", [1.0, 300.0, 1e-5, 3e-7])
def test_stochastic_rounding_keeps_the_mean(dtype, size):
    """One of the two neighbours, as often as it is near: within 5 standard errors. 1e-5: subnormal in float16."""
    n = 200_003
    p = (size * (1 + torch.rand(n)) * torch.where(torch.rand(n) < 0.5, -1.0, 1.0)).to(dtype).requires_grad_()
    start, sums = p.detach().clone(), size * torch.randn(n)
    step(SGD([p], lr=0.01), [p], [sums], new_noise(std=0.0, scale=1.0), "stochastic")
    exact = (start.double() - torch.tensor(0.01).double() * sums.double()).float()
    low, high = neighbours(exact, dtype)
    got = p.detach().float()
    assert (got.sign() == exact.sign())[got != 0].all()
    assert ((got.abs() == low) | (got.abs() == high)).all()
    up = (exact.abs().double() - low.double()) / (high.double() - low.double())
    error, variance = (got.abs() == high).double() - up, up * (1 - up)
    assert (got != exact).double().mean() > 0.1, "there is something to round"
    assert error.sum().abs() <= 5 * variance.sum().sqrt()
    for k in range(4):  # also where it is mostly down, and mostly up
        mine = (up >= k / 4) & (up < (k + 1) / 4)
        if variance[mine].sum() > 100:
            assert error[mine].sum().abs() <= 5 * variance[mine].sum().sqrt()
    # rounding errors of neighbours and of parts of a quad are independent
    for distance in (1, 2, 3, 4, 16):
        products = error[:-distance] * error[distance:]
        assert products.sum().abs() <= 5 * (variance[:-distance] * variance[distance:]).sum().sqrt()


@each_dtype
@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
def test_exact_values_stay(dtype, low_precision):
    """Every number there is, infinities and subnormals too, is itself after an update of 0; NaN stays NaN."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    p = every.clone().requires_grad_()
    for optimizer in (SGD([p], lr=0.0), AdamW([p], lr=0.0, weight_decay=0.1)):
        for _ in range(3):
            step(
                optimizer,
                [p],
                [torch.zeros(1 << 16)],
                new_noise(std=0.0),
                low_precision,
                torch.randint(9, (2,)).tolist(),
            )
        rest = ~every.isnan()
        assert p[~rest].isnan().all()
        zero = rest & (every == 0)
        assert same(p[rest & ~zero].detach(), every[rest & ~zero])
        assert (p[zero] == 0).all()


@pytest.mark.parametrize(("dtype", "value"), [(F16, 1023 * 2.0**-24), (F16, 0.1), (BF16, 0.1), (BF16, 1e-39)], ids=str)
def test_exact_values_stay_among_very_many(dtype, value):
    """A million draws: no random number is large enough to lift what is exact."""
    p = torch.full((1 << 20,), value, dtype=dtype, requires_grad=True)
    start = p.detach().clone()
    step(SGD([p], lr=0.0), [p], [torch.zeros(1 << 20)], new_noise(std=0.0), "stochastic")
    assert same(p.detach(), start)


@each_dtype
@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
def test_what_is_not_finite_stays_alone(dtype, low_precision):
    """An infinite or NaN sum makes its own element so, never a finite one; what overflows becomes infinite."""
    bad = [0, 64, 127, 128, 299]
    sums = torch.randn(300)
    sums[bad] = torch.tensor([math.nan, math.inf, -math.inf, math.inf, 3e38])
    p = torch.zeros(300).to(dtype).requires_grad_()
    step(SGD([p], lr=100.0), [p], [sums], new_noise(std=0.0, scale=1.0), low_precision)
    got = p.detach()[bad].tolist()
    assert math.isnan(got[0]) and got[1:] == [-math.inf, math.inf, -math.inf, -math.inf]
    rest = [k for k in range(300) if k not in bad]
    assert p[rest].isfinite().all()


@each_dtype
def test_stochastic_rounding_is_fresh_at_each_step(dtype):
    """Another step of the noise rounds otherwise, the same one as before."""
    start, sums, got = torch.randn(999).to(dtype), torch.randn(999), []
    for t in (3, 3, 4):
        p = start.clone().requires_grad_()
        step(SGD([p], lr=0.01), [p], [sums], new_noise(std=0.0, scale=1.0, step=t), "stochastic")
        got.append(p.detach())
    assert same(got[0], got[1])
    assert 0.05 < (got[0] != got[2]).double().mean() < 0.6
