"""What Bu et al. say of noise, kernels and flows, and whether the runs agree: computed from them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpfast.analysis.ntk import FULL_RANK, NOT_NEGATIVE, QUADRATIC, REAL, ConvergenceReport
from dpfast.analysis.reproduce.chance import CONFIRMED, NOT_SEEN, ONE_SEED, OPPOSITE, beyond_chance
from dpfast.analysis.reproduce.common import Verdict, mean_error

NEAR = 0.1  # of an exponent of η
NOISE_SAYS = "Noise affects privacy and not convergence: in the gradient flow, η → 0, its effect vanishes."
KERNEL_SAYS = (
    "(1) Without clipping, or with R above all norms, the kernel HC is symmetric and positive, and the loss falls. "
    "(2) With a small R, flat, its eigenvalues stay positive, and symmetry and the positive quadratic form are lost. "
    "(3) With a small R, per layer, nothing is guaranteed. (Table 1.)"
)
FLOW_SAYS = (
    "(1) With R above all norms the loss falls all along the flow; with a small R it need not. (2) A small R leads to "
    "undesirable convergence, and a larger one improves it significantly. (Table 1; the authors' repository.)"
)


def noise_verdict(slopes: Sequence[float], at_sigma: str, at_epsilon: str) -> Verdict:
    """From the exponents of η in the distance to the noiseless run, at a fixed noise multiplier and at a fixed budget.

    Args:
        slopes: the two.
        at_sigma, at_epsilon: in words, what was fixed.
    """
    fixed, budget = (round(slope, 2) + 0.0 for slope in slopes)  # no "-0.00"
    here = (
        f"The last weights are at a distance ∝ η^{fixed:.2f} from those of the noiseless run at {at_sigma}, where ε "
        f"grows without bound as η → 0, and ∝ η^{budget:.2f} at {at_epsilon}."
    )
    end = CONFIRMED if abs(slopes[0] - 0.5) <= NEAR else OPPOSITE if slopes[0] <= NEAR else NOT_SEEN
    stays = "does not carry over" if slopes[1] <= NEAR else "carries over"
    return Verdict(NOISE_SAYS, here, f"{end.capitalize()} at a fixed noise multiplier. It {stays} to a fixed budget.")


def kernel_verdict(
    unclipped: Sequence[ConvergenceReport],
    small: Sequence[ConvergenceReport],
    layer: Sequence[ConvergenceReport],
    dropped: Sequence[ConvergenceReport],
) -> Verdict:
    """The paper's Table 1 against all kernels.

    Args:
        unclipped: without clipping, or with R above all norms.
        small, layer: with a small R, flat and per layer.
        dropped: with 0/1 factors.
    """
    total = len(small)
    whole = sum(all(one.holds for one in report.properties) for report in unclipped)
    good = sum(report.holds(REAL) and report.holds(NOT_NEGATIVE) for report in small)
    lost = sum(not report.holds(QUADRATIC) for report in small)
    broken = sum(not (report.holds(REAL) and report.holds(NOT_NEGATIVE)) for report in layer)
    poorer = sum(not report.holds(FULL_RANK) for report in dropped)
    here = (
        f"(1) All properties hold in {whole} of {len(unclipped)} kernels. (2) The eigenvalues are real and not "
        f"negative in {good} of {total}, and the quadratic form is negative somewhere in {lost}. (3) An eigenvalue is "
        f"complex or negative in {broken} of {total}. With 0/1 factors, which drop {_counts(dropped)} samples, the "
        f"rank is lower than without clipping in {poorer} of {total}."
    )
    ends = (
        CONFIRMED if whole == len(unclipped) else OPPOSITE,
        OPPOSITE if good < total else CONFIRMED if lost else NOT_SEEN,
        CONFIRMED if broken else NOT_SEEN,
    )
    return Verdict(KERNEL_SAYS, here, ", ".join(f"({k}) {end}" for k, end in enumerate(ends, 1)) + ".")


def _counts(reports: Sequence[ConvergenceReport]) -> str:
    dropped = [report.dropped for report in reports]
    return f"{min(dropped)} to {max(dropped)}" if min(dropped) != max(dropped) else str(dropped[0])


def flow_verdict(small: Sequence[float], large: Sequence[float], uphill_small: int, uphill_large: int) -> Verdict:
    """From flows with a small R and with one above all norms.

    Args:
        small, large: last losses over the first, by seed.
        uphill_small, uphill_large: in how many of them dL/dt was above 0 somewhere.
    """
    sign = beyond_chance([math.log(a / b) for a, b in zip(small, large, strict=True)])
    how = ("ends lower with the small R", "ends alike", "ends higher with the small R")[sign + 1]
    here = (
        f"(1) dL/dt is above 0 somewhere in {uphill_large} of {len(large)} flows with a large R, and in {uphill_small} "
        f"of {len(small)} with a small one. (2) At equal first speed the loss {how}: at {mean_error(small)[0]:.1e} of "
        f"the first, against {mean_error(large)[0]:.1e}. Gradients that are all cut to one length do not slow down as "
        f"the loss falls."
    )
    if len(small) < 2:
        return Verdict(FLOW_SAYS, here, ONE_SEED)
    falls = OPPOSITE if uphill_large else CONFIRMED if uphill_small else NOT_SEEN
    return Verdict(FLOW_SAYS, here, f"(1) {falls}, (2) {(OPPOSITE, NOT_SEEN, CONFIRMED)[sign + 1]}.")
