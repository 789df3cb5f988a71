"""bench/gpu.sh: one call that goes through all its steps, whatever becomes of each."""

import json
import os
import re
import subprocess
import time

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
    """With a Python that does nothing, and one that only fails: what matters most comes first, each leaves its line."""
    done = run(tmp_path, python)
    log, stages = ((tmp_path / name).read_text() for name in ("log.txt", "stages.txt"))
    assert done.returncode == status and done.stdout == log
    assert stages.count(f"status {status:3d}") == len(stages.splitlines()) == 6 and stages in log
    order = ["pip install", "dpfast doctor", "--suite models", "--suite kernels", "gpu-tests", "kernel-tests"]
    places = [stages.index(stage) for stage in order]
    assert places == sorted(places)
    assert "bench.split 8 " in stages and "kernel-tests -- tests/kernels -m not compiles and not gpu\n" in stages


def test_the_folders_of_the_tests_on_a_gpu():
    """All that have one are named, so that nothing else is collected."""
    named = re.search(r"gpu-tests -- \\\n *(.*) -m gpu", SCRIPT.read_text())[1].split()
    marked = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu\b", path.read_text()) and path.name != "test_gpu_script.py"
    ]
    assert marked and all(any(path.startswith(name) for name in named) for path in marked)
    assert all((ROOT / name).exists() for name in named)


def test_a_lost_gpu_costs_its_own_row(tmp_path):
    """A suite that ends with status 1 and an unfinished record is gone on with, until it is finished."""
    python = program(
        tmp_path,
        f"case $* in *kernels*--device*) ;; *) exit 0 ;; esac\n"
        f"record={tmp_path}/kernels-cuda-20260101-000000.json\n"
        f'echo "$@" >>{tmp_path}/calls.txt\n'
        f"if [ $(wc -l <{tmp_path}/calls.txt) -lt 3 ]; then\n"
        f"    echo '\"finished\": false' >$record; exit 1\n"
        f"fi\necho '\"finished\": true' >$record",
    )
    run(tmp_path, python)
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert ["--resume" in call for call in calls] == [False, True, True]


def test_cut_short_it_leaves_what_it_has(tmp_path):
    """Whoever stops the script stops the running stage with Ctrl-C, and finds the stages before it."""
    python = program(
        tmp_path,
        "case $* in *models*) ;; *) exit 0 ;; esac\n"
        "trap 'echo said at the end; exit 130' INT\necho begun\nfor k in $(seq 600); do sleep 0.1; done",
    )
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path)}
    script = subprocess.Popen(["bash", str(SCRIPT)], env=environment, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "log.txt"
    until = time.monotonic() + 60
    while not (log.exists() and "begun" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    script.terminate()
    said = script.communicate(timeout=60)[0]
    assert script.returncode == 1 and "said at the end" in said and "=== cut after" in said
    assert "doctor" in (tmp_path / "stages.txt").read_text() and "status   0" in said.partition("=== in all")[2]


def test_it_can_be_rehearsed(tmp_path):
    """The same stages, on a CPU, with small shapes and the interpreter."""
    python = program(tmp_path, 'echo "interpreted=$TRITON_INTERPRET"')
    said = run(tmp_path, python, REHEARSE="1").stdout
    assert said.count("interpreted=1") == 6
    assert "--suite models --device cpu" in said and said.count("--small") == 4  # twice each, as a title and at the end


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
    lines = 'limit=$3; echo "limit $limit after $1 $2"; exit 124'
    program(tmp_path, lines).rename(tmp_path / "timeout")
    short = tmp_path / "gpu.sh"
    for spent, limits in ((0, [20, 90, 130, 60, 50, 90]), (352, [20, 40, 40, 40, 40, 40]), (392, [])):
        script = SCRIPT.read_text().replace("SECONDS=0\n", f"SECONDS={spent}\n")
        script = script.replace('cd "$(dirname "$0")/.."', f'cd "{ROOT}"')
        short.write_text(script)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path)}
        environment |= {"WHEELS": str(tmp_path), "PYTHON": "true"}
        done = subprocess.run(["bash", str(short)], env=environment, capture_output=True, text=True, timeout=60)
        found = [
            int(limit)
            for limit in re.findall(r"^limit (\d+) after --signal=INT --kill-after=8$", done.stdout, re.MULTILINE)
        ]
        assert all(limit - 3 <= was <= limit for was, limit in zip(found, limits, strict=True)), (found, limits)
        assert done.returncode == 1 and len(re.findall("^status 124 ", done.stdout, re.MULTILINE)) == 6


@pytest.mark.parametrize(
    "kernels, models, said",
    [
        (True, False, ["kernels: finished before", "--suite models .* --resume --seconds 30"]),
        (False, None, ["--suite kernels .* --resume --seconds 20", "--suite models .*/[^ ]* --seconds 30"]),
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
