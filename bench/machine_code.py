"""Reads a Triton kernel's machine code, GPU or none: registers, spills, shared memory, occupancy and its inner loops.

``python -m bench.machine_code`` is the worker: a process of its own, as Triton's interpreter may be on in ours, and as
a compiler that dies takes its process along. It is given a JSON list of jobs, and answers each with a line.
:func:`looked_at` runs some of them.
"""

from __future__ import annotations

import io
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2  # processes that compile at a time
LANES = 32  # of a warp
REGISTERS, THREADS, BLOCKS = 65_536, 2048, 32  # of a processor, of both architectures
SHARED = {80: 167_936, 90: 233_472}  # bytes of one, of which a program's own cost 1024 more
LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)


# ---------------------------------------------------------------- what a listing says


def listing(cubin: bytes) -> str:
    """The instructions, by the disassembler of Triton's own wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def parsed(text: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of each innermost loop in one of its passes: what a branch may skip is left out, such
    as what is done once a sample.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    loops, skipped = [], set[int]()
    for at, one in enumerate(instructions):
        named = re.search(r"\bBRA\b.*`\((\.L\w+)\)", one)
        target = labels.get(named[1], at) if named else at
        if target < at:  # one that jumps to itself is the end of the program
            loops.append((target, at))
    inner = [one for one in loops if not any(o != one and one[0] <= o[0] and o[1] <= one[1] for o in loops)]
    for at, one in enumerate(instructions):
        named = re.search(r"^@.*\bBRA\b.*`\((\.L\w+)\)", one)
        target = labels.get(named[1], at) if named else at
        if any(first <= at < target <= last for first, last in inner):
            skipped |= set(range(at + 1, target))
    return instructions, [[instructions[k] for k in range(a, b + 1) if k not in skipped] for a, b in inner]


def operation(instruction: str) -> str:
    """``LDG`` of ``@P1 LDG.E.U16 R1, …``."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def width(instruction: str) -> int:
    """Bytes that a thread moves by a load or a store."""
    sizes = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
    name = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
    if name.startswith("LDSM"):  # matrices of 8 × 8 elements of two bytes
        return 4 * int(re.search(r"\.([124])(\b|$)", name)[1]) if re.search(r"\.([124])(\b|$)", name) else 4
    return next((size for end, size in sizes.items() if end in name), 4)


def tensor_flops(instruction: str) -> int:
    """Of one matrix instruction: of a warpgroup (wgmma), or of a warp."""
    if shape := re.search(r"\bHGMMA\.64x(\d+)x(\d+)", instruction):
        return 2 * 64 * int(shape[1]) * int(shape[2])
    if shape := re.search(r"\bHMMA\.(16)(8)(8|16)\b", instruction):
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0


def operands_in_shared(instruction: str) -> int:
    """Bytes of 16-bit operands that a wgmma reads there; A may be in registers."""
    shape = re.search(r"\bHGMMA\.64x(\d+)x(\d+)(.*)", instruction)
    if not shape:
        return 0
    n, k = int(shape[1]), int(shape[2])
    a_in_registers = re.match(r"\S*\s+R\d+, R\d+, gdesc", shape[3]) is not None
    return 2 * k * (n + (0 if a_in_registers else 64))


def loop_of(body: Sequence[str], warps: int) -> dict[str, Any]:
    """One pass of a whole program through a loop: instructions of a warp, and what all warps multiply and move."""
    never = [one for one in body if not one.startswith("@!PT")]
    count = Counter(map(operation, never))
    groups = warps // 4
    flops = sum(tensor_flops(one) * (groups if "HGMMA" in one else warps) for one in never)
    shared = sum(operands_in_shared(one) * groups for one in never)
    moved = {"loaded": 0, "stored": 0}
    for one in never:
        name = operation(one)
        if name in LOADS:
            moved["loaded"] += width(one) * LANES * warps
        elif name in STORES:
            moved["stored"] += width(one) * LANES * warps
        if name in ("LDS", "STS", "LDSM", "LDGSTS"):  # a warp takes a whole clock of 128 bytes at least
            shared += max(width(one) * LANES, 128) * warps
    return {
        "instructions": len(never),
        "warps": warps,
        "flops": flops,
        "shared_bytes": shared,
        **moved,
        "fma": count["FFMA"],
        "kinds": dict(count.most_common(12)),
    }


def occupancy(registers: int, shared: int, warps: int, capability: int) -> int:
    """Programs that a processor holds at a time."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * LANES * warps)
    by_shared = SHARED[capability] // (shared + 1024)
    return max(1, min(by_registers, by_shared, THREADS // (LANES * warps), BLOCKS))


# ---------------------------------------------------------------- compiling


def specialised(launch: Any, chip: Any) -> tuple[Any, ...]:
    """Options, signature, constants and attributes, as Triton makes them of the arguments of a launch."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(chip)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    return launch.kernel._pack_args(backend, options, bound, specialization, options)


