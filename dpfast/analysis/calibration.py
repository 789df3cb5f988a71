"""Calibration: does a classifier that is 80 % sure turn out right 80 % of the time?

Differentially private training clips and adds noise, and a model so trained is often too sure of itself (Bu et al.,
arXiv 2106.07830). Here are the usual measures, each with a bootstrap interval; :mod:`dpfast.analysis.temperature` fits
a temperature under differential privacy, and :mod:`dpfast.analysis.plots` draws the reliability diagram.

None of this spends privacy or protects it: a figure computed from private data is a release of that data. Use held-out
data that may be published about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

BINS, RESAMPLES, LEVEL = 15, 1000, 0.95
MIN_COUNT = 10  # samples; a bin with fewer decides the MCE by chance
CHUNK = 1 << 22  # bootstrap weights held at once


@dataclass(frozen=True)
class Estimate:
    """A measure and its bootstrap interval, all in the measure's own unit."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".4f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Bins:
    """The samples in bins of their confidence, the largest predicted probability.

    Attributes:
        edges: ``[bins + 1]``, from 0 to 1; a bin holds its upper edge and not its lower one (the first holds both).
        counts: samples in each bin, ``[bins]``.
        accuracy, confidence: means over the bin's samples, ``[bins]``; NaN where a bin is empty.
        index: the bin of each sample, ``[n]``.
    """

    edges: Tensor
    counts: Tensor
    accuracy: Tensor
    confidence: Tensor
    index: Tensor


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`calibration_report` found; ``print(report)`` tells all of it.

    Attributes:
        accuracy, confidence: fraction right, and mean largest probability.
        overconfidence: mean confidence minus accuracy; positive for a model that is too sure.
        ece: expected calibration error ``Σ_b n_b/n · |accuracy_b − confidence_b|`` (Naeini et al. 2015; Guo et al.
            2017).
        mce: the largest ``|accuracy_b − confidence_b|`` over bins with at least ``min_count`` samples.
        nll: mean of ``−log p(label)``, nats.
        brier: mean of ``Σ_k (p_k − 1[k = label])²``, 0 to 2.
        bins: the samples in bins.
        samples, binning, min_count, level: how it was measured.
    """

    accuracy: Estimate
    confidence: Estimate
    overconfidence: Estimate
    ece: Estimate
    mce: Estimate
    nll: Estimate
    brier: Estimate
    bins: Bins
    samples: int
    binning: str
    min_count: int
    level: float

    def measures(self) -> dict[str, Estimate]:
        """The estimates by name."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Estimate)}

    def __str__(self) -> str:
        head = (
            f"calibration on {self.samples} samples, {len(self.bins.counts)} bins of equal {self.binning}, "
            f"{100 * self.level:g} % bootstrap intervals"
        )
        return "\n".join([head, *(f"  {name:<15} {value:.4f}" for name, value in self.measures().items())])


