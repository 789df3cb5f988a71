"""``python -m dpfast bench``: bad requests, records that are whole, interruptions that lose nothing."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")

from bench import ascent, distributed, flashdp, host_workloads, measure, memory, side_by_side
from bench.methods import METHODS
from bench.record import Record
from bench.suites import host, kernels, layers, models
from bench.workloads import workloads
from dpfast.__main__ import main

BASICS = ["--small", "--device", "cpu", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """One thread, few rounds; no process of its own for memory, which has a test of its own; no long roofline."""
    monkeypatch.setattr("bench.command.THREADS", 1)
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.01)
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
        (["--seconds", "inf"], "must be more than 0, and finite"),
        (["--seconds", "nan"], "must be more than 0, and finite"),
        (["--suite", "kernels", "--method", "nonprivate"], "--method says nothing to kernels: it is for layers and"),
        (["--suite", "kernels", "layers", "--model", "mlp"], "--model says nothing to kernels and layers: it is for"),
        (["--suite", "host", "--model", "mlp", "one"], "--model 'mlp' is of no suite asked for: host"),
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


def test_without_a_gpu_its_models_are_listed(tmp_path, capsys):
    assert bench(tmp_path, "--device", "cuda", "--list") == 0
    out, err = capsys.readouterr()
    known = {"models": workloads, "host": host_workloads.workloads}
    listed = [(name, suite) for suite, its in known.items() for name in its("cuda", small=True)]
    assert [tuple(line.split()[:2]) for line in out.splitlines()] == listed and not err


@pytest.mark.parametrize("name", ["psutil", "tqdm", "matplotlib"])
def test_what_is_not_installed_is_named(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert bench(tmp_path, "--list") == 2
    out, err = capsys.readouterr()
    assert err == f"error: bench needs {name}: pip install 'dpfast[demo]'\n" and not out


@pytest.mark.parametrize("out", ["file", "file/folder", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written(out, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert bench(tmp_path / out, "--suite", "models", "--model", "mlp") == 2
    said, err = capsys.readouterr()
    assert err.startswith(f"error: --out {tmp_path / out}: ") and err.count("\n") == 1 and not said
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


WHOLE = {
    "machine": {},
    "device": {},
    "configuration": {"command": "it", "suite": "models"},
    "finished": True,
    "suite": {"works": [1]},
}


@pytest.mark.parametrize(
    "data, said",
    [
        ([], "is no record: a list"),
        ({}, "it has no 'machine'"),
        ({**WHOLE, "suite": []}, "it has no 'suite'"),
        ({**WHOLE, "configuration": {"command": "it"}}, "its configuration has no 'suite'"),
        ({**WHOLE, "configuration": {"command": "it", "suite": "others"}}, "is of the suite 'others', which has no"),
        ({**WHOLE, "configuration": {"command": "it", "suite": "json"}}, "is of the suite 'json', which has no"),
        (WHOLE, "is no record of the suite 'models': "),
    ],
)
def test_a_report_of_what_is_no_record(data, said, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    assert bench(tmp_path, "--report", str(path)) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {path} ") and said in err and err.count("\n") == 1 and not out
    assert list(tmp_path.iterdir()) == [path]


def test_reports_of_what_the_command_does_not_measure(tmp_path, capsys):
    figure = {"median": 1.25, "p20": 1.0, "p80": 1.5, "n": 7}
    row = {"work": "llama", "sharded": False, "growth_bytes": [1 << 20, 2 << 20], "memory_ratio": 2.0}
    row |= {"non_private_seconds": figure, "time_ratio": figure}
    one = {"name": "DPSAT", "milliseconds": figure, "ratio": figure, "share": figure}
    for module, suite in ((distributed, {"rows": [row]}), (ascent, {"workload": "GPT", "figures": [one]})):
        name = module.__name__.removeprefix("bench.")
        command = f"python -m {module.__name__} --rounds 3"
        record = Record.new(tmp_path, name, torch.device("cpu"), {"command": command, "suite": name})
        record.suite.update(suite)
        record.finish(torch.device("cpu"))
        assert bench(tmp_path, "--report", str(record.path)) == 0
        printed = capsys.readouterr().out
        assert f"`{command}`" in printed and "1.25" in printed and record.path.with_suffix(".md").is_file()


def test_who_ignores_an_option_is_named(tmp_path, caplog, monkeypatch):
    seen = {}

    def options_of(name):
        return lambda record, options: seen.update({name: options}) or True

    for suite in (kernels, layers, models, host):
        monkeypatch.setattr(suite, "run", options_of(suite.__name__))
        monkeypatch.setattr(suite, "report", lambda data: "")
    both = ("nonprivate", "dpfast")
    for named, ignored, taken in (
        (("mlp",), "kernels and layers and host", (("mlp",), ())),
        (("one",), "kernels and layers and models", ((), ("one",))),
        (("mnist", "mlp", "one"), "kernels and layers", (("mlp",), ("mnist", "one"))),
    ):
        assert bench(tmp_path, "--model", *named, "--method", *both) == 0
        assert caplog.messages == [f"--model says nothing to {ignored}", "--method says nothing to kernels"]
        caplog.clear()
        assert [one.models for one in seen.values()] == [(), (), *taken]
        assert [one.methods for one in seen.values()] == [(), both, both, both]


def test_an_absent_peer_is_named_or_refused(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastDP" else find(name))
    assert bench(tmp_path, "--method", "nonprivate", "fastdp") == 2
    assert "no module named fastDP" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert bench(tmp_path, "--suite", "models", "--model", "mlp", "--method", "nonprivate", "dpfast") == 0
    (table,) = tmp_path.glob("*.md")
    for text in (capsys.readouterr().out, table.read_text()):
        assert "; fastdp not measured: no module named fastDP" in text


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
        assert dpfast["memory_ratio"] == 1 and part["flops"]["plain"] > 0
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
    points = [part for sweep in suite["sweeps"].values() for part in sweep["points"].values()]
    ways = [row["ways"] for part in points for row in part["rows"] if row["method"] == "dpfast"]
    assert len(ways) == 4 and {way for its in ways for way in its} <= {"ghost", "instantiate", "norm-GEMM"}
    assert ways[0][0] in capsys.readouterr().out
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

    def interrupted(calls, order, *rest):
        if len(rounds) == 3:
            raise KeyboardInterrupt
        rounds.append(order)
        return one_round(calls, order, *rest)

    def counted(work, method, *rest):
        checked.append((work.name, method.name))
        return find_variant(work, method, *rest)

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
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert bench(tmp_path, *arguments[:-1], "hooks", "--resume") == 2
    assert "configuration (methods) ['nonprivate', 'dpfast'], not ['nonprivate', 'hooks']" in capsys.readouterr().err
    monkeypatch.setattr("bench.record._git", lambda *_: "0" * 40)
    assert bench(tmp_path, *arguments, "--resume") == 2
    err = capsys.readouterr().err
    assert "is unfinished, but of commit " in err and f", not {'0' * 40}" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_all_suites_of_a_command_are_resumed(tmp_path, monkeypatch, capsys):
    """One is finished, one was interrupted, one had not begun."""
    begun = []

    def measured(name, interrupted=False, right=True):
        def run(record, options):
            begun.append(name)
            record.suite.setdefault("sessions", []).append(len(begun))
            record.save()
            if interrupted:
                raise KeyboardInterrupt
            return right

        return run

    for suite in (kernels, layers, models, host):
        monkeypatch.setattr(suite, "report", lambda data: "")
        monkeypatch.setattr(suite, "draw", lambda data, stem: [])
    monkeypatch.setattr(kernels, "run", measured("kernels", right=False))
    monkeypatch.setattr(layers, "run", measured("layers", interrupted=True))
    monkeypatch.setattr(models, "run", measured("models"))
    monkeypatch.setattr(host, "run", measured("host"))
    assert bench(tmp_path) == 130 and begun == ["kernels", "layers"]
    monkeypatch.setattr(layers, "run", measured("layers"))
    capsys.readouterr()
    assert bench(tmp_path, "--resume") == 1  # the kernels were not right, as before
    assert begun == ["kernels", "layers", "layers", "models", "host"]
    assert "kernels: finished before, in " in capsys.readouterr().out
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    by_suite = {record["configuration"]["suite"]: record for record in found}
    records = [by_suite[name] for name in ("kernels", "layers", "models", "host")]
    assert len(found) == len(records)
    assert len({record["run"] for record in records}) == 1 and all(record["finished"] for record in records)
    assert [len(record.get("sessions", [])) for record in records] == [0, 1, 0, 0]
    assert records[1]["suite"]["sessions"] == [2, 3]
    assert bench(tmp_path, "--resume") == 2
    assert "no unfinished record kernels-cpu-*.json or layers-cpu-*.json or models" in capsys.readouterr().err


# What a signal raises is dropped in the callback of a weak reference; the one after it is not.
CHILD = """
import signal, sys, time, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from bench import command, measure, side_by_side
from bench.suites import models
from dpfast.__main__ import main
class Thing: pass
def wait(text):
    print(text, flush=True)
    time.sleep(60)
