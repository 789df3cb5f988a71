"""Is a difference between two methods more than chance? Paired by seed, with Student's t; and words for the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpfast.analysis.reproduce.common import mean_error

CONFIRMED, NOT_SEEN, OPPOSITE = "confirmed", "not seen", "opposite"


def student(freedom: int) -> float:
    """What |t| exceeds 5 % of the time by chance."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom)) if freedom > 0 else math.inf


def beyond_chance(differences: Sequence[float], overlap: float = 0.0) -> int:
    """The sign of the mean of paired differences, or 0 where chance explains it at the 5 % level.

    Args:
        differences: one a seed.
        overlap: test samples over training samples where the seeds split one data set anew: such seeds are not
            independent, and the variance of the mean is ``var · (1/n + overlap)`` (Nadeau and Bengio 2003).
    """
    mean, error = mean_error(differences)
    if len(differences) < 2:
        return 0
    error *= math.sqrt(1 + overlap * len(differences))
    return 0 if abs(mean) <= student(len(differences) - 1) * error else 1 if mean > 0 else -1
