"""The models suite: whole training steps of every workload by every method, with memory and rates.

The layers suite prints its rows by the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import measure, plots
from bench.methods import METHODS, Method, absent
from bench.record import Record, title_of
from bench.roofline import in_words, peaks
from bench.side_by_side import measure_work, summary
from bench.suites import Options
from bench.workloads import FULL, VARIANTS, Workload, workloads
from dpfast import tables

HEADER = (
    "method",
    "error against float64",
    "step, ms (p20–p80)",
    "× non-private (p20–p80)",
    "samples/s",
    "tokens/s",
    "of the product's roof",
    "memory, MiB",
    "memory, × non-private",
    "largest batch",
)


def methods_of(work: Workload, options: Options) -> list[Method]:
    """Those that were asked for, or all; compiled ones without being asked only where that is not too long."""
    if options.methods:
        return [METHODS[name] for name in options.methods]
    missing = absent()
    return [m for m in METHODS.values() if m.name not in missing and (work.compiled or not (m.compiled or m.recorded))]


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
        part["rows"] = summary(part, suite["peaks"])
        record.save()
    ours = [entry for part in parts.values() for entry in part["entries"] if entry["method"].startswith("dpfast")]
    return all(entry["error"] is None for entry in ours)


def report(data: dict[str, Any]) -> str:
    """One table a workload, whether the targets are met, and why a peer was not given the plain model."""
    suite = data["suite"]
    parts = heading(data, "Models")
    if "peaks" in suite:
        parts.append(roof_line(suite))
    parts += [section(suite, part) for part in suite.get("works", {}).values()]
    if data["finished"] and not any(part["targets"] for part in suite.get("works", {}).values()):
        parts.append(where_targets_are("cpu" if data["device"]["name"] == "cpu" else "cuda"))
    return "\n\n".join(parts)


def section(suite: dict[str, Any], part: dict[str, Any]) -> str:
    """A part's table, and in lines below it what has no room there."""
    rows = rows_of(suite, part)
    lines = [line for row in rows for line in targets(row)]
    lines += [line for row in rows for line in reasons(row)] + largest_line(part, rows)
    text = table(rows) if rows else "Nothing measured yet."
    return "\n\n".join([f"### {part['title']}", text, *(["\n".join(lines)] if lines else [])])


def heading(data: dict[str, Any], what: str) -> list[str]:
    """What it is, whether it is all of it, and where it was made."""
    lines = [f"## {what}"]
    if not data["finished"]:
        lines.append(
            "unfinished: the run was stopped; below is what it had measured by then. The same command with --resume "
            "goes on with it"
        )
    return [*lines, title_of(data)]


def roof_line(suite: dict[str, Any]) -> str:
    text = f"The roof, measured in this run: {in_words(suite['peaks'])}."
    if "flops_per_second" not in suite["peaks"]:
        return text
    return (
        f"{text} Shares are of the product's rate alone, by the flops of the non-private step's products; attention's "
        f"count in full, causal or not."
    )


def rows_of(suite: dict[str, Any], part: dict[str, Any]) -> list[dict[str, Any]]:
    """A part's rows; of one that was interrupted, of what it has."""
    return part["rows"] if "rows" in part else summary(part, suite.get("peaks", {}))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row; columns where nobody has anything are left out."""
    lines = [cells(row) for row in rows]
    kept = [k for k in range(len(HEADER)) if any(line[k] for line in lines)]
    return tables.markdown([HEADER[k] for k in kept], [[line[k] for k in kept] for line in lines])


def cells(row: dict[str, Any]) -> list[str]:
    """In the order of HEADER."""
    title = METHODS[row["method"]].title
    if row["error"] is not None:
        return [title, plots.gap(row), *[""] * (len(HEADER) - 2)]
    if row["variant"] != "plain":
        title += f" ({VARIANTS[row['variant']]})"
    verdicts, memory = row["verdicts"], row.get("memory", {})
    found = [title, f"{verdicts[-1]['error']:.0e}" if verdicts else "", *[""] * (len(HEADER) - 2)]
    if "step_seconds" in row:
        found[2] = measure.spread(row["step_seconds"], 1e3, ".1f" if row["step_seconds"]["median"] >= 0.1 else ".2f")
        found[3] = f"{measure.spread(row['time_ratio'])}, n={row['time_ratio']['n']}"
        found[4] = rate(row["samples_per_second"])
        found[5] = rate(row["tokens_per_second"]) if "tokens_per_second" in row else ""
        found[6] = f"{row['of_roofline']:.0%}" if row.get("of_roofline") else ""  # none without a product
    found[7] = memory.get(
        "not_measured", f"{memory['growth_bytes'] / measure.MIB:.0f}" if "growth_bytes" in memory else ""
    )
    found[8] = f"{row['memory_ratio']:.2f}" if row.get("memory_ratio") is not None else ""
    found[9] = largest_batch(row.get("largest_batch"))
    return found


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def largest_batch(found: dict[str, Any] | int | None) -> str:
    """What fits, and what does not."""
    if not isinstance(found, dict):  # older records have the number alone
        return "" if found is None else str(found)
    if "error" in found:
        return f"{found['fits']} (not {found['fails']}: {found['error']})"
    return f"≥ {found['fits']}" if found["fails"] is None else f"{found['fits']} (not {found['fails']})"


def largest_line(part: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    if not any("largest_batch" in row for row in rows):
        return []
    limit = part.get("memory_limit_bytes")
    where = f"in {limit / measure.MIB:g} MiB of growth" if limit else "in the GPU's memory"
    return [f"- largest batch {where}, by bisection: the first number fits, the one in brackets does not"]


def targets(row: dict[str, Any]) -> list[str]:
    lines = []
    for what, target in row.get("targets", {}).items():
        reached = target["reached"]
        verdict = "not measured"
        if reached is not None:
            verdict = f"{reached:.2f}, {'met' if reached <= target['at_most'] else 'NOT met'}"
        lines.append(f"- target for {METHODS[row['method']].title}: {what} ≤ {target['at_most']:g}: {verdict}")
    return lines


def where_targets_are(device: str) -> str:
    names = " ".join(name for name, work in workloads(device).items() if work.targets)
    return (
        f"None of these has a target. On {device} these have: "
        f"`python -m dpfast bench --suite models --device {device} --method nonprivate dpfast --model {names}`"
    )


def reasons(row: dict[str, Any]) -> list[str]:
    """Why it has no figure, or why it was not given the plain model."""
    title = METHODS[row["method"]].title
    lines = [] if row["error"] is None else [f"- {title}: {row['error']}"]
    return lines + [f"- {title}, {VARIANTS[v['variant']]}: {v['reason']}" for v in row["verdicts"][:-1]]


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """The bars of ratios."""
    return draw_bars(data, "works", stem)


def draw_bars(data: dict[str, Any], parts: str, stem: Path) -> list[Path]:
    """Of all ``parts`` of the suite."""
    suite = data["suite"]
    groups = [(part["title"], rows_of(suite, part)) for part in suite.get(parts, {}).values()]
    return plots.draw_ratios(groups, stem.with_name(stem.name + "-ratios.png"), title_of(data))
