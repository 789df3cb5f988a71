"""Temperature scaling by DP-SGD: the best temperature without much noise, and its price."""

import math

import pytest
import torch

from dpfast.analysis.calibration import calibration_report
from dpfast.analysis.temperature import TemperatureFit, TemperatureScaling, fit_temperature


@pytest.fixture
def too_sure():
    """Logits whose best temperature is 2."""
    z = 4 * torch.randn(1500, 5)
    return z, torch.multinomial(torch.softmax(z / 2, 1), 1).squeeze(1)


def test_finds_the_temperature(too_sure):
    z, y = too_sure
    fit = fit_temperature(z, y, target_epsilon=2.0, target_delta=1e-4)
    assert fit.temperature == pytest.approx(2, rel=0.15)
    assert 1.5 < fit.epsilon <= 2.0
    before, after = (calibration_report(logits, y, resamples=0) for logits in (z, z / fit.temperature))
    assert after.ece.value < before.ece.value / 3
    assert after.accuracy.value == before.accuracy.value


def test_repeats_with_the_seed(too_sure):
    runs = []
    for seed in (0, 0, 1, None, None):
        torch.manual_seed(3)  # the batches
        kw = {} if seed is None else {"noise_generator": torch.Generator().manual_seed(seed)}
        runs.append(fit_temperature(*too_sure, noise_multiplier=1.0, target_delta=1e-4, epochs=2, **kw).temperature)
    assert runs[0] == runs[1] and len({*runs}) == 4


def test_without_noise_nothing_is_promised(too_sure):
    fit = fit_temperature(*too_sure, noise_multiplier=0.0, target_delta=1e-4, epochs=2)
    assert fit.epsilon == math.inf


def test_composition():
    fit = TemperatureFit(1.5, epsilon=1.0, delta=1e-5, steps=1, noise_multiplier=1.0)
    assert fit.total(3.0, 1e-6, disjoint=True) == (3.0, 1e-5)
    assert fit.total(3.0, 1e-6, disjoint=False) == pytest.approx((4.0, 1.1e-5))


def test_ruled_out_classes_leave_no_nan(too_sure):
    z, y = too_sure
    z = torch.cat([z, torch.full((len(z), 1), -math.inf)], 1)
    assert math.isfinite(fit_temperature(z, y, noise_multiplier=1.0, target_delta=1e-4, epochs=2).temperature)


def test_the_module_divides():
    module = TemperatureScaling(2.0)
    z = torch.randn(3, 4)
    torch.testing.assert_close(module(z), z / 2)
    assert module.temperature == pytest.approx(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.full((20, 2), math.nan)), "logits: 20 of 20 rows"),
        (dict(labels=torch.full((20,), 7)), r"labels\[0\]=7"),
        (dict(noise_multiplier=None), "target_epsilon=None, noise_multiplier=None"),
        (dict(target_epsilon=1.0), "target_epsilon=1.0, noise_multiplier=1.0"),
        (dict(epochs=0), "epochs=0"),
        (dict(batch_size=True), "batch_size=True"),
        (dict(learning_rate=math.inf), "learning_rate=inf"),
        (dict(start=0.0), "start=0.0"),
        (dict(target_delta=math.nan), "target_delta=nan"),
        (dict(max_grad_norm=-1.0), "max_grad_norm=-1.0"),
        (dict(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
    ],
)
def test_refused(change, message):
    given = dict(logits=torch.zeros(20, 2), labels=torch.zeros(20).long(), noise_multiplier=1.0, target_delta=1e-4)
    given |= change
    with pytest.raises(ValueError, match=message):
        fit_temperature(given.pop("logits"), given.pop("labels"), **given)
