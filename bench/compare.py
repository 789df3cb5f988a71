"""Which ops became slower since another commit: ``make bench-compare BASE=<commit>``.

The ops of bench/test_ops.py, this working tree's, are timed on the code of BASE (a temporary git worktree) and on the
working tree in turns, each time in a new process: base, now, now, base, and so on, so that what drifts hits both. An op
is slower where the p20 of its times now is above the p80 of the base's, over all rounds, and its median is above the
base's in every round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.measure import ROOT, percentiles, spread
from dpfast import tables

OPS = Path(__file__).with_name("test_ops.py")
SIDES = ("base", "now")
PARTS = np.linspace(0, 1, 101)  # of a process' times: a process with more of them does not count for more
RULE = (
    "Slower: the p20 now is above the base's p80, of the times of all rounds, and the median is above the base's in "
    "every round. Faster: the reverse."
)
# In the process that measures: it must be the side's code, however dpfast is installed.
PROBE = """
import importlib.util, json, os, sys
from pathlib import Path
root = Path(sys.argv[1]).resolve()
import dpfast
places = [dpfast.__file__]
if (root / "kernels").is_dir():
    places += importlib.util.find_spec("dpfast_kernels").submodule_search_locations
for place in places:
    if not Path(place).resolve().is_relative_to(root):
        sys.exit(f"{place} is not in {root}")
"""
LIBRARIES = """
import torch
devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
try:
    from dpfast import native
except ImportError:
    print("[]")
else:
    print(json.dumps([device for device in devices if native.available(device)]))
"""


class CompareError(Exception):
    """Why nothing can be compared, in a line."""


@dataclass
class Times:
    """Of one op on one side: seconds of each round, and why there are none."""

    rounds: list[list[float]] = field(default_factory=list)
    reason: str | None = None

    @property
    def pooled(self) -> list[float]:
        return [float(t) for times in self.rounds for t in np.quantile(times, PARTS)]


Found = dict[str, dict[str, Times]]  # op: side: times


# ---------------------------------------------------------------- the two sides


def commit_of(base: str) -> str:
    """The commit's hash.

    Raises:
        CompareError: there is no such commit, or no repository.
    """
    if not base:
        raise CompareError("name a commit to compare with: make bench-compare BASE=<commit>")
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}")
    if done.returncode:
        more = f": {done.stderr.strip().splitlines()[-1]}" if done.stderr.strip() else ""
        raise CompareError(f"BASE={base} is no commit of {ROOT}{more}")
    return done.stdout.strip()


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The commit's files in a folder that is gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="dpfast-base-"))
    tree = folder / "base"
    try:
        done = _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        if done.returncode:
            raise CompareError(f"git worktree add failed: {' '.join(done.stderr.split())}")
        yield tree
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave it behind
        _git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune")
        signal.signal(signal.SIGINT, before)


def environment(root: Path, threads: int = 1) -> dict[str, str]:
    """In which ``root``'s code is imported, with a native library of its own."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = [path for path in others if not Path(path).resolve().is_relative_to(ROOT)]
    path = os.pathsep.join([str(root), str(root / "kernels"), *kept])
    mine = {k: v for k, v in os.environ.items() if not k.startswith("DPFAST_LIBRARY_")}
    return mine | {"PYTHONPATH": path, "DPFAST_BENCH_THREADS": str(threads)}


