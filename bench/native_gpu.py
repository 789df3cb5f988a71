"""The CUDA ops beside a device-to-device copy: `python -m bench.native_gpu`.

The floor of every op is the bytes that it must move: each input read once, each output written once. The copy of the
same run says how long that takes, so the figure to look at is the last column: the op's bytes in a second over the
copy's. All cases take turns in every round; device events time each call; buffers are larger than the L2 cache and take
turns. Before anything is timed, its result is compared with the CPU library's.

Without opacus, which importing dpfast needs, the libraries are built or loaded on their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure

KEY = list(range(1, 9))
FAST, SECURE, NONE = (1.0, 0.0), (1.0, 2.0**-24), (0.0, 0.0)  # std, grid
SETS = 3  # of buffers


def load_libraries() -> None:
    """``torch.ops.dpfast`` for the CPU and for CUDA."""
    try:
        from dpfast import native
    except ModuleNotFoundError as error:
        print(f"({error}: the libraries are built on their own)")
        path = measure.ROOT / "dpfast/native/build.py"
        spec = importlib.util.spec_from_file_location("dpfast_native_build", path)
        assert spec and spec.loader
        build = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = build
        spec.loader.exec_module(build)
        arch = "{}{}".format(*torch.cuda.get_device_capability())
        for device in build.DEVICES:
            plan = build.plan(device, **({"arches": (arch,)} if device == "cuda" else {}))
            library = measure.ROOT / "build/bench" / build.library_name(device)
            torch.ops.load_library(str(build.run(plan, library, library.parent / device).library))
        return
    for device in ("cpu", "cuda"):
        if not native.available(device):
            raise SystemExit(f"the {device} library is not there: {native.why_not(device)}")


@dataclass
class Case:
    name: str
    bytes: int  # read and written
    call: Callable[[], Any]


def turns(make: Callable[[], Any]) -> Iterator[Any]:
    """SETS sets of buffers, one after the other, for ever."""
    sets = [make() for _ in range(SETS)]
    while True:
        yield from sets


def noise_cases(n: int) -> list[Case]:
    ops, steps = torch.ops.dpfast, iter(range(1 << 30))
    buffers = turns(lambda: (torch.randn(n, device="cuda"), torch.empty(n, device="cuda")))
    half = turns(lambda: torch.empty(n, dtype=torch.bfloat16, device="cuda"))
    # the parameters of a small transformer, one launch
    sizes = [768 * 768, 768, 768 * 3072, 3072, 768, 768] * (n // (768 * (768 + 3072 + 7)))
    many = turns(
        lambda: (
            torch.randn(sum(sizes), device="cuda").split(sizes),
            torch.empty(sum(sizes), device="cuda").split(sizes),
        )
    )

    def noisy(mode: tuple[float, float], summed: Any, grads: Any) -> None:
        places = list(range(len(summed))), [0] * len(summed)
        ops.noisy_grad_(list(summed), list(grads), *places, KEY, next(steps), *mode, 0.5)

    def pair() -> tuple[list[Tensor], list[Tensor]]:
        x, y = next(buffers)
        return [x], [y]

    def copy() -> None:
        x, y = next(buffers)
        y.copy_(x)

    def torch_noise() -> None:
        x, y = next(buffers)
        torch.randn(n, out=y).add_(x).mul_(0.5)

    return [
        Case("device-to-device copy", 8 * n, copy),
        Case("torch: randn, add, mul", 8 * n, torch_noise),
        Case("noisy_grad_ without noise", 8 * n, lambda: noisy(NONE, *pair())),
        Case("noisy_grad_ fast", 8 * n, lambda: noisy(FAST, *pair())),
        Case("noisy_grad_ fast, in place", 8 * n, lambda: noisy(FAST, *(pair()[:1] * 2))),
        Case("noisy_grad_ fast, to bfloat16", 6 * n, lambda: noisy(FAST, pair()[0], [next(half)])),
        Case(f"noisy_grad_ fast, {len(sizes)} tensors", 8 * sum(sizes), lambda: noisy(FAST, *next(many))),
        Case("noisy_grad_ secure", 8 * n, lambda: noisy(SECURE, *pair())),
    ]


def update_cases(n: int) -> list[Case]:
    ops, steps = torch.ops.dpfast, iter(range(1 << 30))
    buffers = turns(lambda: [torch.rand(n, device="cuda") for _ in range(4)])  # summed, parameter, mean, square

    def theirs() -> Callable[[], Any]:
        param = torch.nn.Parameter(torch.randn(n, device="cuda"))
        param.grad = torch.randn(n, device="cuda")
        return torch.optim.AdamW([param], fused=True).step

    fused = turns(theirs)

    def noise(mode: tuple[float, float]) -> tuple:
        return [0], [0], KEY, next(steps), *mode, 1e-3

    def adamw(mode: tuple[float, float]) -> None:
        x, p, mean, square = next(buffers)
        rule = (1e-3, 0.9, 0.999, 1e-8, 0.01, 3.0, True, False, 0, [1, 2])
        ops.noisy_adam_([x], [x], [p], [mean], [square], [], [], *noise(mode), *rule)

    def sgd(mode: tuple[float, float]) -> None:
        x, p, momentum, _ = next(buffers)
        rule = (1e-3, 0.9, 0.0, 0.01, False, False, False, 0, [1, 2])
        ops.noisy_sgd_([x], [x], [p], [momentum], [], *noise(mode), *rule)

    return [
        Case("torch: fused AdamW, without noise", 28 * n, lambda: next(fused)()),
        Case("noisy_adam_ (AdamW) fast", 32 * n, lambda: adamw(FAST)),
        Case("noisy_adam_ (AdamW) secure", 32 * n, lambda: adamw(SECURE)),
        Case("noisy_sgd_ with momentum, fast", 24 * n, lambda: sgd(FAST)),
    ]


def sample_cases(n: int) -> list[Case]:
    """B = 32 samples of a weight [768, 768]; G [32, 512, d]; ids as frequent as words are."""
    ops, B = torch.ops.dpfast, 32
    samples = turns(lambda: torch.randn(B, n // B, device="cuda"))
    G = turns(lambda: torch.randn(B, 512, n // B // 512, device="cuda"))
    factors = torch.rand(B, device="cuda")
    words = torch.multinomial(1 / torch.arange(1.0, 30_001), B * 512, replacement=True).view(B, 512).cuda()
    d = n // B // 512
    return [
        Case("squared_norms", 4 * n, lambda: ops.squared_norms([next(samples)])),
        Case("weighted_sums", 4 * n + 4 * n // B, lambda: ops.weighted_sums([next(samples)], factors)),
        Case("sum_positions", 4 * n, lambda: ops.sum_positions(next(G))),
        Case("embedding_squared_norm", 4 * n, lambda: ops.embedding_squared_norm(words, next(G))),
        Case("embedding_sum", 4 * n + 4 * 30_000 * d, lambda: ops.embedding_sum(words, next(G), factors, 30_000)),
    ]


def check() -> None:
    """The timed modes are right: to the bit as on the CPU."""
    for mode in (NONE, FAST, SECURE):
        x = torch.randn(1_000_003)
        got, want = torch.full_like(x, torch.nan, device="cuda"), torch.empty_like(x)
        torch.ops.dpfast.noisy_grad_([x], [want], [3], [7], KEY, 11, *mode, 0.5)
        torch.ops.dpfast.noisy_grad_([x.cuda()], [got], [3], [7], KEY, 11, *mode, 0.5)
        if not torch.equal(got.cpu(), want):
            raise SystemExit(f"wrong: {(got.cpu() != want).sum()} of {len(x)} elements differ from the CPU's at {mode}")


def run(cases: list[Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round; the first three rounds only warm up. Rounds are queued as a whole, so that
    the device does not wait for the host."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for number in range(-3, rounds):
        timed = []
        for case in measure.rotated(cases, number):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            case.call()
            end.record()
            timed.append((case.name, start, end))
        torch.cuda.synchronize()
        if number >= 0:
            for name, start, end in timed:
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=1 << 27, help="of the noise's tensors; updates have a quarter")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to measure")
    load_libraries()
    check()
    properties = torch.cuda.get_device_properties(0)
    device = {
        name: getattr(properties, name) for name in ("name", "multi_processor_count", "L2_cache_size", "total_memory")
    }
    record: dict[str, Any] = {
        "machine": measure.machine_record(),
        "device": device | {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda},
        "rounds": arguments.rounds,
        "figures": [],
    }
    rows, copy = [], 0.0
    for make, n in (
        (noise_cases, arguments.elements),
        (update_cases, arguments.elements // 4),
        (sample_cases, arguments.elements // 2),
    ):
        cases = make(n)
        for twice in (1, 2):  # the same twice: what differs less than these two is noise
            for name, seconds in run(cases, arguments.rounds).items():
                case = next(case for case in cases if case.name == name)
                rate = measure.percentiles([case.bytes / s / 1e12 for s in seconds])
                copy = copy or rate["median"]
                milliseconds = measure.percentiles([s * 1e3 for s in seconds])
                share = rate["median"] / copy
                record["figures"].append(
                    {"name": name, "run": twice, "elements": n, "bytes": case.bytes, "ms": milliseconds}
                    | {"terabytes_per_second": rate, "of_copy": share}
                )
                rows.append(
                    [name, str(twice), f"{milliseconds['median']:.3f}", f"{rate['median']:.2f}", f"{share:.0%}"]
                )
        del cases
        torch.cuda.empty_cache()
    print(f"{device['name']}, {device['multi_processor_count']} multiprocessors")
    print(measure.markdown_table(["what", "run", "ms", "TB/s", "of the copy"], rows))
    path = arguments.out / f"native_gpu-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
