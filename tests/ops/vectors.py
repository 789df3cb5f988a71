"""Builds vectors.cpp, the noise headers as a program, for each instruction set, and calls it."""

import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "csrc" / "include"
# Without contraction: the headers say themselves where a multiply-add is fused.
FLAGS = ("-O2", "-std=c++17", "-ffp-contract=off", f"-I{INCLUDE}")
BUILDS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
}
_folder = tempfile.TemporaryDirectory(prefix="dpfast-vectors-")  # removed when the interpreter ends


def why_not(build: str) -> str:
    """Why this machine cannot make or run a build; empty where it can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if not BUILDS[build]:
        return ""
    cpuinfo = Path("/proc/cpuinfo")
    has = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    missing = [flag for flag in BUILDS[build] if flag.removeprefix("-m") not in has]
    return f"this CPU lacks {' '.join(missing)}" if missing else ""


def program(build: str) -> "Program":
    """The build, or a skip that says why there is none."""
    if reason := why_not(build):
        pytest.skip(reason)
    return _compiled(build)


def fastest() -> "Program":
    """The widest build that runs here: all of them make the same bits."""
    return program([build for build in BUILDS if not why_not(build)][-1] if not why_not("scalar") else "scalar")


@functools.cache
def _compiled(build: str) -> "Program":
    path = Path(_folder.name) / build
    subprocess.run(["g++", *FLAGS, *BUILDS[build], HERE / "vectors.cpp", "-o", path], check=True)
    return Program(path)


class Program:
    """Words are integers, or arrays of uint32."""

    def __init__(self, path: Path):
        self.path = path

    def philox(self, key: Sequence[int], counter: Sequence[int]) -> list[list[int]]:
        """For each lane L the four words of counter + (L, 0, 0, 0)."""
        return self._words("philox", *key, *counter)

    def chacha(self, key: Sequence[int], counter: int, nonce: Sequence[int]) -> list[list[int]]:
        """For each lane L the 16 words of block counter + L."""
        return self._words("chacha", *key, counter, *nonce)

    def normals(self, key: Sequence[int], step: int, parameter: int, start: int, stop: int) -> np.ndarray:
        """Float32 ``[stop - start]``."""
        return np.frombuffer(self._run("normals", *key, step, parameter, start, stop), dtype="<f4")

    def integers(
        self, key: Sequence[int], step: int, parameter: int, start: int, stop: int, scale: float
    ) -> np.ndarray:
        """Int32 ``[stop - start]``."""
        bits = struct.unpack("<I", struct.pack("<f", scale))[0]
        return np.frombuffer(self._run("integers", *key, step, parameter, start, stop, bits), dtype="<i4")

    def polar(self, w: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Rows radius, x, y: float32 ``[3, n]`` of uint32 words ``[n]``."""
        lanes = -len(w) % 16  # the program reads whole vectors
        pairs = np.pad(np.stack([w, a], axis=1).astype("<u4"), ((0, lanes), (0, 0)))
        return np.frombuffer(self._run("polar", input=pairs.tobytes()), dtype="<f4").reshape(-1, 3)[: len(w)].T

    def _words(self, *arguments: str | int) -> list[list[int]]:
        return [[int(word, 16) for word in line.split()] for line in self._run(*arguments).decode().splitlines()]

    def _run(self, *arguments: str | int, input: bytes = b"") -> bytes:
        text = [argument if isinstance(argument, str) else f"{argument:x}" for argument in arguments]
        return subprocess.run([self.path, *text], input=input, capture_output=True, check=True).stdout
