"""A suite's record: where it ran and all that was measured, written after every measurement, so that none is lost."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

import dpfast
from bench import signals
from bench.measure import ROOT

logger = logging.getLogger(__name__)
SOURCES = ("dpfast", "kernels", "csrc", "bench")  # folders that decide a figure ...
KINDS = (".py", ".cpp", ".cu", ".h")  # ... by files of these kinds
LIBRARIES = ("torch", "triton", "opacus", "numpy", "fastDP", "opake", "transformers", "peft")
SHAPE = {"machine": dict, "device": dict, "configuration": dict, "finished": bool, "suite": dict}


class RecordError(ValueError):
    """There is no such record, or it is none."""


class Record:
    """A JSON file that is always whole: ``data`` is what it holds.

    ``data["suite"]`` belongs to the suite, in any shape; the rest says what a reader needs to judge a figure.
    """

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path, self.data = path, data

    @classmethod
    def new(
        cls, folder: Path, name: str, device: torch.device, configuration: dict[str, Any], run: Run | None = None
    ) -> Record:
        """A file of its own, empty; ``run`` is that of the command, if it has several."""
        now = datetime.now(UTC)
        of = (now.isoformat(), [name]) if run is None else (run.started, run.suites)
        head = {"run": of[0], "suites": of[1], **_head(device, configuration)}
        while (path := folder / f"{name}-{device.type}-{now:%Y%m%d-%H%M%S}.json").exists():
            now += timedelta(seconds=1)
        record = cls(path, {**head, "finished": False, "suite": {}})
        record.save()
        return record

    @property
    def suite(self) -> dict[str, Any]:
        return self.data["suite"]

    def save(self) -> None:
        """Replace the file; whoever stops us half-way finds the former one.

        Raises:
            KeyboardInterrupt: there was a signal that got lost on its way.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)
        signals.obey()

    def finish(self, device: torch.device, right: bool = True) -> None:
        """Nothing is left to measure; ``right`` is whether all of dpfast was."""
        self.data |= {"finished": True, "right": right, "device_after": device_record(device)}  # clocks after work
        self.save()


class Run:
    """The records of one command, one a suite: they have the same ``started``, and know all its ``suites``."""

    def __init__(
        self, folder: Path, device: torch.device, started: str, suites: list[str], records: Mapping[str, Record]
    ):
        self.folder, self.device, self.started, self.suites, self.records = folder, device, started, suites, records

    @classmethod
    def new(cls, folder: Path, device: torch.device, suites: Iterable[str]) -> Run:
        return cls(folder, device, datetime.now(UTC).isoformat(), list(suites), {})

    @classmethod
    def resumed(cls, folder: Path, device: torch.device, wanted: Mapping[str, dict[str, Any]]) -> Run:
        """The newest run that lacks something of the suites wanted (name: configuration), and was as this one would be.

        A file that is no record is skipped, and named in the log.

        Raises:
            RecordError: there is none. It names the newest unfinished record of another kind, and what differs.
        """
        runs: dict[str, dict[str, Record]] = {}
        for name in wanted:
            for path in sorted(folder.glob(f"{name}-{device.type}-*.json")):
                try:
                    data = read(path)
                except RecordError as error:
                    logger.warning("skipped: %s", error)
                    continue
                started = str(data.get("run") or data["machine"].get("date"))
                runs.setdefault(started, {})[name] = Record(path, data)
        head, other = _head(device, {}), ""
        for started, records in sorted(runs.items(), reverse=True):
            unfinished = [name for name, record in records.items() if not record.data["finished"]]
            suites = list(dict.fromkeys(name for record in records.values() for name in record.data.get("suites", [])))
            if not unfinished and set(suites).intersection(wanted) <= set(records):
                continue
            unlike = {
                name: differences(record.data, {**head, "configuration": wanted[name]})
                for name, record in records.items()
            }
            if not any(unlike.values()):
                return cls(folder, device, started, suites, records)
            for name in unfinished:
                more = f" and {len(unlike[name]) - 3} more" if len(unlike[name]) > 3 else ""
                what = "; ".join(unlike[name][:3]) + more
                other = other or f" ({records[name].path.name} is unfinished, but of {what})"
        which = " or ".join(f"{name}-{device.type}-*.json" for name in wanted)
        raise RecordError(f"no unfinished record {which} in {folder}{other}: start anew, without --resume")

    def record(self, name: str, configuration: dict[str, Any]) -> Record:
        """A suite's record, which may be finished; one that is gone on with also says when, and beside what load."""
        if name not in self.records:
            return Record.new(self.folder, name, self.device, configuration, self)
        record = self.records[name]
        if not record.data["finished"]:
            now = machine_record()
            record.data.setdefault("sessions", []).append({what: now[what] for what in ("date", "load_before")})
        return record


