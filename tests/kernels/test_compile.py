"""Every kernel compiled for sm_80 and sm_90, GPU or none: no spills, shared memory that fits, wgmma where it is due.

In every case of its file; where nothing has changed since a whole compile (:mod:`tests.unchanged`), in the first case
that has it. Compiled in processes of their own, without the interpreter, and with floating-point fusion off by
default, as Triton 3.10 will have it: kernels say by themselves what they want. Run with ``-s`` to see registers and
shared memory.
"""

import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dpfast_kernels
import pytest

from tests.unchanged import is_known_good

FIRST, WHOLE = "first", "whole"
SHARED = {80: 166_912, 90: 232_448}  # bytes a program can have
MODULES = [importlib.import_module(f"dpfast_kernels.{m.name}") for m in pkgutil.iter_modules(dpfast_kernels.__path__)]
CASES = {m.__name__.split(".")[1]: [case.name for case in m.COMPILES] for m in MODULES if hasattr(m, "COMPILES")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Any]:
    """``{family: what was said of its kernels}``, or of what went wrong; in two processes, which share the families."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(dpfast_kernels.__file__).parents[1]), *sys.path])
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "0"}
    caches, part = tmp_path_factory.mktemp("triton"), FIRST if is_known_good("triton") else WHOLE
    by_size = sorted(CASES, key=lambda family: len(CASES[family]))

    def run(families: list[str]) -> dict[str, Any]:
        own = environment | {"TRITON_CACHE_DIR": str(caches / families[0])}  # what another has compiled has no log
        done = subprocess.run([sys.executable, __file__, part, *families], env=own, capture_output=True, text=True)
        if done.returncode:
            return dict.fromkeys(families, done.stderr[-4000:])
        found: dict[str, Any] = {family: [] for family in families}
        for line in map(json.loads, done.stdout.splitlines()):
            found[line["family"]].append(line)
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (by_size[::2], by_size[1::2]))
    return first | second


@pytest.mark.compiles
@pytest.mark.parametrize("family", CASES)
def test_compiled(compiled, family):
    found = compiled[family]
    assert isinstance(found, list), found
    cases = {k["case"] for k in found if k["target"] == 90}
    assert cases == set(CASES[family]) or (is_known_good("triton") and CASES[family][0] in cases)
    assert len({frozenset(k["kernel"] for k in found if k["target"] == target) for target in SHARED}) == 1
    for kernel in found:
        print("sm_{target} {case} {kernel}: {registers} registers, {shared} bytes shared".format(**kernel))
        assert kernel["spills"] == 0, kernel
        assert not kernel["serialized"], kernel
        assert kernel["fused"], kernel
        assert kernel["shared"] <= SHARED[kernel["target"]], kernel
        assert kernel["target"] < 90 or kernel["wgmma"] or not kernel["wants_wgmma"], kernel


def compile_families(part: str, *families: str) -> None:
    """Prints a line of JSON for each kernel of each case, or of the first case that has it."""
    from bench.machine_code import compiled

    done = set()
    seen: dict[str, str] = {}
    for family, target in itertools.product(families, SHARED):
        for case in importlib.import_module(f"dpfast_kernels.{family}").COMPILES:
            launches = case.launches(target)
            assert launches, case
            for launch in launches:
                name = launch.kernel.__name__
                if part == FIRST and (family, target, name) in done:
                    continue
                done.add((family, target, name))
                binary, row = compiled(launch, target, seen)
                line = {"family": family, "case": case.name, "wgmma": "wgmma" in binary.asm["ptx"], **row}
                print(json.dumps(line | {"wants_wgmma": case.wgmma}), flush=True)


if __name__ == "__main__":
    compile_families(*sys.argv[1:])
