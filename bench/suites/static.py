"""The Triton kernels by their machine code, GPU or none: everything here is predicted, and nothing was run.

All cases that the kernels' files have to compile, for sm_90 and sm_80: registers, spills, shared memory, programs a
processor and what their main loop takes. Then shapes on an H100: how much of its tensor cores, or of its memory, a call
can have, with the waves of its programs; whether the kernel's form has its reach, and why not. At last what the planner
makes of the predicted rates.

The record: ``kernels`` by case and target, ``shapes`` and ``plans`` by title.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import predicted
from bench.machine_code import looked_at
from bench.measure import prefixed
from bench.record import Record, title_of
from bench.suites import Options
from bench.suites.static_cases import SHAPES, SMALL
from dpfast import tables

TMA = (
    "No kernel loads by tensor descriptors (TMA). A norm-GEMM that did took 76 instructions a step in place of 140, "
    "but the bytes were the same, and the L2 cache limits it. Kernels that issue limits read what descriptors cannot "
    "address: rows of odd lengths, or rows at indices."
)
NOTE = "Predicted from machine code, not measured: nothing here has run on a GPU."
FEW = ("noise",)  # the families of a small run
PLANS = ((8, 512), (8, 1024), (8, 2048), (8, 4096))  # B, T of GPT-2 medium
LAYERS = {"attention": (1024, 3072, 1), "projection": (1024, 1024, 1), "up": (1024, 4096, 1), "down": (4096, 1024, 1)}
RATES = {  # which shapes a rate of dpfast/planning/unmeasured.py is from
    "linear, 16 bits": {
        "gram": ["ghost, 8 layers, B 8, T 1024, d 1024, p 4096"],
        "tile": ["norm-GEMM, B 8, T 1024, d 1024, p 4096", "norm-GEMM, B 8, T 4096, d 4096, p 4096"],
        "sample": ["instantiated, B 8, T 1024, d 4096, p 4096"],
        "sum": ["weight gradient, B 8, T 1024, d 1024, p 4096", "weight gradient, B 8, T 1024, d 4096, p 4096"],
    },
    "linear, 32 bits": {
        "gram": ["ghost, B 8, T 1024, d 1024, p 4096, float32"],
        "tile": ["norm-GEMM, B 8, T 1024, d 1024, p 4096, float32"],
        "sum": ["weight gradient, B 8, T 1024, d 1024, p 4096, float32"],
    },
    "convolution, 32 bits": {"sample": ["3×3 convolution, samples, B 256, 64 channels, 32×32, float32"]},
    "convolution, 16 bits": {
        "sample": ["3×3 convolution, samples, B 256, 64 channels, 32×32"],
        "sum": ["3×3 convolution, clipped sum, B 256, 64 channels, 32×32"],
    },
}


def jobs_of(small: bool) -> list[dict[str, Any]]:
    """Every case of every family for both targets, and every shape; the shapes first."""
    import dpfast_kernels

    jobs: list[dict[str, Any]] = [
        {"key": title, "family": None, "case": title, "capability": 90} for title in (SMALL if small else SHAPES)
    ]
    families = FEW if small else sorted(module.name for module in pkgutil.iter_modules(dpfast_kernels.__path__))
    for capability in (90, 80):
        for family in families:
            cases = getattr(importlib.import_module(f"dpfast_kernels.{family}"), "COMPILES", ())
            for number, case in enumerate(cases):
                key = f"{family}: {case.name}, sm_{capability}"
                jobs.append({"key": key, "family": family, "case": number, "capability": capability})
    return jobs


def run(record: Record, options: Options) -> bool:
    """Compile and read what the record lacks; whether all of it compiled, without a spill."""
    kernels, shapes, plans = (record.suite.setdefault(name, {}) for name in ("kernels", "shapes", "plans"))
    jobs = jobs_of(options.small)
    left = [job for job in jobs if job["key"] not in (shapes if job["family"] is None else kernels)]
    asked = {job["key"]: job for job in left}
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="static") as bar:
        for answer in looked_at(left):
            job = asked[answer["key"]]
            if job["family"] is not None:
                kernels[job["key"]] = answer.get("rows") or [{"error": answer.get("error", "nothing was launched")}]
            else:
                shapes[job["key"]] = of_shape(job["key"], answer)
            record.save()
            bar.update()
    if not plans:
        plans |= {f"GPT-2 medium, B {B}, T {T}": planned(B, T) for B, T in PLANS}
        record.save()
    rows = [row for cases in kernels.values() for row in cases] + list(shapes.values())
    return not any("error" in row or row["spills"] for row in rows)


def of_shape(title: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a shape: what was read of the launch that counts, and what it predicts."""
    shape = SHAPES[title]
    if "error" in answer:
        return {"error": answer["error"]}
    launches = [one for one in answer["rows"] if one["kernel"] == shape.kernel]
    if not launches:
        return {"error": f"no launch of {shape.kernel}, but of {[one['kernel'] for one in answer['rows']]}"}
    row = {**launches[0], "programs": sum(one["programs"] for one in launches)}
    machine = predicted.MACHINES[90]
    try:
        if shape.flops is None:
            found = predicted.of_memory(row, shape.bytes, machine)
        else:
            multiplied = shape.flops if shape.multiplied is None else shape.multiplied(row["options"])
            turns, beside = (1, 0.0) if shape.kept is None else shape.kept(row["options"])
            found = predicted.of_products(row, shape.flops, multiplied, machine, turns, beside)
    except (LookupError, ZeroDivisionError) as error:  # a kernel of another form than the case knows
        return {"error": f"no prediction: {type(error).__name__}: {error}"}
    found |= {"reach": shape.reach, "verdict": predicted.verdict(found, shape.reach, shape.remark)}
    return {**row, **found, "waves": predicted.waves(row, machine)}


