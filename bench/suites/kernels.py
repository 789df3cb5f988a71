"""The kernels beside cuBLAS (or the CPU's library), a copy and torch's own ops, and the planner beside the clock.

Every set of cases takes turns in one loop; its first case is torch's own op, and the figures to look at are the share
of that op's rate and the share of the roofline: of the least time that the device's two peaks, measured in the same
run, allow for the case's flops and bytes. What a case gives is first compared with float64; one that is wrong, or
fails, is a row that says so.

The record: ``roofline`` by dtype, ``sets`` and ``planner`` by title.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import roofline
from bench.measure import (
    free_memory,
    paired_ratios,
    percentiles,
    prefixed,
    spread,
    still_there,
    turns_of,
    why_not,
)
from bench.record import Record, title_of
from bench.roofline_plot import draw_roofline
from bench.suites import Options, kernel_cases, memory_cases, noise_cases, planner_cases
from bench.suites.kernel_cases import SIZES, SMALL, UNTIMED, WEIGHT, Case, CaseSet, Sizes, wrong
from bench.suites.planner_cases import planned
from dpfast import tables
from dpfast.planning.clock import on_device

UNITS = {"flops": "FLOP/s", "bytes": "B/s"}


def sizes_of(options: Options) -> Sizes:
    return SMALL if options.small else SIZES[options.device.type]


def case_sets(sizes: Sizes, device: torch.device) -> list[CaseSet]:
    return [one for cases in (noise_cases, memory_cases, kernel_cases) for one in cases.case_sets(sizes, device)]


def run(record: Record, options: Options) -> bool:
    """Measure what the record lacks; whether all of ours was right and ran."""
    device, sizes = options.device, sizes_of(options)
    roofs, sets, plans = (record.suite.setdefault(name, {}) for name in ("roofline", "sets", "planner"))
    work: list[tuple[dict[str, Any], str, Callable[[], Any]]] = []
    waiting = case_sets(sizes, device)
    share = options.seconds / (len(waiting) + len(sizes.plans))
    for dtype in dict.fromkeys(one.dtype for one in waiting):
        work.append((roofs, str(dtype).removeprefix("torch."), partial(roofline.peaks, device, dtype)))
    for one in waiting:
        work.append((sets, one.title, partial(measured, one, device, share, roofs)))
    for shape in sizes.plans:
        work.append((plans, planner_cases.title(shape), partial(planned, shape, sizes.dtype, device, share)))
    left = [one for one in work if one[1] not in one[0]]
    with tqdm(total=len(work), initial=len(work) - len(left), desc="kernels") as bar:
        for place, title, measure in left:
            bar.set_postfix_str(title)
            torch.manual_seed(0)  # of each on its own: a run that was resumed has the same inputs
            place[title] = measure()
            record.save()
            free_memory()
            still_there(device)
            bar.update()
    rows = [row for one in (*sets.values(), *plans.values()) for row in one]
    return not any("error" in row and row.get("ours", True) for row in rows)


def measured(
    one: CaseSet, device: torch.device, seconds: float, roofs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each case of a set, in their order: its figures, or why it has none. ``roofs`` are peaks by dtype."""
    roof = roofs.get(str(one.dtype).removeprefix("torch."), {})
    cases: list[Case] = []
    if reason := why_not(lambda: cases.extend(one.make())):
        return [{"name": "all of them", "ours": True, "error": reason}]
    reasons = {case.name: wrong(case.check, case.tolerance) if case.check else why_not(case.call) for case in cases}
    right = {case.name: case.call for case in cases if reasons[case.name] is None}
    taken, failed = turns_of(right, device, seconds, clock=on_device)
    reasons |= failed
    rows = []
    for case in cases:
        row: dict[str, Any] = {"name": case.name, "ours": case.check is not None}
        if reasons[case.name] is not None or not taken.get(case.name):
            rows.append(row | {"error": reasons[case.name] or UNTIMED})
        else:
            rows.append(row | figures(one, case, cases[0], taken, device, roof))
    return rows


