"""What two gradients a step would cost: SAM made private takes one at ``w + ρĝ`` with ĝ from the same samples.

DP-SAT goes along the gradient of the step before, which is released already, and pays for one.
"""

from __future__ import annotations

import math

from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

from dpfast.analysis.reproduce.common import Table

DELTA, SAMPLE_RATE, EPOCHS = 1e-5, 1 / 30, 40
EPSILONS = (1.0, 2.0, 3.0)
EXACT = 1e-3  # of ε, to which σ is found


def price() -> Table:
    """σ for one gradient a step and for two, and the ε of two at the σ of one."""
    steps = round(EPOCHS / SAMPLE_RATE)
    table = Table(
        f"the price of two gradients a step: q = 1/{1 / SAMPLE_RATE:.0f}, {EPOCHS} epochs, δ = {DELTA:g} (RDP)",
        ["ε", "σ, one gradient", "σ, two, a batch each", "", "ε at the first σ", "σ, two, same batch", "", "ε"],
    )
    for epsilon in EPSILONS:
        one, two = (_sigma(epsilon, count * steps) for count in (1, 2))
        table.rows.append(
            [
                f"{epsilon:g}",
                f"{one:.3f}",
                f"{two:.3f}",
                f"× {two / one:.2f}",
                f"{_epsilon(one, 2 * steps):.2f}",
                f"{math.sqrt(2) * one:.3f}",
                f"× {math.sqrt(2):.2f}",
                f"{_epsilon(one / math.sqrt(2), steps):.2f}",
            ]
        )
    table.notes += [
        "A batch each: twice as many steps of the subsampled Gaussian mechanism.",
        "The same batch, as SAM is written: both gradients are one release of sensitivity √2 · C from one draw of "
        "samples, so σ is √2 times that of one gradient.",
        "DP-SAT pays for one gradient: its shift is post-processing of the step before.",
    ]
    return table


def _sigma(epsilon: float, steps: int) -> float:
    return get_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=DELTA,
        sample_rate=SAMPLE_RATE,
        steps=steps,
        accountant="rdp",
        epsilon_tolerance=EXACT,
    )


def _epsilon(sigma: float, steps: int) -> float:
    accountant = RDPAccountant()
    accountant.history = [(sigma, SAMPLE_RATE, steps)]
    return float(accountant.get_epsilon(DELTA))
