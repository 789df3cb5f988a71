"""The main job on real data with no download: `python -m bench.demo`, which is what `make demo` runs.

A GroupNorm CNN on scikit-learn's digits and a small GPT on the English of CPython's own documentation topics, each
trained without privacy, privately with dpfast, as a loop of Opacus is written and with a recorded step, and privately
with stock Opacus. They take turns in one loop, so that their step times can be compared; the private ones draw Poisson
batches and use the same noise multiplier.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.accountants.utils import get_noise_multiplier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bench import measure, memory
from bench.methods import METHODS, Trainer, prepare, quiet_peers
from bench.plots import Result, draw_demo
from bench.tasks import TASKS, Task
from bench.workloads import VARIANTS, sequence_loss
from dpfast import tables

THREADS = 2
DELTA_TEXT = "1e-5"
DELTA = float(DELTA_TEXT)
SCORES = 10  # how often a run is scored on the test data
PNG = measure.ROOT / "bench" / "out" / "demo.png"
ABOUT = """\
{tasks}.
Each is trained {ways}: the same steps in turns, on {threads} threads, for some minutes.
Nothing is downloaded. At the end come a table of time, memory, test score and ε, and a plot.
"""
NEXT = """
What next?
  a script for Opacus, with no line changed    python -m dpfast run train.py
  a model of your own, before it is trained    print(dpfast.check_sensitivity(model, loss, batch, max_grad_norm=1.0))
  scripts to start from                        examples/, for instance: python examples/image_cnn.py
  what is promised, and what cannot be seen    docs/guarantee.md
"""


def memory_job(task: str, method: str, noise_multiplier: float) -> Callable[[bool], Callable[[], measure.Step]]:
    """What a fresh process runs to measure one memory figure: steps on one batch of the expected size."""
    quiet_peers()
    work = TASKS[task]

    def job(small: bool) -> Callable[[], measure.Step]:
        model = work.model(method)
        x, y = work.split[0][: 2 if small else work.batch_size]

        def start() -> measure.Step:
            trainer = make_trainer(work, method, model, noise_multiplier)
            return lambda: trainer.step(x, y)

        return start

    return job


def make_trainer(task: Task, method: str, model: nn.Module, noise_multiplier: float) -> Trainer:
    """What a user's script does before its loop."""
    return prepare(
        METHODS[method],
        model,
        torch.optim.Adam(model.parameters(), lr=task.learning_rate),
        DataLoader(task.split[0], batch_size=task.batch_size, shuffle=True),
        noise_multiplier=noise_multiplier,
        max_grad_norm=task.max_grad_norm,
        poisson_sampling=True,
    )


@dataclass
class Run:
    """One method on one task, as it goes."""

    method: str
    trainer: Trainer
    batches: Iterator[Any]
    seconds: dict[int, float] = field(default_factory=dict)
    scores: list[tuple[int, float]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)

    def epsilon(self) -> float | None:
        return None if self.trainer.engine is None else self.trainer.engine.get_epsilon(DELTA)


