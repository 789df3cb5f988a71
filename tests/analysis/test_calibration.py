"""Measures of calibration: against numbers worked out by hand, against scikit-learn, and on models of known truth."""

import math

import pytest
import torch

from dpfast.analysis import calibration
from dpfast.analysis.calibration import (
    calibration_report,
    expected_calibration_error,
    maximum_calibration_error,
)

RESAMPLES = 200


def logits_of(confidences):
    """Two-class logits whose class 0 has these probabilities."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], 1)


def drawn(n, temperature, classes=4):
    """Logits, and labels drawn from their softmax at ``temperature``: above 1, the logits are too sure."""
    z = 2 * torch.randn(n, classes, dtype=torch.float64)
    return z, torch.multinomial(torch.softmax(z / temperature, 1), 1).squeeze(1)


def test_means_by_hand():
    z = logits_of([0.6, 0.7, 0.8, 0.8, 0.9, 0.95])
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    found = calibration_report(z, y, bins=1, min_count=2, resamples=0)
    assert found.accuracy.value == pytest.approx(0.5)
    assert found.confidence.value == pytest.approx(4.75 / 6)
    assert found.overconfidence.value == pytest.approx(4.75 / 6 - 0.5)
    nll = -sum(math.log(p) for p in (0.6, 0.8, 0.9)) - sum(math.log(1 - p) for p in (0.7, 0.8, 0.95))
    assert found.nll.value == pytest.approx(nll / 6)
    brier = sum(2 * (1 - p) ** 2 for p in (0.6, 0.8, 0.9)) + sum(2 * p**2 for p in (0.7, 0.8, 0.95))
    assert found.brier.value == pytest.approx(brier / 6)
    assert math.isnan(found.brier.low) and "nan" in str(found)


def test_bins_by_hand():
    """Edges every 0.25; the wrong predictions are 0.72 and 0.97."""
    z = logits_of([0.55, 0.62, 0.72, 0.97])
    found = calibration_report(z, torch.tensor([0, 0, 1, 1]), bins=4, min_count=1, resamples=0).bins
    assert found.counts.tolist() == [0, 0, 3, 1]
    assert found.index.tolist() == [2, 2, 2, 3]
    assert found.accuracy.tolist()[2:] == pytest.approx([2 / 3, 0])
    assert found.confidence.tolist()[2:] == pytest.approx([1.89 / 3, 0.97])
    assert math.isnan(found.accuracy[0])


def test_ece_and_mce_by_hand():
    z = logits_of([0.55, 0.65, 0.75, 0.95])  # width 0.5: all in (0.5, 1]; width 0.1: one in each of four bins
    y = torch.tensor([0, 0, 1, 1])
    one_bin = abs((0.55 + 0.65 + 0.75 + 0.95) - 2) / 4
    assert expected_calibration_error(z, y, bins=2) == pytest.approx(one_bin)
    assert maximum_calibration_error(z, y, bins=2, min_count=1) == pytest.approx(one_bin)
    # By mass, two bins: {0.55, 0.65} both right, {0.75, 0.95} both wrong.
    assert expected_calibration_error(z, y, bins=2, binning="mass") == pytest.approx((0.8 + 1.7) / 4)
    assert maximum_calibration_error(z, y, bins=2, binning="mass", min_count=2) == pytest.approx(1.7 / 2)


def test_bins_with_few_samples_do_not_decide_the_mce():
    z = logits_of([0.55] * 20 + [0.95])
    y = torch.tensor([0] * 11 + [1] * 9 + [1])  # 0.55 is right 55 % of the time; the one at 0.95 is wrong
    assert maximum_calibration_error(z, y, bins=10, min_count=1) == pytest.approx(0.95)
    assert maximum_calibration_error(z, y, bins=10, min_count=10) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
def test_as_scikit_learn(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    z, y = drawn(400, 1.7, classes)
    p = torch.softmax(z, 1).numpy()
    found = calibration_report(z, y, resamples=0)
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(y, p.argmax(1)))
    assert found.nll.value == pytest.approx(metrics.log_loss(y, p, labels=range(classes)))
    brier = metrics.brier_score_loss(y, p, labels=list(range(classes)), scale_by_half=False)
    assert found.brier.value == pytest.approx(brier)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_bins_as_scikit_learn(binning):
    """``calibration_curve`` of "was the prediction right" over the confidence."""
    module = pytest.importorskip("sklearn.calibration")
    z, y = drawn(1000, 1.5)
    found = calibration_report(z, y, bins=8, binning=binning, resamples=0).bins
    confidence, predicted = torch.softmax(z, 1).max(1)
    strategy = {"width": "uniform", "mass": "quantile"}[binning]
    right, sure = module.calibration_curve(predicted == y, confidence, n_bins=8, strategy=strategy)
    full = found.counts > 0
    close = 1e-9 if binning == "width" else 0.02  # scikit-learn's quantiles are interpolated
    assert found.accuracy[full].tolist() == pytest.approx(right.tolist(), abs=close)
    assert found.confidence[full].tolist() == pytest.approx(sure.tolist(), abs=close)


def test_bins_of_equal_mass_hold_the_same():
    z, y = drawn(1003, 1.5)
    counts = calibration_report(z, y, bins=10, binning="mass", resamples=0).bins.counts
    assert int(counts.sum()) == 1003
    assert int(counts.max() - counts.min()) <= 1


def test_one_logit_is_a_binary_classifier():
    z = torch.randn(50, dtype=torch.float64)
    y = torch.randint(0, 2, (50,))
    one = calibration_report(z, y, resamples=0)
    two = calibration_report(torch.stack([torch.zeros(50).double(), z], 1), y, resamples=0)
    column = calibration_report(z.unsqueeze(1), y, resamples=0)
    for name, value in two.measures().items():
        assert one.measures()[name].value == pytest.approx(value.value)
        assert column.measures()[name].value == pytest.approx(value.value)


@pytest.mark.parametrize(("temperature", "least"), [(1.0, 0.85), (2.5, 0.8)])
def test_intervals_cover(temperature, least):
    """95 % intervals hold the truth about as often as they say; ECE's also where the truth is 0."""
    z, y = drawn(200_000, temperature)
    truth = calibration_report(z, y, bins=10, resamples=0, min_count=2000).measures()
    runs = 60
    held = dict.fromkeys(truth, 0)
    for seed in range(runs):
        z, y = drawn(1000, temperature)
        found = calibration_report(z, y, bins=10, resamples=RESAMPLES, seed=seed).measures()
        for name, one in found.items():
            held[name] += one.low <= truth[name].value <= one.high
    for name, count in held.items():
        assert count / runs >= (0.7 if name == "mce" else least), (name, count / runs)


