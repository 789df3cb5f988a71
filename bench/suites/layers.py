"""The layers suite: single layers by every method, and how a linear layer's cost grows with each of its sizes.

The planner chooses how dpfast makes norms and sums; where its way changes along a sweep is in the table and the plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import measure
from bench.layer_workloads import layers, points, sweeps
from bench.methods import METHODS, absent
from bench.plots import Curve, draw_growth, gap
from bench.record import Record, title_of
from bench.roofline import peaks
from bench.side_by_side import measure_work, summary
from bench.suites import Options
from bench.suites.models import draw_bars, heading, reasons, roof_line, rows_of, section
from bench.workloads import FULL, Workload
from dpfast import tables

KINDS = ("nonprivate", "dpfast", "hooks", "functorch", "ghost", "fastdp", "opake", "flashdp")
GROWING = ("nonprivate", "dpfast", "hooks", "ghost")  # of a sweep, where none are named
NAMED = "bench.layer_workloads:layers"


def run(record: Record, options: Options) -> bool:
    """Whether dpfast was right on every layer."""
    device, suite, missing = options.device, record.suite, absent()
    if "peaks" not in suite:
        suite["peaks"] = peaks(device, FULL[device.type])
        record.save()
    kinds = layers(device.type, options.small)
    swept = [(sweep, points(sweep, device.type)) for sweep in sweeps(device.type, options.small)]
    share = options.seconds / (len(kinds) + sum(len(its) for _, its in swept))
    bar = tqdm(total=len(kinds) + sum(len(its) for _, its in swept), desc="layers")

    def measured(parts: dict[str, Any], work: Workload, names: Sequence[str], named: str | None) -> None:
        part = parts.setdefault(work.name, {})
        if not part.get("finished"):
            methods = [METHODS[name] for name in options.methods or names if name not in missing]
            measure_work(part, work, methods, device, share, record.save, named, options.small)
            measure.free_memory()
        part["rows"] = summary(part, suite["peaks"])
        record.save()
        bar.update()

    for work in kinds.values():
        measured(suite.setdefault("kinds", {}), work, KINDS, NAMED if device.type == "cuda" else None)
    for sweep, its in swept:
        parts = suite.setdefault("sweeps", {}).setdefault(sweep.grows, {"title": sweep.title, "points": {}})
        for work in its.values():
            measured(parts["points"], work, GROWING, None)
    bar.close()
    ours = [row for part in _parts(suite) for row in part["rows"] if row["method"].startswith("dpfast")]
    return all(row["error"] is None for row in ours)


def _parts(suite: dict[str, Any]) -> list[dict[str, Any]]:
    swept = [part for sweep in suite.get("sweeps", {}).values() for part in sweep["points"].values()]
    return [*suite.get("kinds", {}).values(), *swept]


def report(data: dict[str, Any]) -> str:
    """Step time over non-private of all kinds and in each sweep; then all figures of each kind."""
    suite = data["suite"]
    parts = heading(data, "Layers")
    parts.append(
        "A step is forward, loss, backward and update of one layer. The loss, a cross-entropy over the layer's "
        "outputs, is in every method's step and dilutes the ratios of a small layer. Tables of ratios to the "
        "non-private step have p20 and p80 in brackets."
    )
    if kinds := suite.get("kinds"):
        parts.append(_ratios("layer", suite, kinds))
    for grows, sweep in suite.get("sweeps", {}).items():
        parts.append(f"### {sweep['title']}; {grows} grows")
        parts.append(_ratios(grows, suite, sweep["points"]))
        failed = [f"- {name}: {line[2:]}" for name, part in sweep["points"].items() for line in _failed(suite, part)]
        parts += ["\n".join(failed)] if failed else []
    if kinds:
        parts += ["## Layers, every figure", *([roof_line(suite)] if "peaks" in suite else [])]
        if data["device"]["name"] == "cpu":
            parts.append("Memory of single layers is measured on a GPU only: on a CPU each figure takes a process.")
        parts += [section(suite, part) for part in kinds.values()]
    return "\n\n".join(parts)


def _failed(suite: dict[str, Any], part: dict[str, Any]) -> list[str]:
    return [line for row in rows_of(suite, part) if row["error"] is not None for line in reasons(row)]


def _ratios(first: str, suite: dict[str, Any], parts: dict[str, Any]) -> str:
    """A line a part, a column a method; beside dpfast's ratio the ways that its planner chose in the timed run."""
    found = {name: {row["method"]: row for row in rows_of(suite, part)} for name, part in parts.items()}
    used = [name for name in METHODS if name != "nonprivate" and any(name in rows for rows in found.values())]
    lines = []
    for name, rows in found.items():
        base = rows.get("nonprivate", {})
        timed = "step_seconds" in base
        line = [name.removeprefix(f"{first} "), measure.spread(base["step_seconds"], 1e3) if timed else gap(base)]
        for row in (rows.get(method, {}) for method in used):
            timed = "time_ratio" in row
            line.append(", ".join([measure.spread(row["time_ratio"]), *row.get("ways", [])]) if timed else gap(row))
        lines.append(line)
    return tables.markdown([first, "non-private, ms", *(METHODS[name].title for name in used)], lines)


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """The bars of all kinds, and the growth curves."""
    suite = data["suite"]
    panels = [
        (sweep["title"], grows, [curve for name in METHODS if (curve := _curve(name, grows, suite, sweep["points"]))])
        for grows, sweep in suite.get("sweeps", {}).items()
    ]
    growth = stem.with_name(f"{stem.name}-growth.png")
    return draw_bars(data, "kinds", stem) + draw_growth(panels, growth, title_of(data))


def _curve(method: str, grows: str, suite: dict[str, Any], parts: dict[str, Any]) -> Curve | None:
    """None of a method that the sweep is without."""
    curve = Curve(method)
    missing: dict[str, list[str]] = {}
    for name, part in parts.items():
        value = name.removeprefix(f"{grows} ")
        for row in (row for row in rows_of(suite, part) if row["method"] == method):
            if "step_seconds" in row:
                curve.points.append((float(value), 1e3 * row["step_seconds"]["median"]))
                curve.ways.append(", ".join(row.get("ways", [])))
            elif row["error"] is not None:
                missing.setdefault(gap(row), []).append(value)
    curve.gaps = [f"{why} at {grows} {', '.join(values)}" for why, values in missing.items()]
    return curve if curve.points or curve.gaps else None