def planned(B: int, T: int) -> dict[str, Any]:
    """What the planner chooses for the linear layers of a block, and what a step would cost over an ordinary one's."""
    from dpfast.planning.planner import Shape, choices

    device, ordinary, ours, ways = torch.device("cuda", 0), 0.0, 0.0, {}
    for name, (d, p, count) in LAYERS.items():
        shape = Shape(B, 1, T, d, p, torch.bfloat16, device, 2 * B * T * (d + p))
        plans = choices(shape)
        ways[name] = [{"way": plan.way, "seconds": plan.seconds, "kept_bytes": plan.kept} for plan in plans]
        gradient = 2.0 * shape.elements * T / GEMM
        ordinary += count * 3 * gradient
        ours += count * (2 * gradient + plans[0].seconds)
    return {"ways": ways, "ratio": ours / ordinary, "rates": plans[0].unmeasured}


GEMM = 6.5e14  # flops a second of an ordinary product of bfloat16 on an H100: an assumption


# ---------------------------------------------------------------- the report


def report(data: dict[str, Any]) -> str:
    suite = data["suite"]
    parts = [title_of(data), f"**{NOTE}**"]
    if shapes := suite.get("shapes"):
        machine = predicted.MACHINES[90]
        head = (
            f"**shapes on an {machine.name}, predicted**: {machine.processors} processors at {machine.hertz / 1e9:g} "
            f"GHz, an assumed {machine.l2_bytes:g} bytes a clock of L2 for each; the clocks of a pass through the main "
            "loop are, for products of a step of K = 64, tensor cores (or FMA units)/shared memory/L2/issue, and "
            "memory/issue/latency where nothing is multiplied"
        )
        parts += [f"{head}\n\n{_shapes(shapes)}", TMA]
    for name, named in RATES.items():
        if rates := predicted.rates_from(suite.get("shapes", {}), named):
            said = ", ".join(f"{rate} {value:.2g}" for rate, value in rates.items())
            parts.append(f"Rates for plans, predicted, {name}: {said} FLOP/s.")
    if plans := suite.get("plans"):
        parts.append(f"**plans with predicted rates**\n\n{_plans(plans)}")
    if kernels := suite.get("kernels"):
        parts.append(f"**all kernels, predicted**\n\n{_kernels(kernels)}")
    return "\n\n".join(parts)


def _step(row: Mapping[str, Any]) -> float:
    """How many passes through the main loop are a step of K = 64."""
    options = row["options"]
    depth = options.get("BLOCK_K") or (options.get("BLOCK_T") if "BLOCK_P" in options else None)
    return 64 / depth if depth else 1.0


def _shapes(shapes: Mapping[str, Any]) -> str:
    header = ("call", "registers, KB, warps", "waves", "clocks", "at most", "with waves", "rate", "reach")
    rows = []
    for title in sorted(shapes, key=list(SHAPES).index):
        row = shapes[title]
        if "error" in row:
            rows.append([title, row["error"], *[""] * 6])
            continue
        rate = prefixed(row["flops_per_second"], "FLOP/s") if "flops_per_second" in row else None
        rows.append(
            [
                title,
                f"{row['registers']}, {row['shared'] // 1024}, {row['warps']}",
                f"{row['waves']:.1f}",
                predicted.in_words(row["clocks"], _step(row)),
                f"{row['at_most']:.0%} of {row['of']}, by {row['limit']}",
                f"{row['share']:.0%}",
                rate or prefixed(row["bytes_per_second"], "B/s"),
                row["verdict"],
            ]
        )
    return tables.markdown(header, rows)


def _plans(plans: Mapping[str, Any]) -> str:
    rows = [
        [title, *(one["ways"][name][0]["way"] for name in LAYERS), f"{one['ratio']:.2f}"]
        for title, one in plans.items()
    ]
    assumed = f"an ordinary product at an assumed {GEMM / 1e12:g} TFLOP/s; linear layers alone, the head left out"
    header = ("model", *LAYERS, "time / ordinary, predicted")
    return f"{tables.markdown(header, rows)}\n\n{next(iter(plans.values()))['rates']}; {assumed}."


def _kernels(kernels: Mapping[str, Any]) -> str:
    header = ("case", "kernel", "registers", "KB", "programs a processor", "loop", "clocks", "at most", "")
    rows = []
    for key, launches in sorted(kernels.items()):
        for row in launches:
            if "error" in row:
                rows.append([key, row["error"], *[""] * 7])
                continue
            remarks = [f"SPILLS {row['spills']} bytes"] if row["spills"] else []
            remarks += ["products wait for each other"] if row["serialized"] else []
            loop, clocks, most = "", "", ""
            if loops := predicted.main_loops(row):
                share, limit, its = predicted.at_most(row, predicted.MACHINES[row["target"]])
                loop, clocks = str(loops[0]["instructions"]), predicted.in_words(its, _step(row))
                most = f"{share:.0%}, by {limit}" if next(iter(its.values())) else ""
            figures = [str(row["registers"]), str(row["shared"] // 1024), str(row["occupancy"])]
            rows.append([key, row["kernel"], *figures, loop, clocks, most, "; ".join(remarks)])
    return tables.markdown(header, rows)


def draw(data: dict[str, Any], stem: Path) -> list[Path]:
    """Nothing: the table is the figure."""
    return []
