"""``python -m dpfast bench``: bad requests, records that are whole, interruptions that lose nothing."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")

from bench import flashdp, measure, memory, side_by_side
from bench.methods import METHODS
from bench.workloads import workloads
from dpfast.__main__ import main

BASICS = ["--small", "--device", "cpu", "--seconds", "0.1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No process of its own for memory, which has a test of its own; no long roofline."""
    monkeypatch.setattr(side_by_side, "peak", lambda job, device: {"growth_bytes": 1 << 20})
    roof = {"flops_per_second": 1e11, "bytes_per_second": 1e10, "dtype": "float32"}
    for suite in ("models", "layers"):
        monkeypatch.setattr(f"bench.suites.{suite}.peaks", lambda device, dtype: roof)


def bench(folder, *arguments):
    return main(["bench", *BASICS, "--out", str(folder), *arguments])


def record_in(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--suite", "modles"], "--suite 'modles' is not one of kernels, layers, models"),
        (["--model", "gpt3"], "--model 'gpt3' is not one of mlp, "),
        (["--method", "nonprivate", "dp"], "--method 'dp' is not one of nonprivate, "),
        (["--method", "dpfast"], "nonprivate must be one of them"),
        (["--device", "tpu"], "--device 'tpu' is not one of cpu, cuda"),
        (["--seconds", "0"], "must be more than 0"),
        (["--suite", "models", "--resume"], "no unfinished record models-cpu-*.json in "),
        (["--report", "nowhere.json"], "nowhere.json is no record"),
    ],
)
def test_a_bad_request_is_one_line_and_status_2(arguments, said, tmp_path, capsys):
    assert bench(tmp_path, *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_gpu(tmp_path, capsys):
    assert bench(tmp_path, "--device", "cuda") == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_an_absent_peer_is_named_or_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastDP" else True)
    assert bench(tmp_path, "--method", "nonprivate", "fastdp") == 2
    assert "no module named fastDP" in capsys.readouterr().err


def test_the_models_suite(tmp_path, capsys):
    models = ("mlp", "gpt2")
    assert bench(tmp_path, "--suite", "models", "--model", *models) == 0
    record = record_in(tmp_path)
    assert record["finished"] and record["machine"]["versions"]["torch"] and record["device"]["name"] == "cpu"
    assert list(record["suite"]["works"]) == list(models)
    for part in record["suite"]["works"].values():
        rows = {(row["method"], row["variant"]): row for row in part["rows"]}
        assert {method for method, _ in rows} >= {"nonprivate", "dpfast", "hooks", "functorch", "ghost", "flashdp"}
        assert rows["nonprivate", "plain"]["time_ratio"]["median"] == 1
        dpfast = rows["dpfast", "plain"]
        assert dpfast["verdicts"][-1]["error"] < 1e-3 and dpfast["samples_per_second"] > 0 and dpfast["of_roofline"] > 0
        assert dpfast["memory_ratio"] == 1 and part["flops"] > 0
    rows = {row["method"]: row for row in record["suite"]["works"]["gpt2"]["rows"]}
    assert rows["dpfast"]["variant"] == "plain" and rows["hooks"]["variant"] == "expanded"
    assert rows["ghost"]["variant"] == "untied" and rows["dpfast"]["tokens_per_second"] > 0
    printed = capsys.readouterr().out
    assert "Opacus ghost, as written: NotImplementedError" in printed and "a copy 10 GB/s" in printed
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".json", ".md", ".png"}


def test_the_layers_suite(tmp_path, capsys):
    assert bench(tmp_path, "--suite", "layers", "--method", "nonprivate", "dpfast") == 0
    suite = record_in(tmp_path)["suite"]
    assert {"linear", "embedding", "LayerNorm", "attention", "convolution", "GroupNorm"} <= set(suite["kinds"])
    ways = [part["way"] for sweep in suite["sweeps"].values() for part in sweep["points"].values()]
    assert len(ways) == 4 and set(ways) <= {"ghost", "instantiate", "norm-GEMM"}
    assert ways[0] in capsys.readouterr().out
    assert sorted(path.name.rpartition("-")[2] for path in tmp_path.glob("*.png")) == ["growth.png", "ratios.png"]


def test_a_wrong_method_gets_no_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flashdp, "_factor", lambda square, bound: torch.ones_like(square))
    assert bench(tmp_path, "--suite", "models", "--model", "mlp", "--method", "nonprivate", "dpfast", "flashdp") == 0
    rows = {row["method"]: row for row in record_in(tmp_path)["suite"]["works"]["mlp"]["rows"]}
    assert rows["flashdp"]["error"].startswith("wrong: relative error")
    assert "time_ratio" not in rows["flashdp"] and "time_ratio" in rows["dpfast"]
    assert rows["flashdp"]["error"] in capsys.readouterr().out