def read(path: Path) -> dict[str, Any]:
    """What a record holds.

    Raises:
        RecordError: the file cannot be read, or is none.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is no record: {error}") from error
    if not isinstance(data, dict):
        raise RecordError(f"{path} is no record: a {type(data).__name__}, not an object")
    for name, kind in SHAPE.items():
        if not isinstance(data.get(name), kind):
            raise RecordError(f"{path} is no record: it has no {name!r}, or of another type")
    for name in ("suite", "command"):
        if not isinstance(data["configuration"].get(name), str):
            raise RecordError(f"{path} is no record of a suite: its configuration has no {name!r}")
    return data


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why two heads cannot be of one record: what decides a figure, or what was asked, is not the same.

    Where git knows no commit, the sources' hash alone says whether the code is; it also sees what is not committed.
    """
    old, new = (_identity(json.loads(json.dumps(head))) for head in (before, now))
    if None in (old["commit"], new["commit"]):
        del old["commit"], new["commit"]
    return [f"{what} {old.get(what)}, not {new.get(what)}" for what in old | new if old.get(what) != new.get(what)]


def _identity(data: Mapping[str, Any]) -> dict[str, Any]:
    machine, device = data["machine"], data["device"]
    found = {what: machine.get(what) for what in ("commit", "sources", "cpu", "threads", "python")}
    found |= machine.get("versions", {})
    found["device"] = device.get("name")
    found |= {f"{op}'s backend": backend for op, _, backend, _ in device.get("backends", [])}
    asked = {what: value for what, value in data["configuration"].items() if what != "command"}  # it says the same
    return found | {f"configuration ({what})": value for what, value in asked.items()}


def _head(device: torch.device, configuration: dict[str, Any]) -> dict[str, Any]:
    return {"machine": machine_record(), "device": device_record(device), "configuration": configuration}


def machine_record() -> dict[str, Any]:
    """All that a reader needs to judge a figure, or to repeat it."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    versions = {name: found for name in LIBRARIES if (found := version(name)) is not None}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(psutil.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"dpfast": dpfast.__version__, **versions},
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT") or None,  # a plain copy may be told
        "uncommitted_changes": None if changed is None else bool(changed),
        "sources": hash_of(*(ROOT / folder for folder in SOURCES)),
    }


def device_record(device: torch.device) -> dict[str, Any]:
    """What the figures depend on and :func:`machine_record` does not know."""
    from dpfast import ops

    backends = [row for row in ops.backends() if row[1] == device.type]
    if device.type != "cuda":
        return {"name": "cpu", "backends": backends}
    names = ("name", "multi_processor_count", "L2_cache_size", "total_memory")
    properties = torch.cuda.get_device_properties(device)
    record = {name: getattr(properties, name) for name in names}
    record |= {"capability": torch.cuda.get_device_capability(device), "cuda": torch.version.cuda, "backends": backends}
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    try:
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().split(", ")
        record |= dict(zip(asked, answer, strict=False))
    except (OSError, subprocess.TimeoutExpired):
        record["driver_version"] = None  # nvidia-smi is not there, or does not answer
    return record


def title_of(data: dict[str, Any]) -> str:
    """Where, when and with what a record was made."""
    machine, device, configuration = data["machine"], data["device"], data["configuration"]
    on = device["name"] if device["name"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"
    versions = [f"{name} {machine['versions'][name]}" for name in ("torch", "opacus") if machine["versions"].get(name)]
    commit = f"commit {machine['commit'][:10]}" if machine["commit"] else f"sources {machine.get('sources')}"
    commit += " and uncommitted changes" if machine["uncommitted_changes"] else ""
    later = "".join(f", gone on with {one['date'][:10]}, load {one['load_before']}" for one in data.get("sessions", []))
    absent = "".join(f"; {name} not measured: {reason}" for name, reason in configuration.get("absent", {}).items())
    return (
        f"{on}; {', '.join(versions)}, Python {machine['python']}, {commit}, {machine['date'][:10]}, load "
        f"before the run {machine['load_before']}{later}; `{configuration['command']}`{absent}"
    )


def version(name: str) -> str | None:
    """Of a library, None where there is none; one that is on the path only is told by its sources."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None
    declared = re.search(r"""^__version__ *= *["'](.+)["']""", Path(spec.origin).read_text(), re.MULTILINE)
    return f"{declared[1] if declared else 'no version'}, sources {hash_of(Path(spec.origin).parent)}"


def hash_of(*folders: Path) -> str:
    """Of the names and contents of all sources in some folders."""
    whole = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in KINDS and path.is_file():
                name = path.relative_to(folder.parent).as_posix()
                whole.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:16]


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else (platform.processor() or platform.machine())


def _git(*arguments: str) -> str | None:
    """What git says, or None outside a clone: a copy that lies in somebody else's has no commit."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
