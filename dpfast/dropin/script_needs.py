"""What a script takes from Opacus that the fused mode does not have, as far as its source shows."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

READ = ("grad_sample", "grad_samples")  # attributes that are per-sample gradients
# Methods of Opacus' optimizer, and the function that its noise comes from.
REPLACED = ("add_noise", "clip_and_accumulate", "scale_grad", "pre_step", "_generate_noise")
REPLACING = ("setattr", "object")  # of pytest's monkeypatch, of unittest.mock.patch
# Nobody's script: their code is no use of Opacus, or is Opacus.
_NOT_SCRIPTS = ("dpfast", "opacus", "torch", "numpy", "IPython", "ipykernel", "runpy", "pytest", "_pytest", "pluggy")


class Need(NamedTuple):
    """Something that only Opacus' own modes have, and where it is asked for."""

    what: str
    where: str


def first_need(frame: FrameType | None) -> Need | None:
    """What the code that calls from ``frame`` needs of Opacus itself; None if nothing is seen.

    Looked at are the files of the program (the script and what it has imported, but for installed packages), the cells
    of a notebook, and of installed packages those that are on the stack, each with all its loaded files.
    """
    for name, text in _sources(frame):
        need = _need_of(name, text)
        if need is not None:
            return need
    return None


def _sources(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    packages = set()
    while frame is not None:
        packages.add(str(frame.f_globals.get("__name__", "")).partition(".")[0])
        frame = frame.f_back
    installed = _installed()
    for name, module in [*sys.modules.items()]:
        package = name.partition(".")[0]
        file = getattr(module, "__file__", None)
        if package in _NOT_SCRIPTS or not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        is_installed = any(path.is_relative_to(folder) for folder in installed)
        if is_installed and (package not in packages or package in sys.stdlib_module_names):
            continue
        if path.is_file():
            yield path.name, path.read_text(encoding="utf-8", errors="replace")
    cells: Any = vars(sys.modules["__main__"]).get("In", [])
    for number, cell in enumerate(cells if isinstance(cells, list) else []):
        yield f"cell {number}", "\n".join(line for line in str(cell).splitlines() if line.lstrip()[:1] not in "%!?")


def _installed() -> list[Path]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return [Path(path).resolve() for name in names if (path := sysconfig.get_paths().get(name))]


def _need_of(name: str, text: str) -> Need | None:
    if not any(word in text for word in (*READ, *REPLACED)):
        return None
    try:
        tree = ast.parse(text)
    except SyntaxError:  # of another language, or a notebook's magic in the middle of a line
        return None
    for node in ast.walk(tree):
        what = _what(node)
        if what is not None:
            return Need(what, f"{name}:{getattr(node, 'lineno', 0)}")
    return None


def _what(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        if node.attr in READ and isinstance(node.ctx, ast.Load):
            return f"reads .{node.attr}"
        if node.attr in REPLACED and isinstance(node.ctx, ast.Store):
            return f"replaces .{node.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) > 1:
        named = node.args[1]
        if node.func.attr in REPLACING and isinstance(named, ast.Constant) and named.value in REPLACED:
            return f"replaces .{named.value}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        asked = node.args[1]
        if node.func.id in ("getattr", "hasattr") and isinstance(asked, ast.Constant) and asked.value in READ:
            return f"reads .{asked.value}"
        if node.func.id == "setattr" and isinstance(asked, ast.Constant) and asked.value in REPLACED:
            return f"replaces .{asked.value}"
    return None
