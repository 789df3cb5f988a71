"""Dependencies point one way, and nothing native or heavy is loaded at import.

    integrations, engine → grad_sample, optim → bookkeeping → separation → layers → ops, planner → reference

``reference`` imports torch alone. A module without a place in the chain may be used by any, but no arrow may run
back through it.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dpfast

ROOT = Path(dpfast.__file__).parent
LEVELS = [
    {"reference", "native"},
    {"ops", "planner"},
    {"layers"},
    {"separation"},
    {"bookkeeping"},
    {"grad_sample", "optim"},
    {"engine", "integrations"},
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


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def reached(name: str) -> dict[str, list[str]]:
    """Every module of ours that ``name`` reaches, with the way there."""
    ways = {name: [name]}
    queue = [name]
    while queue:
        here = queue.pop()
        for there in imported(here):
            if there in MODULES and there not in ways and there != "dpfast":
                ways[there] = [*ways[here], there]
                queue.append(there)
    return ways


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) in RANK])
def test_no_arrow_runs_back(name):
    rank = RANK[room(name)]
    for there, way in reached(name).items():
        assert RANK.get(room(there), rank) <= rank, f"{' → '.join(way)}"


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) == "reference"])
def test_reference_imports_torch_alone(name):
    for there in imported(name):
        top = there.split(".")[0]
        allowed = top == "torch" or top in sys.stdlib_module_names or there.startswith("dpfast.reference")
        assert allowed, f"{name} imports {there}"


def test_every_room_of_the_chain_is_there():
    """Guards the guard: a renamed room would otherwise go unchecked."""
    rooms = {room(n) for n in MODULES}
    assert {"reference", "ops", "layers", "bookkeeping", "planner", "grad_sample", "optim", "engine"} <= rooms


def test_no_module_of_ours_imports_the_package_itself():
    """``import dpfast`` inside dpfast would make every arrow run back."""
    for name in MODULES:
        if name not in ("dpfast", "dpfast.__main__"):
            assert "dpfast" not in imported(name), name


def loaded_after(statement: str) -> tuple[set[str], set[str]]:
    """Names and files of the modules in a fresh interpreter."""
    code = (
        "import json, sys, warnings; warnings.simplefilter('ignore');"
        f"{statement};"
        "print(json.dumps([sorted(sys.modules), [getattr(m, '__file__', None) or '' for m in sys.modules.values()]]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    names, files = json.loads(out.stdout.splitlines()[-1])
    return set(names), set(files)


def test_nothing_native_or_heavy_at_import():
    """Beyond what Opacus itself loads: our own Python files and the standard library."""
    before, _ = loaded_after("import opacus.utils.batch_memory_manager, torch.func, torch.utils.checkpoint")
    after, files = loaded_after("import dpfast")
    new = after - before
    foreign = {n for n in new if n.split(".")[0] not in {"dpfast", "torch"} | sys.stdlib_module_names}
    assert not foreign, foreign
    compilers = ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "triton", "dpfast_kernels")
    assert not {n for n in new if n.startswith(compilers)}
    assert not [f for f in files if f.endswith((".so", ".pyd", ".dylib")) and str(ROOT) in f]
