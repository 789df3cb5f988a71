"""The host suite: what a step costs beyond its arithmetic, in models of many tiny layers.

Times are measured as in the models suite. Operators and waits are counts: see :mod:`bench.dispatched`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import measure, plots
from bench.dispatched import Dispatched, count
from bench.host_workloads import workloads
from bench.methods import METHODS, absent, start_training
from bench.record import Record
from bench.side_by_side import measure_work, summary
from bench.suites import Options
from bench.suites.models import draw_bars, heading, reasons, rows_of, targets
from bench.turns import Part, usable
from bench.workloads import Workload
from dpfast import tables

KINDS = ("nonprivate", "dpfast", "hooks", "ghost")  # where none are named
HEADER = ("method", "step, ms (p20–p80)", "× non-private (p20–p80)", "operators", "× non-private", "waits")


def run(record: Record, options: Options) -> bool:
    """Whether dpfast was right on every model."""
    device, suite, missing = options.device, record.suite, absent()
    known = workloads(device.type, options.small)
    chosen = [known[name] for name in options.models or known]
    methods = [METHODS[name] for name in options.methods or KINDS if name not in missing]
    parts = suite.setdefault("works", {})
    for work in tqdm(chosen, desc="host"):
        part = parts.setdefault(work.name, {})
        if not part.get("finished"):
            share = options.seconds / len(chosen)
            measure_work(part, work, methods, device, share, record.save, None, options.small)
        for entry in usable(part):
            if "counts" not in entry:
                entry["counts"] = _counts(work, entry, device)
                record.save()
                measure.still_there(device)
        measure.free_memory()
        part["rows"] = summary(part, {})
        record.save()
    ours = [row for part in parts.values() for row in part["rows"] if row["method"].startswith("dpfast")]
    return all(row["error"] is None for row in ours)


def _counts(work: Workload, entry: Part, device: torch.device) -> dict[str, Any]:
    """Of a training of its own by the plan that was timed; why there are none where it cannot be watched."""
    if METHODS[entry["method"]].compiled:
        return {"error": "a compiled step dispatches other operators when it is watched"}
    found: list[Dispatched] = []

    def attempt() -> None:
        plan = entry.get("plan")
        found.append(count(start_training(work, entry["method"], entry["variant"], device, plan=plan)(), device))

    reason = measure.why_not(attempt)
    if reason is not None:
        return {"error": reason}
    (seen,) = found
    return {
        "operators": seen.operators.total(),
        "by_operator": dict(seen.operators.most_common()),
        "waits": seen.waits.total(),
        "waits_at": [{"operator": op, "place": place, "times": n} for (op, place), n in seen.waits.most_common()],
    }


def report(data: dict[str, Any]) -> str:
    """One table a model; below it, where the host waits and whether the targets are met."""
    parts = heading(data, "Host")
    parts.append(
        "Operators are those that a step dispatches, views left out; one of a compiled library counts once, whatever "
        "it does inside. dpfast's are counted where its layers go the ways in brackets, as in the timed steps. Waits "
        "are operators for which the host must wait until a GPU has caught up; on a CPU they are those that would be, "
        "were all tensors on a GPU."
    )
    return "\n\n".join([*parts, *(_section(data["suite"], part) for part in data["suite"].get("works", {}).values())])


def _section(suite: dict[str, Any], part: Part) -> str:
    rows = rows_of(suite, part)
    lines = [line for row in rows for line in targets(row)]
    lines += [line for row in rows for line in (*_waits(row), *reasons(row))]
    text = tables.markdown(HEADER, [_cells(row) for row in rows]) if rows else "Nothing measured yet."
    return "\n\n".join([f"### {part['title']}", text, *(["\n".join(lines)] if lines else [])])


def _cells(row: Mapping[str, Any]) -> list[str]:
    """In the order of HEADER."""
    counts = row.get("counts", {})
    found = [METHODS[row["method"]].title, plots.gap(row), *[""] * (len(HEADER) - 2)]
    if row.get("ways"):
        found[0] += f" ({', '.join(row['ways'])})"
    if "step_seconds" in row:
        found[1:3] = [measure.spread(row["step_seconds"], 1e3), measure.spread(row["time_ratio"])]
    if "operators" in counts:
        found[3], found[5] = str(counts["operators"]), str(counts["waits"])
    if "operator_ratio" in row:
        found[4] = f"{row['operator_ratio']:.2f}"
    return found


def _waits(row: Mapping[str, Any]) -> list[str]:
    """What they are and where, most first; or why nothing is counted."""
    title, counts = METHODS[row["method"]].title, row.get("counts", {})
    if "error" in counts:
        return [f"- {title}, not counted: {counts['error']}"]
    named = [
        f"{one['operator']} ({one['place']}" + f", {one['times']} times" * (one["times"] > 1) + ")"
        for one in counts.get("waits_at", [])
    ]
    return [f"- {title} waits: {', '.join(named)}"] if named else []


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """The bars of ratios."""
    return draw_bars(data, "works", stem)
