"""Every kernel compiled for sm_80 and sm_90, GPU or none: no spills, shared memory that fits, wgmma where it is due.

For sm_90 in every case of its file, for sm_80 in the first case that has it. Compiled in processes of their own,
without the interpreter. Run with ``-s`` to see registers and shared memory.
"""

import importlib
import io
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import dpfast_kernels
import pytest

SHARED = {80: 166_912, 90: 232_448}  # bytes a program can have
MODULES = [importlib.import_module(f"dpfast_kernels.{m.name}") for m in pkgutil.iter_modules(dpfast_kernels.__path__)]
CASES = {m.__name__.split(".")[1]: [case.name for case in m.COMPILES] for m in MODULES if hasattr(m, "COMPILES")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """``{family: what this file said as a program}``, two at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(dpfast_kernels.__file__).parents[1]), *sys.path[1:]])
    environment["TRITON_DUMP_PTXAS_LOG"] = "1"
    caches = tmp_path_factory.mktemp("triton")

    def run(family: str) -> subprocess.CompletedProcess:
        own = environment | {"TRITON_CACHE_DIR": str(caches / family)}  # what another has compiled has no log
        return subprocess.run([sys.executable, __file__, family], env=own, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.compiles
@pytest.mark.parametrize("family", CASES)
def test_compiled(compiled, family):
    done = compiled[family]
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["case"] for k in found if k["target"] == 90} == set(CASES[family])
    assert len({frozenset(k["kernel"] for k in found if k["target"] == target) for target in SHARED}) == 1
    for kernel in found:
        print("sm_{target} {case} {kernel}: {registers} registers, {shared} bytes shared".format(**kernel))
        assert kernel["spills"] == 0, kernel
        assert not kernel["serialized"], kernel
        assert kernel["shared"] <= SHARED[kernel["target"]], kernel
        assert kernel["target"] < 90 or kernel["wgmma"] or not kernel["wants_wgmma"], kernel


def compile_family(family: str) -> None:
    """Prints a line of JSON for each kernel of each case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    on_80 = set()
    seen = {}  # what Triton has compiled before it does not compile again, and ptxas says nothing
    for target, case in itertools.product(SHARED, importlib.import_module(f"dpfast_kernels.{family}").COMPILES):
        launches = case.launches(target)
        assert launches, case
        for launch in launches:
            name = launch.kernel.__name__
            if target == 80 and name in on_80:
                continue
            on_80.add(name)
            chip = GPUTarget("cuda", target, 32)
            options, *source = specialised(launch, chip)
            with redirect_stdout(io.StringIO()) as said:  # by ptxas
                binary = triton.compile(ASTSource(launch.kernel, *source), target=chip, options=options.__dict__)
            said = seen.setdefault(binary.hash, said.getvalue())
            line = {
                "case": case.name,
                "kernel": name,
                "target": target,
                "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
                "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
                "serialized": "wgmma.mma_async instructions are serialized" in said,
                "shared": binary.metadata.shared,
                "wgmma": "wgmma" in binary.asm["ptx"],
                "wants_wgmma": case.wgmma,
            }
            print(json.dumps(line), flush=True)


def specialised(launch, chip) -> tuple:
    """Options, signature, constants and attributes, as Triton makes them of the arguments of a launch."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(chip)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    return launch.kernel._pack_args(backend, options, bound, specialization, options)


if __name__ == "__main__":
    compile_family(sys.argv[1])
