"""setup.py with each DPFAST_BUILD, what wheels carry, and the real CUDA sources for every architecture."""

import re
import tomllib
import zipfile

import pytest

from dpfast.native import build
from tests.native.small import BROKEN, ROOT, checkout, python, write_csrc
from tests.unchanged import is_known_good

pytestmark = pytest.mark.compiles

NO_CUDA = {"CUDA_HOME": "/nonexistent"}
NO_COMPILER = {"CXX": "/nonexistent"}


def why_no(find) -> str:
    try:
        find()
    except build.BuildError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(why_no(build.compiler)), reason=why_no(build.compiler))
needs_nvcc = pytest.mark.skipif(bool(why_no(build.nvcc)), reason=why_no(build.nvcc))


@pytest.fixture
def tree(tmp_path):
    return checkout(tmp_path / "tree")


def build_ext(tree, choice, **environment):
    """``setup.py build_ext --inplace``; its exit status, what it printed, and the names of the libraries made."""
    done = python(tree, "setup.py", "build_ext", "--inplace", DPFAST_BUILD=choice, **environment)
    libraries = sorted(path.name for path in (tree / "dpfast/native").glob("*.so"))
    return done.returncode, done.stdout + done.stderr, libraries


def test_the_target_is_torchs_own_number():
    header = build.torch_folder()[0] / "include/torch/csrc/stable/version.h"
    number = re.search(r"define TORCH_VERSION_{}_{}_0 (.*)".format(*build.TARGET), header.read_text())[1]
    assert f"-DTORCH_TARGET_VERSION={eval(number.replace('ULL', '')):#018x}" == build.TARGET_FLAG


@needs_compiler
def test_code_for_every_machine_is_linked_before_code_for_some():
    names = [name for name in build.plan("cpu").compiles if name != "about"]
    isas = list(build.ISAS) if build.is_x86() else ["scalar"]
    ranks = [isas.index(name.partition(".")[2]) if "." in name else -1 for name in names]
    assert ranks == sorted(ranks) and set(ranks) == {*range(-1, len(isas))}


def test_an_unknown_choice_is_named(tree):
    status, said, libraries = build_ext(tree, "gpu")
    assert status != 0 and "DPFAST_BUILD='gpu'" in said and "auto, cpu, cuda or none" in said and not libraries


def test_none_builds_nothing(tree):
    status, said, libraries = build_ext(tree, "none", **NO_COMPILER)
    assert status == 0 and not libraries and "DPFAST_BUILD=none" in said, said


@needs_compiler
@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_the_cpu_library_without_nvcc(tree, choice):
    status, said, libraries = build_ext(tree, choice, **NO_CUDA)
    assert status == 0 and libraries == ["libdpfast_cpu.so"], said
    assert re.search(r"cpu +built in \d+ s", said) and "WITHOUT" not in said
    assert ("cuda  not built: no nvcc in CUDA_HOME=/nonexistent" if choice == "auto" else "cuda  not asked for") in said
    about = build.about(tree / "dpfast/native/libdpfast_cpu.so")
    assert about["device"] == "cpu" and about["digest"] == build.digest("cpu", tree / "csrc")


@pytest.mark.parametrize("without", [NO_COMPILER, {"PATH": "/nonexistent"}], ids=["CXX", "PATH"])
def test_no_compiler(tree, without):
    cause = "CXX=/nonexistent is not a program" if "CXX" in without else "no C++ compiler (c++, g++ or clang++)"
    status, said, libraries = build_ext(tree, "auto", **without)
    assert status == 0 and not libraries and f"cpu   not built: {cause}" in said, said
    # Loudly, and last of all.
    last = said[said.index("dpfast is built WITHOUT its compiled cpu library") :]
    assert f"Cause:   {cause}" in last and "name one in CXX, and build again" in last and last.strip().endswith("!!!!")
    status, said, libraries = build_ext(tree, "cpu", **without)
    assert status != 0 and not libraries and f"DPFAST_BUILD=cpu: no cpu library: {cause}" in said, said


@needs_compiler
def test_cuda_fails_without_nvcc(tree):
    status, said, _ = build_ext(tree, "cuda", **NO_CUDA)
    assert status != 0 and "DPFAST_BUILD=cuda: no cuda library: no nvcc in CUDA_HOME=/nonexistent" in said, said


@needs_compiler
def test_a_compile_that_fails_is_quoted(tree):
    (tree / "csrc/cpu/dispatch.cpp").write_text(BROKEN)
    status, said, libraries = build_ext(tree, "auto", **NO_CUDA)
    assert status == 0 and not libraries
    assert re.search(r"cpu +not built: compiling dispatch.cpp failed: .*error.*the_cause", said), said
    status, said, libraries = build_ext(tree, "cpu", **NO_CUDA)
    assert status != 0 and "the_cause" in said and not libraries, said


