"""What a step of each way of fine-tuning costs: ordinary training, dpfast and Opacus' hooks, on the same sentences.

Times are taken in turns, step by step, so that whatever else the machine does meets all methods alike. Memory is the
growth of a fresh process over its first two steps: one process a figure.
"""

from __future__ import annotations

import copy
import gc
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import engine as ours
from dpfast.analysis.reproduce.common import Table, progress
from dpfast.analysis.reproduce.finetune_runs import ROWS_AT_ONCE, optimizer_of
from dpfast.analysis.reproduce.sentences import Classifier, with_adapters

METHODS = ("ordinary", "dpfast", "Opacus")
CASES = ("head on features", "head", "LoRA", "everything")  # the first on what the encoder made once
# One allocator for all: what is freed goes back to the system, so that resident memory follows what is alive.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Step = Callable[[], None]
Load = Callable[[], tuple[Any, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Cost:
    """Of one method in one case.

    Attributes:
        seconds: of a step of 32 sentences, the median.
        spread: the quartiles.
        growth: of resident memory, bytes; None where it was not measured.
        failure: what was raised instead.
    """

    seconds: float | None = None
    spread: tuple[float, float] | None = None
    growth: int | None = None
    failure: str | None = None


Costs = Mapping[str, Mapping[str, Cost]]  # by case and method


def start(encoder: Any, inputs: tuple[Tensor, ...], case: str, method: str) -> Step:
    """A step of ``method``, on a model of its own; the first of it is slower.

    Args:
        encoder: a copy of it is trained.
        inputs: ids, mask, features and labels of one batch.
    """
    ids, mask, features, labels = inputs
    model = Classifier(copy.deepcopy(encoder))
    if case == "LoRA":
        with_adapters(model)
    net: nn.Module = model.head if case == "head on features" else model
    given = (features,) if net is model.head else (ids, mask)
    if case == "head":
        model.encoder.requires_grad_(False)
    optimizer: Any = optimizer_of(net, 1e-5, 1e-5)
    if method != "ordinary":
        library: Any = ours if method == "dpfast" else opacus
        kind = {} if method == "dpfast" else {"grad_sample_mode": "hooks"}
        loader: DataLoader = DataLoader(TensorDataset(*given, labels), batch_size=len(labels))
        net, optimizer, _ = library.PrivacyEngine(accountant="rdp").make_private(
            module=net,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,  # the batch is ours, of one size for all methods
            **kind,
        )
    net.train()

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(*given), labels).backward()
        optimizer.step()

    return step


def all_costs(load: Load, turns: int, memory: bool) -> Costs:
    """Every case by every method: times in turns in this process, memory in one of its own each.

    Args:
        load: the encoder and one batch: ids, mask, features and labels. It can be pickled.
        turns: steps of each method.
        memory: whether to measure that too.
    """
    encoder, inputs = load()
    found = {}
    for case in progress(CASES, "what steps cost"):
        found[case] = times(encoder, inputs, case, turns)
        for method, cost in found[case].items():
            if memory and cost.seconds is not None:
                found[case][method] = replace(cost, growth=growth(load, case, method))
    return found


def times(encoder: Any, inputs: tuple[Tensor, ...], case: str, turns: int) -> dict[str, Cost]:
    """Seconds of a step by method, measured in turns."""
    steps, found = {}, {}
    for method in METHODS:
        try:
            step = start(encoder, inputs, case, method)
            for _ in range(3):  # dpfast looks at the samples once more at its second
                step()
            steps[method] = step
        except Exception as error:  # a cell of the table, in its own words
            found[method] = Cost(failure=str(error).splitlines()[0])
    taken: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(turns):
        for method, step in steps.items():
            began = time.perf_counter()
            step()
            taken[method].append(time.perf_counter() - began)
    for method, seconds in taken.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        found[method] = Cost(seconds=middle, spread=(low, high))
    return {method: found[method] for method in METHODS}


def mixed(first: Mapping[str, Cost], rest: Mapping[str, Cost], share: float) -> dict[str, Cost]:
    """Of runs whose first ``share`` of the steps is one case, and the rest another one: mean time, largest growth."""
    found = {}
    for method in METHODS:
        one, two = first[method], rest[method]
        if one.seconds is None or two.seconds is None:
            found[method] = two if two.seconds is None else one
            continue
        found[method] = Cost(seconds=share * one.seconds + (1 - share) * two.seconds, growth=two.growth)
    return found


def ratios(of: Mapping[str, Cost], method: str) -> str:
    """Time and memory of a method as ratios to ordinary training; or why there are none."""
    base, cost = of["ordinary"], of[method]
    if cost.seconds is None or base.seconds is None:
        return f"fails: {cost.failure or base.failure}"
    grown = "–" if cost.growth is None or not base.growth else f"{cost.growth / base.growth:.2f}"
    return f"{cost.seconds / base.seconds:.2f}, {grown}"


def table(costs: Costs) -> Table:
    """The figures themselves."""
    made = Table(
        f"a step of {ROWS_AT_ONCE} snippets: ms (quartiles), and growth of memory, MB", ["what trains", *METHODS]
    )
    for case, of in costs.items():
        made.rows.append([case, *(_cell(of[method]) for method in METHODS)])
    made.notes.append(
        "One thread. Memory is over the encoder and its data, in a fresh process. A private step is a whole one, with "
        "noise, which a larger logical batch has once for many such batches. Opacus is its hooks mode. Positions and "
        "token types have a batch dimension here, as it cannot follow others."
    )
    return made


def _cell(cost: Cost) -> str:
    if cost.seconds is None or cost.spread is None:
        return f"fails: {cost.failure}"
    low, high = cost.spread
    grown = "" if cost.growth is None else f", {cost.growth / 2**20:.0f} MB"
    digits = 1 if cost.seconds < 0.1 else 0
    return f"{1e3 * cost.seconds:.{digits}f} ({1e3 * low:.{digits}f}–{1e3 * high:.{digits}f}){grown}"


def growth(load: Load, case: str, method: str) -> int | None:
    """How much resident memory grows over two steps, in a process of its own; None where that cannot be read."""
    if sys.platform != "linux":
        return None
    with _environment(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(growth_here, load, case, method).result()


def growth_here(load: Load, case: str, method: str) -> int:
    """As :func:`growth`, in this process: over what encoder and data take."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # they would break the progress bars
    encoder, inputs = load()
    start(encoder, tuple(x[:2] for x in inputs), case, method)()  # what is loaded once is no method's own
    gc.collect()
    before = _status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    step = start(encoder, inputs, case, method)
    for _ in range(2):
        step()
    return _status("VmHWM") - _status("RssFile") - _status("RssShmem") - before


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
