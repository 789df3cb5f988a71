"""What Bu et al. say of R, and whether the runs agree: computed from them alone.

A difference between two R is paired by seed, and counts where Student's t puts it beyond chance at the 5 % level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dpfast.analysis.reproduce.calibration_runs import FLAT, Choice, Grid, Plan, Run
from dpfast.analysis.reproduce.chance import CONFIRMED, NOT_SEEN, ONE_SEED, OPPOSITE, beyond_chance
from dpfast.analysis.reproduce.common import Verdict, mean_error

SIMILAR = 0.01  # of accuracy: about what R = 100 loses against R = 0.1 in the paper's own table
SAYS = (
    "(1) A small R usually gives the best accuracy. (2) It also gives poor calibration; a large R, at the same "
    "guarantee and similar accuracy, gives a significantly better one. (3) A larger R improves convergence. (The "
    "abstract; for the third, the authors' repository.)"
)


def verdict(plan: Plan, found: Grid, choices: Mapping[str, Choice]) -> Verdict:
    """The three claims under flat clipping, for each way to choose the learning rate.

    Args:
        choices: names of these ways to what was chosen.
    """
    here, ends = [], []
    for name, choice in choices.items():
        runs = {norm: found[FLAT, norm, choice[FLAT, norm]] for norm in plan.norms}
        here.append(f"{name}, {_figures(runs)}")
        claims = (accuracy_claim(plan, runs), calibration_claim(plan, runs), convergence_claim(plan, runs))
        ends.append(f"{name}: " + ", ".join(f"({k}) {claim}" for k, claim in enumerate(claims, 1)))
    seen = f"On {plan.name}, flat clipping, ε = {plan.epsilon:g}, {plan.seeds} seeds. "
    end = " ".join(_sentence(text) for text in ends) if plan.seeds > 1 else ONE_SEED
    return Verdict(SAYS, seen + " ".join(_sentence(text) for text in here), end)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _figures(runs: Mapping[float, Sequence[Run]]) -> str:
    """Each measure from the smallest R to the largest."""
    parts = {
        "accuracy (%)": [f"{100 * mean_error(map(_accuracy, part))[0]:.1f}" for part in runs.values()],
        "ECE (%)": [f"{100 * mean_error(map(_ece, part))[0]:.1f}" for part in runs.values()],
        "last training loss": [f"{mean_error(map(_loss, part))[0]:.3f}" for part in runs.values()],
    }
    norms = ", ".join(f"{norm:g}" for norm in runs)
    return f"R = {norms}: " + "; ".join(f"{name} {', '.join(values)}" for name, values in parts.items())


def accuracy_claim(plan: Plan, runs: Mapping[float, Sequence[Run]]) -> str:
    """Is the smallest R more accurate than the best of the larger ones?"""
    small, *larger = runs
    best = max(larger, key=lambda norm: mean_error(map(_accuracy, runs[norm]))[0])
    sign = _sign(plan, runs, best, small, _accuracy)
    if sign == 0:
        return f"{NOT_SEEN} (R = {small:g} and {best:g} do not differ beyond chance)"
    return CONFIRMED if sign < 0 else f"{OPPOSITE} (R = {best:g} is more accurate)"


def calibration_claim(plan: Plan, runs: Mapping[float, Sequence[Run]]) -> str:
    """Is there a larger R of similar accuracy and smaller ECE?"""
    small, *larger = runs
    least = mean_error(map(_accuracy, runs[small]))[0] - SIMILAR
    similar = [norm for norm in larger if mean_error(map(_accuracy, runs[norm]))[0] >= least]
    if not similar:
        return f"{NOT_SEEN} (each larger R loses more than {100 * SIMILAR:g} point of accuracy)"
    best = min(similar, key=lambda norm: mean_error(map(_ece, runs[norm]))[0])
    return _of_sign(_sign(plan, runs, best, small, _ece), best)


def convergence_claim(plan: Plan, runs: Mapping[float, Sequence[Run]]) -> str:
    """Is there a larger R of smaller last training loss?"""
    small, *larger = runs
    best = min(larger, key=lambda norm: mean_error(map(_loss, runs[norm]))[0])
    return _of_sign(_sign(plan, runs, best, small, _loss), best)


def _of_sign(sign: int, best: float) -> str:
    """The verdict on "smaller at a larger R", given the one where it is smallest."""
    return f"{(CONFIRMED, NOT_SEEN, OPPOSITE)[sign + 1]} (at R = {best:g})"


def _sign(
    plan: Plan, runs: Mapping[float, Sequence[Run]], norm: float, other: float, measure: Callable[[Run], float]
) -> int:
    differences = [measure(a) - measure(b) for a, b in zip(runs[norm], runs[other], strict=True)]
    return beyond_chance(differences, plan.resplit)


def _accuracy(run: Run) -> float:
    return run.test.accuracy.value


def _ece(run: Run) -> float:
    return run.test.ece.value


def _loss(run: Run) -> float:
    return run.losses[-1]
