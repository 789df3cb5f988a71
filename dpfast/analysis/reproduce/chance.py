"""Is a difference between two methods more than chance? Paired by seed, with Student's t; and words for the answer."""

from __future__ import annotations

from collections.abc import Sequence

from dpfast.analysis.reproduce.common import mean_error, student

CONFIRMED, NOT_SEEN, OPPOSITE = "confirmed", "not seen", "opposite"
ONE_SEED = "None: one seed tells nothing of chance."


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


def judged(agree: int, against: int, comparisons: int) -> str:
    """What comparisons say of a claim, by how many bear it out and how many contradict it, beyond chance.

    Where there is nothing to see, each does either with a probability of 2.5 %. A count that comes of that in one
    table of 20 or more often counts as none.
    """
    from scipy.stats import binom

    agree, against = (n if n and binom.sf(n - 1, comparisons, 0.025) < 0.05 else 0 for n in (agree, against))
    if agree and against:
        return "both ways"
    if against:
        return OPPOSITE if 2 * against > comparisons else f"{OPPOSITE} in part"
    return CONFIRMED if 2 * agree > comparisons else "in part" if agree else NOT_SEEN