def test_intervals_shrink_and_are_seeded():
    z, y = drawn(4000, 1.5)
    few, many = (calibration_report(z[:n], y[:n], resamples=RESAMPLES).nll for n in (250, 4000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.4)
    again = calibration_report(z, y, resamples=RESAMPLES)
    assert str(again) == str(calibration_report(z, y, resamples=RESAMPLES))
    assert str(again) != str(calibration_report(z, y, resamples=RESAMPLES, seed=1))


def test_intervals_do_not_depend_on_chunks(monkeypatch):
    z, y = drawn(300, 1.5)
    whole = str(calibration_report(z, y, resamples=50))
    monkeypatch.setattr(calibration, "CHUNK", 300)
    assert str(calibration_report(z, y, resamples=50)) == whole


def test_a_class_ruled_out_is_let_through():
    z = torch.tensor([[0.0, 1.0, -math.inf], [2.0, -math.inf, 0.0]])
    found = calibration_report(z, torch.tensor([1, 0]), bins=1, min_count=1, resamples=0)
    assert found.accuracy.value == 1
    assert math.isfinite(found.nll.value)


BAD = [
    (dict(logits=torch.tensor([[0.0, math.nan]] * 20)), r"logits: 20 of 20 rows .* row 0"),
    (dict(logits=torch.tensor([[0.0, math.inf]] * 20)), r"logits: .* row 0"),
    (dict(logits=torch.tensor([math.inf] * 20)), r"logits"),
    (dict(logits=torch.zeros(20, 2, 2)), r"logits of shape \[20, 2, 2\]"),
    (dict(labels=torch.full((20,), 2)), r"labels\[0\]=2 with 2 classes"),
    (dict(labels=torch.full((20,), -100)), r"labels\[0\]=-100"),
    (dict(labels=torch.full((20,), 0.5)), r"not whole"),
    (dict(labels=torch.zeros(19).long()), r"labels of shape \[19\] with 20 rows"),
    (dict(bins=21), r"bins=21 with 20 samples"),
    (dict(bins=0), r"bins=0"),
    (dict(bins=2.5), r"bins=2.5"),
    (dict(bins=True), r"bins=True"),
    (dict(binning="log"), r"binning='log'"),
    (dict(min_count=21), r"min_count=21: no bin .*the fullest has 20"),
    (dict(resamples=-1), r"resamples=-1"),
    (dict(level=95), r"level=95"),
    (dict(level=math.nan), r"level=nan"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refused(change, message):
    given = dict(logits=torch.zeros(20, 2), labels=torch.zeros(20).long(), bins=4, resamples=10, min_count=1) | change
    with pytest.raises(ValueError, match=message):
        calibration_report(given.pop("logits"), given.pop("labels"), **given)
