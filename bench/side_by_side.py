"""One workload, all methods: is each right, what memory does it take, how long is a step.

First dpfast alone in a process, for its memory and for the plan that it makes there, which it keeps in what follows.
Then every method must give the right clipped sum on the very model (bench/check.py). Then memory, one fresh process a
figure on a CPU; then time, all methods in one process and in turns, so that what disturbs the machine disturbs them all
(bench/turns.py). A figure is a ratio to non-private training in the same round.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from bench import measure, memory
from bench.check import find_variant, oracle
from bench.methods import METHODS, Method, quiet_peers, start_training
from bench.roofline import flops_of
from bench.turns import Part, base_of, key_of, plan_of, time_in_turns, usable
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
    on, first = torch.device(device), method.removesuffix("-compiled")  # nobody compiles just to be warm
    return lambda little: start_training(found, first if little else method, variant, on, 2 if little else size)


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
    if "flops" not in part:
        part["flops"] = _flops(work, device)
    if named is not None and any(method.library == "dpfast" for method in methods) and "alone" not in part:
        part["alone"] = peak(_job(_entry("dpfast", "plain"), work, device, named, small), device)
        save()
        measure.still_there(device)
    _check(part, work, methods, device, save)
    if named is not None:
        _memory(part, work, device, named, small, save)
        if work.largest_batch:
            _largest_batches(part, work, device, named, small, save)
    torch.compiler.reset()
    time_in_turns(part, work, device, seconds, save)
    part["finished"] = True
    save()


def _flops(work: Workload, device: torch.device) -> dict[str, int]:
    """Of a step without privacy, for every base; without data where the model can be built so."""
    found: dict[str, int] = {}
    for base in dict.fromkeys(BASE_VARIANT[variant] for variant in work.variants):
        for where in ("meta", device):
            count = partial(flops_of, partial(work.backward, base, where))
            if measure.why_not(lambda base=base, count=count: found.update({base: count()})) is None:  # type: ignore[misc]
                break
    return found


def _check(
    part: Part, work: Workload, methods: Sequence[Method], device: torch.device, save: Callable[[], None]
) -> None:
    entries = part.setdefault("entries", [])
    known = {entry["method"] for entry in entries}
    private = sorted((m for m in methods if m.private), key=lambda m: m.layerwise)  # an oracle for each kind, once
    for method in tqdm(private, desc=f"{work.name}: check", leave=False):
        if method.name in known:
            continue
        verdicts = find_variant(work, method, device, plan_of(part))
        entries.append(
            {
                "method": method.name,
                "variant": verdicts[-1].variant,
                "verdicts": [asdict(verdict) for verdict in verdicts],
                "error": verdicts[-1].reason,
            }
        )
        save()
        measure.still_there(device)
    oracle.cache_clear()  # its sums would be in everybody's way
    if part.get("checked"):
        return
    variants = dict.fromkeys(["plain", *(BASE_VARIANT[e["variant"]] for e in entries if e["error"] is None)])
    bases = [_entry("nonprivate", variant) for variant in variants]
    bases += [_entry(m.name, "plain") for m in methods if not m.private and m.name != "nonprivate"]
    part |= {"entries": bases + entries, "checked": True}
    measure.free_memory()
    save()


def _entry(method: str, variant: str) -> Part:
    return {"method": method, "variant": variant, "verdicts": [], "error": None}


def _memory(
    part: Part, work: Workload, device: torch.device, named: str, small: bool, save: Callable[[], None]
) -> None:
    """Compiled methods have none on a CPU: there the compiler's own processes and modules are what grows."""
    todo = [entry for entry in usable(part) if "memory" not in entry]
    if device.type == "cpu":
        todo = [entry for entry in todo if not METHODS[entry["method"]].compiled]
    for entry in tqdm(todo, desc=f"{work.name}: memory", leave=False):
        known = part.get("alone") if entry["method"] == "dpfast" else None
        entry["memory"] = known or peak(_job(entry, work, device, named, small), device)
        entry["error"] = entry["memory"].get("error")
        save()
        measure.still_there(device)


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
    """Not of compiled methods, which would compile for every size, nor on a CPU of a loop over the samples."""
    limit = MEMORY_LIMIT[device.type]
    left_out = {m.name for m in METHODS.values() if m.compiled or (m.layerwise and device.type == "cpu")}
    todo = [entry for entry in usable(part) if "largest_batch" not in entry and entry["method"] not in left_out]
    for entry in tqdm(todo, desc=f"{work.name}: largest batch", leave=False):
        job, reasons = _job(entry, work, device, named, small), dict[int, str]()

        def fits(size: int, job: dict[str, Any] = job, reasons: dict[int, str] = reasons) -> bool:
            taken = peak(job | {"size": size}, device)
            error = taken.get("error", taken.get("not_measured", ""))
            if error and not error.startswith("out of memory"):
                reasons[size] = error
            return not error and (limit is None or taken["growth_bytes"] <= limit)

        low, high = largest(fits, work.batch_size)
        entry["largest_batch"] = {"fits": low, "fails": high}
        if high in reasons:
            entry["largest_batch"]["error"] = reasons[high]
        part["memory_limit_bytes"] = limit
        save()
        measure.still_there(device)


