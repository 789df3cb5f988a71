"""The planner beside the clock: what it predicts for norm and clipped sum of a weight, and what every way takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.measure import percentiles, turns_of, why_not
from bench.suites.kernel_cases import UNTIMED, gradients, relative_error, wrong
from dpfast import tables
from dpfast.capture.forms import Factored, by
from dpfast.planning import planner
from dpfast.planning.clock import on_device


def title(shape: tuple[int, int, int, int]) -> str:
    return " ".join(f"{name} {size}" for name, size in zip("BTdp", shape, strict=True))


def in_use(shape: planner.Shape) -> int:
    """Bytes that one weight's share is of the memory in use, in a model of many such weights when a backward pass
    starts: its layer's input and output, itself, and the two moments of Adam.
    """
    return shape.sides + 3 * shape.groups * shape.p * shape.d * shape.dtype.itemsize


def default_way(shape: planner.Shape) -> str:
    """What a planner with its default budget takes for such a weight of a model that has many of them."""
    budget = planner.DEFAULT_FRACTION * in_use(shape)
    return planner.Planner(memory_budget=int(budget)).choose("weight", shape).way


def planned(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Every way for one weight, seconds predicted and measured, the fastest predicted first; ``chosen`` is the way of
    :func:`default_way`, which may be another one. A way is timed if its norms and its clipped sum are right.
    """
    B, T, d, p = shape
    row: dict[str, Any] = {"B": B, "T": T, "d": d, "p": p}
    found: list[tuple[Factored, Tensor, list[Tensor]]] = []

    def make() -> None:
        A, G = (torch.randn(B, 1, T, n, device=device, dtype=dtype) for n in (d, p))
        factors = torch.rand(B, device=device)
        found.append((Factored(A, G, rows=p), factors, in_float64(A[:, 0], G[:, 0], factors)))

    if reason := why_not(make):
        return [{**row, "way": "all of them", "chosen": False, "fastest": False, "error": reason}]
    form, factors, want = found.pop()

    def both(plan: planner.Plan) -> tuple[Tensor, Tensor]:
        """Norm and clipped sum."""
        way = by(form, plan)
        return way.squared_norm()[0], way.clipped_sum(factors)

    def error(plan: planner.Plan) -> float:
        squared, summed = both(plan)
        of_norms = relative_error([squared], want[:1], by_sample=True)
        of_sum = relative_error([summed], want[1:])
        return of_norms + of_sum  # NaN if one of them is

    plans, chosen = planner.choices(form.shape), default_way(form.shape)
    reasons = {plan.way: wrong(partial(error, plan)) for plan in plans}
    want.clear()
    right = {plan.way: partial(both, plan) for plan in plans if reasons[plan.way] is None}
    taken, failed = turns_of(right, device, seconds, clock=on_device)
    reasons |= failed
    medians = {way: percentiles(list(times.values())) for way, times in taken.items() if times}
    fastest = min(medians, key=lambda way: medians[way]["median"], default="")
    rows = []
    for plan in plans:
        one = {**row, "way": plan.way, "predicted_seconds": plan.seconds, "kept_bytes": plan.kept}
        one |= {"chosen": plan.way == chosen, "fastest_predicted": plan is plans[0], "fastest": plan.way == fastest}
        if plan.way in medians:
            one["seconds"] = medians[plan.way]
            one["predicted_over_measured"] = plan.seconds / medians[plan.way]["median"]
            one["over_fastest"] = medians[plan.way]["median"] / medians[fastest]["median"]
        else:
            one["error"] = reasons[plan.way] or UNTIMED
            # Who writes gradients out may find no room for them: a budget would have told the planner.
            one["ours"] = not one["error"].startswith("out of memory")
        rows.append(one)
    return rows


def in_float64(A: Tensor, G: Tensor, factors: Tensor) -> list[Tensor]:
    """Squared norms and the clipped sum."""
    squared, summed = [], torch.zeros(G.shape[-1], A.shape[-1], dtype=torch.float64, device=A.device)
    for g, factor in zip(gradients(A, G), factors.tolist(), strict=True):
        squared.append(torch.linalg.vector_norm(g).square())
        summed.add_(g, alpha=factor)
    return [torch.stack(squared), summed]


def cells(row: dict[str, Any]) -> list[str]:
    shape = title(tuple(row[name] for name in "BTdp"))
    remarks = [remark for remark in ("chosen", "fastest") if row[remark]]
    if over_budget(row):
        remarks.insert(0, "fastest predicted, over the budget;")
    predicted = f"{1e3 * row['predicted_seconds']:.3f}" if "predicted_seconds" in row else ""
    if "error" in row:
        return [shape, row["way"], predicted, row["error"], "", " ".join(remarks)]
    measured = f"{1e3 * row['seconds']['median']:.3f}"
    return [shape, row["way"], predicted, measured, f"{row['predicted_over_measured']:.2f}", " ".join(remarks)]


def over_budget(row: dict[str, Any]) -> bool:
    """Whether the default budget made the planner pass over the way that it predicts to be the fastest."""
    return row.get("fastest_predicted", False) and not row["chosen"]


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and how often the planner was right."""
    table = tables.markdown(
        ("weight", "way", "predicted ms", "measured ms", "predicted / measured", ""), [cells(row) for row in rows]
    )
    chosen = [row for row in rows if row["chosen"] and "seconds" in row]
    if not chosen:
        return table
    best = sum(row["fastest"] for row in chosen)
    lost = max(row["over_fastest"] for row in chosen)
    ratios = percentiles([row["predicted_over_measured"] for row in rows if "seconds" in row])
    passed = sum(map(over_budget, rows))
    budget = (
        f" For {passed} the budget left no room for the way that was predicted to be the fastest." if passed else ""
    )
    return (
        f"{table}\n\nThe planner's way at its default memory budget was the fastest for {best} of {len(chosen)} "
        f"weights, and at worst {lost:.2f}× as slow; predicted over measured is {ratios['p20']:.2f} to "
        f"{ratios['p80']:.2f} (p20 to p80).{budget}"
    )
