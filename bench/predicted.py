"""What machine code says of speed: clocks of a pass through a kernel's main loop, and of all its programs on a GPU.

A pass takes as long as the slowest of what it needs of a processor: tensor cores (or FMA units), shared memory, its
share of the L2 cache, and slots to issue instructions. That is a prediction and no measurement: latencies that nothing
hides, conflicts of banks, memory's own limits and clocks under load are left out, and the L2's rate is an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Machine:
    """Per processor and clock, but for the last two."""

    name: str
    processors: int
    tensor_flops: float  # of bfloat16 and float16, sums in float32
    fma_flops: float  # of float32
    shared_bytes: float
    l2_bytes: float  # an assumption: 7 TB/s of an H100, 4.5 of an A100
    latency: float  # clocks until a load from memory is there: what a program waits for before its first pass
    hertz: float
    memory_bytes: float  # a second


MACHINES = {
    80: Machine("A100", 108, 2048, 128, 128, 30, 800, 1.41e9, 2.0e12),
    90: Machine("H100", 132, 4096, 256, 128, 31, 800, 1.755e9, 3.35e12),
}
ISSUED = 4  # instructions a clock: one of a warp, on each of four schedulers


def main_loops(row: Row) -> list[Row]:
    """The loops on the tensor cores; where there is none, the one that multiplies most, or else that loads most."""
    loops = row["loops"]
    products = [loop for loop in loops if loop["flops"]]
    return products or sorted(loops, key=lambda loop: (-loop["fma"], -loop["loaded"]))[:1]


def clocks_of(loop: Row, machine: Machine) -> dict[str, float]:
    """Of one pass of a program, on a processor that it has for itself."""
    if loop["flops"]:
        product = {"tensor": loop["flops"] / machine.tensor_flops}
    else:
        product = {"FMA": 64 * loop["fma"] * loop["warps"] / machine.fma_flops}
    return product | {
        "shared": loop["shared_bytes"] / machine.shared_bytes,
        "L2": loop["loaded"] / machine.l2_bytes,
        "issue": loop["instructions"] * loop["warps"] / ISSUED,
    }


def at_most(row: Row, machine: Machine) -> tuple[float, str, dict[str, float]]:
    """The share of the products' peak that the main loops allow, what limits it, and the clocks of a pass."""
    each = [clocks_of(loop, machine) for loop in main_loops(row)]
    clocks = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
    product, taken = next(iter(clocks.values())), max(clocks.values())
    return product / taken, max(clocks, key=clocks.__getitem__), clocks


def of_products(
    row: Row, flops: float, multiplied: float, machine: Machine, turns: int = 1, beside: float = 0.0
) -> dict[str, Any]:
    """A call worth ``flops`` whose programs multiply so much: seconds, the share of the peak, and what limits it.

    Args:
        turns: tiles that a program works on, one after the other.
        beside: bytes that all programs move from and to the L2 cache outside of their main loops.
    """
    share, limit, clocks = at_most(row, machine)
    peak = machine.tensor_flops if "tensor" in clocks else machine.fma_flops
    program = multiplied / row["programs"] / peak / share + beside / row["programs"] / machine.l2_bytes
    program += turns * row["outside"] * row["warps"] / ISSUED + (turns - 1) * machine.latency
    taken = _of_all(program, row, machine)
    return {
        "at_most": share,
        "limit": limit,
        "clocks": clocks,
        "of": "tensor cores" if "tensor" in clocks else "FMA units",
        "seconds": taken / machine.hertz,
        "share": flops / (taken * machine.processors * peak),
        "flops_per_second": flops / taken * machine.hertz,
    }


def of_memory(row: Row, moved: float, machine: Machine) -> dict[str, Any]:
    """A call that moves so many bytes: the share of the memory's rate that its loop can ask for.

    Programs that a processor holds hide each other's waits; a pass takes what issues it, or what memory has to give, or
    its part of a latency.
    """
    loop = max(row["loops"], key=lambda one: one["loaded"], default=None)
    resident = min(row["occupancy"], -(-row["programs"] // machine.processors))
    per_clock = machine.memory_bytes / machine.hertz / machine.processors
    if loop is None or not loop["loaded"]:  # no loop: each program loads once
        clocks = {"memory": moved / row["programs"] / per_clock, "latency": machine.latency / resident}
    else:
        clocks = {
            "memory": loop["loaded"] / per_clock,
            "issue": loop["instructions"] * loop["warps"] / ISSUED,
            "latency": machine.latency / resident,
        }
    share = clocks["memory"] / max(clocks.values())
    program = moved / row["programs"] / per_clock / share + row["outside"] * row["warps"] / ISSUED
    taken = _of_all(program, row, machine)
    return {
        "at_most": share,
        "limit": max(clocks, key=clocks.__getitem__),
        "clocks": clocks,
        "of": "memory",
        "seconds": taken / machine.hertz,
        "share": moved / (taken * machine.processors * per_clock),
        "bytes_per_second": moved / taken * machine.hertz,
    }


def _of_all(program: float, row: Row, machine: Machine) -> float:
    """Clocks of all programs: the processor with the most of them decides, and each turn begins with a wait."""
    turns = -(-row["programs"] // (machine.processors * row["occupancy"]))
    return -(-row["programs"] // machine.processors) * program + turns * machine.latency


def waves(row: Row, machine: Machine) -> float:
    return row["programs"] / machine.processors / row["occupancy"]


def verdict(found: Row, reach: float, remark: str) -> str:
    """Whether a kernel's form has its reach, and else what keeps it from there."""
    if found["at_most"] > reach - 0.01:
        return f"{reach:.0%}: within reach"
    clocks = list(found["clocks"].values())
    why = f"{found['limit']} takes {max(clocks) / clocks[0]:.1f} times as long"
    return f"{reach:.0%}: no, {why}{f'; {remark}' if remark else ''}"


def in_words(clocks: Mapping[str, float], scale: float = 1.0) -> str:
    return "/".join(f"{scale * value:.0f}" for value in clocks.values())


def rates_from(shapes: Mapping[str, Row], named: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``{rate: flops a second}``: the mean over the named shapes that have a figure."""
    found = {}
    for rate, titles in named.items():
        each = [shapes[title]["flops_per_second"] for title in titles if "flops_per_second" in shapes.get(title, {})]
        if each:
            found[rate] = sum(each) / len(each)
    return found
