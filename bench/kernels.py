"""The kernels beside cuBLAS and a copy, and the planner beside the clock: `python -m bench.kernels`.

Every set of cases takes turns in one loop, its first case is torch's own op, and the figure to look at is the share of
that op's rate: of its flops in a second, or of a copy's bytes. The floor of a memory-bound kernel is each input read
once and each output written once; a ghost norm counts as B·T²(p + d) flops. What a case gives for the inputs that it is
timed on is first compared with float64; one that is wrong, or fails, is a row that says so.

Then the planner: what it predicts for the norm and the clipped sum of a weight by every way, and what they take.

`--device cpu` is for small sizes: the matrix products in PyTorch, the compiled library's ops, and the planner.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import measure
from dpfast import ops, planner, reference
from dpfast.layers.forms import Factored, by

TOLERANCE = 1e-3  # of the relative error: sums are made in float32, of inputs that float64 holds exactly
NORM, WEIGHT, MEMORY = 0.60, 1 / 1.10, 0.80  # targets, as shares of the reference's rate
MIN_ROUNDS, MAX_ROUNDS = 5, 50
WARM_UP = 2  # rounds
LEAD = 4_000_000  # cycles that the device waits at the start of a round, so that the host is ahead of it
SETS = 3  # of buffers, together far larger than the L2 cache


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    dtype: torch.dtype
    flops: float  # of one call of a matrix product, about: sets the batch size
    lengths: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]  # d, p
    memory: tuple[int, int, int, int]  # B, T, d, rows of the embedding
    plans: tuple[tuple[int, int, int, int], ...]  # B, T, d, p


SIZES = {
    "cuda": Sizes(
        dtype=torch.bfloat16,
        flops=6e11,  # 1 ms at 600 TFLOP/s
        lengths=(512, 1024, 2048),
        weights=((1024, 1024), (1024, 4096), (4096, 4096), (8192, 8192)),
        memory=(128, 1024, 1024, 50304),
        plans=(
            (16, 1024, 1024, 1024),
            (16, 1024, 1024, 4096),
            (16, 1024, 4096, 1024),
            (8, 1024, 2048, 8192),
            (16, 1024, 1024, 50304),
            (16, 1024, 2048, 16),
            (16, 1024, 16, 2048),
            (4, 2048, 4096, 4096),
            (2, 8192, 1024, 1024),
            (64, 256, 1024, 1024),
            (128, 64, 1024, 1024),
            (512, 1, 1024, 4096),
        ),
    ),
    "cpu": Sizes(
        dtype=torch.float32,
        flops=2e7,
        lengths=(64,),
        weights=((64, 96),),
        memory=(8, 64, 64, 1000),
        plans=((8, 64, 64, 64), (8, 128, 256, 256), (8, 32, 256, 256), (8, 64, 256, 16), (32, 1, 64, 64)),
    ),
}


@dataclass
class Case:
    """One call, and the flops or bytes that it stands for."""

    name: str
    work: float
    call: Callable[[], Any]
    error: Callable[[Any], float] | None = None  # of the first call's result; None: torch's own op
    target: float | None = None  # the least share of the first case's rate


@dataclass
class CaseSet:
    """Cases that take turns, measured against the first of them; made when it is their time."""

    title: str
    unit: str
    make: Callable[[], list[Case]]


# ---------------------------------------------------------------- what is measured


def case_sets(device: torch.device) -> list[CaseSet]:
    sizes = SIZES[device.type]
    if device.type == "cuda":
        import dpfast_kernels

        for module in pkgutil.iter_modules(dpfast_kernels.__path__):  # each registers its ops
            importlib.import_module(f"dpfast_kernels.{module.name}")
    makers = [ghost_cases, gradient_cases, weight_cases] if device.type == "cuda" else [ghost_cases, weight_cases]
    shapes = [(T, d, p) for d, p in sizes.weights for T in sizes.lengths]
    products = [
        CaseSet(f"T {T}, d {d}, p {p}", "TFLOP/s", functools.partial(maker, T, d, p, device))
        for maker in makers
        for T, d, p in shapes
    ]
    B, T, d, rows = sizes.memory
    memory = CaseSet(f"B {B}, T {T}, d {d}", "TB/s", functools.partial(memory_cases, B, T, d, rows, device))
    return [memory, *products]


def sides(flops_of_a_sample: float, T: int, d: int, p: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``A [B, T, d]`` and ``G [B, T, p]``, with an even B that makes a call long enough to be timed."""
    sizes = SIZES[device.type]
    B = 2 * max(1, round(sizes.flops / flops_of_a_sample / 2))
    A, G = (torch.randn(B, T, n, device=device, dtype=sizes.dtype) for n in (d, p))
    return A, G


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest over the tensors that are wanted; NaN where something is NaN."""
    pairs = [(g.double().reshape(w.shape), w.double()) for g, w in zip(got, want, strict=False)]
    errors = [(g - w).norm() / w.norm() for g, w in pairs]
    return torch.stack(errors).max().item()


def norms_error(squared: Tensor, A: Tensor, G: Tensor) -> float:
    """The error of the first and the last sample's squared norms."""
    want = [(G[i].double().T @ A[i].double()).square().sum() for i in (0, -1)]
    return relative_error([squared[[0, -1]]], [torch.stack(want)])


