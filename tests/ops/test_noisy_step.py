"""The update in the noise's pass, in float32: torch's SGD, Adam and AdamW fed the same noisy gradient."""

import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from dpfast import ops
from dpfast.noise.parts import StepNoise
from dpfast.optim.fused_update import noisy_step, why_not_fused
from tests.ops.noisy import F32, MODES, apart, assert_guards, guarded, new_noise, require, same

SIZES = (0, 1, 5, 127, 129, 1000, 40_001)  # the last is cut in two pieces
RULES = {
    "sgd": (SGD, dict(lr=0.1)),
    "sgd momentum": (SGD, dict(lr=0.1, momentum=0.9)),
    "sgd nesterov": (SGD, dict(lr=0.3, momentum=0.7, nesterov=True, weight_decay=0.01)),
    "sgd dampening": (SGD, dict(lr=0.1, momentum=0.9, dampening=0.3)),
    "sgd weight decay": (SGD, dict(lr=0.05, weight_decay=0.1)),
    "sgd maximize": (SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1, dampening=0.1, maximize=True)),
    "sgd at rest": (SGD, dict(lr=0.0, momentum=0.9)),
    **{
        f"{cls.__name__} {name}": (cls, dict(lr=0.01) | given)
        for cls in (Adam, AdamW)
        for name, given in {
            "": {},
            "decayed": dict(weight_decay=0.1),
            "amsgrad": dict(amsgrad=True),
            "maximize": dict(maximize=True, amsgrad=True, weight_decay=0.01),
            "betas": dict(betas=(0.3, 0.7), eps=1e-3),
            "no mean": dict(betas=(0.0, 0.5)),
        }.items()
    },
}
each_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def compiled():
    require("noisy_sgd_")
    require("noisy_adam_")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch's own kernels here are not vectorised: they round every product before they add it")


class Trained:
    """Guarded float32 parameters and an optimizer that is stepped in the noise's pass."""

    def __init__(self, rule, sizes=SIZES):
        cls, options = RULES[rule]
        self.params = [guarded(n, F32, shift=k).normal_().requires_grad_() for k, n in enumerate(sizes)]
        self.optimizer = cls(self.params, **options)
        self.cls, self.options = cls, options

    def twin(self, **variant):
        """Torch's own optimizer on copies of parameters and state."""
        params = [p.detach().clone().requires_grad_() for p in self.params]
        optimizer = self.cls(params, **self.options, **variant)
        for p, q in zip(self.params, params, strict=True):
            for name, value in self.optimizer.state[p].items():
                optimizer.state[q][name] = value.clone()
        return params, optimizer

    def step(self, noise, sums):
        assert why_not_fused(self.optimizer) is None
        with torch.no_grad():
            noisy_step(
                self.optimizer,
                {p: x.clone() for p, x in zip(self.params, sums, strict=True)},
                {p: k for k, p in enumerate(self.params)},
                StepNoise([noise]),
            )

    def sums(self):
        return [3 * torch.randn(p.shape) for p in self.params]


def gradients(noise, sums, dtype=F32):
    grads = [torch.full_like(x, math.nan, dtype=dtype) for x in sums]
    ops.noisy_grad_(sums, grads, list(range(len(sums))), noise)
    return grads


def stepped(twin, grads):
    params, optimizer = twin
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return params, optimizer.state


@each_rule
@pytest.mark.parametrize("mode", MODES)
def test_is_torchs_step(rule, mode):
    """Four steps, each against torch from the same place: SGD and all moments to the bit, Adam to 2 units."""
    ours, furthest = Trained(rule), dict(single=0.0, fused=0.0, torch=0.0)
    for _ in range(4):
        noise, sums = new_noise(mode), ours.sums()
        grads, before = gradients(noise, sums), [p.detach().clone() for p in ours.params]
        single, state = stepped(ours.twin(foreach=False), grads)
        fused, _ = stepped(ours.twin(fused=True), grads)
        ours.step(noise, sums)
        assert same([p.grad for p in ours.params], grads)
        for p, q, r, start in zip(ours.params, single, fused, before, strict=True):
            assert_guards(p.detach())
            assert p.isfinite().all()
            mine, theirs = ours.optimizer.state[p], state[q]
            assert list(mine) == list(theirs)
            for name in mine:
                assert same(mine[name], theirs[name]), name
            assert ours.cls is not SGD or same(p.detach(), q.detach())
            sizes = start, p.detach() - start
            furthest["single"] = max(furthest["single"], apart(p, q, *sizes))
            furthest["fused"] = max(furthest["fused"], apart(p, r, *sizes))
            furthest["torch"] = max(furthest["torch"], apart(q, r, *sizes))
    assert furthest["fused"] <= 2
    assert furthest["single"] <= max(2, furthest["torch"])


@each_rule
def test_a_run_is_torchs_run(rule):
    """Twelve steps, each going on from its own: SGD to the bit, Adam as close as torch's two ways are."""
    ours = Trained(rule)
    start, single, fused = [p.detach().clone() for p in ours.params], ours.twin(foreach=False), ours.twin(fused=True)
    for _ in range(12):
        noise, sums = new_noise(), ours.sums()
        grads = gradients(noise, sums)
        stepped(single, grads)
        stepped(fused, grads)
        ours.step(noise, sums)
    for p, q, r, first in zip(ours.params, single[0], fused[0], start, strict=True):
        assert ours.cls is not SGD or same(p.detach(), q.detach())
        sizes = first, p.detach() - first
        assert apart(p, q, *sizes) <= 12 + 2 * apart(r, q, *sizes)
        assert ours.options["lr"] == 0 or not torch.equal(p, first) or not p.numel()


@pytest.mark.parametrize("rule", ["sgd nesterov", "AdamW amsgrad"])
def test_nan_and_infinity_stay_alone(rule):
    ours, noise = Trained(rule, (300,)), new_noise()
    other, (sums,) = ours.twin(), ours.sums()
    bad = [0, 127, 255, 299]
    broken = sums.clone()
    broken[bad] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    stepped(other, gradients(noise, [sums]))
    ours.step(noise, [broken])
    rest = [k for k in range(300) if k not in bad]
    assert not ours.params[0][bad].isfinite().any()
    assert apart(ours.params[0][rest], other[0][0][rest], torch.ones(len(rest))) <= 2
