"""Speed and memory beside non-private training and beside the peers: `python -m bench.side_by_side`.

Each method must first give the right clipped sum on the very model (bench/check.py). Then memory, one fresh process
per figure; then time, all methods in one process and one loop, taking turns, so that what disturbs the machine
disturbs them all. A figure is a ratio to non-private training in the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import measure
from bench.check import Verdict, find_variant
from bench.methods import METHODS, Method, fixed_loader, prepare, quiet_peers
from bench.workloads import BASE_VARIANT, VARIANTS, WORKLOADS, Workload

THREADS = 2
NOISE_MULTIPLIER = 1.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-3
MIN_ROUNDS = 5
LONG = 5.0  # seconds: a first step this long tells its cost; others are warm only at the second
SLOW = 8.0  # a method this many times slower than non-private training ...
SLOW_ROUNDS = 3  # ... is timed in this many rounds only


def start_training(method: str, work: Workload, variant: str, size: int | None = None) -> Callable[[], measure.Step]:
    """Build the model and the data; what is returned makes the model private and returns the step."""
    model = work.model(variant)
    x, y = work.batch(size)

    def start() -> measure.Step:
        trainer = prepare(
            METHODS[method],
            model,
            torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            fixed_loader(x, y),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            poisson_sampling=False,
        )
        return lambda: trainer.step(x, y)

    return start


def memory_job(work: str, method: str, variant: str) -> Callable[[bool], Callable[[], measure.Step]]:
    """What a fresh process runs to measure one memory figure (see measure.growth_here)."""
    quiet_peers()
    return lambda small: start_training(method, WORKLOADS[work], variant, 2 if small else None)


@dataclass
class Entry:
    """One method on one workload: what it was given, whether it was right, what it cost."""

    method: str
    variant: str
    verdicts: list[Verdict] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)  # round -> whole step

    @property
    def usable(self) -> bool:
        """Right, and it did not die (of memory, say) in the process that measured its memory."""
        return "error" not in self.memory and (not self.verdicts or self.verdicts[-1].right)


def choose_entries(work: Workload, methods: list[Method]) -> list[Entry]:
    """Check every private method, then add the non-private runs that the chosen variants are divided by."""
    entries = []
    for method in tqdm([m for m in methods if m.private], desc=f"{work.name}: check", leave=False):
        verdicts = find_variant(work, method)
        entries.append(Entry(method.name, verdicts[-1].variant, verdicts))
    bases = ["plain", *(BASE_VARIANT[entry.variant] for entry in entries if entry.usable)]
    return [Entry("nonprivate", variant) for variant in dict.fromkeys(bases)] + entries


def base_of(entry: Entry, entries: list[Entry]) -> Entry:
    """The non-private run of the same mathematics."""
    return next(e for e in entries if e.method == "nonprivate" and e.variant == BASE_VARIANT[entry.variant])


def measure_memory(work: Workload, entries: list[Entry]) -> None:
    """One fresh process per usable entry."""
    for entry in tqdm([e for e in entries if e.usable], desc=f"{work.name}: memory", leave=False):
        entry.memory = measure.growth(
            "bench.side_by_side:memory_job", work=work.name, method=entry.method, variant=entry.variant
        )
        if entry.method == "nonprivate" and not entry.usable:
            raise RuntimeError(f"{work.name}: non-private training itself failed: {entry.memory['error']}")


def plan_rounds(costs: list[float], slow: list[bool], rounds: int, seconds: float) -> int:
    """How many rounds fit in the time, the slow methods' few turns taken off first; never fewer than MIN_ROUNDS."""
    spare = seconds - SLOW_ROUNDS * sum(c for c, s in zip(costs, slow, strict=True) if s)
    fast = sum(c for c, s in zip(costs, slow, strict=True) if not s)
    return max(MIN_ROUNDS, min(rounds, math.floor(spare / fast)))


def measure_time(work: Workload, entries: list[Entry], rounds: int, seconds: float) -> None:
    """Warm every method up, then let them take turns; the order is rotated each round."""
    runners = [(entry, start_training(entry.method, work, entry.variant)()) for entry in entries if entry.usable]
    costs = []
    for _, step in tqdm(runners, desc=f"{work.name}: warm-up", leave=False):
        cost = measure.timed(step)
        costs.append(cost if cost > LONG else measure.timed(step))
    slow = [cost > SLOW * costs[0] for cost in costs]  # the first entry is always non-private, plain
    count = plan_rounds(costs, slow, rounds, seconds)
    slow_turns = {round(i * (count - 1) / (SLOW_ROUNDS - 1)) for i in range(SLOW_ROUNDS)}
    turns = list(zip(runners, slow, strict=True))
    for number in tqdm(range(count), desc=f"{work.name}: time", leave=False):
        for (entry, step), is_slow in measure.rotated(turns, number):
            if not is_slow or number in slow_turns:
                entry.seconds[number] = measure.timed(step)


