"""How the native libraries are compiled: the one place that knows the commands.

``setup.py`` loads this file by its path, without the package; :mod:`dpfast.native.cache` builds with it at first use,
and ``python -m dpfast.native`` by hand. Only the standard library is imported. Of torch, headers and libraries serve:
LibTorch's stable ABI of ``TARGET``, so a library serves every torch from there on and every Python.

The CPU library holds the schemas (``register.cpp``) and is loaded first; the CUDA library needs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEVICES = ("cpu", "cuda")
TARGET = (2, 11)
ARCHES = ("80", "90", "100")  # CUDA: machine code for each, and PTX of the last, for what comes after it

_EXACT = ("-ffp-contract=off", "-fno-math-errno")  # a product is rounded before it is added, but where fma is written
CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *_EXACT, "-Wall", "-Wno-maybe-uninitialized")
CUDA_FLAGS = (
    *("-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "--extended-lambda", "--threads=4"),
    *("-Xptxas=-v", "-Xcompiler=" + ",".join(("-fPIC", "-fvisibility=hidden", *_EXACT)), "-DUSE_CUDA"),
)
TARGET_FLAG = f"-DTORCH_TARGET_VERSION={(TARGET[0] << 56) | (TARGET[1] << 48):#018x}"
ISAS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ),
}
SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class BuildError(RuntimeError):
    """Why a library cannot be built here: what was tried and what it said, in a line.

    ``fix`` says what to do about it, ``output`` is all that the compiler printed.
    """

    def __init__(self, cause: str, fix: str = "", output: str = "") -> None:
        super().__init__(cause)
        self.fix, self.output = fix, output


@dataclass(frozen=True)
class Plan:
    """The commands that make one library. ``about`` is what the library will say of itself (:func:`about`)."""

    device: str
    csrc: Path
    about: dict[str, str]
    compiles: dict[str, tuple[str, ...]]  # object's name → command, less -o; in the order in which they are linked
    link: tuple[str, ...]  # less objects and -o
    libraries: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """A library that was built: where it is, how long that took, and what the compilers printed for each object."""

    library: Path
    seconds: float
    output: dict[str, str] = field(repr=False)


def library_name(device: str) -> str:
    return f"libdpfast_{device}.so"


def find_csrc() -> Path:
    """The C++ sources: in an installed package beside this file, in a checkout at its root.

    Raises:
        BuildError: neither is there.
    """
    for folder in (HERE / "csrc", HERE.parents[1] / "csrc"):
        if (folder / "register.cpp").is_file():
            return folder
    raise BuildError(f"the C++ sources are neither in {HERE / 'csrc'} nor in {HERE.parents[1] / 'csrc'}")


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def digest(device: str, csrc: Path) -> str:
    """Of everything in this package that decides what ``device``'s library is: sources, flags, processor."""
    every = hashlib.sha256(json.dumps([CXX_FLAGS, CUDA_FLAGS, ISAS, TARGET_FLAG, platform.machine()]).encode())
    files = {name: csrc / name for suffix in ("h", "cuh", "cpp", "cu") for name in _sources(csrc, f"**/*.{suffix}")}
    for name, path in sorted({**files, "about.cpp": HERE / "about.cpp"}.items()):
        if device == "cuda" or not name.startswith("cuda/"):
            content = path.read_bytes()
            every.update(f"{name} {len(content)}\n".encode() + content)
    return every.hexdigest()[:16]


def about(library: Path) -> dict[str, str]:
    """What ``library`` says of how it was built, read without loading it; empty if it is no whole library of ours."""
    if library.stat().st_size == 0:
        return {}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(b'dpfast library {"')
        end = content.find(b"}\0", start)
        return json.loads(content[start:end].partition(b" library ")[2] + b"}") if 0 <= start < end else {}