@needs_compiler
@needs_nvcc
def test_the_cuda_library(tree):
    status, said, libraries = build_ext(tree, "cuda")
    assert status == 0 and libraries == ["libdpfast_cpu.so", "libdpfast_cuda.so"], said
    assert build.about(tree / "dpfast/native/libdpfast_cuda.so")["arches"].split() == known_arches()
    (tree / "csrc/cuda/kernel.cu").write_text(BROKEN)  # auto does without, and says why
    status, said, libraries = build_ext(tree, "auto")
    assert status == 0 and re.search(r"cpu +built .*\n *cuda +not built: compiling kernel.cu failed: .*the_cause", said)
    assert "WITHOUT its compiled cuda library" in said


@needs_compiler
def test_a_wheel_carries_library_and_sources(tree, tmp_path):
    command = ("-m", "pip", "wheel", "-v", ".", "--no-build-isolation", "--no-deps", "-w", str(tmp_path))
    done = python(tree, *command, DPFAST_BUILD="cpu")
    assert done.returncode == 0 and re.search(r"cpu +built in", done.stdout + done.stderr), done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("dpfast-0.0.1-py3-none-") and not wheel.name.endswith("-any.whl")
    zipfile.ZipFile(wheel).extractall(installed := tmp_path / "installed")
    names = {path.relative_to(installed / "dpfast/native").as_posix() for path in installed.rglob("native/**/*.*")}
    assert {"about.cpp", "csrc/register.cpp", "csrc/cuda/kernel.cu", "libdpfast_cpu.so"} <= names
    code = "from dpfast import native; assert native.available('cpu'), native.why_not('cpu'); print(native.status()[0])"
    loaded = python(installed, "-c", code, **NO_COMPILER)
    assert "origin='installed'" in loaded.stdout, loaded.stdout + loaded.stderr

    # The same folder again, without: what was built there before stays out.
    done = python(tree, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), DPFAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(tmp_path / "dpfast-0.0.1-py3-none-any.whl").namelist()
    assert "dpfast/native/csrc/register.cpp" in names and not [name for name in names if name.endswith(".so")]


def test_an_old_setuptools_or_none_is_told_in_a_line(tree, tmp_path):
    """As setup.py meets it in a build without isolation. In one with it pip installs what is required."""
    old = tmp_path / "old/setuptools"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text(
        '__version__ = "65.5.0"\nDistribution = object\ndef setup(): raise AssertionError\n'
    )
    done = python(tree, "setup.py", "--version", PYTHONPATH=str(old.parent))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "setuptools 65.5.0 is too old: pip install 'setuptools>=77'\n"
    (old / "__init__.py").write_text("raise ImportError(\"No module named 'setuptools'\")")
    done = python(tree / "release", "-c", "import backend", PYTHONPATH=str(old.parent))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "No module named 'setuptools': pip install 'setuptools>=77'" in done.stderr
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert required == ["setuptools>=77", f"torch>={'.'.join(map(str, build.TARGET))}"]


@needs_compiler
def test_only_what_changed_is_compiled_again(tmp_path):
    csrc, objects = write_csrc(tmp_path / "csrc"), tmp_path / "objects"
    library = tmp_path / "library.so"

    def names():
        build.run(build.plan("cpu", csrc), library, objects)
        return {path.name for path in objects.glob("*.o")}

    before = names()
    assert names() == before
    (csrc / "cpu/kernels.h").write_text((csrc / "cpu/kernels.h").read_text() + "// read by two\n")
    after = names()
    assert {name.partition(".")[0] for name in after - before} == {"dispatch", "about"}
    assert len(after) == len(before)  # the old ones are gone
    whole = library.read_bytes()
    (csrc / "cpu/dispatch.cpp").write_text(BROKEN)
    with pytest.raises(build.BuildError, match="the_cause"):
        names()
    assert library.read_bytes() == whole and not list(tmp_path.glob(".*"))


def test_sources_that_change_under_the_compiler_are_noticed(tmp_path):
    plan = build.plan("cpu", write_csrc(tmp_path / "csrc"))
    (tmp_path / "csrc/register.cpp").write_text("int another;\n")
    with pytest.raises(build.BuildError, match="changed while they were compiled"):
        build.run(plan, tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()


def known_arches() -> list[str]:
    return build.plan("cuda", csrc=ROOT / "csrc").about["arches"].split()


@needs_compiler
@needs_nvcc
def test_cuda_compiles(tmp_path):
    """The real kernels, as ``setup.py`` compiles them; none may spill a register.

    Where nothing has changed since ``make compiled`` found that (:mod:`tests.unchanged`), they are what they were.
    """
    if not list((ROOT / "csrc/cuda").glob("*.cu")):
        pytest.skip("csrc/cuda has no sources")
    assert {"80", "90"} <= {*known_arches()}  # 100 where nvcc knows it: from 12.8
    if is_known_good("cuda"):
        return
    plan = build.plan("cuda", csrc=ROOT / "csrc")
    output = "\n".join(build.run(plan, tmp_path / "library.so", ROOT / "build/native/cuda").output.values())
    seen = set()
    for kernel, arch, report in re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'(.*(?:\n.*?)*?spill.*)", output
    ):
        assert "0 bytes spill stores, 0 bytes spill loads" in report, f"{kernel} on sm_{arch}: {report}"
        seen.add(arch)
    assert seen == {*plan.about["arches"].split()}
    # Functions that were not inlined have a line of their own.
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert spills and {*spills} == {("0", "0")}
