"""Imports point one way, no files import each other in a loop, and nothing native or heavy is loaded at import.

    integrations → analysis → engine → model, optim, data → clipping, noise → layers → capture → planning → ops
    → { reference, native, dpfast_kernels } → refusals

A room imports from itself and from rooms below it, never from one beside it. ``distributed`` serves all
and imports torch, Opacus and the names of refusals alone; ``reference`` and ``dpfast_kernels`` import nothing of ours.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpfast

ROOT = Path(dpfast.__file__).parent
LEVELS = [
    {"refusals"},
    {"reference", "native", "distributed", "arguments", "tables", "version"},
    {"ops"},
    {"planning"},
    {"capture"},
    {"layers", "separation"},
    {"clipping", "noise"},
    {"model", "optim", "data", "accounting"},
    {"amp", "checkpoints", "head_losses", "recorded"},
    {"engine", "losses"},
    {"analysis", "dropin", "zeroth"},
    {"integrations"},
    {""},  # dpfast/__init__.py
    {"cli"},
    {"__main__"},
]
RANK = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> dict[str, Path]:
    """``{dotted name: file}`` of the package."""
    out = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("dpfast", *path.relative_to(ROOT).with_suffix("").parts)
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


MODULES = modules()


def imported(name: str) -> set[str]:
    """Dotted names that ``name`` imports, at its top or inside a function; not for type checkers alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}" if base else package
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text()))
    return found


IMPORTED = {name: imported(name) for name in MODULES}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def way_back(name: str) -> list[str]:
    """The shortest way over imports from ``name`` to itself; empty if there is none."""
    ways = [[name]]
    seen: set[str] = set()
    for way in ways:
        for there in sorted(IMPORTED[way[-1]] & MODULES.keys()):
            if there == name:
                return [*way, there]
            if there not in seen:
                seen.add(there)
                ways.append([*way, there])
    return []


def test_every_module_has_a_room():
    """Guards the guard: a room that nobody has placed would go unchecked. And no place is for a room that is not."""
    assert {room(name) for name in MODULES} == RANK.keys()


@pytest.mark.parametrize("name", MODULES)
def test_no_arrow_runs_back(name):
    for there in IMPORTED[name] & MODULES.keys():
        below = RANK[room(there)] < RANK[room(name)]
        assert below or room(there) == room(name), f"{name} → {there}"


@pytest.mark.parametrize("name", MODULES)
def test_no_files_import_each_other_in_a_loop(name):
    way = way_back(name)
    assert not way, " → ".join(way)


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) in ("refusals", "reference", "distributed")])
def test_what_stands_below_all_imports_torch_alone(name):
    ours = {room(name), *(["refusals"] if room(name) == "distributed" else [])}
    known = {"torch", *(["opacus"] if room(name) in ("refusals", "distributed") else []), *sys.stdlib_module_names}
    for there in IMPORTED[name]:
        assert there.split(".")[0] in known or room(there) in ours, f"{name} imports {there}"


def test_kernels_import_nothing_of_ours():
    folder = importlib.util.find_spec("dpfast_kernels").submodule_search_locations[0]
    files = sorted(Path(folder).glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "dpfast"], path.name


def test_no_module_of_ours_imports_the_package_itself():
    """``import dpfast`` inside dpfast would make every arrow run back."""
    for name in MODULES:
        if name not in ("dpfast", "dpfast.__main__"):
            assert "dpfast" not in IMPORTED[name], name


OF_OPACUS = "opacus.utils.batch_memory_manager, torch.func, torch.utils.checkpoint"
LOADED = f"""
import json, sys, warnings
warnings.simplefilter("ignore")
import {OF_OPACUS}
before = [*sys.modules]
import dpfast, dpfast.native
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
native = [*sys.modules["torch"].ops.loaded_libraries, *dpfast.native._found]
print(json.dumps([before, [*sys.modules], files, native]))
"""


def test_nothing_native_or_heavy_at_import(tmp_path):
    """Beyond what Opacus itself loads: our own Python files and the standard library; nothing is compiled either."""
    env = os.environ | {"DPFAST_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/nonexistent"}
    out = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, cwd=ROOT.parent, env=env
    )
    before, after, files, native = json.loads(out.stdout.splitlines()[-1])
    new = {*after} - {*before}
    foreign = {n for n in new if n.split(".")[0] not in {"dpfast", "torch"} | sys.stdlib_module_names}
    assert not foreign, foreign
    compilers = ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "triton", "dpfast_kernels")
    assert not {n for n in new if n.startswith(compilers)}
    assert not [f for f in files if f.endswith((".so", ".pyd", ".dylib")) and str(ROOT) in f]
    assert native == [] and not (tmp_path / "cache").exists() and not out.stderr
