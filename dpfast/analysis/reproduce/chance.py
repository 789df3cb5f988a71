"""Is a difference between two methods more than chance? Paired by seed, with Student's t; and words for the answer."""

from __future__ import annotations

from collections.abc import Sequence

from dpfast.analysis.reproduce.common import mean_error, student

CONFIRMED, NOT_SEEN, OPPOSITE = "confirmed", "not seen", "opposite"


def beyond_chance(differences: Sequence[float], resplit: float = 0.0) -> int:
    """The sign of the mean of paired differences, or 0 where chance explains it at the 5 % level.

    Args:
        differences: one a seed.
        resplit: as in :func:`mean_error`.
    """
    mean, error = mean_error(differences, resplit)
    if len(differences) < 2 or abs(mean) <= student(len(differences) - 1) * error:
        return 0
    return 1 if mean > 0 else -1
