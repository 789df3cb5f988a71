"""Calibration over R: what was trained, what was chosen, and verdicts that follow the figures, whatever these are."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from dpfast.__main__ import main
from dpfast.analysis.reproduce import calibration, common
from dpfast.analysis.reproduce import calibration_runs as runs
from dpfast.analysis.reproduce import calibration_verdicts as verdicts
from dpfast.analysis.reproduce.chance import CONFIRMED, NOT_SEEN, ONE_SEED, OPPOSITE, beyond_chance
from dpfast.analysis.reproduce.common import Job
from dpfast.analysis.reproduce.convergence_verdicts import flow_verdict, kernel_verdict, noise_verdict

from .idx import idx_folder

STYLES = (runs.FLAT, runs.LAYERS, runs.DROPPED)


@pytest.mark.usefixtures("few_orders")
def test_a_folder_of_images_gives_tables_plots_and_three_last_lines(tmp_path):
    folder, out = idx_folder(tmp_path / "stripes", test=calibration.LEAST_TEST), tmp_path / "out"
    arguments = ["--data", str(folder), "--quick", "--seeds", "1", "--out", str(out)]
    assert main(["reproduce", "calibration", *arguments]) == 0
    assert {path.name for path in out.glob("*.png")} == {
        f"{kind}_stripes.png" for kind in ("reliability", "norms", "training", "maps")
    }
    text = (out / "results.md").read_text(encoding="utf-8")
    for style in STYLES:
        assert len(re.findall(rf"^\| {style} +\|", text, re.MULTILINE)) == 2 * 2  # tables times R
    end = r"^\*The paper says\.\* .+\n\n\*Here\.\* .+\n\n\*Verdict\.\* .+\n\s*1 seeds, .* one thread .*$"
    assert re.search(end, text, re.MULTILINE)
    assert "not accounted for" in text
    assert "xpected" not in text


@pytest.mark.parametrize("sizes", [(64, calibration.LEAST_TEST - 1), (9, calibration.LEAST_TEST)])
def test_too_few_images_are_refused_in_one_line(sizes, tmp_path, capsys):
    folder = idx_folder(tmp_path / "few", *sizes)
    out = tmp_path / "out"
    assert main(["reproduce", "calibration", "--data", str(folder), "--quick", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{sizes[0]} images to train on and {sizes[1]} to test on: give at least 10" in error
    assert not out.exists()


@pytest.mark.usefixtures("few_orders")
def test_all_trainings_of_a_seed_share_data_weights_batches_and_noise(tmp_path):
    """Where nobody is clipped, and the learning rate is the same, the ways to clip are the same."""
    (plan,) = calibration.plans(
        Job(1, tmp_path, quick=True, data=str(idx_folder(tmp_path / "stripes", test=calibration.LEAST_TEST)))
    )
    found = runs.grid(replace(plan, norms=(1e3,), products=(1.0,)))
    flat, layers, dropped = (found[style, 1e3, 1.0][0] for style in STYLES)
    assert flat.losses == pytest.approx(dropped.losses)
    assert flat.losses == pytest.approx(layers.losses)
    assert len(flat.losses) == plan.epochs + 1
    assert torch.allclose(flat.test_logits, dropped.test_logits)
    assert flat.epsilon <= plan.epsilon
    few = replace(plan, norms=(1e-4,), products=(1.0,))
    lost = runs.grid(few)[runs.DROPPED, 1e-4, 1.0][0]
    assert lost.losses[0] == flat.losses[0]  # the same first weights
    assert lost.losses[-1] != pytest.approx(flat.losses[-1])


def one(accuracy, ece, loss, held_out=0.0):
    """A run of these figures."""
    test = SimpleNamespace(accuracy=SimpleNamespace(value=accuracy), ece=SimpleNamespace(value=ece))
    return runs.Run(test, held_out, [9.0, loss], torch.empty(0), torch.empty(0), 1.0)


def some(accuracy, ece, loss):
    """Three seeds that hardly differ."""
    return [one(accuracy + d, ece + d, loss + d) for d in (-1e-4, 0.0, 1e-4)]


def seen(small, large, resplit=0.0):
    plan = runs.Plan(
        "made up", lambda seed: None, seeds=len(small), resplit=resplit, norms=(0.1, 10.0), products=(1.0,), fixed=1.0
    )
    found = {(runs.FLAT, 0.1, 1.0): small, (runs.FLAT, 10.0, 1.0): large}
    choice = {(runs.FLAT, norm): 1.0 for norm in plan.norms}
    return verdicts.verdict(plan, found, {"as is": choice})


WIDE = [one(a, e, x) for a, e, x in ((0.7, 0.3, 0.5), (0.8, 0.1, 1.5), (0.9, 0.2, 1.0))]


@pytest.mark.parametrize(
    ("small", "large", "words"),
    [
        (some(0.83, 0.10, 1.0), some(0.82, 0.05, 0.5), (CONFIRMED, CONFIRMED, CONFIRMED)),
        (some(0.82, 0.05, 0.5), some(0.83, 0.10, 1.0), (OPPOSITE, OPPOSITE, OPPOSITE)),
        (some(0.80, 0.05, 0.5), WIDE, (NOT_SEEN, NOT_SEEN, NOT_SEEN)),
        (some(0.90, 0.10, 1.0), some(0.80, 0.01, 0.5), (CONFIRMED, NOT_SEEN, CONFIRMED)),
    ],
    ids=["as the paper says", "the other way round", "by chance", "calibrated, but no longer accurate"],
)
def test_the_verdict_follows_the_figures(small, large, words):
    text = seen(small, large).verdict
    assert re.findall(r"\(\d\) (confirmed|not seen|opposite)", text) == list(words)


def test_here_is_what_the_runs_say():
    here = seen(some(0.83, 0.10, 1.0), some(0.82, 0.05, 0.5)).here
    assert "R = 0.1, 10: accuracy (%) 83.0, 82.0; ECE (%) 10.0, 5.0; last training loss 1.000, 0.500" in here


def test_seeds_that_split_one_data_set_anew_weaken_a_verdict():
    small, large = some(0.83, 0.10, 1.0), [one(a, e, x) for a, e, x in ((0.82, 0.05, 0.5), (0.82, 0.06, 0.6)) * 2][:3]
    assert "(3) confirmed" in seen(small, large).verdict
    assert "(3) not seen" in seen(small, large, resplit=100.0).verdict


def test_one_seed_proves_nothing():
    found = seen(some(0.83, 0.10, 1.0)[:1], some(0.82, 0.05, 0.5)[:1])
    assert found.verdict == ONE_SEED
    assert "accuracy (%) 83.0, 82.0" in found.here
    assert flow_verdict([1e-4], [2e-3], 1, 0).verdict == ONE_SEED


def test_a_difference_is_beyond_chance_by_students_t():
    """t = mean / (deviation / √n): 2/(1/√3) = 3.46 with 2 degrees of freedom, where 4.30 is needed; 4.33 is enough."""
    assert beyond_chance([1.0, 2.0, 3.0]) == 0
    assert beyond_chance([1.5, 2.5, 3.5]) == 1
    assert beyond_chance([-1.5, -2.5, -3.5]) == -1
    assert beyond_chance([5.0]) == 0
    assert beyond_chance([2.0, 2.0]) == 1


def test_seeds_that_split_one_data_set_anew_need_more():
    clear = [0.3 + d for d in (-0.1, 0.0, 0.1)]  # t = 0.3 / (0.1/√3) = 5.2, and 3.0 with three times the variance
    assert beyond_chance(clear) == 1
    assert beyond_chance(clear, resplit=2 / 3) == 0
    made_up, digits = calibration.plans(Job(5, None, quick=False))
    assert (made_up.resplit, digits.resplit) == (0, common.digits(0).resplit)
    assert digits.resplit > 0


def test_the_learning_rate_is_chosen_on_held_out_samples_alone():
    plan = runs.Plan("made up", lambda seed: None, seeds=1, norms=(1.0,), products=(1.0, 3.0, 9.0))
    held_out = {1.0: 0.5, 3.0: 0.7, 9.0: 0.7}
    found = {
        (style, 1.0, product): [one(accuracy=1 - held_out[product], ece=0.0, loss=0.0, held_out=held_out[product])]
        for style in STYLES
        for product in plan.products
    }
    assert runs.chosen(plan, found) == {(style, 1.0): 3.0 for style in STYLES}  # the smaller of two as good


@pytest.mark.usefixtures("few_orders")
def test_what_all_trainings_of_a_row_spend():
    plan = runs.Plan("digits", common.digits, seeds=1, epochs=2)
    alone, three = runs.composed(plan, 1), runs.composed(plan, 3)
    assert 0.98 * plan.epsilon <= alone <= plan.epsilon < three <= 3 * alone


@pytest.mark.parametrize("full", [False, True])
def test_lengths(full, tmp_path):
    (plan,) = calibration.plans(Job(1, tmp_path, quick=False, full=full, data="fashion-mnist"))
    assert plan.epochs == (60 if full else 8)
    assert plan.fixed in plan.products


@pytest.mark.parametrize(
    ("slopes", "words"),
    [
        ((0.50, -0.001), "Confirmed at a fixed noise multiplier. It does not carry over to a fixed budget."),
        ((0.02, 0.00), "Opposite at a fixed noise multiplier. It does not carry over to a fixed budget."),
        ((0.30, 0.30), "Not seen at a fixed noise multiplier. It carries over to a fixed budget."),
    ],
)
def test_the_noise_verdict(slopes, words):
    found = noise_verdict(slopes, "σ = 1", "ε = 8")
    assert found.verdict == words
    assert f"η^{slopes[0]:.2f}" in found.here and f"η^{abs(slopes[1]):.2f}" in found.here


@pytest.mark.parametrize(
    ("small", "large", "uphill", "verdict", "here"),
    [
        (
            [1e-4, 2e-4, 2e-4],
            [2e-3, 2e-3, 2e-3],
            (2, 0),
            "(1) confirmed, (2) opposite.",
            "lower with the small R: at 1.7e-04",
        ),
        (
            [2e-3, 2e-3, 2e-3],
            [1e-4, 2e-4, 2e-4],
            (0, 0),
            "(1) not seen, (2) confirmed.",
            "higher with the small R: at 2.0e-03",
        ),
        ([1e-4, 2e-3, 1e-3], [1e-3, 1e-4, 2e-3], (3, 1), "(1) opposite, (2) not seen.", "above 0 somewhere in 1 of 3"),
    ],
)
def test_the_flow_verdict(small, large, uphill, verdict, here):
    found = flow_verdict(small, large, *uphill)
    assert found.verdict == verdict
    assert here in found.here


def kernel(**lacks):
    """A report in which every property holds but those named."""
    names = {
        "real": "eigenvalues real",
        "quadratic": "quadratic form not negative",
        "rank": "HC no more singular than H",
    }
    every = [*names.values(), "eigenvalues not negative"]
    properties = [SimpleNamespace(name=name, holds=name not in {names[k] for k in lacks}) for name in every]
    holds = {one.name: one.holds for one in properties}
    return SimpleNamespace(properties=properties, holds=holds.__getitem__, dropped=lacks.get("rank", 0))


@pytest.mark.parametrize(
    ("unclipped", "small", "layer", "words"),
    [
        (kernel(), kernel(quadratic=1), kernel(real=1), (CONFIRMED, CONFIRMED, CONFIRMED)),
        (kernel(), kernel(), kernel(), (CONFIRMED, NOT_SEEN, NOT_SEEN)),
        (kernel(real=1), kernel(real=1), kernel(), (OPPOSITE, OPPOSITE, NOT_SEEN)),
    ],
)
def test_the_kernel_verdict(unclipped, small, layer, words):
    found = kernel_verdict([unclipped] * 2, [small], [layer], [kernel(rank=12)])
    assert re.findall(r"\(\d\) (confirmed|not seen|opposite)", found.verdict) == list(words)
    assert "which drop 12 samples" in found.here


def test_the_best_temperature_undoes_a_scale():
    torch.manual_seed(0)
    logits = torch.randn(4000, 3)
    labels = torch.distributions.Categorical(logits=logits).sample()
    right = runs.best_temperature(logits, labels)
    assert right == pytest.approx(1.0, rel=0.1)
    assert runs.best_temperature(3 * logits, labels) == pytest.approx(3 * right, rel=0.02)
    assert math.isfinite(right)
