"""``python -m dpfast bench``: run suites, keep their records, print their tables, draw their plots."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import host_workloads, signals
from bench.measure import ROOT, THREADS, said
from bench.methods import METHODS, absent, quiet_peers
from bench.record import RecordError, Run, read
from bench.suites import Options
from bench.workloads import workloads

logger = logging.getLogger(__name__)
# Seconds of timing loops by default; one that times nothing runs only by name.
SUITES = {"kernels": 40.0, "layers": 40.0, "models": 90.0, "host": 10.0, "static": 0.0}
TIMED = [name for name, seconds in SUITES.items() if seconds]
DEFAULTS = ", ".join(f"{SUITES[name]:g} of {name}" for name in TIMED)
USES: dict[str, tuple[str, ...]] = {  # options
    "kernels": (),
    "layers": ("method",),
    "models": ("model", "method"),
    "host": ("model", "method"),
    "static": (),
}
NAMED = {"models": workloads, "host": host_workloads.workloads}  # what --model can name of a suite
DEVICES = ("cpu", "cuda")
TABLES = {name: f"bench.suites.{name}" for name in SUITES}  # what prints a record
TABLES |= {name: f"bench.{name}" for name in ("ascent", "distributed", "packed")}


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m dpfast bench", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument(
        "--suite", nargs="+", default=TIMED, metavar="NAME", help=f"of {', '.join(SUITES)} (default: all but static)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="NAME", help="of the models and host suites (see --list)"
    )
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seconds", type=float, help=f"timing loops of one suite (default: {DEFAULTS})")
    parser.add_argument(
        "--out",
        type=Path,
        help="where records, tables and plots go (default: bench/out; with --report beside the record)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the newest run like this one that was not finished"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, which show that everything runs")
    parser.add_argument("--list", action="store_true", help="list the models of the device")
    parser.add_argument(
        "--report", type=Path, metavar="RECORD", help="print and draw a record that is there; run nothing"
    )
    return parser.parse_args(given)


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 if dpfast was wrong or the device died, 2 for a bad request, 130 after an interruption."""
    asked = _arguments(arguments)
    if asked.out is None:
        asked.out = asked.report.parent if asked.report else ROOT / "bench" / "out"
    quiet_peers()
    torch.set_num_threads(THREADS)
    kept = "" if asked.report else f": all that was measured is in {asked.out}; --resume goes on with it"
    with signals.interruptible():
        try:
            return _measure(asked) if asked.report is None else _report(asked.report, asked.out)
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"\ninterrupted{kept}", file=sys.stderr)
            return 130
        except torch.AcceleratorError as error:  # nothing more can be asked of the device in this process
            print(f"error: {said(error)}{kept}", file=sys.stderr)
            return 1


def _measure(asked: argparse.Namespace) -> int:
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if refusal := _refusal(asked, device):
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    if asked.list:
        for suite, models in NAMED.items():
            for name, work in models(device, asked.small).items():
                print(f"{name:14} {suite:7} {work.title}{'' if work.by_default else '  (only by name)'}")
        return 0
    options = {suite: _options(suite, asked, device) for suite in asked.suite}
    configurations = {suite: _configuration(suite, its) for suite, its in options.items()}
    where = torch.device(device)
    run = Run.resumed(asked.out, where, configurations) if asked.resume else Run.new(asked.out, where, options)
    _can_write(asked.out)
    for option in ("model", "method"):
        others = [suite for suite, its in options.items() if not getattr(its, f"{option}s")]
        if getattr(asked, option) and others:
            logger.warning("--%s says nothing to %s", option, " and ".join(others))
    if asked.seconds is not None and (others := [suite for suite in options if suite not in TIMED]):
        logger.warning("--seconds says nothing to %s", " and ".join(others))
    right = [_run(suite, options[suite], run, configurations[suite]) for suite in options]
    return 0 if all(right) else 1


