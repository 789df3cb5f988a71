"""Tables of calibration over R: at one lr · R for all, with the best lr of each, and over R × lr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dpfast.analysis.reproduce.calibration_runs import FLAT, STYLES, Choice, Grid, Plan, Run, Tempered, composed
from dpfast.analysis.reproduce.common import Table, mean_error, written

MEASURES = {"accuracy": "accuracy", "ECE": "ece", "MCE": "mce"}
COLUMNS = (
    "clipping",
    "R",
    "lr · R",
    "accuracy",
    "confidence − accuracy",
    "ECE",
    "MCE",
    "NLL",
    "training loss",
)


def comparison(plan: Plan, title: str, found: Grid, choice: Choice) -> Table:
    """A row for each way to clip and R, with ``choice`` as the lr · R of each."""
    about = f"ε = {plan.epsilon:g}, {plan.epochs} epochs, {plan.seeds} seeds (% and nats, mean ± standard error)"
    table = Table(f"{plan.name}, {title}: {about}", COLUMNS)
    for style in STYLES:
        for norm in plan.norms:
            at = style, norm, choice[style, norm]
            table.rows.append([style, f"{norm:g}", f"{at[2]:g}", *_cells(plan, found[at])])
    if plan.resplit:
        table.notes.append("± is corrected for seeds that split the same samples anew (Nadeau and Bengio 2003).")
    return table


def _cells(plan: Plan, runs: Sequence[Run]) -> list[str]:
    return [
        _written(plan, (one.test.accuracy.value for one in runs), ".1f", 100),
        _written(plan, (one.test.overconfidence.value for one in runs), "+.1f", 100),
        _written(plan, (one.test.ece.value for one in runs), ".1f", 100),
        _written(plan, (one.test.mce.value for one in runs), ".1f", 100),
        _written(plan, (one.test.nll.value for one in runs), ".3f"),
        _written(plan, (one.losses[-1] for one in runs), ".3f"),
    ]


def _written(plan: Plan, values: Iterable[float], spec: str, scale: float = 1.0) -> str:
    return written(values, spec, scale, plan.resplit)


def temperatures(plan: Plan, found: Grid, choice: Choice, scaled: Mapping[float, Sequence[Tempered]]) -> Table:
    """What a temperature under DP mends, under flat clipping; ``scaled`` by R."""
    table = Table(
        f"{plan.name}: temperature scaling after flat clipping, lr chosen for each R, {plan.seeds} seeds",
        ["R", "lr · R", "ECE", "T (DP)", "T (no DP)", "ECE after T (DP)"],
    )
    helped = 0
    for norm, after in scaled.items():
        product = choice[FLAT, norm]
        runs = found[FLAT, norm, product]
        helped += sum(b.test.ece.value < a.test.ece.value for a, b in zip(runs, after, strict=True))
        cells = [
            _written(plan, (one.test.ece.value for one in runs), ".1f", 100),
            _written(plan, (one.temperature for one in after), ".2f"),
            _written(plan, (one.best for one in after), ".2f"),
            _written(plan, (one.test.ece.value for one in after), ".1f", 100),
        ]
        table.rows.append([f"{norm:g}", f"{product:g}", *cells])
    table.notes.append(
        f"T (DP) is fitted by DP-SGD on the held-out samples, which no model was trained on (so ε stays "
        f"{plan.epsilon:g}: parallel composition). It lowers the ECE in {helped} of {len(scaled) * plan.seeds} runs."
    )
    return table


def on_choosing(plan: Plan, found: Grid, choice: Choice) -> list[str]:
    """What choosing the learning rate costs, and whether the range was wide enough."""
    tried, one = len(plan.products), found[FLAT, plan.norms[0], plan.fixed][0]
    ends = (plan.products[0], plan.products[-1])
    at_end = [f"{style} R = {norm:g}" for (style, norm), product in choice.items() if product in ends]
    return [
        f"The {tried} values of lr · R were {', '.join(f'{p:g}' for p in plan.products)}; for each row the one of the "
        f"largest mean accuracy on the held-out samples was taken.",
        f"This choice is not accounted for: ε = {one.epsilon:.2f} is that of one training. All {tried} trainings "
        f"of a row together spend ε = {composed(plan, tried):.2f}, and the choice itself looks at held-out samples "
        f"without noise.",
        f"An end of the range was taken for {', '.join(at_end)}." if at_end else "No end of the range was taken.",
    ]


def maps(plan: Plan, found: Grid) -> dict[str, list[list[float]]]:
    """Accuracy, ECE and MCE in % under flat clipping, ``[norms][products]``."""
    return {
        name: [
            [
                mean_error(100 * getattr(run.test, measure).value for run in found[FLAT, norm, product])[0]
                for product in plan.products
            ]
            for norm in plan.norms
        ]
        for name, measure in MEASURES.items()
    }


def map_table(plan: Plan, found: Grid) -> Table:
    """The figures of the maps."""
    table = Table(
        f"{plan.name}: R × lr under flat clipping, ε = {plan.epsilon:g}, {plan.seeds} seeds (accuracy / ECE / MCE, %)",
        ["R", *(f"lr · R = {product:g}" for product in plan.products)],
    )
    accuracy, ece, mce = maps(plan, found).values()
    for norm, *rows in zip(plan.norms, accuracy, ece, mce, strict=True):
        cells = [f"{a:.1f} / {b:.1f} / {c:.1f}" for a, b, c in zip(*rows, strict=True)]
        table.rows.append([f"{norm:g}", *cells])
    errors = [
        mean_error((100 * run.test.accuracy.value for run in found[FLAT, norm, product]), plan.resplit)[1]
        for norm in plan.norms
        for product in plan.products
    ]
    if plan.seeds > 1:
        table.notes.append(f"Standard errors of the accuracies: {min(errors):.1f} to {max(errors):.1f} points.")
    return table
