"""A package with the real build files and C++ sources of a few lines, which compile in no time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CSRC = {
    "register.cpp": "",
    "cpu/kernels.h": "namespace dpfast { struct Kernels { const char* name; }; const Kernels& kernels(); }\n",
    "cpu/dispatch.cpp": '#include "kernels.h"\n'
    'const dpfast::Kernels& dpfast::kernels() { static const Kernels all{"scalar"}; return all; }\n',
    "cpu/vector/table.cpp": "",
    "cuda/kernel.cu": "__global__ void one(float* x) { *x = 1; }\n",
}
BROKEN = "int broken = the_cause;\n"


def write_csrc(folder: Path) -> Path:
    for name, text in CSRC.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def checkout(folder: Path) -> Path:
    """What setup.py needs of this repository, with the small sources."""
    native = folder / "dpfast/native"
    native.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "release").mkdir()
    shutil.copy(ROOT / "release/backend.py", folder / "release")
    for path in [*(ROOT / "dpfast/native").glob("*.py"), ROOT / "dpfast/native/about.cpp"]:
        shutil.copy(path, native)
    (folder / "dpfast/__init__.py").write_text("")
    (folder / "dpfast/version.py").write_text('__version__ = "0.0.1"\n')
    write_csrc(folder / "csrc")
    return folder


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without what directs a build, and with ``changes``; None takes a variable out."""
    away = ("CXX", "CUDA_HOME", "LD_PRELOAD", "MAX_JOBS", "PYTHONPATH", "XDG_CACHE_HOME")
    env = {k: v for k, v in os.environ.items() if k not in away and not k.startswith("DPFAST_")}
    env |= {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in env.items() if name not in changes or changes[name] is not None}


def python(folder: Path, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run this Python in ``folder``."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(**changes), capture_output=True, text=True, check=False)


def wrapper(path: Path, before: str) -> str:
    """A compiler: the shell commands ``before``, then the real one. Its path."""
    real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    path.write_text(f'#!/bin/sh\n{before}\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)
