"""What this device can do at most, measured in the same run: bytes a second of memory, flops a second of a product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import Step, in_turns, percentiles, prefixed, why_not
from dpfast.planning.clock import on_device

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes of each of two tensors, far more than any cache holds
SIDE = {"cpu": 1536, "cuda": 8192}  # of a square product
SECONDS = {"cpu": 2.0, "cuda": 0.5}


def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The two roofs: ``bytes_per_second`` (read and written) and ``flops_per_second``; or why they have none.

    ``passes`` has the bytes a second of each way through memory, of which the roof is the highest: a CPU reads what it
    writes anew before it writes it, which a copy's bytes do not count, so that whoever only reads, or writes in place,
    is faster than a copy.
    """
    found: dict[str, Any] = {}
    reason = why_not(lambda: found.update(_peaks(device, dtype)))
    return found if reason is None else {"error": reason}


def _peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The best of a few rounds; ways through memory are of float32, for which every pass has vector code."""
    source, target = (torch.ones(COPIED[device.type] // 4, device=device) for _ in range(2))
    side = SIDE[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    passes: dict[str, Step] = {  # each moves twice a tensor's bytes
        "copy": lambda: target.copy_(source),
        "read only": lambda: torch.dot(source, target),
        "in place": lambda: target.neg_(),
    }
    calls: dict[str, Step] = {**passes, "product": lambda: torch.mm(a, b, out=out)}
    taken = in_turns(calls, device, SECONDS[device.type], clock=on_device)
    least = {name: min(rounds.values()) for name, rounds in taken.items()}  # the most that it can do
    rates = {name: 2 * source.nbytes / least[name] for name in passes}
    return {
        "bytes_per_second": max(rates.values()),
        "passes": rates,
        "flops_per_second": 2 * side**3 / least["product"],
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: percentiles(list(rounds.values())) for name, rounds in taken.items()},
    }


def in_words(roof: Mapping[str, Any]) -> str:
    if "error" in roof:
        return roof["error"]
    passes = roof.get("passes", {"copy": roof["bytes_per_second"]})  # old records have a copy only
    highest = max(passes, key=passes.__getitem__)
    more = "" if highest == "copy" else f" ({highest} {prefixed(passes[highest], 'B/s')})"
    multiplied = prefixed(roof["flops_per_second"], "FLOP/s")
    return f"a copy {prefixed(passes['copy'], 'B/s')}{more}, a {roof['dtype']} matrix product {multiplied}"


def flops_of(run: Step) -> int:
    """Of the matrix products of one call, as torch counts them; attention in full, also where it is causal."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