def compiler() -> list[str]:
    """The command of the C++ compiler: ``CXX`` (which may have arguments), else ``c++``, ``g++`` or ``clang++``.

    Raises:
        BuildError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for words in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(words[0]):
            return words
    cause = f"CXX={asked[0]} is not a program" if asked else "no C++ compiler (c++, g++ or clang++) is on PATH"
    raise BuildError(cause, "install a C++20 compiler, such as g++ 10 or newer, or name one in CXX")


def nvcc() -> str:
    """nvcc of ``CUDA_HOME`` if that is set, else on PATH or in ``/usr/local/cuda``, with its headers.

    Raises:
        BuildError: it is not there, or cannot compile an empty file.
    """
    home = os.environ.get("CUDA_HOME")
    places = [home] if home else ["", "/usr/local/cuda"]
    for place in places:
        if found := shutil.which(f"{place}/bin/nvcc" if place else "nvcc"):
            _call([found, "-E", "-x", "cu", os.devnull], "nvcc is here but does not compile an empty file")
            return found
    looked = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
    raise BuildError(f"no nvcc {looked}", "install the CUDA toolkit (12 or newer), or name its folder in CUDA_HOME")


def torch_folder() -> tuple[Path, str]:
    """The folder of the torch that this Python would import, and its version.

    Raises:
        BuildError: there is none, or it is older than ``TARGET``, or came without headers.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        fix = "install torch first, or leave --no-build-isolation out"
        raise BuildError("torch, whose headers are needed, is not there", fix)
    folder = Path(spec.submodule_search_locations[0])
    header = folder / "include/torch/headeronly/version.h"
    version = re.search(r'TORCH_VERSION\s*\\?\s*"([\d.]+)"', header.read_text()) if header.is_file() else None
    if version is None or tuple(int(n) for n in version[1].split(".")[:2]) < TARGET:
        has = f"is {version[1]}" if version else f"has no {header.relative_to(folder)}"
        raise BuildError(f"the torch in {folder} {has}", "install torch {}.{} or newer".format(*TARGET))
    return folder, version[1]


def plan(device: str, csrc: Path | None = None, arches: tuple[str, ...] = ARCHES, extra: tuple[str, ...] = ()) -> Plan:
    """The commands that build ``device``'s library here.

    Args:
        arches: for CUDA: ``"90"`` and so on; the library also has PTX of the last. Those that this nvcc does not know
            are left out (``about["arches"]`` has the rest).
        extra: more flags for the C++ compiler, at the end.

    Raises:
        BuildError: something that it takes is missing.
    """
    if sys.platform == "win32":
        raise BuildError("there are no native libraries for Windows")
    csrc = csrc or find_csrc()
    cxx = compiler()
    torch, torch_version = torch_folder()
    said = {"device": device, "digest": digest(device, csrc), "machine": platform.machine(), "torch": torch_version}
    said["compiler"] = _call([*cxx, "--version"], f"{cxx[0]} does not run").splitlines()[0]
    headers = ("-I.", "-Iinclude", "-isystem", f"{torch}/include", TARGET_FLAG)
    includes = (*headers, "-isystem", f"{torch}/include/torch/csrc/api/include")
    host = (*cxx, "-c", *CXX_FLAGS, *includes, *(["-DDPFAST_X86"] if is_x86() else []), *extra)
    link: tuple[str, ...] = (*cxx, "-shared", *extra)
    compiles = {}
    if device == "cpu":
        # Plain code first, then the lesser instruction sets: of a standard function that several objects hold, the
        # linker keeps the first, which must be one that every machine runs.
        isas = ISAS if is_x86() else {"scalar": ()}
        said["isas"] = " ".join(isas)
        for source in ["register.cpp", *_sources(csrc, "cpu/*.cpp")]:
            compiles[Path(source).stem] = (*host, source)
        for isa, flags in isas.items():
            for source in _sources(csrc, "cpu/vector/*.cpp"):
                compiles[f"{Path(source).stem}.{isa}"] = (*host, *flags, source)
    else:
        program = nvcc()
        known = _call([program, "--list-gpu-code"], "nvcc does not run").split()
        arches = tuple(arch for arch in arches if f"sm_{arch}" in known)
        sources = _sources(csrc, "cuda/*.cu")
        if not arches or not sources:
            raise BuildError("csrc/cuda has no sources" if arches else "nvcc knows none of the asked architectures")
        said["arches"] = " ".join(arches)
        said["nvcc"] = _call([program, "--version"], "nvcc does not run").splitlines()[-1]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
        codes.append(f"-gencode=arch=compute_{arches[-1]},code=compute_{arches[-1]}")
        ccbin = (f"-ccbin={cxx[0]}",) if os.environ.get("CXX") and len(cxx) == 1 else ()  # not for "ccache g++"
        for source in [*sources, *_sources(csrc, "cuda/*.cpp")]:
            compiles[Path(source).name] = (program, "-c", *CUDA_FLAGS, *includes, *ccbin, *codes, source)
        # libtorch.so leads to libtorch_cuda.so where the library is used: torch here may be without CUDA.
        link = (program, "-shared", *ccbin, *codes, *([] if sys.platform == "darwin" else ["-Xlinker=--no-as-needed"]))
    said["key"] = hashlib.sha256(json.dumps([said, extra, [*compiles]]).encode()).hexdigest()[:16]
    kind = ["-DDPFAST_ABOUT_CPU"] if device == "cpu" else []
    text = f"-DDPFAST_ABOUT={json.dumps(json.dumps(said))}"
    compiles["about"] = (*host, *kind, text, str(HERE / "about.cpp"))
    names = ["torch", "torch_cpu", "c10", *(["torch_cuda"] if device == "cuda" else [])]
    libraries = [f"-l{name}" for name in names if [*(torch / "lib").glob(f"lib{name}.*")]]
    return Plan(device, csrc, said, compiles, link, (f"-L{torch}/lib", *libraries))


