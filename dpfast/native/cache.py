"""Libraries built at first use, where none came with the package and a compiler is here.

They lie in ``DPFAST_CACHE_DIR``, else ``XDG_CACHE_HOME/dpfast``, else ``~/.cache/dpfast``, named by a hash of the
sources, the flags, the compiler's version and torch's. A library comes into place whole, by a rename; of several
processes that want one, a file lock lets one build it. What a killed build leaves is removed by the next.

A library is code: folder and library must be this user's or root's, and nobody else may write to them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpfast.native import build

_log = logging.getLogger("dpfast")


def folder() -> Path:
    """Where the libraries are kept; it may not be there yet. BuildError if no place can be told."""
    if own := os.environ.get("DPFAST_CACHE_DIR"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise build.BuildError("no home directory, so no cache folder", "name a folder in DPFAST_CACHE_DIR")
    return Path(base).absolute() / "dpfast"


def library(device: str, arches: tuple[str, ...] = build.ARCHES) -> tuple[Path, bool]:
    """The library for ``device``, and whether it was built by this call.

    Without a compiler, one that was built from these sources by another machine that shares the folder does.

    Raises:
        build.BuildError: it cannot be built, or others could have put it there; names the cause.
    """
    here = folder()
    if here.is_dir():
        _refuse_others(here)
    try:
        plan = build.plan(device, arches=arches)
    except build.BuildError:
        if shared := _of_these_sources(device, arches):
            return shared, False
        raise
    name = build.library_name(device)
    library = here / name.replace(".so", f"-{plan.about['key']}.so")
    try:
        if _whole(library, plan):
            return library, False
        here.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_others(here)  # who may have been faster
        with _locked(library.with_suffix(".lock")) as alone:
            if _whole(library, plan):  # another process was faster
                return library, False
            if alone:
                for left in here.glob(f".{library.name}.*"):
                    shutil.rmtree(left)
            _log.info("dpfast compiles its %s library once, into %s", device, here)
            built = build.run(plan, library)
    except OSError as error:
        fix = "name a folder that can be written in DPFAST_CACHE_DIR"
        raise build.BuildError(f"the cache folder {here} cannot be used: {error}", fix) from error
    _log.info("dpfast compiled %s in %.0f s", built.library, built.seconds)
    return library, True


def _whole(library: Path, plan: build.Plan) -> bool:
    if not library.is_file():
        return False
    _refuse_others(library)
    return build.about(library).get("key") == plan.about["key"]


def _refuse_others(path: Path) -> None:
    """BuildError if it is another user's than this one or root, or can be written by others."""
    state = path.stat()
    mine = "name a folder of your own in DPFAST_CACHE_DIR"
    if state.st_uid not in (os.geteuid(), 0):
        whose = f"{path} belongs to the user of number {state.st_uid}, whose code would be run"
        raise build.BuildError(whose, f"chown it to yourself and chmod go-w it, or {mine}")
    if state.st_mode & 0o022:
        fix = f"see that it is what it should be and chmod go-w {path}, or {mine}"
        raise build.BuildError(f"{path} can be written by others (mode {state.st_mode & 0o777:03o})", fix)


def _of_these_sources(device: str, arches: tuple[str, ...]) -> Path | None:
    """The newest library in the folder that was built from the same sources for such a machine."""
    name = build.library_name(device).removesuffix(".so")
    found = sorted(folder().glob(f"{name}-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    digest = build.digest(device, build.find_csrc()) if found else ""
    for library in found:
        about = build.about(library)
        if about.get("digest") == digest and (device == "cpu" or {*arches} <= {*about["arches"].split()}):
            _refuse_others(library)
            return library
    return None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock; False where the file system has none, and a rename must do."""
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.debug("no lock on %s: %s", path, error)
            yield False
        else:
            yield True  # let go of when the file is closed, or its process dies