def one_round(calls, order, read):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: wait("in a callback"))
    del thing
    print("goes on", flush=True)
    if sys.argv[1] == "again":
        wait("in a loop")
    return {name: 1.0 for name in order}
measure.one_round = one_round
command.THREADS = 1
side_by_side.peak = lambda job, device: {"growth_bytes": 1 << 20}
models.peaks = lambda device, dtype: {"error": "not asked for"}
sys.exit(main(["bench", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("number, again", [(signal.SIGINT, True)])
def test_a_signal_is_not_lost(number, again, tmp_path):
    arguments = [*BASICS, "--suite", "models", "--model", "mlp", "--method", "nonprivate", "dpfast"]
    command = [sys.executable, "-c", CHILD, "again" if again else "once", *arguments, "--out", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=measure.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            for line in child.stdout:
                if line.startswith(("in a callback", "in a loop")):
                    child.send_signal(number)
                if line.startswith("in a loop" if again else "goes on"):
                    break
            out, err = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 130 and "--resume goes on with it" in err and "KeyboardInterrupt" in err
    assert "in a callback" not in out and "## Models" in out  # no second round
    record = record_in(tmp_path)
    rounds = [entry.get("seconds", {}) for entry in record["suite"]["works"]["mlp"]["entries"]]
    assert not record["finished"] and [len(one) for one in rounds] == [0 if again else 1] * 2


@pytest.fixture
def _nothing_is_ignored():
    """As Ctrl-C is in what a shell runs in the background, the tests perhaps."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_handlers_are_as_before(tmp_path, monkeypatch, _nothing_is_ignored):
    inside = []

    def look(record, options):
        inside.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(models, "run", look)
    for _ in range(2):
        assert bench(tmp_path, "--suite", "models") == 130
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not set(inside) & set(before)
    Record.new(tmp_path, "models", torch.device("cpu"), {}).save()  # nobody has asked us to stop


def test_a_dead_device_is_a_line(tmp_path, monkeypatch, capsys):
    def die(part, *_, **__):
        part["title"] = "MLP"
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors ...")

    monkeypatch.setattr(models, "measure_work", die)
    assert bench(tmp_path, "--suite", "models", "--model", "mlp") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: AcceleratorError: CUDA error: an illegal memory access was encountered CUDA kernel")
    assert f"all that was measured is in {tmp_path}; --resume goes on with it" in last
    record = record_in(tmp_path)
    assert not record["finished"] and record["suite"]["peaks"]


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 8, 9, 100, 5000])
@pytest.mark.parametrize("start", [1, 8, 300])
def test_the_largest_batch(limit, start):
    fits, fails = side_by_side.largest(lambda size: size <= limit, start)
    assert fits <= limit < fails and fails - fits <= max(1, fits // 16)


def test_the_largest_batch_of_every_method(monkeypatch):
    entry = lambda name: {"method": name, "variant": "plain", "verdicts": [], "error": None}  # noqa: E731
    work = replace(workloads("cpu", small=True)["mlp"], largest_batch=True)
    part = {"entries": [entry(name) for name in ("nonprivate", "hooks", "flashdp")]}
    each = {"nonprivate": 1, "hooks": 40}
    mib = 1 << 20
    monkeypatch.setattr(side_by_side, "peak", lambda job, _: {"growth_bytes": each[job["method"]] * job["size"] * mib})
    side_by_side._largest_batches(part, work, torch.device("cpu"), side_by_side.NAMED, True, lambda: None)
    found = {entry["method"]: entry.get("largest_batch") for entry in part["entries"]}
    limit = part["memory_limit_bytes"] // mib
    assert found["nonprivate"]["fits"] <= limit < found["nonprivate"]["fails"] <= 1.1 * limit
    assert found["hooks"] == {"fits": limit // 40, "fails": limit // 40 + 1} and found["flashdp"] is None


def test_a_size_that_fails_otherwise_is_named_beside_what_fits(monkeypatch):
    entry = {"method": "hooks", "variant": "plain", "verdicts": [], "error": None}
    refused = {"error": "RuntimeError: integer overflow"}
    monkeypatch.setattr(side_by_side, "peak", lambda job, _: refused if job["size"] > 9 else {"growth_bytes": 1})
    work = replace(workloads("cpu", small=True)["mlp"], largest_batch=True)
    side_by_side._largest_batches(
        {"entries": [entry]}, work, torch.device("cpu"), side_by_side.NAMED, True, lambda: None
    )
    assert entry["largest_batch"] == {"fits": 9, "fails": 10, "error": "RuntimeError: integer overflow"}


def test_every_method_is_checked_before_it_is_timed(tmp_path, monkeypatch):
    """None is timed that was not found right, on the very model."""
    find_variant, one_round, measure_work = side_by_side.find_variant, measure.one_round, models.measure_work
    works, calls = [], []

    def measuring(part, work, *rest, **more):
        works.append(work.name)
        measure_work(part, work, *rest, **more)

    def checking(work, method, *rest):
        calls.append(("check", work.name, method.name))
        return find_variant(work, method, *rest)

    def timing(steps, order, *rest):
        calls.extend(("time", works[-1], key.partition(" ")[0]) for key in order)
        return one_round(steps, order, *rest)

    monkeypatch.setattr(models, "measure_work", measuring)
    monkeypatch.setattr(side_by_side, "find_variant", checking)
    monkeypatch.setattr(measure, "one_round", timing)
    names, methods = ("mlp", "gpt2"), ("nonprivate", "dpfast", "hooks")
    assert bench(tmp_path, "--suite", "models", "--model", *names, "--method", *methods) == 0
    timed = {call[1:] for call in calls if call[0] == "time"}
    assert timed == {(work, method) for work in names for method in methods}
    for work, method in timed:
        if METHODS[method].private:
            assert calls.index(("check", work, method)) < calls.index(("time", work, method))


def test_memory_over_the_base():
    assert memory.ratio({"growth_bytes": 3}, {"growth_bytes": 2}) == 1.5
    assert memory.ratio({"error": "out of memory"}, {"growth_bytes": 2}) is None
