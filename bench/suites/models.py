"""The models suite: whole training steps of every workload by every method, with memory and rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import measure, plots
from bench.methods import METHODS, Method, absent
from bench.record import Record, title_of
from bench.roofline import in_words, peaks
from bench.side_by_side import measure_work, rows_to_draw, summary
from bench.suites import Options
from bench.workloads import FULL, VARIANTS, Workload, workloads

HEADER = (
    "method",
    "error against float64",
    "step, ms (p20–p80)",
    "× non-private (p20–p80)",
    "samples/s",
    "tokens/s",
    "of the roof",
    "memory, MiB",
    "× non-private",
    "largest batch",
)


def methods_of(work: Workload, options: Options) -> list[Method]:
    """Those that were asked for, or all; compiled ones without being asked only where that is not too long."""
    if options.methods:
        return [METHODS[name] for name in options.methods]
    missing = absent()
    return [m for m in METHODS.values() if m.name not in missing and (work.compiled or not m.compiled)]


def run(record: Record, options: Options) -> bool:
    """Whether dpfast was right on every model that it was asked for."""
    device, suite = options.device, record.suite
    known = workloads(device.type, options.small)
    chosen = [known[name] for name in options.models or (name for name, work in known.items() if work.by_default)]
    if "peaks" not in suite:
        suite["peaks"] = peaks(device, FULL[device.type])
        record.save()
    parts = suite.setdefault("works", {})
    for work in tqdm(chosen, desc="models"):
        part = parts.setdefault(work.name, {})
        if not part.get("finished"):
            share = options.seconds / len(chosen)
            methods = methods_of(work, options)
            measure_work(part, work, methods, device, share, record.save, small=options.small)
            measure.free_memory()
        part["rows"] = summary(part, suite["peaks"].get("flops_per_second"))
        record.save()
    ours = [entry for part in parts.values() for entry in part["entries"] if entry["method"].startswith("dpfast")]
    return all(entry["error"] is None for entry in ours)


def report(data: dict[str, Any]) -> str:
    """One table a workload, whether the targets are met, and why a peer was not given the plain model."""
    suite = data["suite"]
    parts = [f"## Models\n\n{title_of(data)}"]
    if "peaks" in suite:
        parts.append(
            f"The roof, measured in this run: {in_words(suite['peaks'])}. Flops are those of the non-private step's "
            f"products."
        )
    for part in suite.get("works", {}).values():
        rows = part.get("rows", [])
        lines = [line for row in rows for line in (*targets(row), *notes(row))]
        table = measure.markdown_table(HEADER, [cells(row) for row in rows])
        limit = part.get("memory_limit_bytes")
        if limit:
            lines.append(f"- the largest batch is one that grows memory by at most {limit / measure.MIB:g} MiB")
        parts.append("\n\n".join([f"### {part['title']}", table, *(["\n".join(lines)] if lines else [])]))
    return "\n\n".join(parts)


def cells(row: dict[str, Any]) -> list[str]:
    title = METHODS[row["method"]].title
    if row["variant"] != "plain" and row["error"] is None:
        title += f" ({VARIANTS[row['variant']]})"
    if row["error"] is not None:
        return [title, row["error"], *[""] * (len(HEADER) - 2)]
    verdicts, memory = row["verdicts"], row.get("memory", {})
    found = [title, f"{verdicts[-1]['error']:.0e}" if verdicts else "", *[""] * (len(HEADER) - 2)]
    if "step_seconds" in row:
        found[2] = measure.spread(row["step_seconds"], 1e3, ".1f")
        found[3] = f"{measure.spread(row['time_ratio'])}, n={row['time_ratio']['n']}"
        found[4] = f"{row['samples_per_second']:.0f}"
        found[5] = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else ""
        found[6] = f"{row['of_roofline']:.0%}" if "of_roofline" in row else ""
    found[7] = memory.get(
        "not_measured", f"{memory['growth_bytes'] / measure.MIB:.0f}" if "growth_bytes" in memory else ""
    )
    found[8] = f"{row['memory_ratio']:.2f}" if row.get("memory_ratio") is not None else ""
    found[9] = str(row.get("largest_batch", ""))
    return found


def targets(row: dict[str, Any]) -> list[str]:
    lines = []
    for what, target in row.get("targets", {}).items():
        reached = target["reached"]
        verdict = "not measured"
        if reached is not None:
            verdict = f"{reached:.2f}, {'met' if reached <= target['at_most'] else 'NOT met'}"
        lines.append(f"- target for {METHODS[row['method']].title}: {what} ≤ {target['at_most']:g}: {verdict}")
    return lines


def notes(row: dict[str, Any]) -> list[str]:
    title = METHODS[row["method"]].title
    return [f"- {title}, {VARIANTS[v['variant']]}: {v['reason']}" for v in row["verdicts"][:-1]]


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """The bars of ratios."""
    groups = rows_to_draw(data["suite"].get("works", {}))
    if not groups:
        return []
    path = stem.with_name(stem.name + "-ratios.png")
    plots.draw_ratios(groups, path, title_of(data))
    return [path]