def summarise(work: Workload, entries: list[Entry]) -> dict[str, Any]:
    """All percentiles and ratios of one workload, as they go into the record."""
    rows = []
    for entry in entries:
        base = base_of(entry, entries) if entry.usable else None
        row: dict[str, Any] = {
            "method": entry.method,
            "variant": entry.variant,
            "verdicts": [asdict(verdict) for verdict in entry.verdicts],
            "memory": entry.memory,
        }
        if base is not None:
            row["step_seconds"] = measure.percentiles(list(entry.seconds.values()))
            row["time_ratio"] = measure.percentiles(measure.paired_ratios(entry.seconds, base.seconds))
            row["memory_ratio"] = measure.memory_ratio(entry.memory, base.memory)
        if entry.method == "dpfast":
            row["target_time"], row["target_memory"] = work.target_time, work.target_memory
        rows.append(row)
    return {"name": work.name, "title": work.title, "batch_size": work.batch_size, "rows": rows}


def _against(ratio: float | None, target: float | None) -> str:
    """The target and whether it is met, on the rows that have one."""
    if target is None:
        return ""
    if ratio is None:
        return f"≤ {target:g}: not measured"
    return f"≤ {target:g}: {'met' if ratio <= target else 'NOT met'}"


def _cells(row: dict[str, Any]) -> list[str]:
    verdicts, memory = row["verdicts"], row["memory"]
    title = METHODS[row["method"]].title
    if row["variant"] != "plain":
        title += f" ({VARIANTS[row['variant']]})"
    exactness = "" if not verdicts else verdicts[-1]["reason"] or f"{verdicts[-1]['error']:.0e}"
    time_cells, growth_cells = ["", ""], [memory.get("error", memory.get("not_measured", "")), ""]
    if "time_ratio" in row:
        step, ratio = row["step_seconds"], row["time_ratio"]
        time_cells[0] = f"{1e3 * step['median']:.0f} ({1e3 * step['p20']:.0f}–{1e3 * step['p80']:.0f})"
        time_cells[1] = f"{ratio['median']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f}), n={ratio['n']}"
    if "growth_bytes" in memory:
        growth_cells[0] = f"{memory['growth_bytes'] / measure.MIB:.0f}"
    if row.get("memory_ratio") is not None:
        growth_cells[1] = f"{row['memory_ratio']:.2f}"
    time_target = _against(row.get("time_ratio", {}).get("median"), row.get("target_time"))
    memory_target = _against(row.get("memory_ratio"), row.get("target_memory"))
    return [title, exactness, *time_cells, time_target, *growth_cells, memory_target]


HEADER = (
    "method",
    "error against the oracle",
    "step, ms (p20–p80)",
    "× non-private (p20–p80)",
    "target",
    "growth, MiB",
    "× non-private",
    "target",
)


def report(record: dict[str, Any]) -> str:
    """The Markdown that is printed: one table a workload, and why a peer was not given the plain model."""
    machine = record["machine"]
    parts = [
        f"{machine['cpu']}, {machine['cores_usable']} cores, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}, opacus {machine['versions']['opacus']}, "
        f"Python {machine['python']}, commit {(machine['commit'] or 'none')[:10]}, {machine['date']}, "
        f"load before the run {machine['load_before']}"
    ]
    for work in record["workloads"]:
        parts.append(f"### {work['title']}\n\n{measure.markdown_table(HEADER, [_cells(r) for r in work['rows']])}")
        notes = [
            f"- {METHODS[row['method']].title}, {VARIANTS[verdict['variant']]}: {verdict['reason']}"
            for row in work["rows"]
            for verdict in row["verdicts"][:-1]
        ]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.side_by_side", description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=30, help="at most this many rounds (default 30)")
    parser.add_argument("--seconds", type=float, default=60, help="timing loop of one workload (default 60)")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "bench" / "results")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    quiet_peers()
    torch.set_num_threads(THREADS)
    record: dict[str, Any] = {
        "machine": measure.machine_record(),
        "configuration": {
            "command": "python -m bench.side_by_side",
            "work": arguments.work,
            "methods": arguments.methods,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "noise_multiplier": NOISE_MULTIPLIER,
            "max_grad_norm": MAX_GRAD_NORM,
            "optimizer": "SGD",
            "allocator_of_memory_runs": measure.ALLOCATOR,
        },
        "workloads": [],
    }
    name = f"side_by_side-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    ok = True
    for work in tqdm([WORKLOADS[name] for name in arguments.work], desc="workloads"):
        entries = choose_entries(work, [METHODS[name] for name in arguments.methods])
        measure_memory(work, entries)
        measure_time(work, entries, arguments.rounds, arguments.seconds)
        record["workloads"].append(summarise(work, entries))
        ok = ok and all(entry.usable for entry in entries if entry.method == "dpfast")
        # after each workload, so that an interrupted run keeps what it has
        (arguments.out / name).write_text(json.dumps(record, indent=1) + "\n")
        gc.collect()
    print(report(record))
    print(f"\nrecord: {arguments.out / name}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
