"""Records: what they tell of the code and the libraries, and which of them a run may go on with."""

import json
import sys

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")

import dpfast
from bench import record as module
from bench import signals
from bench.record import Record, RecordError, Run

CPU = torch.device("cpu")
SUITES = ("kernels", "layers", "models")
WANTED = {name: {"command": f"bench --suite {name}", "suite": name, "methods": []} for name in SUITES}


def begun(folder, name="models", run=None, finished=False, suites=SUITES):
    """A record on the disk, of a command that asked for ``suites``."""
    record = Record.new(folder, name, CPU, WANTED[name], Run(folder, CPU, run, list(suites), {}) if run else None)
    if finished:
        record.finish(CPU)
    return record


def resumed(folder, *names, configurations=WANTED):
    return Run.resumed(folder, CPU, {name: configurations[name] for name in names or SUITES})


def changed(record, **machine):
    record.data["machine"] |= machine
    record.save()
    return record


# ---------------------------------------------------------------- which records go on


def test_one_command_is_one_run(tmp_path):
    run = Run.new(tmp_path, CPU, SUITES)
    records = [run.record(name, WANTED[name]) for name in SUITES]
    assert {record.data["run"] for record in records} == {run.started}
    again = resumed(tmp_path)
    assert again.started == run.started
    assert [again.record(name, WANTED[name]).path for name in SUITES] == [record.path for record in records]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_was_not_begun_belongs_to_the_run(tmp_path):
    first = begun(tmp_path, "kernels", run="2026-01", finished=True)
    begun(tmp_path, "kernels", run="2026-02", finished=True, suites=["kernels"])  # by itself: it lacks nothing
    second = resumed(tmp_path).record("layers", WANTED["layers"])
    assert second.path != first.path and second.data["run"] == first.data["run"]


def test_no_record_replaces_another(tmp_path):
    paths = {begun(tmp_path).path for _ in range(3)}  # in one second
    assert len(paths) == 3 and paths == set(tmp_path.iterdir())


def test_the_newest_run_that_lacks_something(tmp_path):
    old, older = begun(tmp_path, run="2026-02"), begun(tmp_path, run="2026-01")
    begun(tmp_path, run="2026-03", finished=True)
    assert resumed(tmp_path, "models").records["models"].path == old.path
    old.finish(CPU)
    assert resumed(tmp_path, "models").records["models"].path == older.path
    older.finish(CPU)
    with pytest.raises(RecordError, match=r"no unfinished record models-cpu-\*.json in "):
        resumed(tmp_path, "models")
    assert resumed(tmp_path, "models", "layers").started == "2026-03"  # in it the layers had not begun


