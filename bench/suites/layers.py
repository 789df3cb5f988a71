"""The layers suite: single layers by every method, and how a linear layer's cost grows with each of its sizes.

The planner chooses how dpfast makes norms and sums; where its way changes along a sweep is in the table and the plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import measure, plots
from bench.layer_workloads import layers, points, sweeps
from bench.methods import METHODS, absent, fixed_loader, prepare
from bench.record import Record, title_of
from bench.roofline import peaks
from bench.side_by_side import measure_work, rows_to_draw, summary
from bench.suites import Options
from bench.workloads import FULL, Workload

KINDS = ("nonprivate", "dpfast", "hooks", "functorch", "ghost", "fastdp", "flashdp")
GROWING = ("nonprivate", "dpfast", "hooks", "ghost")  # those whose curves are drawn
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
        part["rows"] = summary(part, suite["peaks"].get("flops_per_second"))
        bar.update()

    for work in kinds.values():
        measured(suite.setdefault("kinds", {}), work, KINDS, NAMED if device.type == "cuda" else None)
        record.save()
    for sweep, its in swept:
        parts = suite.setdefault("sweeps", {}).setdefault(sweep.grows, {"title": sweep.title, "points": {}})
        for work in its.values():
            measured(parts["points"], work, GROWING, None)
            parts["points"][work.name].setdefault("way", way_taken(work, device))
            record.save()
    bar.close()
    ours = [row for part in _parts(suite) for row in part["rows"] if row["method"].startswith("dpfast")]
    return all(row["error"] is None for row in ours)


def _parts(suite: dict[str, Any]) -> list[dict[str, Any]]:
    swept = [part for sweep in suite.get("sweeps", {}).values() for part in sweep["points"].values()]
    return [part for part in [*suite.get("kinds", {}).values(), *swept] if "rows" in part]


def way_taken(work: Workload, device: torch.device) -> str:
    """How the planner has the norm and the sum of the weight made, in a step of its own."""
    x, y = work.batch(device=device)
    model = work.model(device=device)
    trainer = prepare(
        METHODS["dpfast"],
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        fixed_loader(x, y),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    trainer.step(x, y)
    plans = trainer.model.book.planner.state_dict()["plans"]  # type: ignore[union-attr, operator]
    return ", ".join(dict.fromkeys(way for _, _, way in plans))


def report(data: dict[str, Any]) -> str:
    """One table of all kinds, one of each sweep: a column a method, step time over non-private."""
    suite = data["suite"]
    parts = [f"## Layers\n\n{title_of(data)}"]
    if kinds := suite.get("kinds"):
        parts.append(
            "Step time over the non-private step's, p20 and p80 in brackets:\n\n" + _table("layer", kinds, KINDS)
        )
    for grows, sweep in suite.get("sweeps", {}).items():
        table = _table(grows, sweep["points"], GROWING, ways=True)
        parts.append(f"### {sweep['title']}; {grows} grows\n\n{table}")
    wrong = [
        f"- {METHODS[row['method']].title}, {part['title']}: {row['error']}"
        for part in _parts(suite)
        for row in part["rows"]
        if row["error"] is not None
    ]
    return "\n\n".join(parts + (["\n".join(dict.fromkeys(wrong))] if wrong else []))


def _table(first: str, parts: dict[str, Any], names: Sequence[str], ways: bool = False) -> str:
    parts = {name: part for name, part in parts.items() if "rows" in part}
    used = [name for name in names if any(row["method"] == name for part in parts.values() for row in part["rows"])]
    header = [first, "non-private, ms", *(METHODS[name].title for name in used if name != "nonprivate")]
    rows = []
    for name, part in parts.items():
        by_method = {row["method"]: row for row in part["rows"]}
        base = by_method["nonprivate"].get("step_seconds")
        cells = [name.removeprefix(f"{first} "), measure.spread(base, 1e3) if base else "not measured"]
        for method in used[1:]:
            row = by_method.get(method, {})
            figure = measure.spread(row["time_ratio"]) if "time_ratio" in row else "no figure"
            cells.append(figure + (f", {part['way']}" if ways and method == "dpfast" and "way" in part else ""))
        rows.append(cells)
    return measure.markdown_table(header, rows)


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """The bars of all kinds, and the growth curves."""
    suite, title = data["suite"], title_of(data)
    paths = {what: stem.with_name(f"{stem.name}-{what}.png") for what in ("ratios", "growth")}
    groups = rows_to_draw(suite.get("kinds", {}))
    panels = [
        (sweep["title"], grows, [curve for name in GROWING if (curve := _curve(name, grows, sweep["points"])).points])
        for grows, sweep in suite.get("sweeps", {}).items()
    ]
    if groups:
        plots.draw_ratios(groups, paths["ratios"], title)
    if panels:
        plots.draw_growth(panels, paths["growth"], title)
    return [path for path, drawn in zip(paths.values(), (groups, panels), strict=True) if drawn]


def _curve(method: str, grows: str, parts: dict[str, Any]) -> plots.Curve:
    curve = plots.Curve(method, [], [])
    for name, part in parts.items():
        for row in part.get("rows", []):
            if row["method"] == method and "step_seconds" in row:
                curve.points.append((float(name.removeprefix(f"{grows} ")), 1e3 * row["step_seconds"]["median"]))
                curve.remarks.append(part.get("way", "") if method == "dpfast" else "")
    return curve
