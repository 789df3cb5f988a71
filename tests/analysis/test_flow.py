"""The simulation against plain gradient descent, against the fused mode, and against what the noise should do."""

import math

import pytest
import torch
from torch import nn

from dpfast.analysis.flow import simulate
from dpfast.analysis.ntk import convergence_report
from dpfast.engine import PrivacyEngine

CE = nn.CrossEntropyLoss()


def small():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture
def batch():
    return torch.randn(12, 4), torch.randint(0, 3, (12,))


def test_without_clipping_it_is_gradient_descent(batch):
    model = small()
    found = simulate(model, CE, *batch, learning_rate=0.01, steps=5, max_grad_norm=None)
    model.double()
    x, y = batch[0].double(), batch[1]
    for step in range(6):
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        assert float(found.losses[step]) == pytest.approx(loss.item(), rel=1e-12)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        if step < 5:
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= 0.01 * g
    torch.testing.assert_close(found.parameters, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(found.outputs, model(x).detach())
    assert found.times.tolist() == pytest.approx([0.01 * k for k in range(6)])


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_it_is_the_fused_mode_without_noise(batch, clipping):
    model = small()
    how = dict(max_grad_norm=0.7, clipping=clipping)
    found = simulate(model, CE, *batch, learning_rate=0.05, steps=4, **how)
    loader = torch.utils.data.DataLoader(list(zip(*batch, strict=True)), batch_size=12)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=loader,
        noise_multiplier=0.0,
        poisson_sampling=False,
        loss_reduction="sum",
        **how,
    )
    for _ in range(4):
        for x, y in loader:
            nn.functional.cross_entropy(private(x), y, reduction="sum").backward()
            optimizer.step()
            optimizer.zero_grad()
    after = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found.parameters, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["parameters", "function"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_it_starts_with_the_slope_of_the_report(batch, space, clipping):
    model, how = small(), dict(max_grad_norm=0.5, clipping=clipping)
    slope = convergence_report(model, CE, *batch, **how).loss_derivative
    found = simulate(model, CE, *batch, learning_rate=1e-6, steps=1, space=space, **how)
    assert float(found.losses.diff()[0]) / 1e-6 == pytest.approx(slope, rel=1e-4)
    assert found.monotone
    assert float(found.slopes[0]) == pytest.approx(slope, rel=1e-9)
    assert found.slopes.shape == found.losses.shape == found.times.shape


@pytest.mark.parametrize("space", ["parameters", "function"])
def test_noise_has_the_variance_it_should(batch, space):
    """One step from the same start moves outputs by ``η σ S J z``, so by a variance ``(η σ S)² tr H`` in all."""
    from dpfast.analysis.ntk import ntk

    model = small()
    how = dict(learning_rate=1e-3, steps=1, max_grad_norm=0.5, space=space)
    still = simulate(model, CE, *batch, **how).outputs
    moves = [
        float((simulate(model, CE, *batch, noise_multiplier=2.0, seed=seed, **how).outputs - still).square().sum())
        for seed in range(150)
    ]
    expected = (1e-3 * 2.0 * 0.5) ** 2 * float(ntk(model, batch[0]).H.trace())
    assert sum(moves) / len(moves) == pytest.approx(expected, rel=0.25)


def test_distance_by_noise_falls_as_the_root_of_the_step(batch):
    model = small()
    distances = []
    for rate in (0.02, 0.02 / 4):
        how = dict(learning_rate=rate, steps=round(0.4 / rate), max_grad_norm=0.5)
        still = simulate(model, CE, *batch, **how).parameters
        ends = [simulate(model, CE, *batch, noise_multiplier=1.0, seed=s, **how).parameters for s in range(4)]
        distances.append(sum(float((end - still).norm()) for end in ends) / 4)
    assert distances[0] / distances[1] == pytest.approx(2, rel=0.2)


def test_a_path_that_rises_is_not_monotone(batch):
    found = simulate(small(), CE, *batch, learning_rate=20.0, steps=20, max_grad_norm=0.5)
    assert not found.monotone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rate=0.0), "learning_rate=0.0"),
        (dict(learning_rate=math.nan), "learning_rate=nan"),
        (dict(steps=0), "steps=0"),
        (dict(steps=1.5), "steps=1.5"),
        (dict(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
        (dict(noise_multiplier=math.inf), "noise_multiplier=inf"),
        (dict(space="weights"), "space='weights'"),
        (dict(max_grad_norm=None, noise_multiplier=1.0), "without clipping"),
        (dict(memory_limit=1e-9), r"per-sample gradients .* GiB"),
        (dict(memory_limit=1e-9, space="function"), r"kernel .* GiB"),
    ],
)
def test_refused(batch, change, message):
    given = dict(learning_rate=0.1, steps=2, max_grad_norm=1.0) | change
    with pytest.raises(ValueError, match=message):
        simulate(small(), CE, *batch, **given)


def test_divergence_is_named(batch):
    loss = nn.MSELoss()
    with pytest.raises(ValueError, match=r"learning_rate=1e\+30: the loss is (inf|nan) after \d step"):
        simulate(small(), loss, batch[0], torch.randn(12, 3), learning_rate=1e30, steps=60, max_grad_norm=None)