def _refusal(asked: argparse.Namespace, device: str) -> str | None:
    """Why a request cannot be met, with the choices."""
    if device not in DEVICES:
        return f"--device {device!r} is not one of {', '.join(DEVICES)}"
    if asked.list:
        return None
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: no CUDA device here; --device cpu measures what there is without one"
    for option, names, choices in (
        ("suite", asked.suite, SUITES),
        ("model", asked.model, _models(NAMED, asked, device)),
        ("method", asked.method, METHODS),
    ):
        for name in names:
            if name not in choices:
                return f"--{option} {name!r} is not one of {', '.join(choices)}"
    for option in ("model", "method"):
        users = [suite for suite in SUITES if option in USES[suite]]
        if getattr(asked, option) and not set(users) & set(asked.suite):
            return f"--{option} says nothing to {' and '.join(asked.suite)}: it is for {' and '.join(users)}"
    for name in asked.model:
        if name not in _models(asked.suite, asked, device):
            return f"--model {name!r} is of no suite asked for: {' and '.join(asked.suite)}"
    for name, reason in absent().items():
        if name in asked.method:
            return f"--method {name}: {reason}: install it, or leave it out"
    if asked.method and "nonprivate" not in asked.method:
        return "--method: nonprivate must be one of them: every figure is a ratio to it"
    if "static" in asked.suite and importlib.util.find_spec("triton") is None:
        return "--suite static: Triton is not installed: install it, or leave the suite out"
    if asked.seconds is not None and not 0 < asked.seconds < math.inf:
        return f"--seconds {asked.seconds}: must be more than 0, and finite"
    return None


def _models(suites: Iterable[str], asked: argparse.Namespace, device: str) -> list[str]:
    """The names that there are in some suites."""
    return [name for suite in suites if suite in NAMED for name in NAMED[suite](device, asked.small)]


def _can_write(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RecordError(f"--out {folder}: {error.strerror}: name a folder that can be written") from error


def _options(suite: str, asked: argparse.Namespace, device: str) -> Options:
    return Options(
        device=torch.device(device),
        seconds=(asked.seconds or SUITES[suite]) if suite in TIMED else 0.0,
        small=asked.small,
        models=tuple(name for name in asked.model if name in _models([suite], asked, device)),
        methods=tuple(asked.method) if "method" in USES[suite] else (),
    )


def _configuration(suite: str, options: Options) -> dict[str, Any]:
    return {
        "command": _command(suite, options),
        "suite": suite,
        "seconds": options.seconds,
        "small": options.small,
        "models": list(options.models),
        "methods": list(options.methods),
        "absent": absent(),
    }


def _command(name: str, options: Options) -> str:
    words = ["python -m dpfast bench", "--suite", name, "--device", options.device.type]
    words += ["--model", *options.models] if options.models else []
    words += ["--method", *options.methods] if options.methods else []
    words += [f"--seconds {options.seconds:g}"] if options.seconds else []
    return " ".join([*words, *(["--small"] if options.small else [])])


def _run(name: str, options: Options, run: Run, configuration: dict[str, Any]) -> bool:
    """Measure what a suite's record lacks, and show it; whether dpfast was right."""
    record = run.record(name, configuration)
    if record.data["finished"]:
        print(f"{name}: finished before, in {record.path}")
        return record.data.get("right", True)
    suite = importlib.import_module(TABLES[name])
    try:
        right = suite.run(record, options)
        record.finish(options.device, right)
    finally:
        _show(record.path, read(record.path), record.path.parent)
    return right


def _report(path: Path, folder: Path) -> int:
    data = read(path)
    name = data["configuration"]["suite"]
    if name not in TABLES:
        raise RecordError(f"{path} is of the suite {name!r}, which has no tables; {', '.join(TABLES)} have")
    _can_write(folder)
    try:
        _show(path, data, folder)
    except OSError as error:
        raise RecordError(f"the tables of {path} cannot be written: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # a file that anybody may have made
        raise RecordError(f"{path} is no record of the suite {name!r}: {said(error)}") from error
    return 0


def _show(path: Path, data: dict[str, Any], folder: Path) -> None:
    """Print a record's tables; leave them and its plots in ``folder``."""
    suite = importlib.import_module(TABLES[data["configuration"]["suite"]])
    text = suite.report(data)
    written = folder / f"{path.stem}.md"
    written.write_text(text + "\n")
    plots = suite.draw(data, written.with_suffix(""))
    print(text)
    print(f"\nrecord: {path}\n" + "\n".join(f"written: {one}" for one in (written, *plots)))
