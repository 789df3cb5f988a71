"""Case 7: an empty Poisson batch. Noise is added once, the step is accounted, nothing crashes."""

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import F32, F64, engine_of, make_private, mse, run_fused, sums_of
from tests.oracle import Verdict
from tests.zoo import every_layer, loss_of, specimen


@pytest.mark.parametrize("dtype", [F64, F32])
@every_layer
def test_a_step_of_noise_for_every_layer(name, dtype):
    model, inputs, target = specimen(name, B=0, dtype=dtype)
    engine = engine_of()
    wrapped, optimizer, _ = make_private(model, engine=engine, noise_multiplier=1.0, lr=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(name)(wrapped(*inputs), target).backward()
    assert wrapped.per_sample_gradient_norms.shape == (0,)
    optimizer.step()
    optimizer.zero_grad()
    for n, p in model.named_parameters():
        assert p.isfinite().all(), n
        assert not torch.equal(p, before[n]), f"{n}: no noise"
    assert [(sigma, steps) for sigma, _, steps in engine.accountant.history] == [(1.0, 1)]


@every_layer
def test_nothing_is_summed(name):
    model, inputs, target = specimen(name, B=0)
    run = run_fused(model, (inputs, target), loss_of(name), 1.0)
    assert not any(s.any() for s in run.sums.values())


@every_layer
def test_empty_then_full(name):
    """What an empty batch leaves behind must not be in the way of the next."""
    model, inputs, target = specimen(name)
    _, none, nothing = specimen(name, B=0)
    verdict = Verdict(model, inputs, target, loss_of(name))
    wrapped, optimizer, _ = make_private(model, max_grad_norm=verdict.max_grad_norm)
    for _ in range(2):
        loss_of(name)(wrapped(*none), nothing).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(name)(wrapped(*inputs), target).backward()
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(model))
        optimizer.step()
        optimizer.zero_grad()


def poisson(model: nn.Module, size: int = 8, sigma: float = 1.0, **kw):
    engine = engine_of()
    data = TensorDataset(torch.randn(size, 4), torch.randn(size, 2))
    out = make_private(
        model,
        engine=engine,
        lr=1.0,
        noise_multiplier=sigma,
        data_loader=DataLoader(data, batch_size=1),
        poisson_sampling=True,
        **kw,
    )
    return engine, *out


def test_noise_is_added_exactly_once():
    """The spread of the noise of an empty step is σC over the expected batch: six standard errors' room."""
    model = nn.Linear(200, 100)
    wrapped, optimizer, _ = make_private(model, size=4, noise_multiplier=1.5, max_grad_norm=0.3, lr=1.0)
    before = model.weight.detach().clone()
    wrapped(torch.randn(0, 200)).sum().backward()
    optimizer.step()
    noise = (before - model.weight.detach()).double()
    expected = 1.5 * 0.3 / 4
    assert abs(noise.std().item() / expected - 1) <= 6 / (2 * noise.numel()) ** 0.5
    assert abs(noise.mean().item()) <= 6 * expected / noise.numel() ** 0.5


@pytest.mark.parametrize("physical", [None, 1, 3])
def test_through_the_loader(physical):
    """One in three batches is empty here; each is a step, with and without BatchMemoryManager."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    engine, wrapped, optimizer, loader = poisson(model)
    sizes, steps = [], 0

    def train(batches):
        nonlocal steps
        for x, y in batches:
            sizes.append(len(x))
            before = model[0].weight.detach().clone()
            mse(wrapped(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += not torch.equal(before, model[0].weight)

    for _ in range(4):
        if physical is None:
            train(loader)
        else:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
            ) as batches:
                train(batches)
    assert 0 in sizes, "no batch was empty: the test needs another seed"
    assert physical is None or max(sizes) <= physical
    assert steps == 4 * len(loader)
    assert sum(n for _, _, n in engine.accountant.history) == 4 * len(loader)
    assert all(p.isfinite().all() for p in model.parameters())
