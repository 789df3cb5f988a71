"""Whole steps on a GPU in bfloat16, beside non-private training and Opacus' ghost: `python -m bench.models_gpu`.

dpfast's clipped sum is first compared with float64, one sample at a time, on a small model of the same layers. Then
each method alone on the device: its peak memory, and the longest kernels of a step, which are only in the record. Then
time, all methods in one loop, taking turns. A figure is a ratio to non-private training, of time in the same round.
What fails, or runs out of memory, is a row that says so.

`--small --device cpu` runs the same on tiny models, without a GPU and without figures of memory.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import dpfast
from bench import measure
from bench.kernels import device_record, free_memory, in_turns, why_not, write
from bench.methods import METHODS, fixed_loader, quiet_peers
from bench.workloads import GPT, SEED, VARIANTS, sequence_loss

DTYPE = torch.bfloat16
TOLERANCE = 0.05  # of the clipped sum, relative: forward and backward are in bfloat16, the oracle is in float64
GHOST_TARGET = 2.0  # times as fast as Opacus' ghost
LEARNING_RATE = 1e-5


# ---------------------------------------------------------------- models


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank update, as plain modules."""

    def __init__(self, d: int, p: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(d, p, bias=False).requires_grad_(False)
        self.down = nn.Linear(d, rank, bias=False)
        self.up = nn.Linear(rank, p, bias=False)  # not 0, as it would be: every gradient is to be something

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LlamaBlock(nn.Module):
    """RMSNorm, grouped-query attention with rotary positions, SwiGLU."""

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        keys = width // heads * key_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.out = LoRA(width, width, rank), LoRA(width, width, rank)
        self.k, self.v = LoRA(width, keys, rank), LoRA(width, keys, rank)
        self.gate, self.up = LoRA(width, hidden, rank), LoRA(width, hidden, rank)
        self.down = LoRA(hidden, width, rank)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q = rotated(self.q(h).unflatten(2, (self.heads, -1)).transpose(1, 2), cos, sin)
        k = rotated(self.k(h).unflatten(2, (self.key_heads, -1)).transpose(1, 2), cos, sin)
        v = self.v(h).unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, heads, T, n]`` turned by ``cos``, ``sin`` ``[T, n / 2]``."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class LlamaLoRA(nn.Module):
    """Llama's shape; adapters on every linear layer of its blocks, all else frozen."""

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        key_heads: int,
        hidden: int,
        length: int,
        rank: int,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, key_heads, hidden, rank) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.RMSNorm) or module is self.head:
                module.requires_grad_(False)
        n = width // heads
        angles = torch.arange(length).outer(10_000 ** (-torch.arange(0, n, 2) / n))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Work:
    """A model, a batch, and the ratios to non-private training that the project set itself."""

    name: str
    title: str
    batch_size: int
    length: int
    vocabulary: int
    build: Callable[[str], nn.Module]
    variants: tuple[str, ...]
    target_time: float
    target_memory: float | None

    def model(self, variant: str, device: torch.device) -> nn.Module:
        """The same random weights on every call."""
        torch.manual_seed(SEED)
        with device:
            return self.build(variant).to(DTYPE)

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        torch.manual_seed(SEED + 1)
        x, y = torch.randint(self.vocabulary, (2, self.batch_size, self.length), device=device)
        return x, y


