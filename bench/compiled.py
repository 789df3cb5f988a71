"""What torch.compile does for the private step, and for the one without privacy: `python -m bench.compiled`.

Four runs of each workload, private or not and compiled or not, take turns in one process, so that what disturbs the
machine disturbs them all. A figure is a ratio of two runs' times in the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import measure
from bench.methods import METHODS, fixed_loader, prepare, quiet_peers
from bench.side_by_side import LEARNING_RATE, MAX_GRAD_NORM, NOISE_MULTIPLIER, THREADS, plan_rounds
from bench.workloads import WORKLOADS, Workload

WARM_UP = 3  # steps: the first checks the layers, the first two may compile
RUNS = [(method, compiled) for method in ("nonprivate", "dpfast") for compiled in (False, True)]
RATIOS = {  # what is divided by what
    "private: compiled / uncompiled": (("dpfast", True), ("dpfast", False)),
    "non-private: compiled / uncompiled": (("nonprivate", True), ("nonprivate", False)),
    "uncompiled: private / non-private": (("dpfast", False), ("nonprivate", False)),
    "compiled: private / non-private": (("dpfast", True), ("nonprivate", True)),
}


def title_of(run: tuple[str, bool]) -> str:
    return f"{METHODS[run[0]].title}, {'compiled' if run[1] else 'uncompiled'}"


def start_training(method: str, compiled: bool, work: Workload, size: int | None) -> measure.Step:
    """The step of a model that is made private, if it is, and then compiled, if it is."""
    model = work.model()
    x, y = work.batch(size)
    trainer = prepare(
        METHODS[method],
        model,
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        fixed_loader(x, y),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        poisson_sampling=False,
    )
    if compiled:
        trainer.model = torch.compile(trainer.model)  # type: ignore[assignment]
    return lambda: trainer.step(x, y)


def measure_workload(work: Workload, size: int | None, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds of every run, and the ratios between them."""
    steps, costs, warm_up = {}, [], {}
    for run in tqdm(RUNS, desc=f"{work.name}: warm-up", leave=False):
        steps[run] = start_training(*run, work, size)
        warm_up[run] = [measure.timed(steps[run]) for _ in range(WARM_UP)]
        costs.append(warm_up[run][-1])
    times: dict[tuple[str, bool], dict[int, float]] = {run: {} for run in RUNS}
    count = plan_rounds(costs, [False] * len(RUNS), rounds, seconds)
    for number in tqdm(range(count), desc=f"{work.name}: time", leave=False):
        for run in measure.rotated(RUNS, number):
            times[run][number] = measure.timed(steps[run])
    return {
        "name": work.name,
        "title": work.title,
        "batch_size": size or work.batch_size,
        "warm_up_seconds": {title_of(run): values for run, values in warm_up.items()},
        "step_seconds": {title_of(run): measure.percentiles(list(values.values())) for run, values in times.items()},
        "ratios": {
            title: measure.percentiles(measure.paired_ratios(times[one], times[other]))
            for title, (one, other) in RATIOS.items()
        },
    }


def report(record: dict[str, Any]) -> str:
    """The Markdown that is printed."""
    parts = []
    for work in record["workloads"]:
        rows = [
            [title, f"{1e3 * step['median']:.0f} ms ({1e3 * step['p20']:.0f}–{1e3 * step['p80']:.0f})"]
            for title, step in work["step_seconds"].items()
        ] + [
            [title, f"{ratio['median']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f}), n={ratio['n']}"]
            for title, ratio in work["ratios"].items()
        ]
        parts.append(f"### {work['title']}\n\n{measure.markdown_table(('', 'median (p20–p80)'), rows)}")
    return "\n\n".join(parts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", nargs="+", choices=WORKLOADS, default=["gpt128", "llama"])
    parser.add_argument("--batch", type=int, help="samples in a batch (default: the workload's)")
    parser.add_argument("--rounds", type=int, default=30, help="at most this many rounds (default 30)")
    parser.add_argument("--seconds", type=float, default=120, help="timing loop of one workload (default 120)")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "bench" / "results")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    quiet_peers()
    torch.set_num_threads(THREADS)
    record: dict[str, Any] = {
        "machine": measure.machine_record(),
        "configuration": {
            "command": "python -m bench.compiled",
            "work": arguments.work,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "noise_multiplier": NOISE_MULTIPLIER,
            "max_grad_norm": MAX_GRAD_NORM,
            "optimizer": "SGD",
            "backend": "inductor, default options",
        },
        "workloads": [],
    }
    name = f"compiled-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for work in tqdm([WORKLOADS[name] for name in arguments.work], desc="workloads"):
        record["workloads"].append(measure_workload(work, arguments.batch, arguments.rounds, arguments.seconds))
        (arguments.out / name).write_text(json.dumps(record, indent=1) + "\n")
        torch.compiler.reset()
        gc.collect()
    print(report(record))
    print(f"\nrecord: {arguments.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