def calibration_report(
    logits: Tensor,
    labels: Tensor,
    *,
    bins: int = BINS,
    binning: str = "width",
    min_count: int = MIN_COUNT,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> CalibrationReport:
    """All measures of calibration of a classifier's outputs.

    Args:
        logits: ``[n, classes]``, before the softmax; ``[n]`` or ``[n, 1]`` for a binary classifier's one logit.
        labels: class indices ``[n]``.
        bins: how many.
        binning: edges evenly from 0 to 1 (``"width"``), or at quantiles of the confidence (``"mass"``).
        min_count: samples that a bin needs to count for the MCE.
        resamples: of the bootstrap, over samples; 0 for none (intervals are NaN).
        level: of the intervals, which hold the model fixed: they tell of the test data's chance, not of training's.
        seed: of the bootstrap.

    Returns:
        The report. Means have percentile intervals. Binned gaps are biased upwards, in a resample twice as much, so ECE
        and MCE have basic intervals ``2·value − quantile``, cut at 0 (Davison and Hinkley 1997, 5.2), which reach down
        to 0 where a perfectly calibrated model with these confidences can show as much ECE (Bröcker and Smith 2007).
        They can lie below the value, whose bias they take off, and are for the binned error with these edges, whatever
        the true error within a bin. In simulations with 1000 and 4000 samples, 95 % intervals held the truth 90 to 95 %
        of the time, those for the ECE 86 to 95 %, and for the MCE 82 to 98 %: a maximum is no smooth function of the
        data, and its intervals are somewhat too short where it is far from 0.

    Raises:
        ValueError: names the argument, its value, and what to do: NaN, labels out of range, fewer samples than bins.
    """
    logits, labels = check_outputs(logits, labels)
    _check(bins, binning, min_count, resamples, level, len(labels))
    log_p = torch.log_softmax(logits, 1)
    p = log_p.exp()
    confidence, predicted = p.max(1)
    right = (predicted == labels).double()
    binned = bin_samples(confidence, right, bins, binning)
    counted = binned.counts >= min_count
    if not counted.any():
        raise ValueError(
            f"min_count={min_count!r}: no bin has that many samples (the fullest has {int(binned.counts.max())}); use "
            f"fewer bins than {bins}, or a smaller min_count"
        )
    of_label = labels.unsqueeze(1)
    nll = -log_p.gather(1, of_label).squeeze(1)
    brier = p.square().sum(1) + 1 - 2 * p.gather(1, of_label).squeeze(1)
    columns = torch.stack([right, confidence, confidence - right, nll, brier], 1)
    member = torch.nn.functional.one_hot(binned.index, bins).double()
    gaps = member * (confidence - right).unsqueeze(1)

    def measure(weights: Tensor) -> Tensor:
        """``[resamples, 7]`` from how often each sample counts, ``[resamples, n]``."""
        n = len(labels)
        gap = (weights @ gaps).abs()
        ece = gap.sum(1) / n
        mce = (gap / (weights @ member).clamp(min=1))[:, counted].amax(1)
        return torch.cat([weights @ columns / n, ece.unsqueeze(1), mce.unsqueeze(1)], 1)

    value = measure(torch.ones(1, len(labels), dtype=torch.float64))[0]
    low, high = _intervals(value, _resample(measure, len(labels), resamples, seed), level)
    if resamples:
        null = _calibrated(confidence, member, resamples, seed)
        if value[-2] <= torch.quantile(null, level):
            low[-2:] = 0
    found = [Estimate(*map(float, row)) for row in zip(value, low, high, strict=True)]
    accuracy, sure, over, nll_, brier_, ece, mce = found
    return CalibrationReport(
        accuracy, sure, over, ece, mce, nll_, brier_, binned, len(labels), binning, min_count, level
    )


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS, binning: str = "width") -> float:
    """The ECE alone, 0 to 1, without an interval; see :func:`calibration_report`."""
    return calibration_report(logits, labels, bins=bins, binning=binning, min_count=1, resamples=0).ece.value


def maximum_calibration_error(
    logits: Tensor, labels: Tensor, bins: int = BINS, binning: str = "width", min_count: int = MIN_COUNT
) -> float:
    """The MCE alone, 0 to 1, without an interval; see :func:`calibration_report`."""
    return calibration_report(logits, labels, bins=bins, binning=binning, min_count=min_count, resamples=0).mce.value