def compiled(launch: Any, capability: int, seen: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """The binary of a launch, and what the assembler says of it.

    Args:
        seen: what it said before, by binary: what Triton has in its cache it does not compile again. TRITON_CACHE_DIR
            must be a folder that was empty when ``seen`` was, and TRITON_DUMP_PTXAS_LOG set.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = GPUTarget("cuda", capability, LANES)
    options, *source = specialised(launch, chip)
    with redirect_stdout(io.StringIO()) as heard:
        binary = triton.compile(ASTSource(launch.kernel, *source), target=chip, options=options.__dict__)
    said = seen.setdefault(binary.hash, heard.getvalue())
    return binary, {
        "kernel": launch.kernel.__name__,
        "target": capability,
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "serialized": "wgmma.mma_async instructions are serialized" in said,
        "shared": binary.metadata.shared,
        "fused": options.enable_fp_fusion,
    }


def read(launch: Any, capability: int, seen: dict[str, str]) -> dict[str, Any]:
    """All that there is to say of a launch: the row of a record."""
    binary, row = compiled(launch, capability, seen)
    instructions, inner = parsed(listing(binary.asm["cubin"]))
    warps = binary.metadata.num_warps
    loops = [loop_of(body, warps) for body in inner]
    kept = {name: value for name, value in launch.options.items() if type(value) is int}
    return row | {
        "options": kept,
        "warps": warps,
        "programs": launch.programs,
        "occupancy": occupancy(row["registers"], row["shared"], warps, capability),
        "outside": len(instructions) - sum(map(len, inner)),  # instructions of no inner loop, or not of every pass
        "loops": sorted(loops, key=lambda loop: (-loop["flops"], -loop["loaded"], -loop["instructions"])),
    }


# ---------------------------------------------------------------- the worker, and who asks it


def answers(jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each job ``{"key", "family" or None, "case", "capability"}``: its rows, or its error."""
    import importlib

    seen: dict[str, str] = {}
    for job in jobs:
        try:
            if job["family"] is None:
                from bench.suites.static_cases import SHAPES

                case = SHAPES[job["case"]].compiled()
            else:
                case = importlib.import_module(f"dpfast_kernels.{job['family']}").COMPILES[job["case"]]
            rows = [read(launch, job["capability"], seen) for launch in case.launches(job["capability"])]
            yield {"key": job["key"], "rows": rows}
        except Exception as error:  # whatever it is, it is this job's row
            yield {"key": job["key"], "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def looked_at(jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The answers to all jobs, as they come; where a worker dies, its job's is an error and another one goes on."""
    parts = [_Part(list(jobs[k::WORKERS])) for k in range(min(WORKERS, len(jobs)))]
    waiting = selectors.DefaultSelector()
    try:
        for part in parts:
            part.start()
            waiting.register(part.worker.stdout, selectors.EVENT_READ, part)
        while waiting.get_map():
            for key, _ in waiting.select():
                part = key.data
                line = part.worker.stdout.readline()
                if line:
                    part.left.pop(0)
                    yield json.loads(line)
                    continue
                waiting.unregister(part.worker.stdout)
                if part.left:  # it died of the first of them
                    yield {"key": part.left.pop(0)["key"], "error": part.last_words()}
                part.stop()
                if part.left:
                    part.start()
                    waiting.register(part.worker.stdout, selectors.EVENT_READ, part)
    finally:
        for part in parts:
            part.stop()
        waiting.close()


class _Part:
    """Jobs that one worker after the other answers, in a folder that is Triton's cache meanwhile."""

    def __init__(self, left: list[Mapping[str, Any]]):
        self.left = left

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.errors = open(Path(self.folder.name) / "errors.txt", "w+")  # noqa: SIM115 - stop() closes it
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": self.folder.name}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "bench.machine_code", json.dumps(self.left)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            bufsize=0,  # what is read ahead, select would not see
        )

    def last_words(self) -> str:
        status = self.worker.wait()
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()[-1:] or ["it said nothing"]
        return f"the compiler died ({status}): {said[0][:300]}"

    def stop(self) -> None:
        self.worker.kill()
        self.worker.wait()
        self.worker.stdout.close()
        self.errors.close()
        self.folder.cleanup()


if __name__ == "__main__":
    for answer in answers(json.loads(sys.argv[1])):
        print(json.dumps(answer), flush=True)
