"""How long a call takes a device: what rates, ``explain`` and the bench's kernels are timed with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LEAD = 2_000_000  # cycles that a GPU waits before a call, about a millisecond: so far the host runs ahead of it


def on_device(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call keeps a GPU busy; on a CPU, seconds on the wall.

    A GPU first waits for :data:`LEAD` cycles. The host queues the call's operators meanwhile, so that an op of many
    small ones is charged what they take the GPU, and not what Python takes to launch them.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LEAD)
        begins.record()
        call()
        ends.record()
        torch.cuda.synchronize(device)
    return begins.elapsed_time(ends) / 1e3
