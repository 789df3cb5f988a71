"""What packing gains: `python -m bench.packed`.

Samples of 16 to 256 tokens, packed into rows of 512, or each in a row of its own, padded to the longest. All in one
process, taking turns, two threads; every figure is a ratio to non-private training on the packed rows in the same
round. Each way is held against float64 first, one sample at a time. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfast
from bench import measure
from bench.architectures import GPT, Llama
from bench.check import CLIPPED, SCALE, TOLERANCE, errors, worst
from bench.methods import LEARNING_RATE, MAX_GRAD_NORM, NOISE_MULTIPLIER, quiet_peers
from bench.record import Record, title_of
from bench.workloads import SEED
from dpfast import tables
from dpfast.losses import causal_lm_loss, segment_cross_entropy

THREADS = 2
TARGET = 1.15  # dpfast packed, over non-private packed
CHECKED = 8  # first steps, in which models are looked at: later ones are at most a hundredth of a run's time
SIZES: dict[str, dict[str, Any]] = {
    "full": dict(width=512, layers=2, heads=8, vocabulary=4096, length=512),
    "tiny": dict(width=16, layers=1, heads=2, vocabulary=32, length=32),
}
ROWS = {"full": 4, "tiny": 2}
LENGTHS = {"full": (16, 256), "tiny": (1, 16)}  # of samples


@dataclass(frozen=True)
class Way:
    """How samples are trained on; ``engine`` is whose, if it is private."""

    title: str
    packed: bool
    engine: Any = None


WAYS = {
    "nonprivate": Way("non-private, packed", True),
    "dpfast": Way("dpfast, packed", True, dpfast.PrivacyEngine),
    "dpfast-padded": Way("dpfast, padded", False, dpfast.PrivacyEngine),
    "opacus-padded": Way("Opacus hooks, padded", False, opacus.PrivacyEngine),
}


def build(model: str, small: bool, variant: str = "plain") -> nn.Module:
    """The same random weights on every call."""
    torch.manual_seed(SEED)
    sizes = SIZES["tiny" if small else "full"]
    if model == "gpt":
        return GPT(**sizes, variant=variant)
    return Llama(**sizes, key_heads=sizes["heads"] // 2, hidden=sizes["width"] * 43 // 16)


def samples(small: bool) -> list[list[Tensor]]:
    """Tokens of the samples of each row, which fill it."""
    size = "tiny" if small else "full"
    draw, tokens = random.Random(SEED), torch.Generator().manual_seed(SEED)
    least, most = LENGTHS[size]
    rows = []
    for _ in range(ROWS[size]):
        lengths: list[int] = []
        while (left := SIZES[size]["length"] - sum(lengths)) > most:
            lengths.append(min(int(draw.triangular(least, most, least)), left - least))
        lengths.append(left)
        rows.append([torch.randint(SIZES[size]["vocabulary"], (n,), generator=tokens) for n in lengths])
    return rows


def batch_of(rows: list[list[Tensor]], packed: bool) -> tuple[Tensor, Tensor]:
    """Ids and position ids ``[rows, T]``, or ids and labels ``[samples, longest]``."""
    if packed:
        ids = torch.stack([torch.cat(row) for row in rows])
        return ids, torch.stack([torch.cat([torch.arange(len(x)) for x in row]) for row in rows])
    each = [x for row in rows for x in row]
    padded = partial(nn.utils.rnn.pad_sequence, each, batch_first=True)
    return padded(), padded(padding_value=-100)


def step_of(
    model: nn.Module, rows: list[list[Tensor]], way: Way, lr: float, noise: float, max_grad_norm: float
) -> measure.Step:
    """A whole step on all samples."""
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=lr)
    each = [x for row in rows for x in row]
    ids, other = batch_of(rows, way.packed)
    if way.engine is not None:
        model, optimizer, _ = way.engine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(each, batch_size=len(each), collate_fn=lambda x: x),
            noise_multiplier=noise,
            max_grad_norm=max_grad_norm,
            poisson_sampling=False,
            loss_reduction="sum",
            **({"units": "packed"} if way.packed else {}),
        )

    def step() -> None:
        if way.packed:
            loss = segment_cross_entropy(model(ids, position_ids=other), ids, position_ids=other)
        else:
            loss = causal_lm_loss(model(ids), other)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clipped_sum(model: nn.Module, rows: list[list[Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """A clipping norm that clips most, and the clipped sum: in float64, one sample at a time."""
    model = copy.deepcopy(model).double()
    names = dict(model.named_parameters())
    norms, found = [], []
    for x in [x[None] for row in rows for x in row]:
        loss = causal_lm_loss(model(x), x)
        found.append(torch.autograd.grad(loss, list(names.values()), allow_unused=True, materialize_grads=True))
        norms.append(torch.stack([g.norm() for g in found[-1]]).norm())
    bound = CLIPPED * float(torch.stack(norms).median())
    factors = [min(1.0, bound / max(float(norm), 1e-300)) for norm in norms]
    sums = {name: sum(f * g[k] for f, g in zip(factors, found, strict=True)) for k, name in enumerate(names)}
    return bound, sums


def error_of(model: nn.Module, rows: list[list[Tensor]], way: Way, truth: tuple[float, dict[str, Tensor]]) -> float:
    """What a step without noise changes, against the clipped sum; relative, the largest of all parameters."""
    bound, sums = truth
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    lr = SCALE * sum(map(len, rows))
    step_of(model, rows, way, lr, 0.0, bound)()
    got = {name: (before[name].double() - p.detach().double()) / lr for name, p in named.items()}
    return max(errors(got, sums).values())


def compared(name: str, ways: Mapping[str, Way], small: bool, seconds: float) -> dict[str, Any]:
    """One model: is each way right, and how long is its step."""
    rows, device = samples(small), torch.device("cpu")
    truth = clipped_sum(build(name, small), rows)
    entries: dict[str, dict[str, Any]] = {}
    steps: dict[str, measure.Step] = {}
    for key, way in ways.items():
        variant = "expanded" if way.engine is opacus.PrivacyEngine else "plain"  # it needs position ids of each sample
        make: Callable[[], nn.Module] = partial(build, name, small, variant)
        entry = entries[key] = {"way": key, "title": way.title, "error": None}
        if way.engine is not None:
            found: list[float] = []
            entry["error"] = measure.why_not(lambda: found.append(error_of(make(), rows, way, truth)))  # noqa: B023
            if found:
                entry["off"] = found[0]
                right = worst({"all": found[0]}, {"all": TOLERANCE})[0] <= 1
                entry["error"] = None if right else f"wrong: relative error {found[0]:.1e}"
        if entry["error"] is None:
            steps[key] = step_of(make(), rows, way, LEARNING_RATE, NOISE_MULTIPLIER, MAX_GRAD_NORM)
            for _ in range(0 if small else CHECKED):
                steps[key]()
    taken, reasons = measure.turns_of(steps, device, seconds)
    for key, rounds in taken.items():
        entries[key]["seconds"] = measure.percentiles(list(rounds.values()))
        entries[key]["ratio"] = measure.percentiles(measure.paired_ratios(rounds, taken["nonprivate"]))
    for key, reason in reasons.items():
        entries[key]["error"] = reason
    lengths = [len(x) for row in rows for x in row]
    padded = len(lengths) * max(lengths)
    title = (
        f"{'GPT, tied head' if name == 'gpt' else 'Llama'}: {len(lengths)} samples of {min(lengths)} to {max(lengths)} "
        f"tokens, {sum(lengths)} in all, in {len(rows)} rows; padded {padded}"
    )
    return {"model": name, "title": title, "figures": [*entries.values()]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.packed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=["llama", "gpt"], default=["llama", "gpt"])
    parser.add_argument("--ways", nargs="+", choices=[way for way in WAYS if way != "nonprivate"], default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=60, help="of each model's timing loop")
    parser.add_argument("--small", action="store_true", help="tiny sizes, which show that everything runs")
    parser.add_argument("--out", type=Path, help="a folder for a record in JSON")
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    quiet_peers()
    ways = {name: way for name, way in WAYS.items() if name == "nonprivate" or name in asked.ways}
    found = [compared(name, ways, asked.small, asked.seconds) for name in asked.model]
    print("\n\n".join(map(table, found)))
    if asked.out is not None:
        command = f"python -m bench.packed --model {' '.join(asked.model)} --seconds {asked.seconds:g}"
        record = Record.new(asked.out, "packed", torch.device("cpu"), {"command": command, "suite": "packed"})
        record.suite["works"] = found
        record.finish(torch.device("cpu"), all(one["error"] is None for part in found for one in part["figures"]))
        print(record.path)


def table(part: dict[str, Any]) -> str:
    rows = []
    for one in part["figures"]:
        if one["error"] is not None:
            rows.append([one["title"], one["error"], "", ""])
            continue
        off = f"{one['off']:.0e}" if "off" in one else ""
        rows.append([one["title"], off, measure.spread(one["seconds"], 1e3, ".0f"), measure.spread(one["ratio"])])
    header = ["training", "error against float64", "step, ms (p20–p80)", "× non-private packed (p20–p80)"]
    return f"### {part['title']}\n\n{tables.markdown(header, rows)}\n\ntarget of dpfast, packed: at most {TARGET}"


def report(data: dict[str, Any]) -> str:
    """As a suite's (see bench.suites)."""
    return "\n\n".join(["## Packed rows", title_of(data), *map(table, data["suite"]["works"])])


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    return []  # a table says it all


if __name__ == "__main__":
    main()
