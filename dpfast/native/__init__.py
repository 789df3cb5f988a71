"""The native libraries: C++ and CUDA kernels, registered as ``torch.ops.dpfast.*``.

Nothing is loaded or compiled at import, but at the first question for a device. Looked for, in this order:

    DPFAST_LIBRARY_CPU, DPFAST_LIBRARY_CUDA   the path of a library; then no other is tried
    the installed one                         beside this file, if built from the sources that are here
    the cache                                 built there at first use, if there is a compiler (:mod:`.cache`)

Whatever does not work is told once, as a warning with its causes, and plain PyTorch serves. ``DPFAST_NATIVE=0`` asks
for that. The CUDA library needs the CPU library, which has the schemas.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dpfast.native import build, cache

_log = logging.getLogger("dpfast")
_lock = threading.RLock()
_found: dict[str, Library] = {}
# What this process has loaded, for good: a second library with the same schemas would crash it.
_loaded: dict[str, Path] = {}

DEVICES = build.DEVICES
_WITHOUT = "the dpfast kernels for {} are not used, plain PyTorch is: {}"


@dataclass(frozen=True)
class Library:
    """What became of the library for one kind of device.

    ``reason`` says why there is none, with every cause, and is None if it is loaded. ``origin`` is ``"given"`` (by
    environment), ``"installed"``, ``"cached"`` or ``"built now"``. ``about`` is what the library says of its build.
    """

    device: str
    reason: str | None = None
    path: Path | None = None
    origin: str = ""
    about: dict[str, str] = field(default_factory=dict)


class _Absent(Exception):
    """No library, for a reason that needs no warning: as it should be, or told before."""


def available(device_type: str) -> bool:
    """Whether the library for ``device_type`` (``"cpu"``, ``"cuda"``, ...) is loaded; the first call loads it.

    Never raises for a library that is missing, cannot be built or cannot be loaded: that is logged, once.

    Raises:
        ValueError: ``DPFAST_NATIVE`` is neither 0 nor 1.
    """
    return library(device_type).reason is None


def why_not(device_type: str) -> str | None:
    """Why there is no library for ``device_type``, every cause in one line; None if it is available."""
    return library(device_type).reason


def status() -> list[Library]:
    """What became of every library; loads, and builds, those not asked for before."""
    return [library(device) for device in DEVICES]


def library(device_type: str) -> Library:
    """As :func:`available`, with all that is known. Safe to call from several threads."""
    found = _found.get(device_type)
    if found is None:
        with _lock:
            found = _found.get(device_type) or _find(device_type)
            _found[device_type] = found
    return found


def instruction_set() -> str:
    """``"scalar"``, ``"avx2"`` or ``"avx512"``: what the CPU library uses here (``DPFAST_CPU_ISA`` may ask for less).

    Raises:
        RuntimeError: the CPU library is not available.
    """
    path = library("cpu").path
    if path is None:
        raise RuntimeError(f"no CPU library: {why_not('cpu')}")
    name = ctypes.CDLL(str(path)).dpfast_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()


def reset() -> None:
    """For tests: forget what became of the libraries and ask again at the next call. One that is loaded stays so."""
    with _lock:
        _found.clear()


def _find(device: str) -> Library:
    try:
        _wanted(device)
        return _load(device)
    except _Absent as reason:
        return Library(device, str(reason))
    except (build.BuildError, OSError) as error:
        fix = getattr(error, "fix", "") or "mend what that says"
        cause = f"{error}. To have them: {fix}; DPFAST_NATIVE=0 asks for plain PyTorch"
        _log.warning(_WITHOUT.format(device.upper(), cause))
        return Library(device, cause)


def _wanted(device: str) -> None:
    """Raises _Absent if there is nothing to load for ``device``."""
    asked = os.environ.get("DPFAST_NATIVE", "1")
    if asked not in ("0", "1"):
        raise ValueError(f"DPFAST_NATIVE={asked!r}: give 1, or 0 for plain PyTorch")
    if asked == "0":
        raise _Absent("DPFAST_NATIVE=0")
    if device not in DEVICES:
        raise _Absent(f"there is no library for {device!r}")
    if device == "cuda":
        if torch.version.cuda is None:
            raise _Absent("this torch is built without CUDA")
        if not torch.cuda.is_available():
            raise _Absent("no CUDA device")
        if reason := library("cpu").reason:
            raise _Absent(f"it needs the CPU library: {reason}")


def _load(device: str) -> Library:
    """Load what is found first. BuildError with the cause of every failure if nothing is."""
    variable = f"DPFAST_LIBRARY_{device.upper()}"
    if given := os.environ.get(variable):
        try:
            return _open(device, Path(given), "given")
        except build.BuildError as error:
            raise build.BuildError(f"{variable}={given}: {error}", f"correct {variable} or unset it") from error
    causes = []
    try:
        path = Path(__file__).with_name(build.library_name(device))
        _check_installed(device, path)
        return _open(device, path, "installed")
    except build.BuildError as error:
        causes.append(f"the installed library: {error}")
    try:
        path, new = cache.library(device, _arches() if device == "cuda" else ())
        return _open(device, path, "built now" if new else "cached")
    except build.BuildError as error:
        causes.append(f"building one: {error}")
        raise build.BuildError("; ".join(causes), error.fix) from error


def _check_installed(device: str, path: Path) -> None:
    """BuildError unless ``path`` is built from the sources that are here, for this machine."""
    if not path.is_file():
        raise build.BuildError("none came with the package")
    about = build.about(path)
    if about.get("digest") != build.digest(device, build.find_csrc()):
        raise build.BuildError(f"{path} is of other sources, flags or processors than those here")
    if device == "cuda":
        toolkit = re.search(r"cuda_(\d+)", about["nvcc"])
        if toolkit and torch.version.cuda and int(toolkit[1]) > int(torch.version.cuda.partition(".")[0]):
            cause = f"is built with CUDA {toolkit[1]}, and torch with {torch.version.cuda}, for which older drivers do"
            raise build.BuildError(f"{path} {cause}")
        has = [int(arch) for arch in about["arches"].split()]
        missing = [arch for arch in _arches() if int(arch) not in has and int(arch) < has[-1]]  # later: by PTX
        if missing:
            raise build.BuildError(f"{path} is not for sm_{', sm_'.join(missing)}")


def _arches() -> tuple[str, ...]:
    """Those to compile for, given the devices here: of each generation the oldest that serves them.

    Raises:
        BuildError: a device is too old.
    """
    arches = set()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        serving = [arch for arch in build.ARCHES if int(arch) // 10 == major and int(arch) % 10 <= minor]
        if major < int(build.ARCHES[0]) // 10:
            name = torch.cuda.get_device_name(index)
            raise build.BuildError(f"{name} has compute capability {major}.{minor}, and 8.0 is the least")
        # Later generations than the last run its PTX.
        arches.add(serving[-1] if serving else build.ARCHES[-1])
    return tuple(sorted(arches, key=int))


def _open(device: str, path: Path, origin: str) -> Library:
    """Load ``path``, BuildError with the loader's words if that fails."""
    path = path.absolute()
    if _loaded.setdefault(device, path) != path:
        raise build.BuildError(f"this process has already loaded {_loaded[device]}", "start a new one")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        del _loaded[device]
        raise build.BuildError(f"{path} does not load: {error.__cause__ or error}", "build it again") from error
    about = build.about(path)
    _log.debug("dpfast loaded its %s library: %s (%s)", device, path, origin)
    return Library(device, path=path, origin=origin, about=about)
