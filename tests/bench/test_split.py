"""bench/split.py and tests/share.py: tests in several processes, of which one may die."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bench.measure import ROOT

TESTS = """
import os, signal, time
import pytest

@pytest.mark.parametrize("n", range(6))
def test_one(n):
    if n == {dies}:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == {hangs}:
        time.sleep(60)
    assert n != {fails}
"""


def started(folder, processes=2, dies=9, hangs=9, fails=9, more=()):
    (folder / "test_it.py").write_text(TESTS.format(dies=dies, hangs=hangs, fails=fails))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.split", str(processes), str(folder), "it", "--", str(folder / "test_it.py")]
    command += [f"--rootdir={folder}", *more]
    # Ctrl-C does what it does in a terminal, though the tests may run in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def passed(folder):
    return sum((folder / f"it-{k}.txt").read_text().count(".") for k in range(2))


def test_every_test_is_somebodys(tmp_path):
    run = started(tmp_path)
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 0 and said.count("3 passed") == 2


def test_a_test_that_kills_its_process_fails_alone(tmp_path):
    """The next process goes on behind it; the other share has a failure of its own, with its reason."""
    run = started(tmp_path, dies=2, fails=3)
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 1
    assert "DIED (-9): test_it.py::test_one[2]" in said and "1 passed" in said  # 0 went with its process's last words
    assert "FAILED" in said and "assert 3 != 3" in said and "1 failed, 2 passed" in said


def test_out_of_time_with_reasons(tmp_path):
    """Ctrl-C, as timeout sends it: what failed until then has its reason, and everything ends."""
    run = started(tmp_path, processes=1, fails=0, hangs=1)
    until = time.monotonic() + 200
    while "F" not in ((tmp_path / "it-0.txt").read_text() if (tmp_path / "it-0.txt").exists() else ""):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    for process in [*map(int, children), run.pid]:
        os.kill(process, signal.SIGINT)
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 130 and "assert 0 != 0" in said and "KeyboardInterrupt" in said


def test_a_bad_argument_is_tried_once(tmp_path):
    run = started(tmp_path, processes=1, more=["--no-such-option"])
    run.communicate(timeout=200)
    assert run.returncode == 1


def test_a_lost_gpu_ends_its_process(monkeypatch, tmp_path):
    """What an illegal address leaves behind: every later test of the process would fail."""
    import torch

    from tests import share

    class Item:
        nodeid = "test_it.py::test_bad"

        class config:
            getoption = staticmethod(lambda name: tmp_path / "begun")

    def lost():
        raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    steps = share.pytest_runtest_protocol(Item(), None)
    next(steps)
    assert (tmp_path / "begun").read_text() == "test_it.py::test_bad\n"
    with pytest.raises(pytest.exit.Exception, match="test_bad has left the GPU unusable") as ended:
        steps.send(None)
    assert ended.value.returncode == share.LOST
