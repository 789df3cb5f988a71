"""``python -m dpfast doctor``: what dpfast runs on here, and why not on more."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from dpfast import native, tables
from dpfast.arguments import Parser
from dpfast.native import allocator, build, cache
from dpfast.version import __version__

MEANT = ("native", "triton", "torch")  # backends in dpfast.ops.backends() that nothing better stands above


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit status."""
    parser = Parser("dpfast doctor", description="Versions, devices, native libraries, and the backend of each op.")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if an op has no kernel")
    strict = parser.parse_args(arguments).strict
    try:
        status = report(strict)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `doctor | head`: whoever reads has seen enough, and Python flushes once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def report(strict: bool) -> int:
    """Print what ``doctor`` finds: native libraries are loaded for it, and built if a first use would build them.

    Returns:
        1 if ``strict`` and an op on a device that is here falls back to the reference, else 0.
    """
    libraries = native.status()
    from dpfast.ops import backends
    from dpfast.planning.rates import said_of

    rows = backends()
    section("versions", versions())
    section("devices", devices())
    section("memory", [("freed memory", kept_memory())])
    section("native libraries", [*map(library_row, libraries), ("cache", "in", cache_folder())])
    section("rates of plans", [(name, *said_of(torch.device(name))) for name in planned()])
    section("ops", rows)
    fallen = [reason for _, _, backend, reason in rows if backend not in MEANT]
    if fallen:
        print(f"{len(fallen)} of {len(rows)} ops fall back to the reference:")
        print(textwrap.indent("\n".join(dict.fromkeys(fallen)), "  "))
    return 1 if strict and fallen else 0


def section(title: str, rows: Iterable[Sequence[str]]) -> None:
    """Print ``rows`` as columns, below their title."""
    print(f"{title}\n{textwrap.indent(tables.plain(rows), '  ')}\n")


def versions() -> Iterator[tuple[str, str]]:
    yield "dpfast", f"{__version__} in {Path(native.__file__).parent.parent}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for name in ("triton", "opacus"):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{cpu_model()}, {torch.get_num_threads()} threads, {instruction_set()}"
    if not torch.cuda.is_available():
        yield "cuda", "none" if torch.version.cuda else "none: this torch is built without CUDA"
        return
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{of.name}, sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB"


def planned() -> list[str]:
    """The devices that plans are made for: all that are here, and some GPU where there is none."""
    return ["cpu", *([f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cuda"])]


def kept_memory() -> str:
    why_not = allocator.keep_freed_memory()
    return "goes back to the system: " + why_not if why_not else "stays with a process that trains on the CPU"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(errors="replace").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The best instruction set of this processor that there are kernels for, and the one in use."""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "scalar")
    if native.why_not("cpu"):
        return f"has {best}, used by no library"
    asked = os.environ.get("DPFAST_CPU_ISA")
    return f"has {best}, uses {native.instruction_set()}" + (f" (DPFAST_CPU_ISA={asked})" if asked else "")


def library_row(library: native.Library) -> tuple[str, str, str]:
    if library.reason is not None:
        return library.device, "none", library.reason
    kinds = library.about.get("isas" if library.device == "cpu" else "arches", "?")
    by = library.about.get("nvcc" if library.device == "cuda" else "compiler", "an unknown compiler")
    since = ".".join(map(str, build.TARGET))
    about = f"for {kinds}, by {by} with torch {library.about.get('torch', '?')}'s headers (serves {since} and newer)"
    return library.device, library.origin, f"{library.path} {about}"


def cache_folder() -> str:
    try:
        return str(cache.folder())
    except build.BuildError as error:
        return f"no folder: {error}"