def works(small: bool) -> dict[str, Work]:
    """By name: as they are measured, or tiny ones of the same layers."""
    gpt = dict(vocabulary=50304, width=1024, layers=24, heads=16, length=1024)
    llama = dict(vocabulary=32000, width=2048, layers=16, heads=32, key_heads=8, hidden=8192, length=1024, rank=16)
    sizes = {"gpt2-medium": 16, "llama1b-lora": 8}
    if small:
        gpt = dict(vocabulary=128, width=32, layers=2, heads=2, length=32)
        llama = dict(vocabulary=128, width=32, layers=2, heads=4, key_heads=2, hidden=64, length=32, rank=4)
        sizes = dict.fromkeys(sizes, 4)
    found = (
        Work(
            name="gpt2-medium",
            title="GPT of {layers} layers, d {width}, {heads} heads, vocabulary {vocabulary} (tied), T {length}".format(
                **gpt
            ),
            batch_size=sizes["gpt2-medium"],
            length=gpt["length"],
            vocabulary=gpt["vocabulary"],
            build=lambda variant: GPT(**gpt, variant=variant),
            variants=("plain", "expanded", "untied"),
            target_time=1.10,
            target_memory=1.15,
        ),
        Work(
            name="llama1b-lora",
            title="Llama of {layers} layers, d {width}, {heads} heads, {key_heads} of keys, mlp {hidden}, vocabulary "
            "{vocabulary}, T {length}, LoRA of rank {rank}".format(**llama),
            batch_size=sizes["llama1b-lora"],
            length=llama["length"],
            vocabulary=llama["vocabulary"],
            build=lambda variant: LlamaLoRA(**llama),
            variants=("plain",),
            target_time=1.05,
            target_memory=None,
        ),
    )
    return {work.name: work for work in found}


# ---------------------------------------------------------------- methods


def sum_of_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Over the samples, each the mean of its tokens'."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]


def start(
    method: str, work: Work, variant: str, device: torch.device, noise: float = 1.0, clip: float = 1.0
) -> tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer]:
    """The model as its method has it; a function that computes the loss; the optimizer.

    Everyone has the AdamW that serves it best: torch's fused one, but for dpfast, whose own step is fused.
    """
    model = work.model(variant, device)
    x, y = work.batch(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=None if method == "dpfast" else True)
    if method == "nonprivate":
        return model, lambda: sum_of_losses(model(x), y) / len(y), optimizer
    common = dict(
        module=model,
        optimizer=optimizer,
        data_loader=fixed_loader(x, y),
        noise_multiplier=noise,
        max_grad_norm=clip,
        poisson_sampling=False,
    )
    if method == "dpfast":
        # "sum", as the model is in bfloat16: under a mean, backprops are those of the loss over the batch size, rounded
        # to 16 bits after that division, so a sample's gradient would depend on how many others there are.
        model, optimizer, _ = dpfast.PrivacyEngine().make_private(**common, loss_reduction="sum")
        return model, lambda: sum_of_losses(model(x), y), optimizer
    criterion = nn.CrossEntropyLoss()
    model, optimizer, criterion, _ = opacus.PrivacyEngine().make_private(
        **common, criterion=criterion, grad_sample_mode="ghost"
    )
    return model, lambda: sequence_loss(criterion, model(x), y, ghost=True), optimizer


def start_step(method: str, work: Work, variant: str, device: torch.device) -> Callable[[], None]:
    """What is timed: the loop body that a user would write."""
    _, loss, optimizer = start(method, work, variant, device)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clipped_sum_error(work: Work, device: torch.device) -> float:
    """Of dpfast, relative, against float64 one sample at a time; the clipping norm is the median of the samples'."""
    model = work.model("plain", device)
    exact = copy.deepcopy(model).double()
    trained = [p for p in exact.parameters() if p.requires_grad]
    x, y = work.batch(device)
    grads = []
    for i in range(len(x)):
        loss = sum_of_losses(exact(x[i : i + 1]), y[i : i + 1])
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    norms = torch.stack([g.norm() for g in grads])
    clip = norms.median().item()
    want = sum(min(1.0, clip / norm.item()) * g for norm, g in zip(norms, grads, strict=True))
    private, loss, _ = start("dpfast", work, "plain", device, noise=0.0, clip=clip)
    loss().backward()
    got = torch.cat([p.summed_grad.double().flatten() for p in private.parameters() if p.requires_grad])
    return ((got - want).norm() / want.norm()).item()


# ---------------------------------------------------------------- measuring


@dataclass
class Entry:
    """One method on one work: what it was given, what that cost, and why not more."""

    method: str
    variant: str = "plain"
    notes: list[str] = field(default_factory=list)  # variants that it cannot train, and why
    error: str | None = None
    peak: int | None = None  # bytes
    kernels: list[tuple[str, int, float]] = field(default_factory=list)  # of one step: name, launches, milliseconds
    seconds: dict[int, float] = field(default_factory=dict)


