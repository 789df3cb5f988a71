"""The compiled CPU ops beside torch's: `python -m bench.native_cpu`.

All in one process, taking turns, two threads; a figure is the median of the rounds' ratios. Inputs are random, larger
than any cache. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from dpfast import native, ops

THREADS = 2
KEY = (1, 2, 3, 4, 5, 6, 7, 8)
GRID = 2.0**-24


def noise_cases(elements: int) -> dict[str, Callable[[], Any]]:
    """Noise and scale of one float32 tensor."""
    x = torch.randn(elements)
    step = iter(range(1 << 30))

    def ours(grid: float) -> None:
        ops.noisy_grad_([x], [x], [0], ops.Noise(KEY, next(step), 1.0, grid, 0.5))

    return {
        "torch: randn_like, add": lambda: x.add_(torch.randn_like(x)),
        "noisy_grad_ fast": lambda: ours(0.0),
        "noisy_grad_ secure": lambda: ours(GRID),
    }


def update_cases(elements: int) -> dict[str, Callable[[], Any]]:
    """AdamW on one float32 parameter; ours also makes the noise, scales, and leaves the gradient in ``grad``."""
    param = torch.nn.Parameter(torch.randn(elements))
    param.grad = torch.randn(elements)
    theirs = torch.optim.AdamW([param], fused=True)
    tensors: list[Tensor] = [torch.randn(elements), torch.randn(elements), torch.rand(elements), torch.rand(elements)]
    summed, mine, mean, square = tensors
    step = iter(range(1 << 30))

    def ours() -> None:
        rule = ops.Adam(1e-3, 0.9, 0.999, 1e-8, 0.01, t=3.0, decoupled=True)
        noise = ops.Noise(KEY, next(step), 1.0, 0.0, 1e-3)
        ops.noisy_step_(rule, [mine], [summed], [summed], [[mean], [square], []], [], [0], noise)

    return {"torch: fused AdamW": theirs.step, "noisy_step_ AdamW": ours}


def run(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of every case in every round, the first of which only warms up."""
    seconds: dict[str, dict[int, float]] = {name: {} for name in cases}
    for number in range(-1, rounds):
        for name in measure.rotated(list(cases), number):
            taken = measure.timed(cases[name])
            if number >= 0:
                seconds[name][number] = taken
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=64 << 20, help="of the noise's tensor; AdamW has a quarter")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if not native.available("cpu"):
        raise SystemExit(f"the compiled library is not there: {native.why_not('cpu')}")
    rows, record = [], {"machine": measure.machine_record(), "rounds": arguments.rounds, "figures": []}
    for make, elements in ((noise_cases, arguments.elements), (update_cases, arguments.elements // 4)):
        seconds = run(make(elements), arguments.rounds)
        base = next(iter(seconds))
        for name, mine in seconds.items():
            ratio = measure.percentiles(measure.paired_ratios(mine, seconds[base]))
            nanoseconds = measure.percentiles([s / elements * 1e9 for s in mine.values()])
            rows.append([name, f"{nanoseconds['median']:.3f}", f"{ratio['median']:.3f}"])
            figure = {"name": name, "elements": elements, "ns_per_element": nanoseconds, "over": base, "ratio": ratio}
            record["figures"].append(figure)
    fast, secure = (
        next(f for f in record["figures"] if f["name"] == f"noisy_grad_ {mode}") for mode in ("fast", "secure")
    )
    print(measure.markdown_table(["what", "ns/element", "over torch"], rows))
    print(f"fast: {1 / fast['ratio']['median']:.1f} times as fast as torch")
    print(f"secure over fast: {secure['ratio']['median'] / fast['ratio']['median']:.2f}")
    path = arguments.out / f"native_cpu-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
