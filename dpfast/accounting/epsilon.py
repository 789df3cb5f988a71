"""ε of a history of steps, and the noise multiplier that spends a given one, for any arguments within seconds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from opacus.accountants import IAccountant, RDPAccountant, create_accountant
from scipy.stats import norm

from dpfast.refusals import BudgetError

History = Sequence[tuple[float, float, int]]

LEAST, MOST = 2.0**-20, 1e6  # noise multipliers that are looked at
CLOSE = 1 + 1e-5  # two noise multipliers that are not told apart
# Beyond these the PRV accountant's grid takes minutes, or its exponentials overflow.
MOST_POINTS, MOST_LOSS = 1 << 24, 500.0
NUMERICAL = (ValueError, ArithmeticError, RuntimeError, IndexError, TypeError)  # what the accountants fail with


def check_budget(name: str, epsilon: Any) -> None:
    """Refuse what is no ε to spend."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
        raise ValueError(f"{name}={epsilon!r}: give a positive finite number")


def check_delta(name: str, delta: Any) -> None:
    """Refuse what is no δ."""
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
        raise ValueError(f"{name}={delta!r}: give a number between 0 and 1, well below one over the number of samples")


def epsilon_of(accountant: IAccountant, delta: float) -> float:
    """ε of the steps that ``accountant`` has counted.

    | | |
    |---|---|
    | no step | 0 |
    | a step without noise | ∞ |
    | the accountant fails, or would take minutes | an upper bound: of its RDP and of Gaussians without sampling |

    Raises:
        ValueError: δ is not between 0 and 1.
    """
    check_delta("delta", delta)
    if not len(accountant):
        return 0.0
    if accountant.mechanism() not in ("prv", "rdp", "gdp"):
        return float(accountant.get_epsilon(delta=delta))
    history = list(accountant.history)
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    if accountant.mechanism() != "prv" or _grid_is_usable(history, delta):
        try:
            found = float(accountant.get_epsilon(delta=delta))
        except NUMERICAL:
            found = math.nan
        if math.isfinite(found):
            return max(0.0, found)
    return _gdp_bound(history, delta) if accountant.mechanism() == "gdp" else _bound(history, delta)


def noise_multiplier_for(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: str,
    epsilon_tolerance: float = 0.01,
) -> float:
    """A noise multiplier with which ``steps`` steps spend at most ``target_epsilon``, by the accountant's own report.

    Args:
        target_epsilon, target_delta: the budget.
        sample_rate: at which samples are drawn, 0 to 1.
        steps: how many there will be.
        accountant: Opacus' name of it.
        epsilon_tolerance: how much of the budget may be left over.

    Raises:
        ValueError: an argument is out of range, or no noise multiplier up to 10⁶ is enough.
    """
    check_budget("target_epsilon", target_epsilon)
    check_delta("target_delta", target_delta)
    check_budget("epsilon_tolerance", epsilon_tolerance)
    counter = quietly(create_accountant, mechanism=accountant)

    def spent(sigma: float) -> float:
        counter.history = [(sigma, sample_rate, steps)]
        return quietly(epsilon_of, counter, target_delta)

    if (least := spent(MOST)) > target_epsilon:
        raise BudgetError(
            f"target_epsilon={target_epsilon!r} cannot be met over {steps} steps at delta={target_delta!r}: the "
            f"{accountant} accountant sees no less than {least:.2g}; give {2 * least:.1g} or more"
        )
    low = high = _start(target_epsilon, target_delta, sample_rate, steps, accountant)
    apart = 2.0 if accountant == "rdp" else 1.15
    at_low = at_high = spent(high)
    while at_high > target_epsilon:
        low, at_low, high = high, at_high, min(apart * high, MOST)
        at_high, apart = spent(high), min(apart**2, 16.0)
    while at_low <= target_epsilon and low > LEAST:
        high, at_high, low = low, at_low, low / apart
        at_low, apart = spent(low), min(apart**2, 16.0)
    turn, left = 0, epsilon_tolerance / 4  # so that the default spends the budget to two decimal places, rounded
    while at_low > target_epsilon and target_epsilon - at_high > left and high > low * CLOSE:
        share, turn = 0.5, turn + 1
        if turn % 3 and at_high > 0 and at_low < math.inf:  # log ε is nearly linear in log σ
            aim = max(target_epsilon - left / 2, at_high)
            share = math.log(at_low / aim) / math.log(at_low / at_high) if aim > at_high else 1.0
        middle = low * (high / low) ** min(max(share, 0.02), 0.98)
        if (here := spent(middle)) <= target_epsilon:
            high, at_high = middle, here
        else:
            low, at_low = middle, here
    return high


def _start(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    """Where the search begins: for the others, which are slow or close to it, where the RDP accountant's ended."""
    if accountant == "rdp" or epsilon < 0.5:  # of which RDP is far off
        return 1.0
    budget = {"target_epsilon": epsilon, "target_delta": delta, "epsilon_tolerance": 0.1 * epsilon}
    return noise_multiplier_for(**budget, sample_rate=sample_rate, steps=steps, accountant="rdp")


def quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """``call(*args, **kwargs)`` without the accountants' warnings."""
    with quiet():
        return call(*args, **kwargs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the accountants' warnings about grids of theirs that nobody can set here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha")
        warnings.filterwarnings("ignore", "GDP accounting is experimental")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="opacus")
        yield


def _grid_is_usable(history: History, delta: float) -> bool:
    """Whether the PRV accountant (:class:`opacus.accountants.PRVAccountant`) can be asked."""
    try:
        largest = _rdp(history, delta / 4000)
    except NUMERICAL:
        return False
    mesh = 0.01 / math.sqrt(sum(steps for *_, steps in history) * math.log(12000 / delta) / 2)
    return largest <= MOST_LOSS and 2 * (largest + 3) / mesh <= MOST_POINTS


def _rdp(history: History, delta: float, alphas: Sequence[float] | None = None) -> float:
    counter = RDPAccountant()
    counter.history = list(history)
    return float(quietly(counter.get_epsilon, delta, alphas=alphas))


def _bound(history: History, delta: float) -> float:
    """An upper bound of ε that is always there: sampling makes no step less private."""
    mu = math.sqrt(sum(steps / sigma**2 for sigma, _, steps in history))
    found = [_gaussian(mu, delta)]
    for alphas in (None, range(2, 64)):
        try:
            found.append(_rdp(history, delta, alphas))
        except NUMERICAL:
            continue
    return max(0.0, min(x for x in found if not math.isnan(x)))


def _gdp_bound(history: History, delta: float) -> float:
    """As the GDP accountant's, without its limit of 500."""
    (sigma, rate, steps) = history[-1]
    try:
        mu = rate * math.sqrt(steps * math.expm1(sigma**-2))
    except OverflowError:
        return math.inf
    return _gaussian(mu, delta)


def _gaussian(mu: float, delta: float) -> float:
    """ε, at most, of a Gaussian mechanism whose means are μ standard deviations apart."""
    if 2 * norm.cdf(mu / 2) - 1 <= delta:
        return 0.0
    return mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
