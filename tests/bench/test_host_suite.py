"""The host suite: its models, and the counts that stand beside the times."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="the bench needs the extra 'demo'")

from bench import measure, side_by_side
from bench.host_workloads import TARGETS, workloads
from bench.suites import host
from dpfast.__main__ import main

BOTH = ("--method", "nonprivate", "dpfast")
ITEM = "aten._local_scalar_dense"


@pytest.fixture(autouse=True)
def _on_one_thread(monkeypatch):
    monkeypatch.setattr("bench.command.THREADS", 1)
    monkeypatch.setattr(measure, "SLOW", float("inf"))


def bench(folder, *arguments):
    basics = ["--small", "--device", "cpu", "--seconds", "0.1", "--suite", "host", "--out", str(folder)]
    return main(["bench", *basics, *arguments])


def record_in(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def rows_of(folder, name="one"):
    return {row["method"]: row for row in record_in(folder)["suite"]["works"][name]["rows"]}


def line_of(text, start):
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line


def test_times_and_counts_side_by_side(tmp_path, capsys):
    assert bench(tmp_path, "--model", "deeptok", "--method", "nonprivate", "dpfast", "hooks") == 0
    record = record_in(tmp_path)
    assert record["finished"] and record["right"] and list(record["suite"]["works"]) == ["deeptok"]
    rows = rows_of(tmp_path, "deeptok")
    assert list(rows) == ["nonprivate", "dpfast", "hooks"]
    base, dpfast = rows["nonprivate"]["counts"], rows["dpfast"]
    for row in rows.values():
        counts = row["counts"]
        assert counts["operators"] == sum(counts["by_operator"].values())
        assert counts["waits"] == sum(one["times"] for one in counts["waits_at"])
        assert row["operator_ratio"] == counts["operators"] / base["operators"] and row["step_seconds"]["n"] >= 5
    assert base["waits"] == rows["hooks"]["counts"]["waits"] == 0
    assert base["by_operator"]["aten.addmm"] == 3 and base["by_operator"]["aten.native_layer_norm"] == 2
    assert dpfast["targets"]["waits"] == {"at_most": 0, "reached": dpfast["counts"]["waits"]}
    printed = capsys.readouterr().out
    cells = [cell.strip() for cell in line_of(printed, "| dpfast").split("|")]
    assert cells[1] == f"dpfast ({', '.join(dpfast['ways'])})"
    counted = dpfast["counts"]
    assert cells[4:7] == [str(counted["operators"]), f"{dpfast['operator_ratio']:.2f}", str(counted["waits"])]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_counts_repeat():
    work = workloads("cpu", small=True)["deepmlp"]
    entry = {"method": "dpfast", "variant": "plain"}
    first, second = (host._counts(work, entry, torch.device("cpu")) for _ in range(2))
    assert first == second and first["operators"] > 30


def test_what_was_timed_is_counted_when_it_goes_on(tmp_path, monkeypatch):
    """By the plan that was timed, and nothing is timed again."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(host, "count", stop)
        assert bench(tmp_path, "--model", "deeptok", *BOTH) == 130
    before = record_in(tmp_path)["suite"]["works"]["deeptok"]
    assert before["finished"] and not any("counts" in entry for entry in before["entries"])
    started, start = [], host.start_training

    def starting(work, method, variant, device, plan):
        started.append(plan)
        return start(work, method, variant, device, plan=plan)

    monkeypatch.setattr(host, "start_training", starting)
    monkeypatch.setattr(host, "measure_work", stop)
    assert bench(tmp_path, "--model", "deeptok", *BOTH, "--resume") == 0
    plain, ours = before["entries"]
    assert ours["plan"] and started == [None, ours["plan"]] and "plan" not in plain
    after = record_in(tmp_path)["suite"]["works"]["deeptok"]["entries"]
    assert [entry["seconds"] for entry in after] == [plain["seconds"], ours["seconds"]]
    assert all(entry["counts"]["operators"] for entry in after)


def test_what_cannot_be_counted_has_its_time_and_the_reason(tmp_path, capsys, monkeypatch):
    def full(step, device):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(host, "count", full)
    assert bench(tmp_path, "--model", "one", *BOTH) == 0
    row = rows_of(tmp_path)["dpfast"]
    assert "time_ratio" in row and "operator_ratio" not in row and row["targets"]["waits"]["reached"] is None
    printed = capsys.readouterr().out
    assert "- dpfast, not counted: out of memory: tried to allocate 80 GiB" in printed
    assert "target for dpfast: waits ≤ 0: not measured" in printed


def test_a_compiled_step_is_not_counted():
    compiled = {"method": "dpfast-compiled", "variant": "plain"}
    found = host._counts(workloads("cpu", small=True)["one"], compiled, torch.device("cpu"))
    assert list(found) == ["error"] and "compiled" in found["error"]


def test_where_it_waits_is_told():
    counts = {"waits": 3, "waits_at": [{"operator": ITEM, "place": "dpfast/a.py:1", "times": 2}]}
    counts["waits_at"].append({"operator": "aten.nonzero", "place": "dpfast/b.py:2", "times": 1})
    said = host._waits({"method": "dpfast", "counts": counts})
    assert said == [f"- dpfast waits: {ITEM} (dpfast/a.py:1, 2 times), aten.nonzero (dpfast/b.py:2)"]
    assert host._waits({"method": "dpfast", "counts": {"waits": 0, "waits_at": []}}) == []
    assert host._waits({"method": "dpfast"}) == []


def test_dpfast_wrong_is_not_timed_nor_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.check.SCALE", 1e-12)  # the change of the parameters is lost in their rounding
    assert bench(tmp_path, "--model", "one", *BOTH) == 1
    row = rows_of(tmp_path)["dpfast"]
    assert row["error"].startswith("wrong") and not {"counts", "time_ratio"} & set(row)


def test_the_ratio_of_operators_and_the_targets():
    entry = {"variant": "plain", "verdicts": [], "error": None}
    entries = [
        entry | {"method": "nonprivate", "counts": {"operators": 10, "waits": 0}},
        entry | {"method": "dpfast", "counts": {"operators": 25, "waits": 3}},
    ]
    targets = {"operators": 1.8, "waits": 0, "time": 1.5}
    rows = side_by_side.summary({"entries": entries, "targets": targets, "batch_size": 4, "tokens": 0}, {})
    reached = {what: target["reached"] for what, target in rows[1]["targets"].items()}
    assert rows[1]["operator_ratio"] == 2.5 and reached == {"operators": 2.5, "waits": 3, "time": None}


def test_the_models_are_of_many_tiny_layers():
    works = workloads("cpu")
    assert list(works) == list(workloads("cuda")) == list(workloads("cpu", small=True))
    assert set(TARGETS) <= set(works) and all(work.targets["waits"] == 0 for work in works.values())
    linears = {"deepmlp": 101, "deeptok": 51, "one": 1, "mnist": 2, "gpt24": 97, "lora16": 16 * 4 * 3 + 1}
    for name, work in works.items():
        model = work.model()
        assert sum(isinstance(module, nn.Linear) for module in model.modules()) == linears[name]
        x, y = work.batch(2)
        assert model(x).shape[:-1] == y.shape
    trained = {name for name, p in works["lora16"].model().named_parameters() if p.requires_grad}
    assert len(trained) == 16 * 4 * 2 and all(name.split(".")[-2] in ("down", "up") for name in trained)