def test_dpfast_wrong_is_status_1(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.check.SCALE", 1e-12)  # the change of the parameters is lost in their rounding
    assert bench(tmp_path, "--suite", "models", "--model", "mlp", "--method", "nonprivate", "dpfast") == 1
    rows = {row["method"]: row for row in record_in(tmp_path)["suite"]["works"]["mlp"]["rows"]}
    assert "time_ratio" not in rows["dpfast"] and "wrong" in rows["dpfast"]["error"]


@pytest.mark.parametrize("when", ["memory", "beside the others"])
def test_out_of_memory_is_a_row(when, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    if when == "memory":
        answer = {"error": "out of memory: killed by the system"}
        peak = lambda job, device: answer if job["method"] == "flashdp" else {"growth_bytes": 1}  # noqa: E731
        monkeypatch.setattr(side_by_side, "peak", peak)
    else:
        attach, calls = flashdp.clip_each_layer, []

        def second_time(*given, **settings):
            calls.append(given)
            return attach(*given, **settings) if len(calls) == 1 else full()

        monkeypatch.setattr(flashdp, "clip_each_layer", second_time)
    assert bench(tmp_path, "--suite", "models", "--model", "mlp", "--method", "nonprivate", "dpfast", "flashdp") == 0
    rows = {row["method"]: row for row in record_in(tmp_path)["suite"]["works"]["mlp"]["rows"]}
    assert "out of memory" in rows["flashdp"]["error"] and "time_ratio" not in rows["flashdp"]
    assert "time_ratio" in rows["dpfast"] and "out of memory" in capsys.readouterr().out


def test_interrupted_and_resumed(tmp_path, monkeypatch, capsys):
    """Nothing that was measured is lost, or measured again."""
    arguments = ["--suite", "models", "--model", "mlp", "resnet18", "--method", "nonprivate", "dpfast", "flashdp"]
    one_round, rounds, checked = measure.one_round, [], []
    find_variant = side_by_side.find_variant

    def interrupted(calls, order, device):
        if len(rounds) == 3:
            raise KeyboardInterrupt
        rounds.append(order)
        return one_round(calls, order, device)

    def counted(work, method, device):
        checked.append((work.name, method.name))
        return find_variant(work, method, device)

    monkeypatch.setattr(measure, "SLOW", float("inf"))  # all in every round
    monkeypatch.setattr(measure, "one_round", interrupted)
    monkeypatch.setattr(side_by_side, "find_variant", counted)
    assert bench(tmp_path, *arguments) == 130
    assert "--resume goes on" in capsys.readouterr().err
    before = record_in(tmp_path)
    assert not before["finished"] and list(before["suite"]["works"]) == ["mlp"]
    kept = {entry["method"]: entry["seconds"] for entry in before["suite"]["works"]["mlp"]["entries"]}
    assert all(len(seconds) == 3 for seconds in kept.values())

    monkeypatch.setattr(measure, "one_round", one_round)
    assert bench(tmp_path, *arguments, "--resume") == 0
    after = record_in(tmp_path)
    assert after["finished"] and list(after["suite"]["works"]) == ["mlp", "resnet18"]
    for entry in after["suite"]["works"]["mlp"]["entries"]:
        assert entry["seconds"].items() >= kept[entry["method"]].items() and len(entry["seconds"]) >= 5
    assert checked == [(work, method) for work in ("mlp", "resnet18") for method in ("dpfast", "flashdp")]
    assert bench(tmp_path, *arguments, "--resume") == 2


def test_other_runs_are_not_resumed(tmp_path, monkeypatch, capsys):
    arguments = ["--suite", "models", "--model", "mlp", "--method", "nonprivate", "dpfast"]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "one_round", stop)
    assert bench(tmp_path, *arguments) == 130
    capsys.readouterr()
    assert bench(tmp_path, *arguments[:-1], "hooks", "--resume") == 2
    assert "of another configuration" in capsys.readouterr().err
    monkeypatch.setattr("bench.record._git", lambda *_: "0" * 40)
    assert bench(tmp_path, *arguments, "--resume") == 2
    assert "of another commit" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 8, 9, 100, 5000])
@pytest.mark.parametrize("start", [1, 8, 300])
def test_the_largest_batch(limit, start):
    found = side_by_side.largest(lambda size: size <= limit, start)
    assert found <= limit and found >= limit - max(1, limit // 4)


def test_the_largest_batch_of_every_method(monkeypatch):
    work = replace(workloads("cpu", small=True)["mlp"], largest_batch=True)
    part = {"entries": [side_by_side._base(name, "plain") for name in ("nonprivate", "hooks", "flashdp")]}
    each = {"nonprivate": 1, "hooks": 40}
    mib = 1 << 20
    monkeypatch.setattr(side_by_side, "peak", lambda job, _: {"growth_bytes": each[job["method"]] * job["size"] * mib})
    side_by_side._largest_batches(part, work, torch.device("cpu"), side_by_side.NAMED, True, lambda: None)
    found = {entry["method"]: entry.get("largest_batch") for entry in part["entries"]}
    limit = part["memory_limit_bytes"] // mib
    assert 0.8 * limit <= found["nonprivate"] <= limit and found["hooks"] == limit // 40 and found["flashdp"] is None


def test_every_method_is_checked_before_it_is_timed():
    assert all(method.private or method.name.startswith("nonprivate") for method in METHODS.values())
    assert memory.ratio({"growth_bytes": 3}, {"growth_bytes": 2}) == 1.5
