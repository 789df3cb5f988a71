"""Builds the native libraries into ``dpfast/native/``; the rest is declared in pyproject.toml.

DPFAST_BUILD   auto   what can be built here: the CPU library with a C++ compiler, the CUDA library with nvcc (default)
               cpu    the CPU library, or fail
               cuda   the CPU and the CUDA library, or fail
               none   nothing: built at first use, where there is a compiler then

torch's headers are needed: a build in isolation installs torch for itself, one without has to find it installed. What a
build did is told at its end; pip shows that with ``-v``. The libraries are plain shared objects, the same for every
Python and every torch from 2.11 on.
"""

import atexit
import importlib.util
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import setuptools
from setuptools import Distribution, setup

if int(setuptools.__version__.split(".")[0]) < 77:  # as pyproject.toml has it; --no-build-isolation does not look there
    raise SystemExit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build/native"


def load_build():
    """``dpfast/native/build.py`` by its path: importing the package would need all that it depends on."""
    spec = importlib.util.spec_from_file_location("dpfast_native_build", ROOT / "dpfast/native/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_build()
WANTED = {"auto": build.DEVICES, "cpu": ("cpu",), "cuda": build.DEVICES, "none": ()}
CHOICE = os.environ.get("DPFAST_BUILD", "auto")
if CHOICE not in WANTED:
    raise SystemExit(f"DPFAST_BUILD={CHOICE!r}: give auto, cpu, cuda or none")


WITHOUT = """
{line}
dpfast is built WITHOUT its compiled {device} library, which can be built on other machines.
Cause:   {cause}
Effect:  {effect}
Remedy:  {fix}, and build again; DPFAST_BUILD={device} makes such a build fail.
{line}
"""
EFFECTS = {
    "cpu": "unless a first use can build it, dpfast works in plain PyTorch: the same results, more slowly.",
    "cuda": "unless a first use can build it, a GPU is served by Triton's kernels and plain PyTorch.",
}


def say(text):
    """Not print(): pip shows the standard error of a build only if it fails, setuptools may swallow its output."""
    sys.stdout.write(text)
    sys.stdout.flush()


class NativeLibraries(build_ext):
    """``build_ext``: the native libraries take the place of extension modules."""

    def run(self):
        self.built = []
        folder = ROOT if self.inplace else Path(self.build_lib)
        told = []
        for device in build.DEVICES:
            library = folder / "dpfast/native" / build.library_name(device)
            if not self.inplace:
                library.unlink(missing_ok=True)  # of an earlier build
            told.append(f"  {device:<5} {self.one(device, library)}")
        say("\n".join([f"dpfast's native libraries (DPFAST_BUILD={CHOICE}):", *told, ""]))

    def one(self, device, library):
        if device not in WANTED[CHOICE]:
            return "not asked for"
        try:
            if device == "cuda" and not self.built:
                raise build.BuildError("the CPU library, which it needs, was not built")
            plan = build.plan(device)
            made = build.run(plan, library, OBJECTS / device)
        except build.BuildError as error:
            fix = f" ({error.fix})" if error.fix else ""
            if CHOICE != "auto":
                raise CompileError(
                    f"DPFAST_BUILD={CHOICE}: no {device} library: {error}{fix}\n{error.output}"
                ) from error
            if device == "cpu" or error.output:  # that there is no nvcc is nothing unusual
                parts = {"device": device, "cause": error, "effect": EFFECTS[device], "line": "!" * 100}
                # Last of all, and not above the names of a hundred files that are copied.
                atexit.register(say, WITHOUT.format(fix=error.fix or "mend what that says", **parts))
            return f"not built: {error}{fix}"
        self.built.append(library)
        kinds = plan.about["isas" if device == "cpu" else "arches"].replace(" ", ", ")
        return f"built in {made.seconds:.0f} s for {kinds}: {library}"

    def get_outputs(self):
        return [] if self.inplace else [str(library) for library in getattr(self, "built", [])]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file())


class WithSources(build_py):
    """``build_py``: the C++ sources come along, for building at first use."""

    def run(self):
        super().run()
        if not self.editable_mode:
            copy = Path(self.build_lib) / "dpfast/native/csrc"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", copy)


class AnyPython(bdist_wheel):
    """``bdist_wheel``: the libraries are of a platform, never of a Python version."""

    def get_tag(self):
        built = getattr(self.get_finalized_command("build_ext"), "built", [])
        return "py3", "none", super().get_tag()[2] if built else "any"


def readme():
    """README.md as the package index shows it: links and pictures lead to the repository."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]

    def absolute(match):
        kind = "raw" if match[1].startswith("!") else "blob"
        return f"{match[1]}{urls['Repository']}/{kind}/main/{match[2]})"

    return re.sub(r"(!?\[[^\]]*\]\()([^)\s#:]+(?:#[^)]*)?)\)", absolute, (ROOT / "README.md").read_text())


class OfPlatform(Distribution):
    def has_ext_modules(self):
        return True


setup(
    distclass=OfPlatform,
    long_description=readme(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": NativeLibraries, "build_py": WithSources, "bdist_wheel": AnyPython},
)
