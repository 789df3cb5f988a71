"""The command line.

``python -m dpfast doctor`` says what dpfast runs on here, and why not on more; ``python -m dpfast reproduce`` tries
what the papers say: see :mod:`dpfast.analysis.reproduce`; ``python -m dpfast finetune`` trains a language model
privately: see :mod:`dpfast.integrations.finetune`; ``python -m dpfast run`` runs a script that uses Opacus, unchanged:
see :mod:`dpfast.dropin.run`; ``python -m dpfast bench`` measures, in a clone of the sources.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

import dpfast
from dpfast import native
from dpfast.analysis import reproduce
from dpfast.dropin import run
from dpfast.integrations.finetune import command
from dpfast.native import allocator, build, cache

MEANT = ("native", "triton", "torch")  # backends in dpfast.ops.backends() that nothing better stands above


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Without one, print the help."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["bench"]:
        return bench(given[1:])
    if given[:1] == ["run"]:
        return run.main(given[1:])
    parser = argparse.ArgumentParser("dpfast", description=dpfast.__doc__)
    commands = parser.add_subparsers(dest="command")
    doctor = commands.add_parser("doctor", help="versions, devices, native libraries, and the backend of each op")
    doctor.add_argument("--strict", action="store_true", help="exit with status 1 if an op has no kernel")
    reproduce.add_arguments(commands.add_parser("reproduce", help="the papers' claims, tried on small data"))
    commands.add_parser("run", help="run a script that uses Opacus, unchanged, on the fused mode", add_help=False)
    commands.add_parser("bench", help="measure beside ordinary training and the peers", add_help=False)
    tuned = commands.add_parser("finetune", help="fine-tune a Transformers model with differential privacy")
    command.add_arguments(tuned)
    asked = parser.parse_args(given)
    if asked.command is None:
        parser.print_help()
        return 0
    if asked.command == "reproduce":
        return reproduce.main(asked.experiment, asked.seeds, asked.out, asked.quick)
    if asked.command == "finetune":
        return command.main(asked)
    return report(asked.strict)


def bench(arguments: Sequence[str]) -> int:
    """The bench is no part of the package: it is run from a clone, with what the extra ``demo`` installs."""
    root = Path(dpfast.__file__).parent.parent
    if not (root / "bench" / "command.py").is_file():
        print("error: bench is in dpfast's sources, not in its package: run this in a clone of them", file=sys.stderr)
        return 2
    missing = [name for name in ("matplotlib", "psutil", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: bench needs {', '.join(missing)}: pip install 'dpfast[demo]'", file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module("bench.command").main(arguments)


def report(strict: bool) -> int:
    """Print what ``doctor`` finds: native libraries are loaded for it, and built if a first use would build them.

    Returns:
        1 if ``strict`` and an op on a device that is here falls back to the reference, else 0.
    """
    libraries = native.status()
    from dpfast.ops import backends

    rows = backends()
    section("versions", versions())
    section("devices", devices())
    section("memory", [("freed memory", kept_memory())])
    section("native libraries", [*map(library_row, libraries), ("cache", "in", cache_folder())])
    section("ops", rows)
    fallen = [(op, device) for op, device, backend, _ in rows if backend not in MEANT]
    if fallen:
        print(f"{len(fallen)} of {len(rows)} ops fall back to the reference")
    return 1 if strict and fallen else 0


def section(title: str, rows: Iterable[Sequence[str]]) -> None:
    """Print ``rows`` as columns, each as wide as its longest entry."""
    print(title)
    table = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  " + "  ".join(f"{entry:<{width}}" for entry, width in zip(row, widths, strict=True)).rstrip())
    print()


def versions() -> Iterator[tuple[str, str]]:
    yield "dpfast", f"{dpfast.__version__} in {Path(dpfast.__file__).parent}"
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


if __name__ == "__main__":
    sys.exit(main())
