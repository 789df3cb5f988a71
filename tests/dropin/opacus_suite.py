"""Opacus' own tests as a judge: ``python -m tests.dropin.opacus_suite``, or ``make opacus-tests``.

They come with Opacus' wheel, and run in several ways, each in a process of its own:

    stock     Opacus as it is
    samplers  after ``dpfast.register()``
    patched   after ``dpfast.patch_opacus()``
    engine    ``dpfast.PrivacyEngine`` in the place of Opacus', in the mode that a test asks for, or Opacus' default

What fails is listed in ``docs/migrating-from-opacus.md`` with its reason, and nowhere else. A failure that is not
listed is a fault, and so is a listed test that does not fail.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import opacus
import pytest
import torch

from tests.dropin.opacus_plugin import WAYS, Plugin

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-opacus.md"
TESTS = Path(opacus.__file__).parent / "tests"
OUTCOMES, PRINTED = "outcomes.json", "printed"  # files of a run
Outcomes = Mapping[str, Sequence[str]]  # of each test: what came of it, and what was raised


@dataclass(frozen=True)
class Known:
    """A row of the page: tests (a pattern of their names) that fail in some ways, and why."""

    tests: str
    ways: tuple[str, ...]
    reason: str


def known() -> list[Known]:
    """The rows of the page's table of tests that fail.

    Raises:
        ValueError: a row without a reason, or of a way that there is not.
    """
    rows = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "_test.py" not in cells[0] or not line.startswith("| `"):
            continue
        row = Known(cells[0].strip("`"), tuple(way.strip() for way in cells[1].split(",")), cells[2])
        if not row.reason or not set(row.ways) <= {*WAYS}:
            raise ValueError(f"{PAGE.name}: a row of tests needs ways of {', '.join(WAYS)} and a reason: {line}")
        rows.append(row)
    return rows


def judge(way: str, outcomes: Outcomes, rows: Sequence[Known], whole: bool = True) -> list[str]:
    """What is wrong with the ``outcomes``, a line each: failures without a row, and rows without failures.

    A run that is not of the ``whole`` suite need not have the tests of every row.
    """
    mine = [row for row in rows if way in row.ways]
    wrong = []
    for name, (outcome, raised) in outcomes.items():
        listed = any(fnmatch.fnmatchcase(name, row.tests) for row in mine)
        if outcome == "failed" and not listed:
            wrong.append(f"{way}: {name} failed and is not listed: {raised}")
        if outcome != "failed" and listed:
            wrong.append(f"{way}: {name} is listed as failing and has {outcome}")
    for row in mine:
        if whole and not fnmatch.filter(outcomes, row.tests):
            wrong.append(f"{way}: {row.tests} is listed as failing, and there is no such test")
    return wrong


def outcomes_of(way: str, tests: Sequence[str] = (), examples: int = 100) -> Outcomes:
    """Run Opacus' tests, all or those given by file or node id, with so many examples of each that Hypothesis draws.

    Raises:
        RuntimeError: pytest did not come to its end; with what it printed.
    """
    if not TESTS.is_dir():
        raise RuntimeError(f"there is no {TESTS}: this build of Opacus comes without its tests")
    with tempfile.TemporaryDirectory() as folder:
        # A fork has imported torch and Opacus already; but CUDA does not work in one of a process that has used it.
        start = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
        child = start.Process(target=_run, args=(folder, way, [str(TESTS / test) for test in tests or [""]], examples))
        child.start()
        child.join()
        written = Path(folder) / OUTCOMES
        if not written.exists():
            printed = (Path(folder) / PRINTED).read_text()[-5000:]
            raise RuntimeError(f"pytest ended with {child.exitcode} on {', '.join(tests) or 'all tests'}: {printed}")
        return json.loads(written.read_text())


def _run(folder: str, way: str, tests: list[str], examples: int) -> None:
    """The process of a way, in a ``folder`` of its own."""
    os.chdir(folder)
    with open(PRINTED, "w") as sys.stdout:
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        sys.stderr = sys.stdout
        plugin = Plugin(way, examples)
        options = ["-q", "-c", os.devnull, "--rootdir", str(TESTS.parents[1]), "-o", "python_files=*_test.py"]
        options += ["-p", "no:cacheprovider", "-W", "ignore", "--continue-on-collection-errors"]
        code = pytest.main([*options, *tests], plugins=[plugin])
        if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            Path(OUTCOMES).write_text(json.dumps(plugin.outcomes))
    sys.exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dropin.opacus_suite", description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="files or node ids below opacus/tests; all if none is given")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--examples", type=int, default=100, help="of each test that Hypothesis draws examples for")
    asked = parser.parse_args()
    rows, wrong = known(), []
    for way in asked.way:
        outcomes = outcomes_of(way, asked.tests, asked.examples)
        counts = Counter(outcome for outcome, _ in outcomes.values())
        print(f"{way}: {', '.join(f'{counts[what]} {what}' for what in ('passed', 'failed', 'skipped'))}", flush=True)
        wrong += judge(way, outcomes, rows, whole=not asked.tests)
    print("\n".join(wrong) or "Nothing fails that is not listed, and all that is listed fails.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
