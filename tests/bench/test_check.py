"""The oracle, on tiny models of every kind that the bench measures."""

import pytest
import torch

pytest.importorskip("psutil", reason="the bench needs the extra 'demo'")

from bench import check
from bench.methods import METHODS, quiet_peers
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
    """The tolerance is the model's own rounding; a method that clips to something else is beyond it."""
    work = workloads("cuda", small=True)["gpt2"]
    assert work.dtype == torch.bfloat16
    truth = check.oracle(work, "plain", False, CPU)
    assert check.TOLERANCE < truth.tolerance < 0.2
    assert check.check(work, METHODS["dpfast"], "plain", CPU).right
    other = check.clipped_sum(work, METHODS["dpfast"], "plain", truth.max_grad_norm / 2, CPU)
    assert check.compare(other, truth.sums)[0] > truth.tolerance


def test_each_layer_alone():
    work = workloads("cpu", small=True)["bert-base"]
    flat, each = (check.oracle(work, "plain", layerwise, CPU) for layerwise in (False, True))
    assert flat.max_grad_norm == each.max_grad_norm
    assert check.compare(each.sums, flat.sums)[0] > 0.01
    assert check.check(work, METHODS["flashdp"], "expanded", CPU).right


def test_nan_is_wrong():
    want = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    error, where = check.compare({"a": torch.tensor([1.0, torch.nan]), "b": 2 * want["b"]}, want)
    assert where == "a" and not error <= 1


def test_all_sizes_have_the_same_models_and_known_variants():
    assert set(BASE_VARIANT) == set(VARIANTS)
    names = [set(sizes) for sizes in SIZES.values()]
    assert names[0] == names[1] == names[2]
    for device in ("cpu", "cuda"):
        for work in workloads(device).values():
            assert set(work.variants) <= set(VARIANTS)
    with pytest.raises(ValueError, match="has the variants plain; got 'untied'"):
        workloads("cpu")["mlp"].model("untied")
