"""``python -m dpfast run``: a script that uses Opacus, unchanged, with :func:`dpfast.patch_opacus` in force.

Processes that the script spawns (``torch.multiprocessing.spawn``, workers of a loader) are patched as well. A script
of ``torchrun`` is run as ``torchrun … -m dpfast run script.py``.
"""

from __future__ import annotations

import multiprocessing.spawn
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpfast.arguments import Parser

CHILD = "DPFAST_RUN_SCRIPT"  # names the script to processes that are spawned
TABLE = "DPFAST_RUN_REPORT"  # set where they are to print the whole table


def main(arguments: Sequence[str]) -> int:
    """Run the script that ``arguments`` name; the exit status where there is none to run.

    What the script raises, ``SystemExit`` included, is raised here.
    """
    parser = Parser(
        "dpfast run",
        usage="python -m dpfast run [--report] (script.py | -m module) [arguments of the script]",
        description="Run a script that uses Opacus, unchanged, with its privacy engine served by dpfast's fused mode.",
    )
    parser.add_argument("--report", action="store_true", help="print a table of what ran fused, what did not, and why")
    parser.add_argument("-m", dest="module", metavar="module", help="run a module, as python -m does")
    options, script = _split(list(arguments))
    asked = parser.parse_args(options)
    if asked.module is None and not script:
        parser.print_usage(sys.stderr)
        print("error: name a script, or -m and a module", file=sys.stderr)
        return 2
    if asked.module is None and not Path(script[0]).is_file():
        print(f"error: there is no file {script[0]!r}: give the path of a Python script", file=sys.stderr)
        return 2
    from dpfast.dropin import patch  # loads torch, which help has no need of

    patch.patch_opacus()
    if asked.report:
        os.environ[TABLE] = "1"
    multiprocessing.spawn.get_preparation_data = preparation_data  # type: ignore[assignment]
    try:
        if asked.module is not None:
            sys.argv = [asked.module, *script]
            sys.path[0] = os.getcwd()
            runpy.run_module(asked.module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = script
            sys.path[0] = str(Path(script[0]).resolve().parent)
            os.environ[CHILD] = str(Path(script[0]).resolve())
            runpy.run_path(script[0], run_name="__main__")
    finally:
        print(report(), file=sys.stderr)
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the script with its arguments, whatever these look like."""
    for k, word in enumerate(arguments):
        if word == "-m":
            return arguments[: k + 2], arguments[k + 2 :]
        if not word.startswith("-"):
            return arguments[:k], arguments[k:]
    return arguments, []


_stock = multiprocessing.spawn.get_preparation_data


def preparation_data(name: str) -> dict[str, Any]:
    """What a spawned process does first: it is patched, then loads the script as Python's own would."""
    data = _stock(name)
    if CHILD in os.environ and "init_main_from_path" in data:
        del data["init_main_from_path"]
        data["init_main_from_name"] = "dpfast.dropin.child"
    return data


def report() -> str:
    """What ran fused in this process, in a line, and a table of what did not and why; with ``--report``, of all."""
    from dpfast.dropin import patch

    calls, table = patch.calls(), TABLE in os.environ
    fused = sum(call.ran == "fused" for call in calls)
    if not calls:
        return "dpfast: no privacy engine of Opacus was asked for make_private in this process"
    said = f"dpfast: {fused} of {len(calls)} calls of make_private ran fused"
    rows = [("where", "mode", "ran", "why"), *calls] if table else [call for call in calls if call.ran != "fused"]
    widths = [max(len(row[k]) for row in rows) for k in range(3)] if rows else []
    lines = [
        "  "
        + "  ".join([*(f"{entry:<{width}}" for entry, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip()
        for row in rows
    ]
    return "\n".join([said, *lines])