def run(plan: Plan, library: Path, objects: Path | None = None) -> Built:
    """Compile on all cores and link to ``library``, which is there whole or not at all.

    Args:
        objects: a folder where objects are kept: one whose sources, command and compiler are the same is used again.

    Raises:
        BuildError: a compiler failed; it quotes the last of what that said. ``library`` is left as it was.
    """
    start = time.monotonic()
    library = library.absolute()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{library.name}.", dir=library.parent) as scratch:
        kept = objects.absolute() if objects else Path(scratch)
        kept.mkdir(parents=True, exist_ok=True)
        named = {}
        tools = [plan.about.get(tool) for tool in ("compiler", "nvcc", "torch")]
        for name, command in plan.compiles.items():
            every = json.dumps([tools, command, _read_by(plan.csrc, plan.csrc / command[-1])])
            named[name] = kept / f"{name}.{hashlib.sha256(every.encode()).hexdigest()[:16]}.o"
        # What takes longest first: the widest instruction sets were planned last.
        with ThreadPoolExecutor(_jobs()) as pool:
            tasks = {name: pool.submit(_compile, plan, name, named[name]) for name in reversed(named)}
            done, _ = wait(tasks.values(), return_when=FIRST_EXCEPTION)
            pool.shutdown(wait=False, cancel_futures=True)
            for failure in filter(None, (task.exception() for task in done)):
                raise failure
        output = {name: task.result() for name, task in tasks.items()}
        whole = Path(scratch) / "linked.so"
        linking = [*plan.link, *map(str, named.values()), *plan.libraries, "-o", str(whole)]
        _call(linking, f"linking {library.name} failed")
        if digest(plan.device, plan.csrc) != plan.about["digest"]:
            raise BuildError("the C++ sources changed while they were compiled", "build again")
        whole.chmod(whole.stat().st_mode & ~0o022)  # it is code: whatever the umask, nobody else writes to it
        os.replace(whole, library)
        for old in {*kept.glob("*.o"), *kept.glob("*.log")} - {*named.values(), *map(_log, named.values())}:
            old.unlink(missing_ok=True)
    return Built(library, time.monotonic() - start, output)


def _compile(plan: Plan, name: str, target: Path) -> str:
    """What the compiler said. Object and log come into place whole, the object last."""
    log = _log(target)
    if target.exists() and log.exists():
        return log.read_text()
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = plan.compiles[name]
        output = _call([*command, "-o", str(made)], f"compiling {Path(command[-1]).name} failed", plan.csrc)
        (said := Path(scratch) / log.name).write_text(output)
        os.replace(said, log)
        os.replace(made, target)
    return output


def _read_by(csrc: Path, source: Path) -> dict[str, str]:
    """``source`` and the files of ours that it includes, with what is in them."""
    read: dict[str, str] = {}
    queue = [source]
    while queue:
        path = queue.pop()
        if str(path) not in read:
            read[str(path)] = path.read_text()
            for name in re.findall(r'^\s*#\s*include\s+"(.+)"', read[str(path)], re.MULTILINE):
                places = (base / name for base in (path.parent, csrc, csrc / "include"))
                queue += [place.resolve() for place in places if place.is_file()][:1]
    return read


def _log(target: Path) -> Path:
    return target.with_suffix(".log")


def _sources(csrc: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(csrc).as_posix() for path in csrc.glob(pattern))


def _jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdigit() and int(asked) > 0 else here


def _call(command: list[str], failed: str, cwd: Path | None = None) -> str:
    """Run a compiler; BuildError with ``failed`` and the last of what it said. Not under a preloaded sanitizer."""
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{failed}: {error}") from error
    output = done.stdout + done.stderr
    if done.returncode == 0:
        return output
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|undefined|cannot", line, re.IGNORECASE)] or lines
    quoted = " | ".join(errors[-3:]) or f"exit status {done.returncode} of {command[0]}, which said nothing"
    raise BuildError(f"{failed}: {quoted}", "try another compiler: name it in CXX", output)


if __name__ == "__main__":
    raise SystemExit("to build by hand: python -m dpfast.native")
