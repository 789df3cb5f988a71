"""Sources that a whole compile has found good: while they are the same, tests compile a part of them.

A whole one of all kernels takes minutes. ``make compiled`` runs it and writes :data:`FILE`; where kernels, headers or a
compiler are others than it says, the tests run the whole one by themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from dpfast.native import build

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("compiled.json")


def digest(files: Iterable[Path], compiler: str) -> str:
    """Of the files' names and contents, and of what compiles them."""
    said = hashlib.sha256(compiler.encode())
    for path in sorted(files):
        said.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return said.hexdigest()


def now(what: str) -> str:
    """The digest of ``"triton"`` or ``"cuda"`` as it is."""
    if what == "triton":
        return digest((ROOT / "kernels/dpfast_kernels").glob("*.py"), metadata.version("triton"))
    about = build.plan("cuda", csrc=ROOT / "csrc").about
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and "cpu" not in path.parts]
    return digest(sources, f"{about['nvcc']} {about['arches']}")


def is_known_good(what: str) -> bool:
    """Whether the sources are those of the last whole compile, and nobody asks for another one."""
    return "DPFAST_COMPILE_ALL" not in os.environ and json.loads(FILE.read_text()).get(what) == now(what)


if __name__ == "__main__":
    FILE.write_text(json.dumps({what: now(what) for what in ("triton", "cuda")}, indent=2) + "\n")
