"""A run's record: where it ran and all that was measured, written after every measurement, so that none is lost."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.measure import ROOT

SAME = ("device", "commit", "configuration")  # of two runs that can be one record


class ResumeError(ValueError):
    """There is no record that a run could go on with."""


class Record:
    """A JSON file that is always whole: ``data`` is what it holds.

    ``data["suite"]`` belongs to the suite, in any shape; the rest says what a reader needs to judge a figure.
    """

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path, self.data = path, data

    @classmethod
    def new(cls, folder: Path, name: str, device: torch.device, configuration: dict[str, Any]) -> Record:
        """A record of its own for this run, empty."""
        path = folder / f"{name}-{device.type}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        record = cls(path, {**_head(device, configuration), "finished": False, "suite": {}})
        record.save()
        return record

    @classmethod
    def resumed(cls, folder: Path, name: str, device: torch.device, configuration: dict[str, Any]) -> Record:
        """The newest unfinished record of the same run.

        Raises:
            ResumeError: if there is none, or the newest was made by other code, on another device or otherwise.
        """
        for path in sorted(folder.glob(f"{name}-{device.type}-*.json"), reverse=True):
            data = json.loads(path.read_text())
            if data["finished"]:
                continue
            now = json.loads(json.dumps(_head(device, configuration)))
            for what in SAME:
                if _identity(data, what) != _identity(now, what):
                    raise ResumeError(
                        f"{path} is of another {what}: {_identity(data, what)}, not {_identity(now, what)}. Start "
                        f"anew, without --resume"
                    )
            return cls(path, data)
        raise ResumeError(f"no unfinished record {name}-{device.type}-*.json in {folder}: start anew, without --resume")

    @property
    def suite(self) -> dict[str, Any]:
        return self.data["suite"]

    def save(self) -> None:
        """Replace the file; whoever stops us half-way finds the former one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)

    def finish(self, device: torch.device) -> None:
        self.data["finished"] = True
        self.data["device_after"] = device_record(device)  # clocks after work
        self.save()


def _head(device: torch.device, configuration: dict[str, Any]) -> dict[str, Any]:
    return {"machine": machine_record(), "device": device_record(device), "configuration": configuration}


def _identity(data: dict[str, Any], what: str) -> Any:
    if what == "device":
        return data["device"]["name"], data["machine"]["cpu"]
    return data["machine"]["commit"] if what == "commit" else data["configuration"]


def machine_record() -> dict[str, Any]:
    """All that a reader needs to judge a figure, or to repeat it."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
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
        "versions": {name: version(name) for name in ("torch", "triton", "opacus", "dpfast", "numpy")},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
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
    versions = [f"{name} {machine['versions'][name]}" for name in ("torch", "opacus") if machine["versions"][name]]
    commit = (machine["commit"] or "none")[:10] + (" and uncommitted changes" if machine["uncommitted_changes"] else "")
    absent = "".join(f"; {name} not measured: {reason}" for name, reason in configuration.get("absent", {}).items())
    return (
        f"{on}; {', '.join(versions)}, Python {machine['python']}, commit {commit}, {machine['date'][:10]}, load "
        f"before the run {machine['load_before']}; `{configuration['command']}`{absent}"
    )


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else (platform.processor() or platform.machine())


def _git(*arguments: str) -> str | None:
    """What git says, or None outside a clone."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
