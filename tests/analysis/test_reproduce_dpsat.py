"""DP-SAT on digits and on images: what is measured, what two gradients would cost, and how a verdict comes about."""

import copy
import math
import re

import pytest
import torch
from opacus.accountants import RDPAccountant

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from dpfast.__main__ import main
from dpfast.analysis.reproduce import flatness, price
from dpfast.analysis.reproduce.chance import judged
from dpfast.analysis.reproduce.datasets import idx_data
from dpfast.analysis.reproduce.dpsat import _verdict as verdict_on_digits
from dpfast.analysis.reproduce.flatness_report import BASE, Run, comparison, verdict
from tests.analysis.idx import CLASSES, idx_folder, packed


@pytest.mark.usefixtures("few_orders")
def test_images_from_scratch_and_fine_tuned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flatness, "EPSILONS", (3.0,))
    monkeypatch.setattr(price, "EPSILONS", (2.0,))
    folder, out = idx_folder(tmp_path / "images"), tmp_path / "out"
    assert main(["reproduce", "dpsat", "--data", str(folder), "--quick", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"results.md", "flatness.png"}
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "## from scratch, 1 epochs" in text and "## fine-tuned, 1 epochs" in text
    assert "δ = 1e-05" in text and "did not converge" not in text
    assert [line[: line.index("*", 1) + 1] for line in text.splitlines() if re.match(r"\*[TVH]", line)] == [
        "*The paper says.*",
        "*Here.*",
        "*Verdict.*",
    ]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_start_has_seen_nothing_of_the_private_classes(tmp_path):
    data = idx_data(idx_folder(tmp_path), 0)
    (images, test), private = flatness.halves(data)
    x, y = data.train.tensors
    assert torch.equal(images.tensors[0], x[y % 2 == 1]) and torch.equal(private.train.tensors[0], x[y % 2 == 0])
    assert len(images) + len(private.train) == len(x) and len(test) + len(private.test) == len(data.test)
    assert private.classes == CLASSES // 2 and set(private.test.tensors[1].tolist()) == {0, 1}
    model, right = flatness.start_of((images, test), 2, 0)
    again, _ = flatness.start_of((images, test), 2, 0)
    other, _ = flatness.start_of((images, test), 2, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model[1].weight, other[1].weight)
    assert 0 <= right <= 1 and model(x).shape == (len(x), 2)


def test_pixels_are_centred_by_those_to_train_on(tmp_path):
    data = idx_data(idx_folder(tmp_path), 0)
    centred = flatness.centred(data)
    pixels = centred.train.tensors[0].double()
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-5) and float(pixels.std()) == pytest.approx(1, abs=1e-5)
    mean, deviation = (of(data.train.tensors[0]) for of in (torch.mean, torch.std))
    torch.testing.assert_close(centred.test.tensors[0] * deviation + mean, data.test.tensors[0])
    assert torch.equal(centred.test.tensors[1], data.test.tensors[1])


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 2, 4, 6], [1, 3, 5], [0, 1, 3]])
def test_too_few_classes_are_one_line(classes, tmp_path, capsys):
    folder, out = idx_folder(tmp_path / "data"), tmp_path / "out"
    for part, n in (("train", 64), ("t10k", 32)):
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(packed(torch.tensor(classes).repeat(n)[:n]))
    assert main(["reproduce", "dpsat", "--data", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"classes {classes}: dpsat takes two odd ones" in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("side", [8, 9, 14, 15])
def test_the_net_fits_images_of_any_side(side):
    assert flatness.cnn(side**2, 5)(torch.randn(2, side**2)).shape == (2, 5)


def test_norms_are_those_of_each_sample():
    model, x, y = flatness.cnn(64, 3).double(), torch.randn(5, 64, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = flatness.sample_norms(model, x, y)
    for k in range(5):
        twin = copy.deepcopy(model)
        torch.nn.functional.cross_entropy(twin(x[k : k + 1]), y[k : k + 1]).backward()
        assert float(found[k]) == pytest.approx(
            math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters())), rel=1e-12
        )


@pytest.mark.usefixtures("few_orders")
def test_the_price_of_two_gradients(monkeypatch):
    """σ of twice as many steps spends the same ε; two releases of one draw are one of sensitivity √2."""
    monkeypatch.setattr(price, "EPSILONS", (2.0,))
    ((epsilon, one, two, ratio, more, same, _, most),) = price.price().rows

    def spent(sigma, steps):
        accountant = RDPAccountant()
        accountant.history = [(sigma, 1 / 30, steps)]
        return accountant.get_epsilon(1e-5)

    assert (epsilon, ratio) == ("2", "× 1.37")
    assert spent(float(one), 1200) == pytest.approx(2, abs=0.01)
    assert spent(float(two), 2400) == pytest.approx(2, abs=0.01)
    assert float(more) == pytest.approx(spent(float(one), 2400), abs=0.01)
    assert spent(float(same) / math.sqrt(2), 1200) == pytest.approx(2, abs=0.01)
    assert float(more) < float(most) == pytest.approx(spent(float(one) / math.sqrt(2), 1200), abs=0.01)


def runs(accuracy, top, seconds=1.0, noise=0.01):
    """Three seeds about these figures."""
    return [
        Run(accuracy + k * noise, top + k * noise, rise=0.1, norm=5.0, clipped=0.9, seconds=seconds, converged=True)
        for k in (-1, 0, 1)
    ]


def found_with(gain, flatter):
    """Four comparisons, in each of which DP-SAT gains and is flatter by so much, give or take chance."""
    found = {}
    for start in ("from scratch", "fine-tuned"):
        for epsilon in (2.0, 3.0):
            found[start, epsilon, BASE] = runs(0.8, 10.0)
            found[start, epsilon, "DP-SAT"] = runs(0.8 + gain, 10.0 - flatter, 1.05, noise=0.011)
    return found


@pytest.mark.parametrize(
    ("gain", "flatter", "more", "lower"),
    [
        (0.1, 0.0, "confirmed", "not seen"),
        (0.0, 1.0, "not seen", "confirmed"),
        (-0.1, -1.0, "opposite", "opposite"),
    ],
)
def test_a_verdict_comes_from_the_figures(gain, flatter, more, lower):
    told = str(verdict(found_with(gain, flatter)))
    assert f"more accuracy: {more}." in told and f"A lower top eigenvalue: {lower};" in told
    assert f"from {100 * gain:+.2f} to {100 * gain:+.2f} points" in told and "1.05 times" in told
    table = str(comparison("fine-tuned", found_with(gain, flatter), "8 epochs"))
    assert f"{100 * gain:+.2f} ± 0.06" + ("\\*" if gain else " ") in table and "8 epochs, 3 paired seeds" in table


def test_one_seed_has_no_verdict():
    one = {key: some[:1] for key, some in found_with(0.1, 1.0).items()}
    assert "one seed tells nothing" in str(verdict(one))
    assert "one seed tells nothing" in str(verdict_on_digits({"MLP": {}}, 1))


def test_the_verdict_on_digits():
    clear = {net: dict.fromkeys(("a", "b", "c"), 0.4) for net in ("MLP", "CNN")}
    assert "More accuracy: confirmed." in str(verdict_on_digits(clear, 5))
    assert "Of 8 comparisons on digits, beyond chance: none." in str(verdict_on_digits({"MLP": {}, "CNN": {}}, 5))
    against = {"MLP": {"a": -1.0, "b": -0.5}, "CNN": {}}
    assert "More accuracy: opposite in part." in str(verdict_on_digits(against, 5))


@pytest.mark.parametrize(
    ("agree", "against", "comparisons", "expected"),
    [
        (0, 0, 8, "not seen"),
        (1, 0, 8, "not seen"),  # chance gives one in 18 % of tables
        (2, 0, 8, "in part"),
        (5, 0, 8, "confirmed"),
        (5, 1, 8, "confirmed"),
        (5, 2, 8, "both ways"),
        (0, 5, 8, "opposite"),
        (0, 2, 8, "opposite in part"),
        (1, 0, 1, "confirmed"),
    ],
)
def test_what_chance_gives_is_no_finding(agree, against, comparisons, expected):
    assert judged(agree, against, comparisons) == expected
