"""Adaptive clipping: C follows a quantile of the norms, by noisy counts that are part of the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AdaptiveClipping:
    """``C ← C · exp(-η (b - q))``, b the noisy fraction of samples with n ≤ C (Andrew et al. 2021, Algorithm 1).

    Each sample adds ``1[n ≤ C] - ½`` to a count, which it moves by ½; the count gets noise of ``unclipped_num_std``.
    Over R groups there is a threshold and a count for each. A sample moves each of them by ½, whatever its norms are,
    and all together by ``√R / 2`` (L2). Both releases of a step together are as private as one with the noise
    multiplier z that the accountant is told: sums get ``z_Δ = (z⁻² - R · (2 · unclipped_num_std)⁻²)^(-½)`` (their
    Theorem 1, for one count), which is larger.

    Args:
        target_unclipped_quantile: q, the fraction of samples to leave unclipped, 0 to 1.
        clipbound_learning_rate: η.
        max_clipbound, min_clipbound: where C stays.
        unclipped_num_std: standard deviation of each count's noise; more than ``√R / 2`` times the noise multiplier.
            Andrew et al. take a twentieth of the expected batch size.

    Raises:
        ValueError: with the argument's name.
    """

    target_unclipped_quantile: float
    clipbound_learning_rate: float
    max_clipbound: float
    min_clipbound: float
    unclipped_num_std: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: give a finite number that is not negative")
        if self.target_unclipped_quantile > 1:
            raise ValueError(f"target_unclipped_quantile={self.target_unclipped_quantile!r}: give a fraction, 0 to 1")
        if not 0 < self.min_clipbound < self.max_clipbound:
            raise ValueError(
                f"min_clipbound={self.min_clipbound!r}, max_clipbound={self.max_clipbound!r}: the first must be "
                f"positive and less than the second"
            )

    def of_counts(self, groups: int) -> float:
        """The noise multiplier of all counts together: their noise over what one sample moves them by."""
        return 2 * self.unclipped_num_std / math.sqrt(groups)

    def of_sums(self, noise_multiplier: Any, groups: int) -> float:
        """The noise multiplier of the clipped sums, where both releases are accounted for as ``noise_multiplier``.

        Raises:
            ValueError: the counts' noise alone is not enough for it.
        """
        if noise_multiplier == 0:
            return 0.0
        if (counts := self.of_counts(groups)) <= noise_multiplier:
            least = "half of" if groups == 1 else f"√{groups} / 2 = {math.sqrt(groups) / 2:.6g} times"
            raise ValueError(
                f"unclipped_num_std={self.unclipped_num_std!r}: must be more than {least} the noise multiplier "
                f"({noise_multiplier!r}), or counting alone spends more than the step's budget"
            )
        return noise_multiplier / math.sqrt(1 - (noise_multiplier / counts) ** 2)

    def next_threshold(self, threshold: float, fraction: float) -> float:
        """C after a step in which the noisy fraction of unclipped samples was ``fraction``."""
        exponent = -self.clipbound_learning_rate * (fraction - self.target_unclipped_quantile)
        return min(max(threshold * math.exp(min(exponent, 700.0)), self.min_clipbound), self.max_clipbound)
