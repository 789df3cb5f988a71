"""bench.compare without real benchmarks: the rule, the rows, the errors, and that nothing is left behind."""

import argparse
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="comparing needs the extra 'test'")
pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the bench needs the extra 'demo'")

from bench import compare
from bench.compare import CompareError, Times


def times(*medians, spread=0.1, n=20):
    """A round for each median, all of one relative spread."""
    return Times([[m * (1 + spread * (2 * k / (n - 1) - 1)) for k in range(n)] for m in medians])


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "base, now, word",
    [
        (times(1, 1, 1), times(1.3, 1.3, 1.3), "slower"),
        (times(1, 1, 1), times(0.7, 0.7, 0.7), "faster"),
        (times(1, 1, 1), times(1, 1, 1), ""),
        (times(1, 1, 1), times(1.1, 1.1, 1.1), ""),  # within the spread of its own times
        (times(1, 1, 1, spread=0.01), times(1.1, 1.1, 1.1, spread=0.01), "slower"),
        (times(1, 2, 1), times(1.3, 1.3, 1.3), ""),  # the base's rounds are further apart
        (times(1, 1, 1, 1, 1, 1.5), times(1.3, 1.3, 1.3, 1.3, 1.3, 1.4), ""),  # not in every round
    ],
)
def test_only_more_than_the_spread_counts(base, now, word):
    assert compare.verdict(base, now) == word


def test_a_round_with_more_times_does_not_count_for_more():
    few, many = Times([[1.0] * 5, [2.0] * 5]), Times([[1.0] * 5, [2.0] * 5000])
    assert compare.percentiles(few.pooled) == compare.percentiles(many.pooled)


def test_the_table_has_a_row_for_what_one_side_lacks():
    found = {
        "test_op[same-cpu]": {"base": times(1), "now": times(1)},
        "test_op[worse-cpu]": {"base": times(1), "now": times(2)},
        "test_op[better-cpu]": {"base": times(2), "now": times(1)},
        "test_op[new-cpu]": {"base": Times(reason="no attribute 'new'"), "now": times(1)},
        "test_op[gone-cpu]": {"base": times(1), "now": Times(reason="no attribute 'gone'")},
        "test_op[skipped-cpu]": {"base": Times(reason="no tiles"), "now": Times(reason="no tiles")},
    }
    printed = compare.table(found)
    rows = {row.split("|")[1].strip(): row for row in printed.splitlines() if "-cpu " in row and row.startswith("|")}
    assert set(rows) == {"same-cpu", "worse-cpu", "better-cpu", "new-cpu", "gone-cpu"}
    assert "not in base" in rows["new-cpu"] and "no attribute 'new'" in rows["new-cpu"]
    assert "not in now" in rows["gone-cpu"]
    assert "slower" in rows["worse-cpu"] and "2.00 (2.00–2.00)" in rows["worse-cpu"] and "er |" not in rows["same-cpu"]
    assert "Slower by more than the spread: worse-cpu 2.00 (2.00–2.00)." in printed
    assert "Faster by more than the spread: better-cpu 0.50 (0.50–0.50)." in printed
    assert compare.RULE in printed


# ---------------------------------------------------------------- both sides


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with one commit, whose dpfast is empty."""
    root = tmp_path / "clone"
    (root / "dpfast").mkdir(parents=True)
    (root / "dpfast" / "__init__.py").write_text("")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare.tempfile, "tempdir", str(tmp_path))
    return root


def worktrees(root):
    done = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True, check=True)
    return len(done.stdout.splitlines())


@pytest.mark.parametrize("base", ["no-such-commit", "", "HEAD~5", "0" * 40])
def test_what_is_no_commit_is_an_error_in_a_line(base, clone, capsys):
    assert compare.main([base]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and (f"BASE={base} is no commit" in said[0] or not base)


@pytest.mark.parametrize(
    "given", [["--rounds", "0"], ["--rounds", "-1"], ["--threads", "0"], ["--seconds", "nan"], ["--seconds", "inf"]]
)
def test_a_bad_number_is_an_error_in_a_line(given, clone, capsys, monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("it began"))
    assert compare.main(["HEAD", *given]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"error: {given[0]} ") and worktrees(clone) == 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, CompareError, None])
def test_the_worktree_is_gone_afterwards(failure, clone):
    tree = None
    try:
        with compare.worktree(compare.commit_of("HEAD")) as tree:
            assert (tree / "dpfast" / "__init__.py").is_file() and worktrees(clone) == 2
            if failure:
                raise failure
    except (KeyboardInterrupt, CompareError):
        pass
    assert not tree.parent.exists() and worktrees(clone) == 1


def test_after_an_interrupt_the_finished_rounds_are_printed(clone, monkeypatch, capsys):
    def interrupted(trees, asked, found):
        compare.add(found, {"base": ({"test_op[a-cpu]": [1.0, 1.1]}, {}), "now": ({"test_op[a-cpu]": [3.0, 3.1]}, {})})
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", interrupted)
    assert compare.main(["HEAD"]) == 130
    assert "a-cpu 2.90" in capsys.readouterr().out and worktrees(clone) == 1


def test_each_side_imports_its_own(clone, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(clone), str(clone / "kernels"), str(elsewhere)]))
    monkeypatch.setenv("DPFAST_LIBRARY_CPU", "other.so")
    made = compare.environment(Path("/base"))
    assert made["PYTHONPATH"].split(os.pathsep) == ["/base", "/base/kernels", str(elsewhere)]
    assert "DPFAST_LIBRARY_CPU" not in made


def test_another_dpfast_is_not_measured(tmp_path):
    """Where the side has none, whatever is installed would be imported."""
    with pytest.raises(CompareError, match=r"is not in|No module named"):
        compare.ready(tmp_path, tmp_path)


OPS = """
import pytest
@pytest.mark.parametrize("name", ["good", "missing", "skipped"])
def test_op(name, benchmark):
    if name == "skipped":
        pytest.skip("not here")
    assert name != "missing", "no such op"
    benchmark(lambda: None)
"""


def test_times_and_reasons_of_a_process(clone, tmp_path, monkeypatch):
    (tmp_path / "ops.py").write_text(OPS)
    monkeypatch.setattr(compare, "OPS", tmp_path / "ops.py")
    folder = tmp_path / "folder"
    folder.mkdir()
    compare.prepared(folder)
    asked = argparse.Namespace(seconds=0.01, select="", threads=1)
    found, reasons = compare.measured(clone, folder, asked)
    assert set(found) == {"test_op[good]"} and len(found["test_op[good]"]) >= 5
    assert "no such op" in reasons["test_op[missing]"] and "not here" in reasons["test_op[skipped]"]
    (folder / "conftest.py").write_text("import os; os._exit(7)")
    with pytest.raises(CompareError, match="status 7"):
        compare.measured(clone, folder, asked)