def figures(
    one: CaseSet,
    case: Case,
    base: Case,
    taken: Mapping[str, Mapping[int, float]],
    device: torch.device,
    roof: Mapping[str, Any],
) -> dict[str, Any]:
    """Of one case; beside the first one's only where that one has been timed."""
    seconds = list(taken[case.name].values())
    figure: dict[str, Any] = {
        "by": one.by,
        "dtype": str(one.dtype).removeprefix("torch."),
        "flops": case.flops,
        "bytes": case.bytes,
        "intensity": case.flops / case.bytes,
        "milliseconds": percentiles([1e3 * s for s in seconds]),
        "flops_per_second": percentiles([case.flops / s for s in seconds]),
        "bytes_per_second": percentiles([case.bytes / s for s in seconds]),
    }
    if "bytes_per_second" in roof:
        least = max(case.flops / roof["flops_per_second"], case.bytes / roof["bytes_per_second"])
        figure["roofline"] = percentiles([least / s for s in seconds])
    ratios = paired_ratios(taken[case.name], taken.get(base.name, {}))
    if not ratios:
        return figure
    worth = getattr(case, one.by) / getattr(base, one.by)
    share = percentiles([worth / ratio for ratio in ratios])
    target = case.target if device.type == "cuda" else None  # they are a GPU's
    return figure | {
        "over": base.name,
        "ratio": percentiles(ratios),
        "share": share,
        "target": target,
        "met": None if target is None else share["median"] >= target,
    }


# ---------------------------------------------------------------- the report

HEADER = ("what", "ms", "rate", "of the roofline", "of the first one's rate", "time / the first one's", "target")


def report(data: dict[str, Any]) -> str:
    suite = data["suite"]
    parts = [title_of(data)]
    parts += [f"Peaks of {dtype}: {roofline.in_words(roof)}." for dtype, roof in suite.get("roofline", {}).items()]
    for title, rows in suite.get("sets", {}).items():
        parts += [f"**{title}**\n\n{_table(rows)}", *_noise_line(rows)]
    if plans := [row for rows in suite.get("planner", {}).values() for row in rows]:
        parts.append(f"**the planner**\n\n{planner_cases.report(plans)}")
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [_cells(row) for row in rows]
    kept = [k for k in range(len(HEADER)) if k == 0 or any(row[k] for row in cells)]
    return tables.markdown([HEADER[k] for k in kept], [[row[k] for k in kept] for row in cells])


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["name"], row["error"], "", "", "", "", ""]
    rate = prefixed(row[f"{row['by']}_per_second"]["median"], UNITS[row["by"]])
    roof = f"{row['roofline']['median']:.0%}" if "roofline" in row else ""
    cells = [row["name"], spread(row["milliseconds"], digits=".3f"), rate, roof]
    if "share" not in row:
        return [*cells, "", "", ""]
    target, said_of_it = row["target"], ""
    if target is not None:
        as_time = " (1.10× the time)" if target == WEIGHT else ""
        said_of_it = f"≥ {target:.0%}{as_time}: {'met' if row['met'] else 'NOT met'}"
    share = f"{spread(row['share'], 100, '.0f')} %"
    return [*cells, share, spread(row["ratio"]), said_of_it]


def _noise_line(rows: list[dict[str, Any]]) -> list[str]:
    """What noise costs, in a sentence."""
    ratios = {row["name"]: row["ratio"]["median"] for row in rows if "ratio" in row}
    fast, secure = (ratios.get(f"noisy_grad_ {mode}") for mode in ("fast", "secure"))
    if fast is None or secure is None:
        return []
    return [
        f"Noise and scale are {1 / fast:.1f} times as fast as torch's own lines; in secure mode {secure / fast:.2f} "
        f"times slower than that."
    ]


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """Our kernels under the two measured roofs."""
    suite = data["suite"]
    roofs = {dtype: roof for dtype, roof in suite.get("roofline", {}).items() if "bytes_per_second" in roof}
    rows = [
        row
        for rows in suite.get("sets", {}).values()
        for row in rows
        if row["ours"] and row.get("flops") and "roofline" in row
    ]
    if not roofs or not rows:
        return []
    path = stem.with_name(f"{stem.name}-roofline.png")
    draw_roofline(roofs, rows, path, title_of(data))
    return [path]