@pytest.mark.parametrize(
    "what, value, said",
    [
        ("sources", "0" * 16, "sources 0000000000000000, not "),
        ("commit", "1" * 40, f"commit {'1' * 40}, not "),
        ("threads", 77, "threads 77, not "),
        ("python", "2.7.18", "python 2.7.18, not "),
        ("versions", {"torch": "1.0"}, "torch 1.0, not "),
        ("versions", {"triton": "1.0", "torch": torch.__version__}, "triton 1.0, not "),
        ("cpu", "80386", "cpu 80386, not "),
    ],
)
def test_another_kind_is_named_and_stands_in_nobodys_way(what, value, said, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_git", lambda *_: "2" * 40)
    older = begun(tmp_path, run="2026-01")
    newer = changed(begun(tmp_path, run="2026-02"), **{what: value})
    assert resumed(tmp_path).records["models"].path == older.path
    older.path.unlink()
    with pytest.raises(RecordError) as error:
        resumed(tmp_path)
    assert said in str(error.value) and f"{newer.path.name} is unfinished, but of " in str(error.value)
    assert "\n" not in str(error.value)


def test_another_question_is_another_run(tmp_path):
    begun(tmp_path)
    others = {"models": {**WANTED["models"], "methods": ["dpfast"]}}
    with pytest.raises(RecordError, match=r"configuration \(methods\) \[\], not \['dpfast'\]"):
        resumed(tmp_path, "models", configurations=others)


@pytest.mark.parametrize("before, now", [(None, None), (None, "1" * 40), ("1" * 40, None)])
def test_without_git_the_sources_tell(before, now, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_git", lambda *_: before)
    record = begun(tmp_path)
    monkeypatch.setattr(module, "_git", lambda *_: now)
    assert resumed(tmp_path).records["models"].path == record.path
    monkeypatch.setattr(module, "SOURCES", ("csrc",))
    with pytest.raises(RecordError, match="sources"):
        resumed(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', '{"finished": false}', "\x00"])
def test_a_file_that_is_no_record_is_skipped(text, tmp_path, caplog):
    good = begun(tmp_path)
    bad = tmp_path / "models-cpu-99990101-000000.json"
    bad.write_text(text)
    assert resumed(tmp_path).records["models"].path == good.path
    (line,) = caplog.messages
    assert line.startswith(f"skipped: {bad} is no record")
    assert bad.read_text() == text


def test_each_session_leaves_its_head(tmp_path):
    begun(tmp_path)
    for count in (1, 2):
        record = resumed(tmp_path).record("models", WANTED["models"])
        record.save()
        sessions = json.loads(record.path.read_text())["sessions"]
        assert len(sessions) == count and set(sessions[-1]) == {"date", "load_before"}
    assert module.title_of(record.data).count(", gone on with ") == 2
    assert set(record.data["machine"]) > set(sessions[0])


# ---------------------------------------------------------------- what they tell


def test_the_hash_sees_every_source(tmp_path):
    for name in ("dpfast/a.py", "csrc/cuda/b.cu", "csrc/b.h", "csrc/c.cpp", "dpfast/x.so", "dpfast/x.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    folders = [tmp_path / "dpfast", tmp_path / "csrc"]
    hashes = [module.hash_of(*folders)]
    for name in ("dpfast/a.py", "csrc/cuda/b.cu", "csrc/b.h", "csrc/c.cpp"):
        (tmp_path / name).write_text("else")
        hashes.append(module.hash_of(*folders))
    (tmp_path / "dpfast/a.py").rename(tmp_path / "dpfast/b.py")
    hashes.append(module.hash_of(*folders))
    assert len(set(hashes)) == len(hashes)
    for name in ("dpfast/x.so", "dpfast/x.pyc"):  # made from the others
        (tmp_path / name).write_text("else")
    assert module.hash_of(*folders) == hashes[-1]


def test_versions(tmp_path, monkeypatch):
    versions = module.machine_record()["versions"]
    assert versions["dpfast"] == dpfast.__version__ and versions["torch"] == torch.__version__
    assert None not in versions.values()
    if "fastDP" not in sys.modules and "fastDP" not in versions:  # on the path only, as a user has it
        package = tmp_path / "fastDP"
        package.mkdir()
        (package / "__init__.py").write_text("from . import nothing\n__version__ = '2.0.0'\n")
        monkeypatch.syspath_prepend(tmp_path)
        found = module.machine_record()["versions"]["fastDP"]
        assert found == f"2.0.0, sources {module.hash_of(package)}"


def test_a_copy_may_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "3" * 40)
    monkeypatch.setattr(module, "ROOT", tmp_path)  # without git
    found = module.machine_record()
    assert found["commit"] == "3" * 40 and found["uncommitted_changes"] is None
    monkeypatch.setattr(module, "_git", lambda *_: "4" * 40)
    assert module.machine_record()["commit"] == "4" * 40


def test_saving_obeys_a_signal_that_was_dropped(tmp_path, monkeypatch):
    record = begun(tmp_path)
    monkeypatch.setattr(signals, "_heard", True)
    record.suite["figure"] = 1
    with pytest.raises(KeyboardInterrupt):
        record.save()
    assert json.loads(record.path.read_text())["suite"] == {"figure": 1}
