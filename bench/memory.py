"""Peak memory: growth of resident memory on a CPU, one fresh process a figure; the allocator's count on a GPU."""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.measure import THREADS, Step, free_memory, said

# One allocator for all: with a fixed threshold every tensor of 64 KiB or more goes back to the system when it is
# freed, so resident memory follows what is alive. (glibc otherwise raises the threshold as it runs.)
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024),
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "1000000",
}
PRELOADED = ["torch", "opacus", "dpfast", "bench.workloads", "bench.methods"]  # loaded once, before any thread is there

Job = Callable[[bool], Callable[[], Step]]


def growth_here(job: Job, steps: int = 2) -> dict[str, Any]:
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
    figures = {"before_bytes": before, "growth_bytes": max(growths), "growth_by_step_bytes": growths}
    return figures | _plan_of(step)


def growth(function: str, **arguments: Any) -> dict[str, Any]:
    """`growth_here(module:function(**arguments))` in a fresh process; a process that dies is a row, not a crash."""
    if sys.platform != "linux":
        return {"not_measured": "peak memory is measured on Linux only"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, function, arguments))
    with allocator():
        process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = {}
    process.join()
    if found:
        return found
    killed = process.exitcode == -signal.SIGKILL
    return {"error": "out of memory: killed by the system" if killed else f"exit status {process.exitcode}"}


@contextmanager
def allocator() -> Iterator[None]:
    """The environment of processes whose memory is measured."""
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _measure(result: Connection, function: str, arguments: Mapping[str, Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # warnings would break the progress bars
    torch.set_num_threads(THREADS)
    module, name = function.split(":")
    try:
        result.send(growth_here(getattr(importlib.import_module(module), name)(**arguments)))
    except Exception as failure:  # a row of the table, in its own words
        result.send({"error": said(failure)})


def peak_on_gpu(job: Job, device: torch.device, steps: int = 2) -> dict[str, Any]:
    """As :func:`growth_here`, counted by the CUDA allocator: exact, so no process of its own is needed.

    Raises:
        torch.OutOfMemoryError: and whatever else the job raises.
    """
    job(True)()()  # rates that a planner measures, and what libraries keep for themselves, are no method's own
    free_memory()
    start = job(False)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step = start()
    for _ in range(steps):
        step()
    torch.cuda.synchronize(device)
    peak, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return {"before_bytes": before, "growth_bytes": peak - before, "kept_bytes": kept} | _plan_of(step)


def _plan_of(step: Step) -> dict[str, Any]:
    """What a step of dpfast chose, so that it is timed as it is measured here."""
    plan = getattr(step, "plan", None)
    return {} if plan is None else {"plan": plan}


def ratio(memory: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Growth over the base's growth; None where one of the two has none."""
    if "growth_bytes" not in memory or "growth_bytes" not in base:
        return None
    return memory["growth_bytes"] / base["growth_bytes"]


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