def largest(fits: Callable[[int], bool], start: int, most: int = 1 << 20) -> tuple[int, int | None]:
    """A size that fits and one that does not, closer than a sixteenth of it; None where ``most`` fits."""
    low, high = 0, min(start, most)
    while fits(high):
        low = high
        if high == most:
            return low, None
        high = min(2 * high, most)
    while low == 0 and high > 1:
        low, high = (high // 2, high) if fits(high // 2) else (0, high // 2)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def summary(part: Part, roof: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a method, of what is measured by now: percentiles, ratios, rates, and what dpfast's targets came to.

    ``roof`` are the device's peaks.
    """
    by_key = {key_of(entry): entry for entry in part.get("entries", [])}
    seconds = {key: {int(n): s for n, s in entry.get("seconds", {}).items()} for key, entry in by_key.items()}
    rows = []
    for key, entry in by_key.items():
        base = base_of(entry)
        row: dict[str, Any] = {name: entry[name] for name in ("method", "variant", "verdicts", "error")}
        row |= {name: entry[name] for name in ("memory", "largest_batch", "ways", "counts") if name in entry}
        ratios = measure.paired_ratios(seconds[key], seconds.get(base, {}))
        if ratios and entry["error"] is None:
            step = measure.percentiles(list(seconds[key].values()))
            row["step_seconds"] = step
            row["samples_per_second"] = part["batch_size"] / step["median"]
            if part["tokens"]:
                row["tokens_per_second"] = part["tokens"] * part["batch_size"] / step["median"]
            flops = part.get("flops", {}).get(BASE_VARIANT[entry["variant"]])
            if "flops_per_second" in roof and flops:
                row["of_roofline"] = flops / step["median"] / roof["flops_per_second"]
            row["time_ratio"] = measure.percentiles(ratios)
        if base in by_key:
            row["memory_ratio"] = memory.ratio(entry.get("memory", {}), by_key[base].get("memory", {}))
        counts, base_counts = row.get("counts", {}), by_key.get(base, {}).get("counts", {})
        if "operators" in counts and "operators" in base_counts:
            row["operator_ratio"] = counts["operators"] / base_counts["operators"]
        if entry["method"] == "dpfast":
            reached = {
                "time": row.get("time_ratio", {}).get("median"),
                "memory": row.get("memory_ratio"),
                "operators": row.get("operator_ratio"),
                "waits": counts.get("waits"),
            }
            row["targets"] = {
                what: {"at_most": limit, "reached": reached[what]} for what, limit in part["targets"].items()
            }
        rows.append(row)
    return rows
