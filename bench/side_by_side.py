"""One workload, all methods: is each right, what memory does it take, how long is a step.

A method must first give the right clipped sum on the very model (bench/check.py). Then memory, one fresh process a
figure on a CPU; then time, all methods in one process and one loop, taking turns, so that what disturbs the machine
disturbs them all. A figure is a ratio to non-private training in the same round.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from bench import measure, memory
from bench.check import find_variant
from bench.methods import METHODS, Method, quiet_peers, start_training
from bench.turns import Part, base_of, key_of, time_in_turns, usable
from bench.workloads import BASE_VARIANT, Workload

MEMORY_LIMIT = {"cpu": 1 << 26, "cuda": None}  # that the largest batch may grow to; None: all that there is
NAMED = "bench.workloads:workloads"  # a function that finds workloads by name


def memory_job(
    named: str, work: str, small: bool, method: str, variant: str, device: str = "cpu", size: int | None = None
) -> memory.Job:
    """What is run to measure one memory figure (see memory.growth_here)."""
    quiet_peers()
    module, function = named.split(":")
    found = getattr(importlib.import_module(module), function)(device, small)[work]
    return lambda little: start_training(found, method, variant, torch.device(device), 2 if little else size)


def peak(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The memory that a job takes, or why it does not run."""
    if device.type != "cuda":
        return memory.growth("bench.side_by_side:memory_job", **arguments)
    found: dict[str, Any] = {}
    reason = measure.why_not(lambda: found.update(memory.peak_on_gpu(memory_job(**arguments), device)))
    return found if reason is None else {"error": reason}


def measure_work(
    part: Part,
    work: Workload,
    methods: Sequence[Method],
    device: torch.device,
    seconds: float,
    save: Callable[[], None],
    named: str | None = NAMED,
    small: bool = False,
) -> None:
    """Fill a part of a record with what it does not have; ``save`` is called after every measurement.

    ``named`` says where a process of its own finds the workload; None leaves memory out.
    """
    part |= {"title": work.title, "batch_size": work.batch_size, "tokens": work.tokens, "targets": dict(work.targets)}
    torch.compiler.reset()
    _check(part, work, methods, device, save)
    if named is not None:
        _memory(part, work, device, named, small, save)
        if work.largest_batch:
            _largest_batches(part, work, device, named, small, save)
    torch.compiler.reset()
    time_in_turns(part, work, device, seconds, save)
    part["finished"] = True
    save()


def _check(
    part: Part, work: Workload, methods: Sequence[Method], device: torch.device, save: Callable[[], None]
) -> None:
    entries = part.setdefault("entries", [])
    known = {entry["method"] for entry in entries}
    private = sorted((m for m in methods if m.private), key=lambda m: m.layerwise)  # an oracle for each kind, once
    for method in tqdm(private, desc=f"{work.name}: check", leave=False):
        if method.name in known:
            continue
        verdicts = find_variant(work, method, device)
        entries.append(
            {
                "method": method.name,
                "variant": verdicts[-1].variant,
                "verdicts": [asdict(verdict) for verdict in verdicts],
                "error": verdicts[-1].reason,
            }
        )
        save()
    if part.get("checked"):
        return
    variants = dict.fromkeys(["plain", *(BASE_VARIANT[e["variant"]] for e in entries if e["error"] is None)])
    bases = [_base("nonprivate", variant) for variant in variants]
    bases += [_base(m.name, "plain") for m in methods if not m.private and m.name != "nonprivate"]
    part |= {"entries": bases + entries, "checked": True}
    measure.free_memory()
    save()


def _base(method: str, variant: str) -> Part:
    return {"method": method, "variant": variant, "verdicts": [], "error": None}


