"""The oracle, on tiny models of every kind that the bench measures."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")

from bench import check
from bench.methods import METHODS, Trainer, quiet_peers
from bench.workloads import BASE_VARIANT, SIZES, VARIANTS, workloads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet():
    quiet_peers()


@pytest.mark.parametrize("name", SIZES["tiny"])
def test_dpfast_is_right_as_the_model_is_written(name):
    verdicts = check.find_variant(workloads("cpu", small=True)[name], METHODS["dpfast"], CPU)
    assert [verdict.reason for verdict in verdicts] == [None] and verdicts[0].variant == "plain"


def test_in_bfloat16():
    """The tolerances are the model's own rounding; a method that clips to something else is beyond them."""
    work = workloads("cuda", small=True)["gpt2"]
    assert work.dtype == torch.bfloat16
    truth = check.oracle(work, "plain", False, CPU)
    assert truth.blunt is None and all(check.TOLERANCE < limit < 0.5 for limit in truth.tolerances.values())
    assert truth.tolerances[check.WHOLE] < 0.1
    assert check.check(work, METHODS["dpfast"], "plain", CPU).right
    for other in check.clipped_sums(work, METHODS["dpfast"], "plain", truth.max_grad_norm * 0.8, CPU):
        assert check.worst(check.errors(other, truth.sums), truth.tolerances)[0] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES["tiny"])
def test_training_without_privacy_is_wrong(name, dtype):
    verdict = check.check(replace(workloads("cpu", small=True)[name], dtype=dtype), METHODS["nonprivate"], "plain", CPU)
    assert verdict.reason.startswith("wrong: relative error")


def test_the_other_style_is_wrong():
    work = workloads("cpu", small=True)["bert-base"]
    flat, each = (check.oracle(work, "plain", layerwise, CPU) for layerwise in (False, True))
    assert flat.max_grad_norm == each.max_grad_norm and flat.blunt is each.blunt is None
    assert check.worst(check.errors(each.sums, flat.sums), flat.tolerances)[0] > 1
    assert check.check(work, METHODS["flashdp"], "expanded", CPU).right
    assert not check.check(work, replace(METHODS["flashdp"], layerwise=False), "expanded", CPU).right


def test_a_check_that_tells_nothing_passes_nobody(monkeypatch):
    """Where nothing is clipped, no clipping is right."""
    monkeypatch.setattr(check, "CLIPPED", 100.0)
    verdict = check.check(workloads("cpu", small=True)["mlp"], METHODS["dpfast"], "plain", CPU)
    assert verdict.reason == "not checked: the check would not tell clipping each layer from it"


def test_an_oracle_without_memory_is_a_verdict(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried 80 GiB")

    monkeypatch.setattr(check, "_clipped_sums", full)
    verdict = check.check(workloads("cpu", small=True)["vit-s"], METHODS["dpfast"], "plain", CPU)
    assert verdict.reason == "not checked: the oracle has no answer: out of memory: tried 80 GiB"


def test_the_second_step_is_checked_as_well(monkeypatch):
    """Whoever adds the first step's gradients to the second's is found."""
    monkeypatch.setattr("torch.optim.SGD.zero_grad", lambda self, set_to_none=True: None)
    verdict = check.check(workloads("cpu", small=True)["mlp"], METHODS["flashdp"], "plain", CPU)
    assert verdict.reason.startswith("wrong: relative error 1.0e+00")


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_the_batch_that_is_checked_is_as_large_as_the_one_that_is_timed(size, monkeypatch):
    work, seen = replace(workloads("cpu", small=True)["mlp"], batch_size=size), []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, x, y: (seen.append(len(x)), step(self, x, y)))
    assert check.check(work, METHODS["dpfast"], "plain", CPU).right and seen == [size, size]


def test_nan_is_wrong():
    want = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    found = check.errors({"a": torch.tensor([1.0, torch.nan]), "b": 2 * want["b"]}, want)
    assert check.worst(found, dict.fromkeys(found, 1e9)) == (float("inf"), "a")


def test_all_sizes_have_the_same_models_and_known_variants():
    assert set(BASE_VARIANT) == set(VARIANTS)
    names = [set(sizes) for sizes in SIZES.values()]
    assert names[0] == names[1] == names[2]
    for device in ("cpu", "cuda"):
        for work in workloads(device).values():
            assert set(work.variants) <= set(VARIANTS)
    with pytest.raises(ValueError, match="has the variants plain; got 'untied'"):
        workloads("cpu")["mlp"].model("untied")
