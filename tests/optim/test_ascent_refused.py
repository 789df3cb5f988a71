"""What is refused, by name and before anything is changed."""

import warnings

import pytest
from torch import nn
from torch.optim import SGD

import dpfast
from tests.helpers import make_private
from tests.optim.ascending import RHO

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("cls", [dpfast.DPSAT, dpfast.DPSATMomentum])
@pytest.mark.parametrize("rho", [-0.1, NAN, INF, -INF, None, "0.1", True])
def test_no_length(cls, rho):
    with pytest.raises(ValueError, match="rho="):
        cls(rho)


@pytest.mark.parametrize("kappa", [-0.1, 0, 1.1, NAN, INF, None, True])
def test_no_kappa(kappa):
    with pytest.raises(ValueError, match="kappa="):
        dpfast.DiSK(kappa)


@pytest.mark.parametrize("gamma", [0.5, 0.0, -1, NAN, INF, "1"])
def test_a_gamma_that_takes_two_evaluations(gamma):
    with pytest.raises(ValueError, match="gamma="):
        dpfast.DiSK(0.7, gamma)
    assert dpfast.DiSK(0.8, 0.25).gamma == pytest.approx(0.25)
    assert dpfast.DiSK(0.7, 0.42857143) == dpfast.DiSK(0.7)


@pytest.mark.parametrize(
    "kw, word",
    [
        (dict(ascent=dpfast.DPSAT), "give an object"),
        (dict(ascent=0.1), "give an object"),
        (dict(ascent=RHO, grad_sample_mode="hooks"), "fused mode"),
        (dict(ascent=RHO, grad_sample_mode="ew"), "fused mode"),
        (dict(ascent=dpfast.DiSK(0.7), low_precision="master"), "low_precision"),
        (dict(ascent=RHO, optimizer=SGD([dict(params=[])], lr=0.1)), "no parameter"),
    ],
    ids=["class", "number", "hooks", "ew", "DiSK in one pass", "no parameter"],
)
def test_refused_before_anything_is_changed(kw, word):
    model = nn.Linear(2, 2)
    before = dict(vars(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=word) as refusal:
            make_private(model, **kw)
    assert "ascent" in str(refusal.value)
    assert vars(model) == before and not hasattr(model.weight, "summed_grad")
