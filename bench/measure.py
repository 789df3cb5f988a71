"""What every measurement shares: clocks that take turns, percentiles, paired ratios, failures as rows."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
THREADS = 2
WARM_UP = 2  # calls before the first that is timed: the first may compile, or check what it will trust afterwards
MOST_WARM_UP, WARM_UP_SECONDS = 70, 1.0  # and of short ones so many more, within this time
COMPILES = 2.0  # a call that takes more than this many times as long as a later one has compiled, or checked
MIN_ROUNDS, MAX_ROUNDS = 5, 50
SLOW = 8.0  # who takes this many times as long as the first one ...
SLOW_ROUNDS = 3  # ... is timed in this many rounds only

Step = Callable[[], object]
Clock = Callable[[Step, torch.device], float]
Name = TypeVar("Name", bound=Hashable)


def timed(step: Step, device: torch.device | None = None, times: int = 1) -> float:
    """Seconds on the wall that a call takes, the mean of ``times`` in a row, until the device is done."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


def in_turns(
    calls: Mapping[Name, Step],
    device: torch.device,
    seconds: float,
    kept: Mapping[Name, Mapping[int, float]] | None = None,
    each_round: Callable[[dict[Name, dict[int, float]]], None] | None = None,
    clock: Clock = timed,
) -> dict[Name, dict[int, float]]:
    """Seconds of every call in every round, for about ``seconds`` in all, and never in fewer than MIN_ROUNDS.

    Each round has an order of its own, so that nobody always follows the same neighbour. ``kept`` are rounds of an
    earlier run, which count; ``each_round`` gets all there is after every round.
    """
    taken: dict[Name, dict[int, float]] = {name: {**(kept or {}).get(name, {})} for name in calls}
    read = partial(clock, device=device)
    costs = {name: _warmed_up(partial(read, call), device) for name, call in calls.items()}
    first = next(iter(costs.values()))
    slow = {name for name, cost in costs.items() if cost > SLOW * first}
    whole = sum(cost for name, cost in costs.items() if name not in slow)
    spare = seconds - SLOW_ROUNDS * sum(costs[name] for name in slow)
    count = max(MIN_ROUNDS, min(MAX_ROUNDS, int(spare / max(whole, 1e-9))))
    done = max((len(rounds) for rounds in taken.values()), default=0)
    slow_turns = {round(i * (count - 1) / (SLOW_ROUNDS - 1)) for i in range(SLOW_ROUNDS)}
    for number in range(done, count):
        order = [name for name in shuffled(list(calls), number) if name not in slow or number in slow_turns]
        for name, once in one_round(calls, order, read).items():
            taken[name][number] = once
        if each_round is not None:
            each_round(taken)
    return taken


def _warmed_up(call: Step, device: torch.device) -> float:
    """The least of the first calls; short ones have more, as private models are checked in their 2nd, 4th, 8th.

    A call that compiles is far longer than those after it. It leaves them their time, and is not the last one.
    """
    taken: list[float] = []
    while (
        len(taken) < WARM_UP
        or COMPILES * taken[-1] < taken[-2]
        or (len(taken) < MOST_WARM_UP and _of_steps(taken) < WARM_UP_SECONDS)
    ):
        taken.append(timed(call, device))
    return min(taken)


def _of_steps(taken: Sequence[float]) -> float:
    """Seconds of those that did nothing but a step."""
    return sum(once for once in taken if once < COMPILES * min(taken))


def turns_of(
    calls: dict[str, Step],
    device: torch.device,
    seconds: float,
    kept: Mapping[str, Mapping[int, float]] | None = None,
    each_round: Callable[[dict[str, dict[int, float]]], None] | None = None,
    clock: Clock = timed,
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """:func:`in_turns` for calls that may fail: the seconds of those that live, and why each of the others does not.

    A call that failed, say for memory that it has beside fewer others only, is taken out of ``calls``, so that what it
    holds is free; the others go on. Where nobody can tell whose failure it is, it is everybody's.
    """
    taken = {name: {**(kept or {}).get(name, {})} for name in calls}
    reasons: dict[str, str] = {}

    def keep(rounds: dict[str, dict[int, float]]) -> None:
        taken.update(rounds)
        if each_round is not None:
            each_round(rounds)

    while calls:
        blamed: list[str] = []

        def read(call: Step, device: torch.device, blamed: list[str] = blamed) -> float:
            try:
                return clock(call, device)  # a GPU's failure comes when the clock waits for it
            except Exception:
                blamed += [name for name, one in calls.items() if one is call]
                raise

        try:
            return in_turns(calls, device, seconds, taken, keep, read), reasons
        except Exception as failure:  # whatever it is, it is a row of the table
            reason = said(failure)
        lost = is_lost(device)  # then the others are not to blame for what they cannot do any more
        for name in blamed or ([] if lost else list(calls)):
            reasons[name] = reason
            del calls[name], taken[name]
        if lost:
            break
        free_memory()
    return taken, reasons


def one_round(calls: Mapping[Name, Step], order: Sequence[Name], read: Callable[[Step], float]) -> dict[Name, float]:
    """Seconds of one call each, in this order."""
    return {name: read(calls[name]) for name in order}


def shuffled(items: Sequence[Any], number: int) -> list[Any]:
    """The items in the order of round ``number``, the same in every run."""
    return random.Random(number).sample(items, len(items))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80, with the count behind them."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80), "n": len(values)}


def paired_ratios(rounds: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Time over the base's time in the same round, where both have one: what disturbs a whole round cancels."""
    return [seconds / base[number] for number, seconds in rounds.items() if number in base]


def why_not(attempt: Callable[[], Any]) -> str | None:
    """What an attempt died of, in a line, and None if it lives; memory that it held is free again."""
    try:
        attempt()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return None
    except Exception as failure:  # whatever it is, it is a row of the table
        reason = said(failure)
    free_memory()
    return reason


def said(failure: BaseException) -> str:
    """A failure in a line."""
    words = " ".join(str(failure).split())
    other = "can't allocate memory" in words or "CUDA error: out of memory" in words
    if other or isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {words[:160]}"
    return f"{type(failure).__name__}: {words[:300]}"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(torch.AcceleratorError):  # of a device that is lost: still_there tells
            torch.cuda.empty_cache()


def still_there(device: torch.device) -> None:
    """To be asked when the rows are saved: after some errors a GPU does nothing more for this process.

    Raises:
        torch.AcceleratorError: it does not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_lost(device: torch.device) -> bool:
    try:
        still_there(device)
    except torch.AcceleratorError:
        return True
    return False


def spread(figure: Mapping[str, float], scale: float = 1.0, digits: str = ".2f") -> str:
    """``median (p20–p80)``."""
    median, p20, p80 = (format(scale * figure[name], digits) for name in ("median", "p20", "p80"))
    return f"{median} ({p20}–{p80})"


def prefixed(value: float, unit: str) -> str:
    """Three digits with the unit's prefix."""
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G")) if value >= s), (1e6, "M"))
    return f"{value / scale:.3g} {prefix}{unit}"
