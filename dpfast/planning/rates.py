"""How fast this device is at what the planner chooses between, measured once and kept on disk.

Rates lie beside the compiled libraries, in ``rates-*.json``, named by device, torch's version and the backends in use.
Where none can be measured or kept, those of :mod:`dpfast.planning.unmeasured` serve: two processes never differ in
their choices for having measured at different times. ``explain`` and ``python -m dpfast doctor`` say so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dpfast import ops
from dpfast.native import allocator, build
from dpfast.native import cache as libraries
from dpfast.planning.clock import on_device
from dpfast.planning.unmeasured import Rates, unmeasured

_log = logging.getLogger("dpfast")
EDITION = {"cpu": 5, "cuda": 4}  # another one where other ops are measured, in another way, or ours have become faster
MAY_LACK = ("tile", "lines", "unmeasured")  # rates that are kept have these or None; of the last, only None


def rates_of(device: torch.device, dtype: torch.dtype, patches: bool) -> Rates:
    """The rates for products of ``dtype`` on ``device``, of patches of a convolution or of a linear layer's sides."""
    if device.type not in EDITION:
        return unmeasured(device.type, dtype, patches, f"nothing is known of {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        return unmeasured("cuda", dtype, patches, "no CUDA device is here")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return unmeasured("cuda", dtype, patches, "nothing can be measured while a CUDA graph is captured")
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _rates(device.type, index, dtype, patches)


@cache
def _rates(kind: str, index: int | None, dtype: torch.dtype, patches: bool) -> Rates:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    try:
        path = file_of(device, dtype, patches)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # first, to see whether it can be kept
                start = time.perf_counter()
                json.dump(asdict(measured(device, dtype, patches)), file)
                file.flush()
                with suppress(FileExistsError):  # of several processes the first one's rates stay
                    os.link(file.name, path)
            took = time.perf_counter() - start
            _log.info(
                "dpfast measured %s products of %s on %s in %.1f s: %s", _what(patches), dtype, device, took, path
            )
        return _checked(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, torch.OutOfMemoryError, build.BuildError) as error:
        rates = unmeasured(kind, dtype, patches, f"measured ones cannot be had: {error}")
        _log.info("dpfast plans with %s", rates.unmeasured)
        return rates


def file_of(device: torch.device, dtype: torch.dtype, patches: bool) -> Path:
    """Where the measured rates are, or will be."""
    name = f"rates-{device.type}-{_what(patches)}-{str(dtype).removeprefix('torch.')}-{_key(device)}.json"
    return libraries.folder() / name


def said_of(device: torch.device) -> tuple[str, str]:
    """For ``doctor``, without measuring: whether the rates of a device are measured, and which, or what serves."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "predicted", str(rates_of(device, torch.bfloat16, False).unmeasured)
    try:
        folder = file_of(device, torch.float32, False).parent
        kept = sorted(folder.glob(f"rates-{device.type}-*-{_key(device)}.json"))
    except build.BuildError as error:
        return "not measured", f"built-in or predicted rates serve, as there is no folder: {error}"
    if not kept:
        return "not measured", f"the first plan measures those of its dtype, and keeps them in {folder}"
    return "measured", f"{', '.join(' '.join(path.stem.split('-')[2:4]) for path in kept)}, in {folder}"


def _what(patches: bool) -> str:
    return "convolution" if patches else "linear"


def _checked(fields: dict[str, Any]) -> Rates:
    """Rates as a file has them, or a ValueError or TypeError: a plan must not fail for them in a backward pass."""
    rates = Rates(**fields)
    numbers = [value for name, value in vars(rates).items() if not (name in MAY_LACK and value is None)]
    if not all(type(value) in (int, float) and 0 < value < math.inf for value in numbers):
        raise ValueError(f"rates that are no positive numbers: {fields}")
    return rates


def measured(device: torch.device, dtype: torch.dtype, patches: bool) -> Rates:
    """Rates from ops on random numbers, some hundred milliseconds."""
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return (_of_patches if patches else _of_linear)(device, dtype)


def _of_linear(device: torch.device, dtype: torch.dtype) -> Rates:
    B, T, d, p = (8, 1024, 2048, 2048) if device.type == "cuda" else (8, 128, 512, 512)
    A = torch.randn(B, 1, T, d, device=device).to(dtype)
    G = torch.randn(B, 1, T, p, device=device).to(dtype)
    factors = torch.rand(B, device=device)
    product = 2.0 * B * T * d * p

    tile = product / seconds(lambda: ops.tile_squared_norm(A, G), device) if ops.has_tiles(A, G) else None
    more = 1 if device.type == "cuda" else 4  # bounds are made of all layers at once: they should count for little
    sides = [(torch.cat([A] * more), torch.cat([G] * more))]
    gram = more * B * T * T * (d + p) / seconds(lambda: ops.ghost_squared_norms(sides), device)
    whole = product / seconds(lambda: ops.clipped_weight_gradient(A, G, factors), device)
    sample = product / seconds(lambda: ops.grad_samples(A, G), device)
    return Rates(gram, tile, sample, whole, *_memory(device), 1 if ops.grad_samples(A, G)[1] is not None else 2)


def _of_patches(device: torch.device, dtype: torch.dtype) -> Rates:
    B, C, p, side = (64, 128, 128, 32) if device.type == "cuda" else (16, 64, 128, 12)
    x = torch.randn(B, C, side, side, device=device).to(dtype)
    G = torch.randn(B, p, side, side, device=device).to(dtype)
    weight = torch.empty(p, C, 3, 3, dtype=dtype, device=device)
    geometry = ops.Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    sides = (x, G, weight, geometry)
    T, d = side**2, C * 9
    product = 2.0 * B * T * d * p

    gram = B * T * T * (d + p) / seconds(lambda: ops.convolution_squared_norm(*sides, B), device)
    lines = _lines(gram, device, dtype)
    whole = product / seconds(lambda: ops.convolution_clipped_gradient(*sides, torch.ones(B, device=device)), device)
    sample = product / seconds(lambda: ops.convolution_grad_samples(*sides, B), device)
    has_norms = ops.convolution_grad_samples(*sides, B)[1] is not None
    return Rates(gram, None, sample, whole, *_memory(device), 1 if has_norms else 2, lines)


def _lines(gram: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """From a ghost norm over few positions: what it takes beyond its products."""
    B, C, p, side = 256, 32, 64, 5  # so many that the call itself counts for little
    x = torch.randn(B, C, side, side, device=device).to(dtype)
    G = torch.randn(B, p, side, side, device=device).to(dtype)
    weight = torch.empty(p, C, 3, 3, dtype=dtype, device=device)
    geometry = ops.Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    T, d = side**2, C * 9
    taken = seconds(lambda: ops.convolution_squared_norm(x, G, weight, geometry, B), device)
    rest = taken - B * T * T * (d + p) / gram
    return B * T * (d + p) / rest if rest > 0 else None


def _memory(device: torch.device) -> tuple[float, float, float]:
    """Bytes a second into new memory and through a weighted sum, far more than caches hold; seconds of the least op."""
    n = 1 << (22 if device.type == "cuda" else 20)
    samples, factors = torch.randn(16, n, device=device), torch.rand(16, device=device)
    write = samples.nbytes / seconds(lambda: torch.ones_like(samples), device)
    read = samples.nbytes / seconds(lambda: ops.weighted_sum(samples, factors), device)
    return write, read, seconds(lambda: ops.weighted_sum(samples[:, :1], factors), device)


def seconds(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The least of a few runs, after one that is not counted."""
    call()
    return min(on_device(call, device) for _ in range(times))


def _key(device: torch.device) -> str:
    """Of what decides the rates: device, threads, versions, backends, the allocator and what is measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {_processor()}"
    kept = device.type == "cpu" and allocator.keep_freed_memory() is None  # new memory then costs less
    said = [
        name,
        torch.get_num_threads(),
        torch.__version__,
        sorted(map(str, ops.backends())),
        kept,
        EDITION[device.type],
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
