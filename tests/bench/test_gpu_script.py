"""bench/gpu.sh: one call that goes through all its steps, whatever becomes of each."""

import os
import subprocess

import pytest

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")

from bench.measure import ROOT
from bench.workloads import workloads


def test_it_names_models_that_there_are():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    names = script.partition("--model ")[2].splitlines()[0].split()
    assert sorted(names) == sorted(workloads("cuda"))


@pytest.mark.parametrize("python, status", [("true", 0), ("false", 1)])
def test_the_script_goes_on_after_a_failure(python, status, tmp_path):
    """With a Python that does nothing, and one that only fails."""
    path = ROOT / "bench" / "gpu.sh"
    environment = {**os.environ, "PYTHON": python, "OUT": str(tmp_path), "WHEELS": str(tmp_path)}
    done = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, timeout=60)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == status and done.stdout == log
    assert log.count(f"status {status:3d}") == 6
    order = ["pip install", "dpfast doctor", "-m gpu", "tests/kernels", "--suite kernels", "--suite models"]
    places = [log.index(step) for step in order]
    assert places == sorted(places)