def ghost_cases(T: int, d: int, p: int, device: torch.device) -> list[Case]:
    A, G = sides(T**2 * (d + p), T, d, p, device)
    B = len(A)

    def grams() -> None:
        """Whole ones, of half of the samples: the same flops."""
        for side in (A[: B // 2], G[: B // 2]):
            torch.bmm(side, side.mT)

    def ghost() -> Tensor:
        if device.type == "cuda":
            return torch.ops.dpfast_kernels.ghost_norm(A, G)[0]
        return ops.ghost_squared_norm(A.unsqueeze(1), G.unsqueeze(1))[0]

    work = B * T**2 * (d + p)
    return [
        Case("torch.bmm: A Aᵀ and G Gᵀ", work, grams),
        Case("ghost norm", work, ghost, lambda squared: norms_error(squared, A, G), NORM),
    ]


def gradient_cases(T: int, d: int, p: int, device: torch.device) -> list[Case]:
    A, G = sides(2 * T * d * p, T, d, p, device)
    work = 2 * len(A) * T * d * p
    return [
        Case("torch.bmm: Gᵀ A", work, lambda: torch.bmm(G.mT, A)),
        Case(
            "norm-GEMM",
            work,
            lambda: torch.ops.dpfast_kernels.gradient_norm(A, G)[0],
            lambda squared: norms_error(squared, A, G),
            NORM,
        ),
    ]


def weight_cases(T: int, d: int, p: int, device: torch.device) -> list[Case]:
    A, G = sides(2 * T * d * p, T, d, p, device)
    factors = torch.rand(len(A), device=device)
    rows_a, rows_g = A.flatten(0, 1), G.flatten(0, 1)
    work = 2 * len(A) * T * d * p

    def clipped() -> Tensor:
        if device.type == "cuda":
            return torch.ops.dpfast_kernels.clipped_weight_gradient(A, G, factors, False)[0]
        return ops.clipped_weight_gradient(A.unsqueeze(1), G.unsqueeze(1), factors)

    def error(got: Tensor) -> float:
        want = torch.zeros(p, d, dtype=torch.float64, device=device)
        for a, g, factor in zip(A, G, factors.double(), strict=True):
            want.addmm_(g.double().T * factor, a.double())
        return relative_error([got], [want])

    cases = [Case("torch.mm: Gᵀ A", work, lambda: torch.mm(rows_g.T, rows_a))]
    if device.type == "cuda":
        cases.append(Case("torch.mm, float32 out", work, lambda: torch.mm(rows_g.T, rows_a, out_dtype=torch.float32)))
    return [*cases, Case("clipped weight gradient", work, clipped, error, WEIGHT)]


def memory_cases(B: int, T: int, d: int, rows: int, device: torch.device) -> list[Case]:
    """A copy, then each op of Triton's kernels and of the compiled library; ids are as frequent as words are."""
    dtype = SIZES[device.type].dtype
    frequency = 1 / torch.arange(1.0, rows + 1)
    ids = torch.multinomial(frequency, B * T, replacement=True).view(B, T).to(device)
    factors = torch.rand(B, device=device)
    mean, rstd = torch.randn(B, T, device=device), torch.rand(B, T, device=device)
    G, x = ([torch.randn(B, T, d, device=device, dtype=dtype) for _ in range(SETS)] for _ in range(2))
    samples = [torch.randn(B, T * d // 2, device=device) for _ in range(SETS)]  # in float32, as large as G in bfloat16
    copies = cycle([(y, torch.empty_like(y)) for y in samples])

    def copy() -> None:
        source, target = next(copies)
        target.copy_(source)

    def embedding_sum() -> Tensor:
        scaled = (G[0].double() * factors.double().view(-1, 1, 1)).flatten(0, 1)
        return torch.zeros(rows, d, dtype=torch.float64, device=device).index_add_(0, ids.flatten(), scaled)

    # name: bytes, arguments for each set of buffers, what the op must give for the first one
    specs: dict[str, tuple[int, list[tuple], Callable[[], Sequence[Tensor]]]] = {
        "weighted_sums": (
            samples[0].nbytes + samples[0][0].nbytes,
            [([y], factors) for y in samples],
            lambda: [reference.weighted_sum(samples[0].double(), factors)],
        ),
        "squared_norms": (
            samples[0].nbytes,
            [([y],) for y in samples],
            lambda: reference.squared_norm(samples[0].double())[:1],
        ),
        "sum_positions": (
            G[0].nbytes,
            [(g,) for g in G],
            lambda: reference.sum_positions(G[0].double()),
        ),
        "normalised_sums": (
            2 * G[0].nbytes,
            [(*sides, mean, rstd) for sides in zip(G, x, strict=True)],
            lambda: reference.normalised_sums(G[0].double(), x[0], mean, rstd),
        ),
        "embedding_squared_norm": (
            G[0].nbytes,
            [(ids, g) for g in G],
            lambda: reference.embedding_squared_norm(ids, G[0].double())[:1],
        ),
        "embedding_sum": (
            G[0].nbytes + 4 * rows * d,
            [(ids, g, factors, rows) for g in G],
            lambda: [embedding_sum()],
        ),
    }
    libraries = {"Triton": torch.ops.dpfast_kernels} if device.type == "cuda" else {}
    cases = [Case("copy", 2 * samples[0].nbytes, copy)]
    for name, (moved, buffers, want) in specs.items():
        native = {"native": torch.ops.dpfast} if ops.is_native(name, device) else {}
        for library, namespace in (libraries | native).items():
            call = functools.partial(_next_call, getattr(namespace, name), cycle(buffers))
            cases.append(Case(f"{name} ({library})", moved, call, functools.partial(_error, want), MEMORY))
    return cases


def _next_call(op: Callable, buffers: Iterator[tuple]) -> Any:
    return op(*next(buffers))


def _error(want: Callable[[], Sequence[Tensor]], got: Any) -> float:
    return relative_error([got] if isinstance(got, Tensor) else got, want())


# ---------------------------------------------------------------- measuring


def in_turns(calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, dict[int, float]]:
    """Seconds of every call in every round. On a GPU by its own clock, and the host waits for it once a round."""
    warm = sum(sum(_round(calls, number, device).values()) for number in range(WARM_UP)) / WARM_UP
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(warm, 1e-9))))
    taken: dict[str, dict[int, float]] = {name: {} for name in calls}
    for number in range(rounds):
        for name, once in _round(calls, number, device).items():
            taken[name][number] = once
    return taken


def _round(calls: dict[str, Callable[[], Any]], number: int, device: torch.device) -> dict[str, float]:
    order = measure.rotated(list(calls), number)
    if device.type != "cuda":
        return {name: measure.timed(calls[name]) for name in order}
    marks = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    torch.cuda._sleep(LEAD)
    for name in order:
        marks[name][0].record()
        calls[name]()
        marks[name][1].record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in marks.items()}