def _memory(
    part: Part, work: Workload, device: torch.device, named: str, small: bool, save: Callable[[], None]
) -> None:
    """Compiled methods have none on a CPU: there the compiler's own processes and modules are what grows."""
    todo = [entry for entry in usable(part) if "memory" not in entry]
    if device.type == "cpu":
        todo = [entry for entry in todo if not METHODS[entry["method"]].compiled]
    for entry in tqdm(todo, desc=f"{work.name}: memory", leave=False):
        entry["memory"] = peak(_job(entry, work, device, named, small), device)
        entry["error"] = entry["memory"].get("error")
        save()


def _job(entry: Part, work: Workload, device: torch.device, named: str, small: bool) -> dict[str, Any]:
    return {
        "named": named,
        "work": work.name,
        "small": small,
        "method": entry["method"],
        "variant": entry["variant"],
        "device": device.type,
    }


def _largest_batches(
    part: Part, work: Workload, device: torch.device, named: str, small: bool, save: Callable[[], None]
) -> None:
    limit = MEMORY_LIMIT[device.type]
    slow = {method.name for method in METHODS.values() if method.compiled or method.layerwise}  # a loop over samples
    todo = [entry for entry in usable(part) if "largest_batch" not in entry and entry["method"] not in slow]
    for entry in tqdm(todo, desc=f"{work.name}: largest batch", leave=False):
        job = _job(entry, work, device, named, small)

        def fits(size: int, job: dict[str, Any] = job) -> bool:
            taken = peak(job | {"size": size}, device)
            return "error" not in taken and (limit is None or taken.get("growth_bytes", 0) <= limit)

        entry["largest_batch"] = largest(fits, work.batch_size)
        part["memory_limit_bytes"] = limit
        save()


def largest(fits: Callable[[int], bool], start: int, most: int = 1 << 16) -> int:
    """The largest size that fits, to a quarter of itself; 0 if not even one does."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    if low == 0:
        while high > 1 and not fits(high // 2):
            high //= 2
        low = high // 2
    while high <= most and high - low > max(1, low // 4):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def rows_to_draw(parts: Mapping[str, Part]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of every part that has a ratio to show, for :func:`bench.plots.draw_ratios`."""
    groups = (
        (part["title"], [row for row in part["rows"] if "time_ratio" in row and row["method"] != "nonprivate"])
        for part in parts.values()
        if "rows" in part
    )
    return [group for group in groups if group[1]]


def summary(part: Part, peak_flops: float | None) -> list[dict[str, Any]]:
    """One row a method: percentiles, ratios, rates, and whether dpfast's targets are met."""
    rows = []
    seconds = {key_of(e): {int(n): s for n, s in e.get("seconds", {}).items()} for e in part.get("entries", [])}
    by_key = {key_of(entry): entry for entry in part.get("entries", [])}
    for key, entry in by_key.items():
        base = base_of(entry)
        row: dict[str, Any] = {name: entry[name] for name in ("method", "variant", "verdicts", "error")}
        row |= {name: entry[name] for name in ("memory", "largest_batch") if name in entry}
        if seconds[key] and entry["error"] is None:
            step = measure.percentiles(list(seconds[key].values()))
            row["step_seconds"] = step
            row["samples_per_second"] = part["batch_size"] / step["median"]
            if part["tokens"]:
                row["tokens_per_second"] = part["tokens"] * part["batch_size"] / step["median"]
            if peak_flops and "flops" in part:
                row["of_roofline"] = part["flops"] / step["median"] / peak_flops
            row["time_ratio"] = measure.percentiles(measure.paired_ratios(seconds[key], seconds[base]))
        if base in by_key:
            row["memory_ratio"] = memory.ratio(entry.get("memory", {}), by_key[base].get("memory", {}))
        if entry["method"] == "dpfast":
            reached = {"time": row.get("time_ratio", {}).get("median"), "memory": row.get("memory_ratio")}
            row["targets"] = {
                what: {"at_most": limit, "reached": reached[what]} for what, limit in part["targets"].items()
            }
        rows.append(row)
    return rows
