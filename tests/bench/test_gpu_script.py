"""bench/gpu.sh: one call that goes through all its steps, whatever becomes of each."""

import json
import os
import re
import subprocess

import pytest

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")

from bench.measure import ROOT
from bench.workloads import workloads

SCRIPT = ROOT / "bench" / "gpu.sh"


def run(folder, python, cwd=None, **given):
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(folder), "WHEELS": str(folder), **given}
    return subprocess.run(["bash", str(SCRIPT)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def program(folder, lines):
    """A stand-in for Python."""
    path = folder / "python"
    path.write_text(f"#!/usr/bin/env bash\n{lines}\n")
    path.chmod(0o755)
    return path


def test_it_names_models_that_there_are():
    names = SCRIPT.read_text().partition("--model ")[2].splitlines()[0].split()
    assert sorted(names) == sorted(workloads("cuda"))
    last = [workloads("cuda")[name] for name in names[4:]]
    assert not any(work.targets or work.largest_batch for work in last)  # who is out of time loses these


@pytest.mark.parametrize("python, status", [("true", 0), ("false", 1)])
def test_the_script_goes_on_after_a_failure(python, status, tmp_path):
    """With a Python that does nothing, and one that only fails."""
    done = run(tmp_path, python)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == status and done.stdout == log
    assert log.count(f"status {status:3d}") == 6
    order = ["pip install", "dpfast doctor", "-m gpu", "tests/kernels", "--suite kernels", "--suite models"]
    places = [log.index(step) for step in order]
    assert places == sorted(places)
    assert "pytest tests/kernels -q -m not compiles and not gpu" in log


def test_what_the_steps_see(tmp_path):
    """Absolute paths, ours before the caller's; and which commit it is."""
    python = program(tmp_path, 'echo "path=$PYTHONPATH commit=$COMMIT"')
    done = run(tmp_path, python, cwd=tmp_path, PYTHONPATH="/one:two", COMMIT="abc")
    seen = set(re.findall("path=.*", done.stdout))
    assert seen == {f"path={ROOT}:{ROOT}/kernels:/one:{tmp_path}/two commit=abc"}
    seen = set(re.findall("path=.*", run(tmp_path, python, PYTHONPATH="", COMMIT="").stdout))
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = commit if (ROOT / ".git").exists() else ""
    assert seen == {f"path={ROOT}:{ROOT}/kernels commit={commit}"}


def test_all_steps_share_the_time(tmp_path, monkeypatch):
    """A clock that stands in for timeout: each step takes its whole limit, and the grace."""
    lines = 'limit=$2; echo "limit $limit after $1"; exit 124'
    program(tmp_path, lines).rename(tmp_path / "timeout")
    short = tmp_path / "gpu.sh"
    for spent, limits in ((0, [20, 110, 70, 80, 80, 165]), (500, [20, 30, 30, 30, 30, 30]), (530, [])):
        script = SCRIPT.read_text().replace("SECONDS=0\n", f"SECONDS={spent}\n")
        script = script.replace('cd "$(dirname "$0")/.."', f'cd "{ROOT}"')
        short.write_text(script)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path)}
        environment |= {"WHEELS": str(tmp_path), "PYTHON": "true"}
        done = subprocess.run(["bash", str(short)], env=environment, capture_output=True, text=True, timeout=60)
        found = [int(limit) for limit in re.findall(r"^limit (\d+) after --kill-after=5$", done.stdout, re.MULTILINE)]
        assert all(limit - 3 <= was <= limit for was, limit in zip(found, limits, strict=True)), (found, limits)
        assert done.returncode == 1 and len(re.findall("^status 124 ", done.stdout, re.MULTILINE)) == 6


@pytest.mark.parametrize(
    "kernels, models, said",
    [
        (True, False, ["kernels: finished before", "--suite models .* --resume --seconds 40"]),
        (False, None, ["--suite kernels .* --resume --seconds 25", "--suite models .*/[^ ]* --seconds 40"]),
    ],
)
def test_resumed(kernels, models, said, tmp_path):
    """The suites alone, each of them as far as it is to be gone on with; the log before is kept."""
    for name, finished in (("kernels", kernels), ("models", models)):
        if finished is not None:
            (tmp_path / f"{name}-cuda-20260101-000000.json").write_text(json.dumps({"finished": finished}, indent=1))
    (tmp_path / "log.txt").write_text("before\n")
    done = run(tmp_path, "true", RESUME="1")
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0 and log == "before\n" + done.stdout
    assert "dpfast doctor" not in log and "-m pytest" not in log and "pip install" in log
    for words in said:
        assert re.search(f"=== .*{words}", log)
