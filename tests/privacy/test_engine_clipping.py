"""Flat, per-layer and grouped clipping; schedulers; the noise and its reproducibility."""

import copy

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise, LambdaGradClip, StepGradClip, StepNoise
from torch import nn

from tests.helpers import F64, SLACK, distance, make_private, mse, run_fused, sums_of, token_loss
from tests.oracle import Verdict, take
from tests.zoo import TinyGPT


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(n: int = 5) -> tuple:
    return (torch.randn(n, 4, dtype=F64),), torch.randn(n, 2, dtype=F64)


def assert_grouped(model, data, bounds: dict[str, float], groups: dict[str, str], given) -> None:
    """Sums against the oracle group by group, and ``sqrt(Σ C²)`` for each sample left out."""
    inputs, target = data
    verdict = Verdict(model, inputs, target, mse, bounds, groups)
    run = run_fused(model, data, mse, given, clipping="per_layer")
    verdict.check_sums(run.sums)
    sensitivity = sum(bounds[g] ** 2 for g in set(groups.values())) ** 0.5
    assert run.optimizer.max_grad_norm == pytest.approx(sensitivity)
    for i in range(len(target)):
        rest = take(data, [j for j in range(len(target)) if j != i])
        moved = distance(run.sums, run_fused(model, rest, mse, given, clipping="per_layer").sums)
        assert moved <= sensitivity * SLACK


def test_per_layer_with_a_list():
    """One C for each parameter, in the optimizer's order, as in Opacus."""
    model = net()
    names = [n for n, _ in model.named_parameters()]
    bounds = [0.01 * (i + 1) for i in range(len(names))]
    assert_grouped(model, batch(), dict(zip(names, bounds, strict=True)), {n: n for n in names}, bounds)


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        ({"0": 0.1, "1": 0.02, "3": 0.3}, {"0.": "0", "1.": "1", "3.": "3"}),
        ({"": 0.1}, {"": ""}),
        ({"": 0.1, "3": 0.2}, {"": "", "3.": "3"}),
        ({"": 0.1, "3": 0.2, "3.bias": 0.05}, {"": "", "3.": "3", "3.bias": "3.bias"}),
        ({"0": 0.1, "1": 0.1, "3.weight": 0.1, "3.bias": 0.1}, None),
    ],
    ids=["layers", "one group", "the rest", "longest prefix", "parameters"],
)
def test_per_layer_with_groups_by_name(given, groups):
    model = net()
    found = {}
    for name, _ in model.named_parameters():
        prefixes = [g for g in given if g == "" or name == g or name.startswith(f"{g}.")]
        found[name] = max(prefixes, key=len)
        if groups is not None:
            assert found[name] == groups[max((p for p in groups if name.startswith(p)), key=len)]
    assert_grouped(model, batch(), given, found, given)


