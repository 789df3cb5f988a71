"""Plots of calibration over R."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dpfast.analysis.calibration import calibration_report
from dpfast.analysis.plots import Curve, curves, heat_maps, reliability_diagram
from dpfast.analysis.reproduce.calibration_runs import FLAT, LAYERS, STYLES, Choice, Grid, Plan, Run
from dpfast.analysis.reproduce.calibration_tables import maps
from dpfast.analysis.reproduce.common import mean_error

RESAMPLES = 300
BETTER = {"accuracy": "↑ better", "ECE": "↓ better", "MCE": "↓ better"}


def draw_maps(plan: Plan, found: Grid, out: Path) -> None:
    """Accuracy, ECE and MCE over R × lr."""
    panels = {f"{name}, % ({BETTER[name]})": values for name, values in maps(plan, found).items()}
    heat_maps(panels, plan.norms, plan.products, out / f"maps_{plan.slug}.png", column_name="lr · R")


def draw_reliability(plan: Plan, found: Grid, choice: Choice, temperature: float, out: Path) -> None:
    """Flat clipping at the smallest, a middle and the largest R, and the smallest with a temperature; first seed."""
    labels = plan.make(0).test.tensors[1]
    picked = sorted({plan.norms[0], plan.norms[len(plan.norms) // 2], plan.norms[-1]})
    logits = {f"R = {norm:g}": found[FLAT, norm, choice[FLAT, norm]][0].test_logits for norm in picked}
    logits[f"R = {picked[0]:g}, T = {temperature:.2f}"] = logits[f"R = {picked[0]:g}"] / temperature
    panels = {title: calibration_report(part, labels, resamples=RESAMPLES) for title, part in logits.items()}
    reliability_diagram(panels, out / f"reliability_{plan.slug}.png")


def draw_training(plan: Plan, found: Grid, fixed: Choice, best: Choice, out: Path) -> None:
    """Training loss after each epoch: flat clipping by R, at one lr · R and at the best; and the three ways to clip."""
    panels: dict[str, dict[str, Curve]] = {}
    for title, choice in ((f"flat, lr · R = {plan.fixed:g}", fixed), ("flat, best lr of each R", best)):
        panels[title] = {f"R = {norm:g}": _path(plan, found[FLAT, norm, choice[FLAT, norm]]) for norm in plan.norms}
    ways = panels["best R and lr of each clipping"] = {}
    for style in STYLES:
        norm = max(plan.norms, key=lambda norm: _held_out(found[style, norm, best[style, norm]]))
        ways[f"{style}, R = {norm:g}"] = _path(plan, found[style, norm, best[style, norm]])
    curves(panels, out / f"training_{plan.slug}.png", legend=(1, 3), y_name="training loss, nats")


def _path(plan: Plan, runs: Sequence[Run]) -> Curve:
    found = [mean_error((run.losses[k] for run in runs), plan.resplit) for k in range(len(runs[0].losses))]
    return _curve(range(len(found)), found)


def _curve(x: Iterable[float], found: Sequence[tuple[float, float]]) -> Curve:
    """Means with their errors; no band where one seed leaves none."""
    return Curve(list(x), [mean for mean, _ in found], [error if error == error else 0.0 for _, error in found])


def _held_out(runs: Sequence[Run]) -> float:
    return mean_error(run.held_out for run in runs)[0]


def draw_norms(plan: Plan, found: Grid, fixed: Choice, best: Choice, out: Path) -> None:
    """Accuracy, confidence − accuracy and ECE over R: flat at one lr · R and at the best, and per layer at the best.

    0/1 factors are in the table alone: where they drop nearly all samples, their figures would set the scale.
    """
    measures: dict[str, Callable[[Run], float]] = {
        "accuracy, %": lambda run: run.test.accuracy.value,
        "confidence − accuracy, points": lambda run: run.test.overconfidence.value,
        "ECE, %": lambda run: run.test.ece.value,
    }
    lines = {f"flat, lr · R = {plan.fixed:g}": (FLAT, fixed), "flat, best lr": (FLAT, best)}
    lines["per layer, best lr"] = (LAYERS, best)
    panels: dict[str, dict[str, Curve]] = {}
    for title, measure in measures.items():
        panels[title] = {
            name: _curve(
                plan.norms,
                [
                    mean_error((100 * measure(run) for run in found[style, r, choice[style, r]]), plan.resplit)
                    for r in plan.norms
                ],
            )
            for name, (style, choice) in lines.items()
        }
    curves(panels, out / f"norms_{plan.slug}.png", x_name="R (clipping norm)", log="x", legend=1)
