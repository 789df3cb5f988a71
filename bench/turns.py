"""How long a step of each method takes on one workload: all in one loop, taking turns.

Where a GPU has no room for all of them beside each other, there are several loops. Non-private training is in each, so
that every figure has its ratio in the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from bench import measure
from bench.methods import Plan, start_training
from bench.workloads import BASE_VARIANT, Workload

STEPS_OF_A_TURN = {"cpu": 1, "cuda": 3}  # on a GPU the host runs ahead from one to the next, as in training
ROOM = 0.9  # of a GPU's memory, for all that stand beside each other

Part = dict[str, Any]  # of a record: what is known of one workload; or an entry of it, one method


def key_of(entry: Part) -> str:
    return f"{entry['method']} {entry['variant']}"


def base_of(entry: Part) -> str:
    """The key of the non-private training that an entry is divided by."""
    return f"nonprivate {BASE_VARIANT[entry['variant']]}"


def usable(part: Part) -> list[Part]:
    return [entry for entry in part["entries"] if entry["error"] is None]


def plan_of(part: Part) -> Plan | None:
    """What dpfast chose alone in a process, where it could be measured: beside others it sees more memory in use, of
    which its budget is a part.
    """
    return part.get("alone", {}).get("plan")


def time_in_turns(part: Part, work: Workload, device: torch.device, seconds: float, save: Callable[[], None]) -> None:
    """Fill ``seconds`` of every entry, by round. Whoever fails beside the others is left out."""
    room = ROOM * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    loops = part.setdefault("loops", loops_of(usable(part), room))
    for number in range(part.get("timed", 0), len(loops)):
        entries = [entry for entry in usable(part) if key_of(entry) in loops[number]]
        _loop(part, entries, work, device, seconds / len(loops), number, save)
        save()
        measure.free_memory()
        measure.still_there(device)
        part["timed"] = number + 1
        save()


def loops_of(entries: Sequence[Part], room: float) -> list[list[str]]:
    """Who stands beside whom, by key: every non-private base, and of the others as many as have room.

    What all of a loop keep, and the most that one of them takes on top in its step, is at most ``room`` bytes. An entry
    without a figure takes none; one that fits nowhere is alone with the bases.
    """
    bases = [entry for entry in entries if entry["method"] == "nonprivate"]
    loops: list[list[Part]] = []
    for entry in entries:
        if entry in bases:
            continue
        beside = next((loop for loop in loops if _taken([*loop, entry]) <= room), None)
        if beside is None:
            loops.append([*bases, entry])
        else:
            beside.append(entry)
    return [[key_of(entry) for entry in loop] for loop in loops or [bases]]


def _taken(loop: Sequence[Part]) -> int:
    figures = [entry.get("memory", {}) for entry in loop]
    kept = [figure.get("kept_bytes", 0) for figure in figures]
    peaks = [figure.get("before_bytes", 0) + figure.get("growth_bytes", 0) for figure in figures]
    return sum(kept) + max(max(0, peak - keeps) for peak, keeps in zip(peaks, kept, strict=True))


def _loop(
    part: Part,
    entries: Sequence[Part],
    work: Workload,
    device: torch.device,
    seconds: float,
    number: int,
    save: Callable[[], None],
) -> None:
    """One loop; its rounds have numbers that no other loop has."""
    measure.free_memory()
    by_key = {key_of(entry): entry for entry in entries}
    steps: dict[str, measure.Step] = {}
    reasons: dict[str, str | None] = {}
    for key, entry in tqdm(by_key.items(), desc=f"{work.name}: set up", leave=False):

        def set_up(key: str = key, entry: Part = entry) -> None:
            plan = plan_of(part)
            steps[key] = start_training(work, entry["method"], entry["variant"], device, plan=plan)()

        reasons[key] = measure.why_not(set_up)
        if measure.is_lost(device):
            by_key[key]["error"] = f"beside the others: {reasons[key]}"
            return
    first = number * measure.MAX_ROUNDS
    kept = {key: {int(n) - first: s for n, s in _rounds(by_key[key]).items() if int(n) >= first} for key in steps}
    with tqdm(desc=f"{work.name}: rounds", leave=False) as bar:

        def keep(taken: Mapping[str, Mapping[int, float]]) -> None:
            for key, rounds in taken.items():
                by_key[key]["seconds"] = _rounds(by_key[key]) | {str(first + n): s for n, s in rounds.items()}
                plan = getattr(steps[key], "plan", None)
                if plan is not None:
                    by_key[key] |= {"plan": dict(plan), "ways": sorted(set(plan.values()))}
            bar.update()
            save()

        clock = partial(measure.timed, times=STEPS_OF_A_TURN[device.type])
        reasons |= measure.turns_of(steps, device, seconds, kept, keep, clock)[1]
    lost = measure.is_lost(device)
    for entry in entries:
        own, base = (reasons.get(key, "it failed before") for key in (key_of(entry), base_of(entry)))
        if entry["method"] == "nonprivate":
            last = number == len(part["loops"]) - 1
            entry["error"] = own if last and not _rounds(entry) else None
        elif own is not None:
            entry["error"] = f"beside the others: {own}"
        elif base is not None and not lost:
            entry["error"] = f"no non-private step beside it: {base}"


def _rounds(entry: Part) -> dict[str, float]:
    return entry.get("seconds", {})