def why_not(attempt: Callable[[], Any]) -> str | None:
    """What an attempt died of, in a line, and None if it lives; memory that it held is free again."""
    try:
        attempt()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return None
    except Exception as failure:  # whatever it is, it is a row of the table
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    free_memory()
    return reason


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wrong(case: Case) -> str | None:
    """Why a case gets no figure: it fails, or its first result is not what it must be."""
    reason = None

    def attempt() -> None:
        nonlocal reason
        result = case.call()
        error = 0.0 if case.error is None else case.error(result)
        if not error <= TOLERANCE:
            reason = f"wrong: relative error {error:.1e}"

    return why_not(attempt) or reason


def measured(one: CaseSet, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """The figures of one set, in the order of its cases."""
    cases: list[Case] = []
    if reason := why_not(lambda: cases.extend(one.make())):
        return [{"set": one.title, "name": "all of them", "error": reason}]
    reasons = {case.name: wrong(case) for case in cases}
    right = [case for case in cases if reasons[case.name] is None]
    base = cases[0]
    figures = [{"set": one.title, "name": name, "error": reason} for name, reason in reasons.items() if reason]
    if base not in right:
        return figures
    taken = in_turns({case.name: case.call for case in right}, device, seconds)
    for case in right:
        target = case.target if device.type == "cuda" else None  # they are a GPU's
        own = taken[case.name]
        shares = [case.work / s / (base.work / taken[base.name][number]) for number, s in own.items()]
        share = measure.percentiles(shares)
        figures.append(
            {
                "set": one.title,
                "name": case.name,
                "work": case.work,
                "milliseconds": measure.percentiles([1e3 * s for s in own.values()]),
                "unit": one.unit,
                "rate": measure.percentiles([case.work / s / 1e12 for s in own.values()]),
                "over": base.name,
                "share": share,
                "target": target,
                "met": None if target is None else share["median"] >= target,
            }
        )
    return figures


def planned(B: int, T: int, d: int, p: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Every way for one weight: seconds predicted and measured; the first row is the way that the planner takes
    where memory does not matter.
    """
    dtype = SIZES[device.type].dtype
    A, G = (torch.randn(B, 1, T, n, device=device, dtype=dtype) for n in (d, p))
    form, factors = Factored(A, G, rows=p), torch.rand(B, device=device)

    def both(plan: planner.Plan) -> None:
        """Norm and clipped sum."""
        way = by(form, plan)
        way.squared_norm()
        way.clipped_sum(factors)

    plans = planner.choices(form.shape)
    calls = {plan.way: functools.partial(both, plan) for plan in plans}
    reasons = {way: why_not(call) for way, call in calls.items()}
    taken = in_turns({way: call for way, call in calls.items() if reasons[way] is None}, device, seconds)
    medians = {way: measure.percentiles(list(times.values())) for way, times in taken.items()}
    fastest = min(medians, key=lambda way: medians[way]["median"], default=None)
    rows = []
    for plan in plans:
        row: dict[str, Any] = {"B": B, "T": T, "d": d, "p": p, "way": plan.way, "predicted_seconds": plan.seconds}
        row |= {"chosen": plan is plans[0], "fastest": plan.way == fastest, "kept_bytes": plan.kept}
        if plan.way in medians:
            seconds_taken = medians[plan.way]
            row |= {"seconds": seconds_taken, "predicted_over_measured": plan.seconds / seconds_taken["median"]}
            row["over_fastest"] = seconds_taken["median"] / medians[fastest]["median"]
        else:
            row["error"] = reasons[plan.way]
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the record


def device_record(device: torch.device) -> dict[str, Any]:
    """What the figures depend on and `measure.machine_record` does not know."""
    backends = [row for row in ops.backends() if row[1] == device.type]
    if device.type != "cuda":
        return {"name": "cpu", "backends": backends}
    names = ("name", "multi_processor_count", "L2_cache_size", "total_memory")
    properties = torch.cuda.get_device_properties(0)
    record = {name: getattr(properties, name) for name in names}
    record |= {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda, "backends": backends}
    record["triton"] = importlib.import_module("triton").__version__
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    try:
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().split(", ")
        record |= dict(zip(asked, said, strict=False))
    except (OSError, subprocess.TimeoutExpired):
        record["driver_version"] = None  # nvidia-smi is not there, or does not answer
    return record


def write(record: dict[str, Any], path: Path) -> None:
    """After each set, so that an interrupted run keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def figure_row(figure: dict[str, Any]) -> list[str]:
    if "error" in figure:
        return [figure["set"], figure["name"], figure["error"], "", "", ""]
    share, target = figure["share"], figure["target"]
    said = "" if target is None else f"≥ {target:.0%}: {'met' if figure['met'] else 'NOT met'}"
    times = figure["milliseconds"]
    return [
        figure["set"],
        figure["name"],
        f"{times['median']:.3f} ({times['p20']:.3f}–{times['p80']:.3f})",
        f"{figure['rate']['median']:.4g} {figure['unit']}",
        f"{share['median']:.0%} ({share['p20']:.0%}–{share['p80']:.0%})",
        said,
    ]


def plan_row(row: dict[str, Any]) -> list[str]:
    shape = " ".join(f"{name} {row[name]}" for name in "BTdp")
    remarks = " ".join(remark for remark in ("chosen", "fastest") if row[remark])
    predicted = f"{1e3 * row['predicted_seconds']:.3f}"
    if "error" in row:
        return [shape, row["way"], predicted, row["error"], "", remarks]
    cells = f"{1e3 * row['seconds']['median']:.3f}", f"{row['predicted_over_measured']:.2f}"
    return [shape, row["way"], predicted, *cells, remarks]


def report(record: dict[str, Any]) -> str:
    header = ("sizes", "what", "ms (p20–p80)", "rate", "of the first one's rate", f"target ({WEIGHT:.0%} is 1.10×)")
    plan_header = ("weight", "way", "predicted ms", "measured ms", "predicted / measured", "")
    parts = [f"{record['device']['name']}, torch {torch.__version__}, {record['machine']['date']}"]
    parts.append(measure.markdown_table(header, [figure_row(figure) for figure in record["figures"]]))
    plans = record["planner"]
    if plans:
        parts.append(measure.markdown_table(plan_header, [plan_row(row) for row in plans]))
        chosen = [row for row in plans if row["chosen"]]
        best = sum(row["fastest"] for row in chosen)
        ratios = [row["predicted_over_measured"] for row in plans if "seconds" in row]
        lost = max((row["over_fastest"] for row in chosen if "seconds" in row), default=1.0)
        spread = measure.percentiles(ratios) if ratios else {"p20": 1.0, "p80": 1.0}
        parts.append(
            f"The planner's way was the fastest for {best} of {len(chosen)} weights, and at worst {lost:.2f}× as slow; "
            f"predicted over measured is {spread['p20']:.2f} to {spread['p80']:.2f} (p20 to p80)."
        )
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a kernel is wrong or fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--seconds", type=float, default=60, help="of timing loops, in all (default 60)")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "bench" / "results")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --device cpu measures what there is without one")
    device = torch.device(asked.device)
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "machine": measure.machine_record(),
        "device": device_record(device),
        "configuration": {"command": "python -m bench.kernels", "device": asked.device, "seconds": asked.seconds},
        "figures": [],
        "planner": [],
    }
    path = asked.out / f"kernels-{asked.device}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    sets, shapes = case_sets(device), SIZES[device.type].plans
    share = asked.seconds / (len(sets) + len(shapes))
    for one in tqdm(sets, desc="kernels"):
        record["figures"] += measured(one, device, share)
        write(record, path)
        free_memory()
    for shape in tqdm(shapes, desc="planner"):
        record["planner"] += planned(*shape, device, share)
        write(record, path)
        free_memory()
    record["device_after"] = device_record(device)  # clocks after work
    write(record, path)
    print(report(record))
    print(f"\nrecord: {path}")
    return 1 if any("error" in figure for figure in record["figures"]) else 0


if __name__ == "__main__":
    sys.exit(main())
