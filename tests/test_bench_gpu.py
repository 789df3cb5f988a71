"""The benches for a GPU, as far as a CPU goes: they run, their records are whole, and what is wrong gets no figure."""

import json
import os
import subprocess

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")

from bench import kernels, measure, models_gpu
from dpfast import planner
from dpfast.rates import BUILT_IN

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Nothing is measured for the planner, and nothing written for later runs."""
    monkeypatch.setattr(planner, "rates_of", lambda device, *_: BUILT_IN["cpu"])


def record_in(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_kernels(tmp_path, capsys):
    assert kernels.main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    record = record_in(tmp_path)
    assert record["machine"]["versions"]["torch"] and record["device"]["name"] == "cpu"
    names = {figure["name"] for figure in record["figures"]}
    assert {"copy", "ghost norm", "clipped weight gradient"} <= names
    for figure in record["figures"]:
        assert figure["rate"]["p20"] <= figure["rate"]["median"] <= figure["rate"]["p80"]
        assert figure["share"]["n"] >= kernels.MIN_ROUNDS and figure["met"] is None
    for row in record["planner"]:
        assert row["predicted_seconds"] > 0 and row["seconds"]["median"] > 0 and row["over_fastest"] >= 1
    shapes = kernels.SIZES["cpu"].plans
    assert sum(row["chosen"] for row in record["planner"]) == len(shapes)
    assert sum(row["fastest"] for row in record["planner"]) == len(shapes)
    printed = capsys.readouterr().out
    assert "predicted / measured" in printed and f"of {len(shapes)} weights" in printed


def raises():
    raise RuntimeError("out of registers")


def one_and(call):
    x = torch.ones(8)
    error = lambda got: kernels.relative_error([got], [x])  # noqa: E731
    cases = [kernels.Case("copy", 64, lambda: x.clone()), kernels.Case("ours", 64, lambda: call(x), error, 0.8)]
    return kernels.CaseSet("8", "TB/s", lambda: cases)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda x: 1.01 * x, "wrong: relative error 1.0e-02"),
        (lambda x: torch.nan * x, "wrong: relative error nan"),
        (lambda x: raises(), "RuntimeError: out of registers"),
    ],
)
def test_what_is_wrong_gets_no_figure(call, said):
    bad, copy = kernels.measured(one_and(call), CPU, 0.01)
    assert (bad["name"], bad["error"]) == ("ours", said) and "rate" not in bad
    assert copy["name"] == "copy" and copy["share"]["median"] == 1
    assert said in kernels.figure_row(bad)


def test_what_is_right_gets_one():
    ours = kernels.measured(one_and(torch.clone), CPU, 0.01)[1]
    assert ours["name"] == "ours" and ours["share"]["median"] > 0 and ours["over"] == "copy"


def test_a_set_that_cannot_be_made_is_a_row():
    (row,) = kernels.measured(kernels.CaseSet("8", "TB/s", raises), CPU, 0.01)
    assert row["error"] == "RuntimeError: out of registers"


@pytest.mark.parametrize("name", models_gpu.works(small=True))
def test_models(name, tmp_path, capsys):
    arguments = ["--small", "--device", "cpu", "--seconds", "0.1", "--only", name, "--out", str(tmp_path)]
    assert models_gpu.main(arguments) == 0
    record = record_in(tmp_path)
    (work,) = record["works"]
    assert work["name"] == name and work["clipped_sum_error"] < models_gpu.TOLERANCE
    by_method = {row["method"]: row for row in work["rows"]}
    assert list(by_method) == ["nonprivate", "dpfast", "ghost"]
    for method in ("nonprivate", "dpfast"):
        assert by_method[method]["step_seconds"]["median"] > 0 and by_method[method]["error"] is None
        *longest, (name, launches, milliseconds) = by_method[method]["kernels"]
        assert name == "all" and launches >= len(longest) and milliseconds >= longest[0][2]
    assert by_method["nonprivate"]["time_ratio"]["median"] == 1
    assert by_method["dpfast"]["targets"]["time"]["reached"] > 0
    printed = capsys.readouterr().out
    assert "time ≤ " in printed and "Opacus ghost" in printed


def test_a_wrong_clipped_sum_gets_no_figure(monkeypatch):
    monkeypatch.setattr(models_gpu, "clipped_sum_error", lambda *_: 0.1)
    monkeypatch.setattr(models_gpu, "measure_memory", lambda work, entry, device: None)
    work = models_gpu.works(small=True)["gpt2-medium"]
    monkeypatch.setattr(models_gpu, "measure_time", lambda *_: None)
    row = models_gpu.measured(work, CPU, 0.1)["rows"][1]
    assert row["method"] == "dpfast" and "wrong" in row["error"] and "wrong" in models_gpu.cells(row)[1]


def test_the_last_one_makes_room(monkeypatch):
    """Who finds no memory beside the others is left out, and the others are timed."""
    started = []

    def start_step(method, *_):
        started.append(method)
        return raises if method == "ghost" else lambda: None

    monkeypatch.setattr(models_gpu, "start_step", start_step)
    entries = [models_gpu.Entry(method) for method in ("nonprivate", "dpfast", "ghost")]
    models_gpu.measure_time(models_gpu.works(small=True)["gpt2-medium"], entries, CPU, 0.01)
    assert entries[2].error == "beside the others: RuntimeError: out of registers" and not entries[2].seconds
    assert entries[0].seconds and entries[1].seconds and entries[1].error is None


@pytest.mark.parametrize("python, status", [("true", 0), ("false", 1)])
def test_the_script_goes_on_after_a_failure(python, status, tmp_path):
    """With a Python that does nothing, and one that only fails."""
    path = measure.ROOT / "bench" / "gpu.sh"
    environment = {**os.environ, "PYTHON": python, "OUT": str(tmp_path), "WHEELS": str(tmp_path)}
    done = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, timeout=60)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == status and done.stdout == log
    assert log.count(f"status {status:3d}") == 7
    order = ["pip install", "dpfast doctor", "-m gpu", "tests/kernels", "bench.kernels", "native_gpu", "models_gpu"]
    places = [log.index(step) for step in order]
    assert places == sorted(places)
