"""The planner beside the clock: what it predicts for norm and clipped sum of a weight, and what every way takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.measure import markdown_table, percentiles, turns_of, why_not
from dpfast import planner
from dpfast.layers.forms import Factored, by


def title(shape: tuple[int, int, int, int]) -> str:
    return " ".join(f"{name} {size}" for name, size in zip("BTdp", shape, strict=True))


def planned(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Every way for one weight: seconds predicted and measured; the first row is the way that the planner takes
    where memory does not matter.
    """
    B, T, d, p = shape
    row: dict[str, Any] = {"B": B, "T": T, "d": d, "p": p}
    found: list[tuple[Factored, torch.Tensor]] = []

    def make() -> None:
        A, G = (torch.randn(B, 1, T, n, device=device, dtype=dtype) for n in (d, p))
        found.append((Factored(A, G, rows=p), torch.rand(B, device=device)))

    if reason := why_not(make):
        return [{**row, "way": "all of them", "chosen": False, "fastest": False, "error": reason}]
    form, factors = found[0]

    def both(plan: planner.Plan) -> None:
        """Norm and clipped sum."""
        way = by(form, plan)
        way.squared_norm()
        way.clipped_sum(factors)

    plans = planner.choices(form.shape)
    calls = {plan.way: partial(both, plan) for plan in plans}
    reasons = {way: why_not(call) for way, call in calls.items()}
    right = {way: call for way, call in calls.items() if reasons[way] is None}
    taken, failed = turns_of(right, device, seconds)
    reasons |= failed
    medians = {way: percentiles(list(times.values())) for way, times in taken.items()}
    fastest = min(medians, key=lambda way: medians[way]["median"], default="")
    rows = []
    for plan in plans:
        one = {**row, "way": plan.way, "predicted_seconds": plan.seconds, "kept_bytes": plan.kept}
        one |= {"chosen": plan is plans[0], "fastest": plan.way == fastest}
        if plan.way in medians:
            one["seconds"] = medians[plan.way]
            one["predicted_over_measured"] = plan.seconds / medians[plan.way]["median"]
            one["over_fastest"] = medians[plan.way]["median"] / medians[fastest]["median"]
        else:
            one["error"] = reasons[plan.way]
            # Who writes gradients out may find no room for them: a budget would have told the planner.
            one["ours"] = not (one["error"] or "").startswith("out of memory")
        rows.append(one)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    shape = title(tuple(row[name] for name in "BTdp"))
    remarks = " ".join(remark for remark in ("chosen", "fastest") if row[remark])
    predicted = f"{1e3 * row['predicted_seconds']:.3f}" if "predicted_seconds" in row else ""
    if "error" in row:
        return [shape, row["way"], predicted, row["error"], "", remarks]
    measured = f"{1e3 * row['seconds']['median']:.3f}"
    return [shape, row["way"], predicted, measured, f"{row['predicted_over_measured']:.2f}", remarks]


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and how often the planner was right."""
    table = markdown_table(
        ("weight", "way", "predicted ms", "measured ms", "predicted / measured", ""), [cells(row) for row in rows]
    )
    chosen = [row for row in rows if row["chosen"] and "seconds" in row]
    if not chosen:
        return table
    best = sum(row["fastest"] for row in chosen)
    lost = max(row["over_fastest"] for row in chosen)
    ratios = percentiles([row["predicted_over_measured"] for row in rows if "seconds" in row])
    return (
        f"{table}\n\nThe planner's way was the fastest for {best} of {len(chosen)} weights, and at worst {lost:.2f}× "
        f"as slow; predicted over measured is {ratios['p20']:.2f} to {ratios['p80']:.2f} (p20 to p80)."
    )
