"""What ``dpfast.native`` finds, builds at first use, and says where it does neither."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from dpfast import native
from dpfast.native import build, cache
from tests.native.small import BROKEN, checkout, environment, python, wrapper, write_csrc
from tests.native.test_build import needs_compiler, needs_nvcc

pytestmark = pytest.mark.compiles
OPEN = native._open

# Says how it went: origin, or the reason; and how often there was a warning.
ASK = """
import logging, sys
warned = []
class Count(logging.Handler):
    def emit(self, record): warned.append(record.getMessage())
logging.getLogger("dpfast").addHandler(Count(logging.WARNING))
from dpfast import native
ok = native.available(device := "cpu")
assert ok == (native.why_not(device) is None) == native.available(device)
found = native.library(device)
print(f"{found.origin or 'none'}|{len(warned)}|{native.instruction_set() if ok else found.reason}")
"""


@pytest.fixture
def tree(tmp_path):
    return checkout(tmp_path / "tree")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "cache"


def ask(tree, **env):
    done = python(tree, "-c", ASK, **env)
    assert done.returncode == 0, done.stderr
    origin, warnings, rest = done.stdout.strip().split("|", 2)
    return origin, int(warnings), rest


@pytest.fixture
def apart(monkeypatch, tmp_path, store):
    """This process's ``dpfast.native``, with the small sources and nothing installed, loading nothing in earnest."""
    for name in list(os.environ):
        if name.startswith("DPFAST_") or name in ("CXX", "CUDA_HOME"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DPFAST_CACHE_DIR", str(store))
    csrc = write_csrc(tmp_path / "csrc")
    monkeypatch.setattr(build, "find_csrc", lambda: csrc)
    monkeypatch.setattr(native, "_open", lambda device, path, origin: native.Library(device, None, path, origin))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "package/__init__.py"))
    native.reset()
    yield csrc
    native.reset()


@needs_compiler
def test_built_at_first_use_and_kept(tree, store):
    home = {"XDG_CACHE_HOME": str(store)}
    assert ask(tree, **home) == ("built now", 0, "scalar")
    assert ask(tree, CXX="/nonexistent", **home) == ("cached", 0, "scalar")  # as another machine shares the folder
    assert [path.suffix for path in sorted((store / "dpfast").iterdir())] == [".lock", ".so"]


@needs_compiler
def test_an_installed_library_of_other_sources_is_passed_over(apart, store, monkeypatch, caplog):
    installed = build.Path(native.__file__).with_name("libdpfast_cpu.so")
    build.run(build.plan("cpu"), installed)
    assert native.library("cpu").origin == "installed" and native.library("cpu").path == installed
    (apart / "cpu/vector/table.cpp").write_text("// edited\n")
    native.reset()
    assert native.library("cpu").origin == "built now"
    native.reset()
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("DPFAST_CACHE_DIR", str(store / "other"))
    assert not native.available("cpu")
    (line,) = told(caplog)
    assert "libdpfast_cpu.so is of other sources" in line and "CXX=/nonexistent is not a program" in line


