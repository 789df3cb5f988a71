"""What this device can do at most, measured in the same run: bytes a second of a copy, flops a second of a product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import Step, in_turns, percentiles, prefixed, why_not

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes, far more than any cache holds
SIDE = {"cpu": 1536, "cuda": 8192}  # of a square product
SECONDS = {"cpu": 2.0, "cuda": 0.5}


def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The two roofs: ``bytes_per_second`` (read and written) and ``flops_per_second``; or why they have none."""
    found: dict[str, Any] = {}
    reason = why_not(lambda: found.update(_peaks(device, dtype)))
    return found if reason is None else {"error": reason}


def _peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The best of a few rounds."""
    n = COPIED[device.type] // dtype.itemsize
    source, target = torch.ones(n, dtype=dtype, device=device), torch.empty(n, dtype=dtype, device=device)
    side = SIDE[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    calls: dict[str, Step] = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    taken = in_turns(calls, device, SECONDS[device.type])
    copied, multiplied = (min(taken[name].values()) for name in calls)  # the most that it can do
    return {
        "bytes_per_second": 2 * source.nbytes / copied,
        "flops_per_second": 2 * side**3 / multiplied,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: percentiles(list(rounds.values())) for name, rounds in taken.items()},
    }


def in_words(roof: Mapping[str, Any]) -> str:
    if "error" in roof:
        return roof["error"]
    copied, multiplied = prefixed(roof["bytes_per_second"], "B/s"), prefixed(roof["flops_per_second"], "FLOP/s")
    return f"a copy {copied}, a {roof['dtype']} matrix product {multiplied}"


def flops_of(step: Step) -> int:
    """Of the matrix products of one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