def longest_kernels(step: Callable[[], None], on_gpu: bool, most: int = 20) -> list[tuple[str, int, float]]:
    """Where one step's time goes; the last row is all of it. Without a GPU of torch's ops."""
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    ran = [one for one in profile.key_averages() if not one.is_user_annotation]  # these are spans over kernels
    rows = sorted(((one.key, one.count, getattr(one, time) / 1e3) for one in ran), key=lambda row: -row[2])
    return [*rows[:most], ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def measure_memory(work: Work, entry: Entry, device: torch.device) -> None:
    """Two steps of the first variant that works, alone on the device, and a third one that is profiled. Opacus may have
    any variant; others have the plain one.
    """
    on_gpu = device.type == "cuda"

    def attempt() -> None:
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        step = start_step(entry.method, work, entry.variant, device)
        step()
        step()
        entry.peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
        if reason := why_not(lambda: entry.kernels.extend(longest_kernels(step, on_gpu))):
            entry.notes.append(f"not profiled: {reason}")

    for variant in work.variants if entry.method == "ghost" else ("plain",):
        free_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        entry.variant = variant
        entry.error = why_not(attempt)
        if entry.error is None:
            return
        entry.notes.append(f"{VARIANTS[variant]}: {entry.error}")


def measure_time(work: Work, entries: list[Entry], device: torch.device, seconds: float) -> None:
    """All that work, in turns; while there is no memory for all of them, the last one is left out."""
    running = [entry for entry in entries if entry.error is None]

    def attempt() -> None:
        steps = {entry.method: start_step(entry.method, work, entry.variant, device) for entry in running}
        taken = in_turns(steps, device, seconds)
        for entry in running:
            entry.seconds = taken[entry.method]

    while running:
        free_memory()
        reason = why_not(attempt)
        if reason is None:
            return
        running.pop().error = f"beside the others: {reason}"


def summarise(work: Work, entries: list[Entry], error: float) -> dict[str, Any]:
    by_method = {entry.method: entry for entry in entries}
    base = by_method["nonprivate"]
    rows = []
    for entry in entries:
        row: dict[str, Any] = {"method": entry.method, "variant": entry.variant, "notes": entry.notes}
        row |= {"error": entry.error, "peak_bytes": entry.peak, "kernels": entry.kernels, "targets": {}}
        if entry.seconds:
            row["step_seconds"] = measure.percentiles(list(entry.seconds.values()))
        if entry.seconds and base.seconds:
            row["time_ratio"] = measure.percentiles(measure.paired_ratios(entry.seconds, base.seconds))
        if entry.peak and base.peak:
            row["memory_ratio"] = entry.peak / base.peak
        if entry.method == "dpfast":
            row["targets"] = targets(work, row, entry, by_method.get("ghost"))
        rows.append(row)
    about = {"name": work.name, "title": work.title, "batch_size": work.batch_size}
    return about | {"clipped_sum_error": error, "rows": rows}


def targets(work: Work, row: dict[str, Any], dpfast_entry: Entry, ghost: Entry | None) -> dict[str, Any]:
    """Each target with what was reached; None is not measured."""
    found = {"time": {"at_most": work.target_time, "reached": row.get("time_ratio", {}).get("median")}}
    if work.target_memory is not None:
        found["memory"] = {"at_most": work.target_memory, "reached": row.get("memory_ratio")}
    if ghost is not None:
        faster = None
        if ghost.seconds and dpfast_entry.seconds:
            faster = measure.percentiles(measure.paired_ratios(ghost.seconds, dpfast_entry.seconds))["median"]
        found["times as fast as Opacus ghost"] = {"at_least": GHOST_TARGET, "reached": faster}
    return found


def cells(row: dict[str, Any]) -> list[str]:
    title = METHODS[row["method"]].title
    if row["variant"] != "plain" and row["error"] is None:
        title += f" ({VARIANTS[row['variant']]})"
    found = [title, row["error"] or "", "", "", ""]
    if "step_seconds" in row:
        step = row["step_seconds"]
        found[1] = f"{1e3 * step['median']:.1f} ({1e3 * step['p20']:.1f}–{1e3 * step['p80']:.1f}), n={step['n']}"
    if "time_ratio" in row:
        ratio = row["time_ratio"]
        found[2] = f"{ratio['median']:.3f} ({ratio['p20']:.3f}–{ratio['p80']:.3f})"
    if row["peak_bytes"]:
        found[3] = f"{row['peak_bytes'] / 2**30:.1f}"
    if "memory_ratio" in row:
        found[4] = f"{row['memory_ratio']:.3f}"
    return found


HEADER = ("method", "step, ms (p20–p80)", "× non-private (p20–p80)", "peak memory, GiB", "× non-private")


def told(name: str, target: dict[str, Any]) -> str:
    reached = target["reached"]
    least = "at_least" in target
    bound = target["at_least" if least else "at_most"]
    verdict = "not measured"
    if reached is not None:
        met = reached >= bound if least else reached <= bound
        verdict = f"{reached:.3f}, {'met' if met else 'NOT met'}"
    return f"- {name} {'≥' if least else '≤'} {bound:g}: {verdict}"


def report(record: dict[str, Any]) -> str:
    parts = [f"{record['device']['name']}, torch {torch.__version__}, {record['machine']['date']}"]
    if record["configuration"]["small"]:
        parts.append("Tiny models: these show that the steps run, and the targets are not for them.")
    for work in record["works"]:
        parts.append(f"### {work['title']}, batch {work['batch_size']}")
        parts.append(f"dpfast's clipped sum on a small one: relative error {work['clipped_sum_error']:.1e}")
        parts.append(measure.markdown_table(HEADER, [cells(row) for row in work["rows"]]))
        lines = [told(name, target) for row in work["rows"] for name, target in row["targets"].items()]
        lines += [f"- {METHODS[row['method']].title}, {note}" for row in work["rows"] for note in row["notes"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def measured(work: Work, device: torch.device, seconds: float) -> dict[str, Any]:
    """One work: check, memory, time. A dpfast that is wrong gets no figure."""
    entries = [Entry("nonprivate"), Entry("dpfast"), Entry("ghost")]
    error = float("nan")

    def check() -> None:
        nonlocal error
        error = clipped_sum_error(works(small=True)[work.name], device)

    failed = why_not(check)
    for entry in tqdm(entries, desc=f"{work.name}: memory", leave=False):
        if entry.method == "dpfast" and not error <= TOLERANCE:
            entry.error = failed or f"wrong: the clipped sum's relative error is {error:.1e}"
        else:
            measure_memory(work, entry, device)
    measure_time(work, entries, device, seconds)
    return summarise(work, entries, error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if dpfast has no figure for a work."""
    parser = argparse.ArgumentParser(prog="python -m bench.models_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=works(small=True), default=list(works(small=True)), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=40, help="of timing loops, in all (default 40)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "bench" / "results")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --small --device cpu shows that the steps run")
    quiet_peers()
    device = torch.device(asked.device)
    chosen = [works(asked.small)[name] for name in asked.only]
    record: dict[str, Any] = {
        "machine": measure.machine_record(),
        "device": device_record(device),
        "configuration": {
            "command": "python -m bench.models_gpu",
            "only": asked.only,
            "small": asked.small,
            "seconds": asked.seconds,
            "dtype": str(DTYPE).removeprefix("torch."),
            "optimizer": "AdamW",
        },
        "works": [],
    }
    path = asked.out / f"models-{asked.device}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    for work in tqdm(chosen, desc="models"):
        record["works"].append(measured(work, device, asked.seconds / len(chosen)))
        record["device_after"] = device_record(device)  # clocks after work
        write(record, path)
        free_memory()
    print(report(record))
    print(f"\nrecord: {path}")
    usable = all(row["error"] is None for work in record["works"] for row in work["rows"] if row["method"] == "dpfast")
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main())
