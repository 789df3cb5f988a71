"""One workload, all methods: is each right, what memory does it take, how long is a step.

A method must first give the right clipped sum on the very model (bench/check.py). Then memory, one fresh process a
figure on a CPU; then time, all methods in one process and one loop, taking turns, so that what disturbs the machine
disturbs them all. A figure is a ratio to non-private training in the same round.
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
from bench.check import find_variant
from bench.methods import METHODS, Method, fixed_loader, prepare, quiet_peers
from bench.roofline import flops_of
from bench.workloads import BASE_VARIANT, Workload

NOISE_MULTIPLIER = 1.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-3
MEMORY_LIMIT = {"cpu": 1 << 26, "cuda": None}  # that the largest batch may grow to; None: all that there is
NAMED = "bench.workloads:workloads"  # a function that finds workloads by name

Part = dict[str, Any]  # of a record: what is known of one workload


def start_training(
    work: Workload, method: str, variant: str, device: torch.device, size: int | None = None
) -> Callable[[], measure.Step]:
    """Build the model and the data; what is returned makes the model private and returns the step.

    On a GPU everyone has the AdamW that serves it best: torch's fused one, but for dpfast, whose own step is fused.
    """
    model = work.model(variant, device)
    x, y = work.batch(size, device)
    if work.inner:
        x.requires_grad_(x.is_floating_point())

    def start() -> measure.Step:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if device.type == "cuda":
            fused = None if METHODS[method].library == "dpfast" else True
            optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=fused)
        else:
            optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
        trainer = prepare(
            METHODS[method],
            model,
            optimizer,
            fixed_loader(x.detach(), y),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            poisson_sampling=False,
        )
        return lambda: trainer.step(x, y)

    return start


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
    _time(part, work, device, seconds, save)
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


def usable(part: Part) -> list[Part]:
    return [entry for entry in part["entries"] if entry["error"] is None]


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


class _Failed(Exception):
    """A method's step raised."""

    def __init__(self, entry: Part, failure: Exception):
        super().__init__()
        self.entry, self.failure = entry, failure


def _time(part: Part, work: Workload, device: torch.device, seconds: float, save: Callable[[], None]) -> None:
    """All in turns; whoever fails beside the others (a GPU may have no memory for all) is left out."""
    while "nonprivate plain" in (running := {key_of(entry): entry for entry in usable(part)}) and not part.get("timed"):
        try:
            _turns(part, work, running, device, seconds, save)
            part["timed"] = True
        except _Failed as failed:
            failed.entry["error"] = f"beside the others: {measure.said(failed.failure)}"
        measure.free_memory()
        save()


def key_of(entry: Part) -> str:
    return f"{entry['method']} {entry['variant']}"


def _guarded(entry: Part, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as failure:  # a row of the table, in its own words
        raise _Failed(entry, failure) from failure


def _turns(
    part: Part,
    work: Workload,
    running: Mapping[str, Part],
    device: torch.device,
    seconds: float,
    save: Callable[[], None],
) -> None:
    steps: dict[str, measure.Step] = {}
    for key, entry in tqdm(running.items(), desc=f"{work.name}: set up", leave=False):
        start = _guarded(entry, partial(start_training, work, entry["method"], entry["variant"], device))
        steps[key] = partial(_guarded, entry, _guarded(entry, start))
    if "flops" not in part:
        part["flops"] = flops_of(steps["nonprivate plain"])
    kept = {key: {int(n): s for n, s in entry.get("seconds", {}).items()} for key, entry in running.items()}
    with tqdm(desc=f"{work.name}: rounds", leave=False) as bar:

        def keep(taken: Mapping[str, Mapping[int, float]]) -> None:
            for key, entry in running.items():
                entry["seconds"] = {str(n): s for n, s in taken[key].items()}
            bar.update()
            save()

        measure.in_turns(steps, device, seconds, kept, keep)


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
        base = f"nonprivate {BASE_VARIANT[entry['variant']]}"
        row: dict[str, Any] = {name: entry[name] for name in ("method", "variant", "verdicts", "error")}
        row |= {name: entry[name] for name in ("memory", "largest_batch") if name in entry}
        if seconds[key] and entry["error"] is None:
            step = measure.percentiles(list(seconds[key].values()))
            row["step_seconds"] = step
            row["samples_per_second"] = part["batch_size"] / step["median"]
            if part["tokens"]:
                row["tokens_per_second"] = part["tokens"] * part["batch_size"] / step["median"]
            if peak_flops:
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