def test_a_prefix_ends_at_a_dot():
    """Group 1 has layer 1, not layer 10."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(11)]).double()
    groups = {n: "1" if n.startswith("1.") else "" for n, _ in model.named_parameters()}
    data = (torch.randn(4, 3, dtype=F64),), torch.randn(4, 3, dtype=F64)
    given = {"": 0.1, "1": 0.001}
    Verdict(model, *data, mse, given, groups).check_sums(run_fused(model, data, mse, given, clipping="per_layer").sums)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"0": 0.1, "3": 0.1}, ["1.weight"]),
        ({"0": 0.1, "1": 0.1, "3.weight": 0.1}, ["3.bias"]),
        ({"": 0.1, "nowhere": 0.1}, ["nowhere"]),
        ([0.1, 0.1], ["max_grad_norm", "6"]),
    ],
    ids=["layer", "bias", "no such name", "short list"],
)
def test_groups_that_do_not_fit_are_refused_by_name(given, words):
    with pytest.raises(ValueError) as refusal:
        make_private(net(), max_grad_norm=given, clipping="per_layer")
    for word in words:
        assert word in str(refusal.value)


def test_tied_parameters_are_in_the_group_of_their_first_name():
    model = TinyGPT().double()
    ids = torch.randint(9, (4, 5))
    given = {"": 0.1, "tok": 0.02}
    groups = {n: "tok" if n.startswith("tok.") else "" for n, _ in model.named_parameters()}
    verdict = Verdict(model, (ids,), ids, token_loss, given, groups)
    verdict.check_sums(run_fused(model, ((ids,), ids), token_loss, given, clipping="per_layer").sums)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda o: StepNoise(o, step_size=2, gamma=0.5), [1.0, 0.5, 0.5, 0.25]),
        (lambda o: ExponentialNoise(o, gamma=0.5), [0.5, 0.25, 0.125]),
    ],
    ids=["step", "exponential"],
)
def test_noise_schedulers(make, values):
    """The noise of each step has the scheduler's spread, within six standard errors."""
    model = nn.Linear(100, 100)
    wrapped, optimizer, _ = make_private(model, size=4, noise_multiplier=1.0, max_grad_norm=0.5, lr=1.0)
    scheduler = make(optimizer)
    for sigma in values:
        scheduler.step()
        assert optimizer.noise_multiplier == pytest.approx(sigma)
        before = model.weight.detach().clone()
        wrapped(torch.randn(0, 100)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        spread = (model.weight.detach() - before).std().item()
        assert abs(spread / (sigma * 0.5 / 4) - 1) <= 6 / (2 * model.weight.numel()) ** 0.5


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda o: StepGradClip(o, step_size=1, gamma=0.5), [0.05, 0.025]),
        (lambda o: ExponentialGradClip(o, gamma=0.5), [0.05, 0.025]),
        (lambda o: LambdaGradClip(o, scheduler_function=lambda e: 1 / (1 + e)), [0.05, 0.1 / 3]),
    ],
    ids=["step", "exponential", "lambda"],
)
def test_grad_clip_schedulers(make, values):
    """The very next backward clips to the new bound."""
    model = net()
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=0.1)
    scheduler = make(optimizer)
    for bound in [0.1, *values]:
        assert optimizer.max_grad_norm == pytest.approx(bound)
        inputs, target = batch()
        mse(wrapped(*inputs), target).backward()
        Verdict(twin, inputs, target, mse, bound).check_sums(sums_of(model))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def noise_of(steps=1, seed=None, sigma=1.0, shape=(40, 40), generator=None, **kw) -> list[torch.Tensor]:
    """What steps of pure noise did to two layers of the same shape."""
    model = nn.Sequential(nn.Linear(*shape, bias=False), nn.Linear(*shape, bias=False)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    if seed is not None:
        torch.manual_seed(seed)
    kw = dict(noise_multiplier=sigma, lr=1.0, noise_generator=generator) | kw
    wrapped, optimizer, _ = make_private(model, **kw)
    out = []
    for _ in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        wrapped(torch.zeros(0, shape[0], dtype=F64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        out += [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    return out


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_noise_generator_repeats_a_run_whatever_else_is_drawn():
    runs = [noise_of(2, seed=s, generator=torch.Generator().manual_seed(g)) for s, g in ((1, 5), (2, 5), (1, 6))]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_two_runs_without_a_seed_differ():
    assert not same(noise_of(), noise_of())


def test_noise_is_fresh_for_each_parameter_and_each_step():
    """No two of four matrices are equal or correlated: six standard errors' room."""
    draws = [d.flatten() for d in noise_of(2)]
    table = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws), dtype=F64)
    assert table.abs().max() <= 6 / draws[0].numel() ** 0.5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("clipping", "given", "sensitivity"), [("flat", 0.5, 0.5), ("per_layer", [0.3, 0.4], 0.5)])
def test_noise_has_the_right_size_and_shape(clipping, given, sensitivity, reduction):
    """σ times the sensitivity, over the expected batch under "mean"; mean 0, and kurtosis and tails of a normal."""
    kw = dict(clipping=clipping, max_grad_norm=given, loss_reduction=reduction, size=8)
    z = torch.cat([d.flatten() for d in noise_of(sigma=2.0, shape=(200, 200), **kw)])
    z = z / (2.0 * sensitivity / (8 if reduction == "mean" else 1))
    n = len(z)
    assert abs(z.mean()) <= 6 / n**0.5
    assert abs(z.square().mean() - 1) <= 6 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean()) <= 6 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) <= 6 * (96 / n) ** 0.5
    beyond = (z.abs() > 2).double().mean().item()
    assert abs(beyond - 0.0455) <= 6 * (0.0455 / n) ** 0.5
    assert 3.5 < z.abs().max() < 7


def test_sigma_zero_adds_nothing():
    assert not any(d.any() for d in noise_of(sigma=0.0))