def endless(task: Task, method: str, trainer: Trainer) -> Iterator[Any]:
    """Batches of as many epochs as are asked for; a recorded step has them in a few sizes."""
    with contextlib.ExitStack() as stack:
        loader = trainer.loader
        if METHODS[method].recorded:
            import dpfast  # as below

            few = dict(max_physical_batch_size=2 * task.batch_size, pad=max(1, task.batch_size // 10))
            given = dict(data_loader=loader, optimizer=trainer.optimizer)
            loader = stack.enter_context(dpfast.BatchMemoryManager(**given, **few))
        while True:
            yield from loader


@torch.no_grad()
def score(task: Task, model: nn.Module) -> float:
    """Test accuracy, or test loss per byte."""
    x, y = task.split[1]
    model.eval()
    logits = model(x)
    model.train()
    if task.score == "accuracy":
        return (logits.argmax(-1) == y).float().mean().item()
    return sequence_loss(nn.CrossEntropyLoss(), logits, y).item()


def check_first(task: Task) -> None:
    """The first thing to run on a new model: does one sample move the clipped sum by more than its sensitivity?"""
    import dpfast  # here, not above: the processes that measure memory without it must not load it

    def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return sequence_loss(nn.CrossEntropyLoss(), model(batch[0]), batch[1])

    loss: Any = nn.CrossEntropyLoss() if task.score == "accuracy" else token_loss
    found = dpfast.check_sensitivity(task.model("dpfast"), loss, task.split[0][:8], task.max_grad_norm)
    print(f"{task.title}: dpfast.check_sensitivity says\n{found}\n")


def train(task: Task, methods: list[str]) -> list[Run]:
    """Memory of each method in a process of its own, then all of them step by step in turns."""
    sample_rate = 1 / len(DataLoader(task.split[0], batch_size=task.batch_size))
    noise_multiplier = get_noise_multiplier(
        target_epsilon=task.target_epsilon,
        target_delta=DELTA,
        sample_rate=sample_rate,
        steps=task.steps,
        accountant="prv",
    )
    runs = []
    for method in tqdm(methods, desc=f"{task.name}: peak memory", leave=False):
        trainer = make_trainer(task, method, task.model(method), noise_multiplier)
        runs.append(Run(method, trainer, endless(task, method, trainer)))
        runs[-1].memory = memory.growth(
            "bench.demo:memory_job", task=task.name, method=method, noise_multiplier=noise_multiplier
        )
        runs[-1].scores.append((0, score(task, trainer.model)))
    every = task.steps // SCORES
    bar = tqdm(range(1, task.steps + 1), desc=f"{task.name}: training")
    for number in bar:
        for run in measure.shuffled(runs, number):
            x, y = next(run.batches)
            run.seconds[number] = measure.timed(functools.partial(run.trainer.step, x, y))
            if number % every == 0 or number == task.steps:
                run.scores.append((number, score(task, run.trainer.model)))
        bar.set_postfix({run.method: f"{run.scores[-1][1]:.2f}" for run in runs})
    return runs


def label(task: Task, method: str, separator: str = " ") -> str:
    """The method's name, and what it was given if that is not the model as written."""
    title = METHODS[method].title
    if METHODS[method].mode == "hooks" and task.opacus_variant != "plain":
        title += f"{separator}({VARIANTS[task.opacus_variant]})"
    return title


def results(task: Task, runs: list[Run]) -> list[Result]:
    """The figures of one task: what the table prints and the plot draws."""
    base = runs[0]
    found = []
    for run in runs:
        ratio = measure.percentiles(measure.paired_ratios(run.seconds, base.seconds))
        growth = run.memory.get("growth_bytes")
        found.append(
            Result(
                method=run.method,
                label=label(task, run.method, "\n"),
                milliseconds=1e3 * measure.percentiles(list(run.seconds.values()))["median"],
                time_ratio=ratio["median"],
                time_spread=(ratio["p20"], ratio["p80"]),
                memory_mib=growth / measure.MIB if growth is not None else None,
                memory_ratio=memory.ratio(run.memory, base.memory),
                memory_error=run.memory.get("error", run.memory.get("not_measured")),
                scores=run.scores,
                epsilon=run.epsilon(),
            )
        )
    return found


HEADER = ("task", "method", "step, ms", "× non-private", "peak memory growth, MiB", "× non-private", "score", "ε")


def rows(task: Task, found: list[Result]) -> list[list[str]]:
    """The table's rows of one task."""
    cells = []
    for one in found:
        first, last = one.scores[0][1], one.scores[-1][1]
        percent = task.score == "accuracy"
        cells.append(
            [
                task.title,
                one.label.replace("\n", " "),
                f"{one.milliseconds:.0f}",
                f"{one.time_ratio:.2f}",
                f"{one.memory_mib:.0f}" if one.memory_mib is not None else str(one.memory_error),
                f"{one.memory_ratio:.2f}" if one.memory_ratio is not None else "",
                f"test accuracy {last:.1%}" if percent else f"test loss {first:.2f} → {last:.2f}",
                "∞" if one.epsilon is None else f"{one.epsilon:.2f}",
            ]
        )
    return cells


def about(names: list[str], methods: list[str]) -> str:
    """What is about to be done."""
    tasks = " and a ".join(TASKS[name].title.removeprefix("a ") for name in names)
    known = {"nonprivate": "without privacy", "dpfast-graphed": "privately with dpfast and a recorded step"}
    ways = ", ".join(known.get(method, f"privately with {METHODS[method].title}") for method in methods)
    return ABOUT.format(tasks=f"A {tasks}", ways=ways, threads=THREADS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    methods = ["dpfast", "dpfast-graphed", "hooks"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    arguments = parser.parse_args()
    quiet_peers()
    torch.set_num_threads(THREADS)
    print(about(arguments.tasks, ["nonprivate", *arguments.methods]), flush=True)
    drawn, table = [], []
    for name in arguments.tasks:
        task = TASKS[name]
        if {"dpfast", "dpfast-graphed"} & {*arguments.methods}:
            check_first(task)
        found = results(task, train(task, ["nonprivate", *arguments.methods]))
        table += rows(task, found)
        drawn.append((task.title, task.score, found))
    print(f"\n{tables.markdown(HEADER, table)}\n")
    print(
        f"ε at δ = {DELTA_TEXT}; one sample is one image, or one sequence of 128 bytes. Ratios are taken step by step."
    )
    PNG.parent.mkdir(parents=True, exist_ok=True)
    draw_demo(drawn, PNG, f"ε at δ = {DELTA_TEXT}")
    print(f"plot: {PNG.relative_to(measure.ROOT)}")
    print(NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