@needs_compiler
def test_two_processes_build_once(tree, store):
    links = store.parent / "links"
    slow = wrapper(store.parent / "slow", f'case "$*" in *-shared*) echo link >> {links}; sleep 1;; esac')
    env = environment(CXX=slow, DPFAST_CACHE_DIR=str(store))
    both = [
        subprocess.Popen([sys.executable, "-c", ASK], cwd=tree, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = sorted(process.communicate()[0].strip() for process in both)
    assert said == ["built now|0|scalar", "cached|0|scalar"] or said == ["cached|0|scalar", "built now|0|scalar"]
    assert links.read_text() == "link\n"


@needs_compiler
def test_what_a_killed_build_leaves_does_no_harm(apart, store):
    hangs = wrapper(store.parent / "hangs", 'case "$*" in *-shared*) sleep 60;; esac')
    code = "from pathlib import Path; from dpfast.native import build, cache;"
    code += f"build.find_csrc = lambda: Path({str(apart)!r}); cache.library('cpu')"
    env = environment(CXX=hangs, DPFAST_CACHE_DIR=str(store), PYTHONPATH=str(build.HERE.parents[1]))
    process = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (left := list(store.glob(".*.so.*"))) or not list(left[0].glob("about.*.o")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(store.glob(".*.so.*")) and not list(store.glob("*.so"))

    os.environ["CXX"] = wrapper(store.parent / "hangs", "")  # the same compiler, but it does its work
    path, new = cache.library("cpu")
    assert new and build.about(path)["device"] == "cpu"
    assert not list(store.glob(".*")), "what the killed build left"


@needs_compiler
def test_threads_build_once(apart, store, monkeypatch):
    runs = []
    real = build.run
    monkeypatch.setattr(build, "run", lambda *arguments: runs.append(1) or real(*arguments))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(native.available("cpu"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8 and len(runs) == 1


@needs_compiler
def test_the_key_follows_sources_and_compiler(apart, monkeypatch, tmp_path):
    keys = [build.plan("cpu").about["key"]]
    (apart / "cpu/kernels.h").write_text((apart / "cpu/kernels.h").read_text() + "\n")
    keys.append(build.plan("cpu").about["key"])
    monkeypatch.setenv("CXX", wrapper(tmp_path / "other", '[ "$1" = --version ] && echo "c++ 99.0" && exit'))
    keys.append(build.plan("cpu").about["key"])
    keys.append(build.plan("cpu", extra=("-O0",)).about["key"])
    monkeypatch.setattr(build, "torch_folder", lambda: (build.Path("/torch"), "2.99.0"))
    keys.append(build.plan("cpu").about["key"])
    assert len({*keys}) == 5
    (apart / "cuda/kernel.cu").write_text("")
    (apart / ".kernel.cu.swp").write_text("an editor's")
    assert build.plan("cpu").about["key"] == keys[-1]


def told(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "dpfast" and record.levelno >= logging.WARNING
    ]


def test_without_a_compiler_it_is_told_once(apart, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nonexistent")
    assert not native.available("cpu") and not native.available("cpu") and not native.available("cuda")
    (line,) = told(caplog)
    assert native.why_not("cpu") in line and "\n" not in line
    for part in (
        "none came with the package",
        "CXX=/nonexistent is not a program",
        "install a C++20",
        "DPFAST_NATIVE=0",
    ):
        assert part in line


@needs_compiler
def test_a_compile_that_fails_is_quoted(apart, caplog):
    (apart / "cpu/dispatch.cpp").write_text(BROKEN)
    assert not native.available("cpu")
    (line,) = told(caplog)
    assert "compiling dispatch.cpp failed" in line and "the_cause" in line and "\n" not in line


def test_a_folder_that_cannot_be_written_is_named(apart, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPFAST_CACHE_DIR", str(tmp_path / "file"))
    assert not native.available("cpu")
    (line,) = told(caplog)
    assert f"the cache folder {tmp_path / 'file'} cannot be used" in line and "in DPFAST_CACHE_DIR" in line


def test_plain_pytorch_on_request(apart, monkeypatch, caplog):
    monkeypatch.setenv("DPFAST_NATIVE", "0")
    assert not native.available("cpu") and native.why_not("cpu") == "DPFAST_NATIVE=0" and not told(caplog)
    native.reset()
    monkeypatch.setenv("DPFAST_NATIVE", "no")
    with pytest.raises(ValueError, match="DPFAST_NATIVE='no': give 1, or 0"):
        native.available("cpu")


def test_devices_without_a_library_need_no_warning(apart, caplog):
    assert native.why_not("mps") == "there is no library for 'mps'"
    if torch.version.cuda is None:
        assert native.why_not("cuda") == "this torch is built without CUDA"
    assert not told(caplog)


@pytest.mark.parametrize(
    "given, words", [("/nonexistent.so", "cannot open shared object file"), (__file__, "invalid ELF header")]
)
def test_a_library_that_does_not_load_quotes_the_loader(apart, store, monkeypatch, caplog, given, words):
    monkeypatch.setattr(native, "_open", OPEN)
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setenv("DPFAST_LIBRARY_CPU", given)
    assert not native.available("cpu")
    (line,) = told(caplog)
    assert f"DPFAST_LIBRARY_CPU={given}" in line and words in line
    assert not store.exists(), "no other is tried"


@needs_compiler
def test_a_given_library_and_no_second_one(tree, store):
    library = build.run(build.plan("cpu", tree / "csrc"), store / "given.so").library
    code = f"""
import os, shutil
from dpfast import native
assert native.library("cpu").origin == "given" and native.instruction_set() == "scalar"
native.reset()
assert native.available("cpu")
native.reset()
os.environ["DPFAST_LIBRARY_CPU"] = shutil.copy({str(library)!r}, {str(store / "second.so")!r})
print(native.why_not("cpu"))
"""
    done = python(tree, "-c", code, DPFAST_LIBRARY_CPU=str(library))
    assert f"this process has already loaded {library}" in done.stdout, done.stderr


@needs_compiler
def test_a_cut_off_library_in_the_cache_is_built_again(apart, store):
    path, _ = cache.library("cpu")
    whole = path.read_bytes()
    for part in (0, 100, whole.index(b"dpfast library {") + 30):
        path.write_bytes(whole[:part])
        assert cache.library("cpu") == (path, True)
    assert cache.library("cpu") == (path, False)


class Devices:
    """Stands in for ``torch.cuda``, on a machine with devices of these compute capabilities."""

    def __init__(self, monkeypatch, *capabilities):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name, answer in {
            "is_available": lambda: True,
            "device_count": lambda: len(capabilities),
            "get_device_capability": lambda index: capabilities[index],
            "get_device_name": lambda index: f"card {index}",
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.parametrize(
    "capabilities, arches",
    [
        ([(8, 0)], ("80",)),
        ([(8, 9), (9, 0)], ("80", "90")),
        ([(10, 3)], ("100",)),
        ([(12, 0), (8, 6)], ("80", "100")),  # later generations run the PTX of the last
    ],
)
def test_cuda_is_built_for_the_devices_that_are_here(monkeypatch, capabilities, arches):
    Devices(monkeypatch, *capabilities)
    assert native._arches() == arches


@needs_compiler
def test_cuda_devices_that_are_too_old(apart, monkeypatch, caplog):
    Devices(monkeypatch, (7, 5))
    assert not native.available("cuda") and "card 0 has compute capability 7.5, and 8.0 is the least" in told(caplog)[0]


def test_cuda_needs_the_cpu_library(apart, monkeypatch, caplog):
    Devices(monkeypatch, (9, 0))
    monkeypatch.setenv("CXX", "/nonexistent")
    assert not native.available("cuda")
    assert "it needs the CPU library: " in native.why_not("cuda") and len(told(caplog)) == 1


@needs_compiler
@needs_nvcc
def test_cuda_is_built_at_first_use(apart, monkeypatch, store):
    Devices(monkeypatch, (9, 0))
    assert native.available("cuda")
    found = native.library("cuda")
    assert found.origin == "built now" and build.about(found.path)["arches"] == "90"
    # An installed one serves the generations it has, and later ones by its PTX.
    package = build.Path(native.__file__).parent
    package.mkdir()
    shutil.copy(found.path, package / "libdpfast_cuda.so")
    monkeypatch.setenv("CXX", "/nonexistent")
    for capability, reason in [((9, 0), None), ((10, 0), None), ((8, 0), "is not for sm_80")]:
        native._found.pop("cuda")
        Devices(monkeypatch, capability)
        assert native.available("cuda") if reason is None else reason in native.why_not("cuda")
    # Of a later CUDA than torch's it is passed over: the drivers that serve torch need not serve it.
    toolkit = int(re.search(r"cuda_(\d+)", build.about(found.path)["nvcc"])[1])
    for torchs, passed_over in [(f"{toolkit}.9", False), (f"{toolkit + 1}.0", False), (f"{toolkit - 1}.8", True)]:
        native._found.pop("cuda")
        Devices(monkeypatch, (9, 0))
        monkeypatch.setattr(torch.version, "cuda", torchs)
        assert native.library("cuda").origin == ("cached" if passed_over else "installed")