def ready(root: Path, folder: Path) -> list[str]:
    """The devices that a side has a native library for; what is missing is built here, before anything is timed.

    Raises:
        CompareError: its code cannot be imported, or another one would be.
    """
    command = [sys.executable, "-c", PROBE + LIBRARIES, str(root)]
    done = subprocess.run(command, cwd=folder, env=environment(root), capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise CompareError(f"dpfast of {root} cannot be used: {said[-1] if said else done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(root: Path, folder: Path, asked: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every op on ``root``'s code, in a new process, and why others have none.

    Raises:
        CompareError: the process died.
    """
    times, report = folder / "times.json", folder / "report.xml"
    for path in (times, report):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "test_ops.py", "-q", "--rootdir", str(folder), "-c", "pytest.ini"]
    command += ["-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={times}", f"--junitxml={report}"]
    command += [f"--benchmark-max-time={asked.seconds}", "--benchmark-min-rounds=5"]
    command += ["-k", asked.select] if asked.select else []
    done = subprocess.run(command, cwd=folder, env=environment(root, asked.threads), capture_output=True, text=True)
    if done.returncode not in (0, 1) or not report.is_file():  # 1: some ops failed, which are rows
        last = " ".join((done.stdout + done.stderr).split())[-400:]
        raise CompareError(f"measuring {root} ended with status {done.returncode}: {last}")
    text = times.read_text() if times.is_file() else ""
    data = json.loads(text) if text else {"benchmarks": []}
    return {one["name"]: one["stats"]["data"] for one in data["benchmarks"]}, _failures(report)


def _failures(report: Path) -> dict[str, str]:
    """What pytest said of each test that gave no time."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error", "skipped"):
            if (told := case.find(kind)) is not None:
                found[case.get("name", "")] = " ".join((told.get("message") or kind).split())[:120]
    return found


def prepared(folder: Path) -> None:
    """The file of ops, alone: from its own place pytest would put the working tree first on the path."""
    shutil.copy(OPS, folder / "test_ops.py")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(PROBE.replace("sys.argv[1]", 'os.environ["PYTHONPATH"].split(os.pathsep)[0]'))


def compare(trees: Mapping[str, Path], asked: argparse.Namespace, found: Found) -> None:
    """Measure both sides in turns; ``found`` has all rounds that were finished."""
    with tempfile.TemporaryDirectory(prefix="dpfast-ops-") as name, tqdm(total=2 * asked.rounds) as bar:
        folder = Path(name)
        prepared(folder)
        for side, tree in trees.items():
            bar.set_description(f"{side}: its native library is built if it is not there yet (minutes)")
            libraries = ready(tree, folder)
            bar.write(f"{side}: native libraries for {', '.join(libraries) or 'no device'}", file=sys.stderr)
        for number in range(asked.rounds):
            this: dict[str, tuple[dict[str, list[float]], dict[str, str]]] = {}
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                bar.set_description(f"round {number + 1} of {asked.rounds}, {side}")
                this[side] = measured(trees[side], folder, asked)
                bar.update()
            add(found, this)


def add(found: Found, this: Mapping[str, tuple[Mapping[str, list[float]], Mapping[str, str]]]) -> None:
    """One round of both sides."""
    for side, (times, reasons) in this.items():
        for name in [*times, *reasons]:
            one = found.setdefault(name, {side: Times() for side in SIDES})[side]
            if name in times:
                one.rounds.append(times[name])
            else:
                one.reason = reasons[name]


# ---------------------------------------------------------------- what became slower


def verdict(base: Times, now: Times) -> str:
    """``"slower"``, ``"faster"``, or nothing: see RULE."""
    before, after = percentiles(base.pooled), percentiles(now.pooled)
    medians = [(float(np.median(b)), float(np.median(n))) for b, n in zip(base.rounds, now.rounds, strict=True)]
    if after["p20"] > before["p80"] and all(n > b for b, n in medians):
        return "slower"
    if after["p80"] < before["p20"] and all(n < b for b, n in medians):
        return "faster"
    return ""


def ratio(base: Times, now: Times) -> str:
    """Median of the rounds' ratios, and the range."""
    ratios = [float(np.median(n) / np.median(b)) for b, n in zip(base.rounds, now.rounds, strict=True)]
    return f"{np.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def table(found: Found) -> str:
    """Markdown: every op, then what changed. What neither side can run here is left out."""
    rows: list[list[str]] = []
    changed: dict[str, list[str]] = {"slower": [], "faster": []}
    for name, sides in found.items():
        base, now = sides["base"], sides["now"]
        if not base.rounds and not now.rounds and base.reason == now.reason:
            continue
        op = name.removeprefix("test_op[").removesuffix("]")
        cells = [op, *(_cell(sides[side]) for side in SIDES)]
        if len(base.rounds) != len(now.rounds) or not base.rounds:
            lacks = [side for side in SIDES if sides[side].reason is not None]
            rows.append([*cells, "", f"not in {' and '.join(lacks)}" if lacks else "not compared"])
            continue
        word = verdict(base, now)
        if word:
            changed[word].append(f"{op} {ratio(base, now)}")
        rows.append([*cells, ratio(base, now), word])
    header = ("op", "base, ms (p20–p80)", "now, ms (p20–p80)", "now / base (range of rounds)", "change")
    lines = [
        f"{word.capitalize()} by more than the spread: {', '.join(ops) or 'none'}." for word, ops in changed.items()
    ]
    return "\n\n".join([tables.markdown(header, rows), RULE, *lines])


def _cell(times: Times) -> str:
    return spread(percentiles(times.pooled), 1e3, ".3f") if times.rounds else times.reason or "not measured"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, whatever became slower; 2 if nothing could be compared; 130 after Ctrl-C, with the rounds that there are."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a commit")
    parser.add_argument("--rounds", type=int, default=4, help="processes of each side (default 4)")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each op in each process (default 0.25)")
    parser.add_argument(
        "--threads", type=int, default=1, help="(default 1: two that wait for each other time their neighbours)"
    )
    parser.add_argument("-k", dest="select", default="", help="only these ops, as pytest's -k has it")
    asked = parser.parse_args(arguments)
    found: Found = {}
    status = 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the worktree goes then too
    try:
        _check(asked)
        commit = commit_of(asked.base)
        with worktree(commit) as tree:
            compare({"base": tree, "now": ROOT}, asked, found)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if found:
        print(f"The working tree beside {asked.base} ({commit[:10]})\n\n{table(found)}")
    return status


def _check(asked: argparse.Namespace) -> None:
    for name, least in (("rounds", 1), ("threads", 1), ("seconds", 1e-6)):
        if not least <= getattr(asked, name) < math.inf:
            raise CompareError(f"--{name} {getattr(asked, name)}: must be at least {least:g}, and finite")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
