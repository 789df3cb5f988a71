"""``python -m dpfast bench``: run suites, keep their records, print their tables, draw their plots."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import ROOT, THREADS
from bench.methods import METHODS, absent, quiet_peers
from bench.record import Record, ResumeError
from bench.suites import Options
from bench.workloads import workloads

SUITES = {"kernels": 40.0, "layers": 40.0, "models": 90.0}  # seconds of timing loops by default
DEFAULTS = ", ".join(f"{seconds:g} of {name}" for name, seconds in SUITES.items())
DEVICES = ("cpu", "cuda")


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m dpfast bench", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--suite", nargs="+", default=list(SUITES), metavar="NAME", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="of the models suite (see --list)")
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seconds", type=float, help=f"timing loops of one suite (default: {DEFAULTS})")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="where records, tables and plots go")
    parser.add_argument("--resume", action="store_true", help="go on with the newest unfinished record of the same run")
    parser.add_argument("--small", action="store_true", help="tiny sizes, which show that everything runs")
    parser.add_argument("--list", action="store_true", help="list the models of the device")
    parser.add_argument(
        "--report", type=Path, metavar="RECORD", help="print and draw a record that is there; run nothing"
    )
    return parser.parse_args(given)


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 if dpfast was wrong somewhere, 2 for a bad request, 130 after an interruption."""
    asked = _arguments(arguments)
    quiet_peers()
    torch.set_num_threads(THREADS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # out of time is an interruption like any other
    if asked.report is not None:
        return _show(asked.report)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if refusal := _refusal(asked, device):
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    if asked.list:
        for name, work in workloads(device, asked.small).items():
            print(f"{name:14} {work.title}{'' if work.by_default else '  (only by name)'}")
        return 0
    right = True
    for suite in asked.suite:
        options = Options(
            device=torch.device(device),
            seconds=asked.seconds or SUITES[suite],
            small=asked.small,
            models=tuple(asked.model),
            methods=tuple(asked.method),
        )
        try:
            right = _run(suite, options, asked.out, asked.resume) and right
        except ResumeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"\ninterrupted: all that was measured is in {asked.out}; --resume goes on with it", file=sys.stderr)
            return 130
    return 0 if right else 1


def _refusal(asked: argparse.Namespace, device: str) -> str | None:
    """Why a request cannot be met, with the choices."""
    if device not in DEVICES:
        return f"--device {device!r} is not one of {', '.join(DEVICES)}"
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: no CUDA device here; --device cpu measures what there is without one"
    for option, names, choices in (
        ("suite", asked.suite, SUITES),
        ("model", asked.model, workloads(device, asked.small)),
        ("method", asked.method, METHODS),
    ):
        for name in names:
            if name not in choices:
                return f"--{option} {name!r} is not one of {', '.join(choices)}"
    for name, reason in absent().items():
        if name in asked.method:
            return f"--method {name}: {reason}: install it, or leave it out"
    if asked.method and "nonprivate" not in asked.method:
        return "--method: nonprivate must be one of them: every figure is a ratio to it"
    if asked.seconds is not None and not asked.seconds > 0:
        return f"--seconds {asked.seconds}: must be more than 0"
    return None


def _run(name: str, options: Options, out: Path, resume: bool) -> bool:
    suite = importlib.import_module(f"bench.suites.{name}")
    configuration = {
        "command": _command(name, options),
        "suite": name,
        "seconds": options.seconds,
        "small": options.small,
        "models": list(options.models),
        "methods": list(options.methods),
        "absent": absent(),
    }
    make = Record.resumed if resume else Record.new
    record = make(out, name, options.device, configuration)
    try:
        right = suite.run(record, options)
        record.finish(options.device)
    finally:
        _show(record.path)
    return right


def _command(name: str, options: Options) -> str:
    words = ["python -m dpfast bench", "--suite", name, "--device", options.device.type]
    words += ["--model", *options.models] if options.models else []
    words += ["--method", *options.methods] if options.methods else []
    return " ".join([*words, f"--seconds {options.seconds:g}", *(["--small"] if options.small else [])])


def _show(path: Path) -> int:
    """Print a record's tables; leave them and its plots beside it."""
    try:
        data = json.loads(path.read_text())
        suite = importlib.import_module(f"bench.suites.{data['configuration']['suite']}")
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {path} is no record: {error}", file=sys.stderr)
        return 2
    text = suite.report(data)
    path.with_suffix(".md").write_text(text + "\n")
    plots = suite.draw(data, path.with_suffix(""))
    print(text)
    print("\n" + "\n".join(f"written: {one}" for one in (path, path.with_suffix(".md"), *plots)))
    return 0