def bin_samples(confidence: Tensor, right: Tensor, bins: int, binning: str) -> Bins:
    """Samples in bins of their confidence.

    Args:
        confidence, right: ``[n]``, float64: largest probability, and 1 if the prediction was right.
        bins, binning: as in :func:`calibration_report`. Equal confidences stay in one bin, so bins of equal mass can
            be empty where many are alike.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    if binning == "mass":
        ranked = confidence.sort().values
        last = [round(len(ranked) * b / bins) - 1 for b in range(1, bins)]  # the bin's largest confidence
        edges[1:-1] = ranked[last]
    index = torch.bucketize(confidence.contiguous(), edges[1:-1].contiguous())
    counts = torch.bincount(index, minlength=bins)
    means = [torch.zeros(bins, dtype=torch.float64).index_add_(0, index, x) / counts for x in (right, confidence)]
    return Bins(edges, counts, means[0], means[1], index)


def check_outputs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[n, classes]``, float64, and labels ``[n]``, on the CPU; refuses what is neither.

    A logit of −inf is a class ruled out, and is let through where another class is left.
    """
    logits, labels = torch.as_tensor(logits).detach().cpu().double(), torch.as_tensor(labels).detach().cpu()
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        z = logits.reshape(-1)
        logits = torch.stack([-z / 2, z / 2], 1)  # finite where z is, as two logits
    if logits.dim() != 2:
        raise ValueError(f"logits of shape {list(logits.shape)}: give [samples, classes], or [samples] if binary")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels of shape {list(labels.shape)} with {len(logits)} rows of logits: give one class index a sample"
        )
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise ValueError(f"labels of dtype {labels.dtype} that are not whole: give class indices")
    bad = torch.log_softmax(logits, 1).isnan().any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"logits: {int(bad.sum())} of {len(logits)} rows have no probabilities, the first is row {row}: "
            f"{[float(f'{x:.4g}') for x in logits[row][:6]]}; did training diverge? Lower the learning rate, or drop "
            f"those samples knowingly"
        )
    classes = logits.shape[1]
    labels = labels.long()
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"labels[{first}]={int(labels[first])} with {classes} classes: give 0 to {classes - 1}, and drop samples "
            f"that are to be ignored"
        )
    return logits, labels


def _check(bins: Any, binning: Any, min_count: Any, resamples: Any, level: Any, samples: int) -> None:
    whole = {"bins": (bins, 1), "min_count": (min_count, 1), "resamples": (resamples, 0)}
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
    if binning not in ("width", "mass"):
        raise ValueError(f"binning={binning!r}: use 'width' or 'mass'")
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ValueError(f"level={level!r}: give the intervals' coverage, between 0 and 1, such as 0.95")
    if samples < bins:
        raise ValueError(f"bins={bins!r} with {samples} samples: give at least as many samples as bins, or fewer bins")


def _resample(measure: Any, n: int, resamples: int, seed: int) -> Tensor:
    """Measures of ``resamples`` draws of n samples with replacement, ``[resamples, measures]``."""
    generator = torch.Generator().manual_seed(seed)
    found, left = [], resamples
    while left > 0:
        rows = min(left, max(1, CHUNK // n))
        drawn = torch.randint(n, (rows, n), generator=generator)
        weights = torch.zeros(rows, n, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(1).double().expand(rows, n)
        )
        found.append(measure(weights))
        left -= rows
    return torch.cat(found) if found else torch.empty(0, 0)


def _calibrated(confidence: Tensor, member: Tensor, resamples: int, seed: int) -> Tensor:
    """ECEs of models that are right as often as they say, with these confidences, ``[resamples]``."""
    generator = torch.Generator().manual_seed(seed + 1)
    found, left = [], resamples
    while left > 0:
        rows = min(left, max(1, CHUNK // len(confidence)))
        right = torch.rand(rows, len(confidence), generator=generator, dtype=torch.float64) < confidence
        found.append(((confidence - right.double()) @ member).abs().sum(1) / len(confidence))
        left -= rows
    return torch.cat(found)


def _intervals(value: Tensor, draws: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Lower and upper ends, ``[measures]``: percentile for all but the last two, ECE and MCE, which are basic."""
    if not len(draws):
        return torch.full_like(value, math.nan), torch.full_like(value, math.nan)
    tail = (1 - level) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    low, high = low.clone(), high.clone()
    low[-2:], high[-2:] = (2 * value - high)[-2:], (2 * value - low)[-2:]
    return torch.cat([low[:-2], low[-2:].clamp(min=0)]), torch.cat([high[:-2], high[-2:].clamp(min=0)])
