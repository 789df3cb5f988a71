"""What an ascent adds to a step of DP-SGD: `python -m bench.ascent`.

All in one process, taking turns, two threads; "over DP-SGD" is the median of the rounds' ratios to DP-SGD in the same
round, "own share" is 1 plus the time spent in the ascent's own functions over the rest of the same step, which a busy
machine disturbs less. The optimizer is SGD with momentum, whose update is made in the noise's pass. Nothing else should
run on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dpfast
from bench import measure
from bench.methods import fixed_loader, quiet_peers
from bench.record import Record, title_of
from bench.workloads import Workload, sequence_loss, workloads
from dpfast import tables

THREADS = 2
TARGET = 1.03
WAYS: dict[str, Any] = {
    "DP-SGD": None,
    "DPSAT": dpfast.DPSAT(),
    "DPSATMomentum": dpfast.DPSATMomentum(),
    "DiSK": dpfast.DiSK(),
}


class Own:
    """Seconds spent in some methods since the last :meth:`take`."""

    def __init__(self, owner_and_names: list[tuple[Any, str]]):
        self.seconds = 0.0
        for owner, name in owner_and_names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            self.seconds += measure.timed(method)

        return timed

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def step_of(work: Workload, ascent: Any) -> tuple[measure.Step, Own]:
    """One step of training in the fused mode, on the workload's own batch, and the ascent's own share of it."""
    model, (x, y) = work.model(), work.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = fixed_loader(x, y)
    model, optimizer, _ = dpfast.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        ascent=ascent,
    )
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        sequence_loss(criterion, model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    ascending = optimizer.ascending
    methods = ("filter", "before_update", "see_gradients", "after_update")
    own = Own([(ascending, name) for name in methods] + [(ascending.shift, "start_forward")])
    return step, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=workloads("cpu"), default="gpt128")
    parser.add_argument("--ways", nargs="+", choices=[name for name in WAYS if WAYS[name]], default=["DPSAT"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a folder for a record in JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    quiet_peers()
    work = workloads("cpu")[arguments.workload]
    steps = {name: step_of(work, WAYS[name]) for name in ("DP-SGD", *arguments.ways)}
    seconds: dict[str, dict[int, float]] = {name: {} for name in steps}
    shares: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, arguments.rounds):  # the first two warm up: an ascent begins with the second
        for name in measure.shuffled(list(steps), number):
            step, own = steps[name]
            taken, ascents = measure.timed(step), own.take()
            if number >= 0:
                seconds[name][number] = taken
                shares[name].append(taken / (taken - ascents))
    figures = [
        {
            "name": name,
            "milliseconds": measure.percentiles([1e3 * s for s in mine.values()]),
            "ratio": measure.percentiles(measure.paired_ratios(mine, seconds["DP-SGD"])),
            "share": measure.percentiles(shares[name]),
        }
        for name, mine in seconds.items()
    ]
    found = {"workload": work.title, "figures": figures}
    print(table(found))
    if arguments.out is not None:
        chosen = f"--workload {arguments.workload} --ways {' '.join(arguments.ways)} --rounds {arguments.rounds}"
        command = f"python -m bench.ascent {chosen}"
        device = torch.device("cpu")
        record = Record.new(arguments.out, "ascent", device, {"command": command, "suite": "ascent"})
        record.suite.update(found)
        record.finish(device)
        print(record.path)


def table(found: dict[str, Any]) -> str:
    rows = []
    for one in found["figures"]:
        time, ratio, share = (one[what] for what in ("milliseconds", "ratio", "share"))
        over = [f"{ratio['median']:.3f}", f"{ratio['p20']:.3f} to {ratio['p80']:.3f}"]
        rows.append([one["name"], f"{time['median']:.1f}", *over, f"{share['median']:.4f}"])
    header = ["way", "ms a step", "over DP-SGD", "p20 to p80", "own share"]
    return f"{found['workload']}\n\n{tables.markdown(header, rows)}\n\ntarget of DPSAT: at most {TARGET}"


def report(data: dict[str, Any]) -> str:
    """As a suite's (see bench.suites)."""
    return f"## Ascent\n\n{title_of(data)}\n\n{table(data['suite'])}"


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    return []  # a table says it all


if __name__ == "__main__":
    main()
