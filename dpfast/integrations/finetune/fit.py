"""How many samples fit in memory at once: ``--physical-batch-size auto``."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpfast.integrations.finetune.config import FinetuneError
from dpfast.native import allocator

MOST_ON_CPU = 64  # larger ones are no faster there
SHARE = 0.7  # of the memory that is available now
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or a GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def fitting_size(attempt: Callable[[int], None], most: int, device: torch.device, optimizer_bytes: int) -> int:
    """The largest power of two of samples that fits, at most ``most`` (rounded up to one).

    Args:
        attempt: forward and backward of that many made-up samples of the longest length, cleared up afterwards.
        most: more are never wanted.
        device: where.
        optimizer_bytes: what the optimizer will hold besides, from its first step on.

    Raises:
        FinetuneError: not even one sample fits.
    """
    if device.type == "cuda":
        found = _by_trying(attempt, most, device, optimizer_bytes)
    else:
        found = _by_measuring(attempt, min(most, MOST_ON_CPU), optimizer_bytes)
    if found < 1:
        raise FinetuneError(
            "not even one sample of the longest length fits in memory: shorten --context (with --truncate), or use "
            "--gradient-checkpointing, --bf16 or --lora-rank"
        )
    return found


def _by_trying(attempt: Callable[[int], None], most: int, device: torch.device, optimizer_bytes: int) -> int:
    ballast = torch.empty(optimizer_bytes, dtype=torch.uint8, device=device)
    found, size = 0, 1
    try:
        while True:
            try:
                attempt(size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
            found = size
            if size >= most:
                break
            size *= 2
    finally:
        del ballast
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _by_measuring(attempt: Callable[[int], None], most: int, optimizer_bytes: int) -> int:
    import psutil

    few = min(4, most)
    attempt(few)  # once for what is only allocated once
    one, several = _growth(lambda: attempt(1)), _growth(lambda: attempt(few))
    free = SHARE * psutil.virtual_memory().available - optimizer_bytes
    # Freed pages are used again, so that growth understates: a sample never takes less than its share of all.
    each = max((several - one) / max(1, few - 1), several / few, 1.0)
    size = 1
    while 2 * size * each <= free and size < most:
        size *= 2
    return size if each <= free else 0


def _growth(job: Callable[[], Any]) -> int:
    """The most that resident memory grows by during ``job``, seen every millisecond."""
    import psutil

    gc.collect()
    allocator.give_back()  # else growth would not show what is served from free memory
    process = psutil.Process()
    before = process.memory_info().rss
    with _watching(process) as seen:
        job()
    return max(0, seen[0] - before)


@contextmanager
def _watching(process: Any) -> Iterator[list[int]]:
    seen, done = [process.memory_info().rss], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], process.memory_info().rss)
            time.sleep(1e-3)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
