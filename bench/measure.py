"""What every measurement shares: peak memory, percentiles, ratios, the machine's record, a Markdown table.

As a program (`python -m bench.measure module:function '{"argument": 1}'`) it measures the memory growth of one job in
a process of its own and prints it as JSON; `growth()` starts that program.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20

# One allocator for all: with a fixed threshold every tensor of 64 KiB or more goes back to the system when it is
# freed, so resident memory follows what is alive. (glibc otherwise raises the threshold as it runs.)
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024),
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "1000000",
}

Step = Callable[[], object]


# ---------------------------------------------------------------- memory


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory can only be measured on Linux")
    return int(found[1]) * 1024


def _reset_peak() -> None:
    """Set VmHWM, the peak, to the present size."""
    Path("/proc/self/clear_refs").write_text("5")


def _tidy() -> None:
    """Give freed memory back to the system, so that a later reading does not count it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def growth_here(job: Callable[[bool], Callable[[], Step]], steps: int = 2) -> dict[str, Any]:
    """Growth of resident memory over the first two steps of a job, in this process.

    `job(small)` builds the model and the data and returns `start`; `start()` makes the model private and returns the
    step. The job first runs once with `small=True` and is thrown away, so that the library code it touches is already
    resident. The reading before is taken before `start()`, so whatever a method allocates when it is set up counts as
    well, and so does what it does only once, in its first step: a job must fit then too. Pages of files (the libraries'
    code, which the system may drop and load again at any time) are left out.
    """
    job(True)()()
    _tidy()
    start = job(False)
    _tidy()
    before = _status("RssAnon")
    _reset_peak()
    step = start()
    growths = []
    for _ in range(steps):
        step()
        growths.append(_status("VmHWM") - _status("RssFile") - _status("RssShmem") - before)
        _reset_peak()
    return {"before_bytes": before, "growth_bytes": max(growths), "growth_by_step_bytes": growths}


def growth(function: str, **arguments: Any) -> dict[str, Any]:
    """`growth_here(module:function(**arguments))` in a fresh process; a process that dies is a row, not a crash."""
    if sys.platform != "linux":
        return {"not_measured": "peak memory is measured on Linux only"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.measure", function, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -9:
        return {"error": "killed: out of memory"}
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"exit status {done.returncode}: {last}"}


def memory_ratio(memory: dict[str, Any], base: dict[str, Any]) -> float | None:
    """Growth over the base's growth; None where one of the two has none."""
    if "growth_bytes" not in memory or "growth_bytes" not in base:
        return None
    return memory["growth_bytes"] / base["growth_bytes"]


# ---------------------------------------------------------------- time


def timed(step: Step) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def rotated(items: Sequence[Any], turns: int) -> list[Any]:
    """The items, starting at another one each round: no method always runs after the same neighbour."""
    turns %= max(len(items), 1)
    return [*items[turns:], *items[:turns]]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80, with the count behind them."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80), "n": len(values)}


def paired_ratios(rounds: dict[int, float], base: dict[int, float]) -> list[float]:
    """Time over the base's time in the same round: what disturbs a whole round cancels."""
    return [seconds / base[number] for number, seconds in rounds.items()]


# ---------------------------------------------------------------- records


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else (platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says, or None outside a clone."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine_record() -> dict[str, Any]:
    """All that a reader needs to judge a figure, or to repeat it."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(psutil.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "opacus", "dpfast", "numpy")},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def main() -> None:
    function, arguments = sys.argv[1:]
    module, name = function.split(":")
    torch.set_num_threads(2)
    job = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    print(json.dumps(growth_here(job)))


if __name__ == "__main__":
    main()
