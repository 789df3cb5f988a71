"""Case 6: a sample whose gradient is NaN or infinite contributes exact zeros and is warned of once."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import oracle
from tests.helpers import F32, F64, assert_exact, distance, make_private, mse, run_fused, sums_of
from tests.zoo import ZOO, every_layer, specimen


def spoilt(output, target):
    """The mean over samples of a loss times the sample's weight, which may be NaN or infinite."""
    target, weight = target
    if target.is_floating_point():
        each = (output - target).square().flatten(1).mean(1)
    else:
        each = F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)
    return (each * weight).mean()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@every_layer
def test_one_sample_for_every_layer(name, bad):
    model, inputs, target = specimen(name)
    weight = torch.ones(4, dtype=F64)
    weight[2] = bad
    run = assert_exact(model, inputs, (target, weight), spoilt)
    assert run.norms.isfinite().tolist() == [True, True, False, True]
    # exact zeros: the others' sum, to the last bit of what the oracle allows, is the sum without it
    bound = oracle.Verdict(model, inputs, (target, weight), spoilt).max_grad_norm
    rest = oracle.take((inputs, (target, weight)), [0, 1, 3])
    without = run_fused(model, rest, spoilt, bound)
    allowed = oracle.Verdict(model, *rest, spoilt, bound).sum_tolerances()
    assert distance(run.sums, without.sums) <= 2 * sum(allowed.values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", [name for name, (_, draw) in ZOO.items() if draw(1)[0].is_floating_point()])
def test_one_bad_input_for_every_layer(name, bad):
    """The activations are bad as well as the backprops: 0 times NaN must not come into the sum."""
    model, inputs, target = specimen(name)
    inputs[0][2] = bad
    run = assert_exact(model, inputs, target, mse)
    assert all(s.isfinite().all() for s in run.sums.values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("sigma", [0.0, 1.0])
@every_layer
def test_all_samples_bad_leaves_noise_alone(name, sigma):
    model, inputs, target = specimen(name)
    wrapped, optimizer, _ = make_private(model, noise_multiplier=sigma, lr=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    spoilt(wrapped(*inputs), (target, torch.full((4,), float("nan"), dtype=F64))).backward()
    assert not any(s.any() for s in sums_of(model).values())
    optimizer.step()
    for n, p in model.named_parameters():
        assert p.isfinite().all(), n
        assert torch.equal(p, before[n]) == (sigma == 0), n


def net(dtype=F64) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def test_warned_of_once_and_counted():
    model = net()
    wrapped, optimizer, _ = make_private(model, size=5)
    x, y = torch.randn(5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)
    y[1], y[3] = float("nan"), float("inf")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            mse(wrapped(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    told = [w for w in seen if "finite" in str(w.message).lower() or "nan" in str(w.message).lower()]
    assert len(told) == 1, [str(w.message) for w in seen]
    assert issubclass(told[0].category, UserWarning | RuntimeWarning)
    assert "2" in str(told[0].message), f"how many samples is not said: {told[0].message}"


def test_nothing_is_said_of_finite_samples():
    model = net()
    wrapped, _, _ = make_private(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mse(wrapped(torch.randn(4, 4, dtype=F64)), torch.randn(4, 2, dtype=F64)).backward()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("scale", [1e18, 1e20, 1e30, 1e37])
def test_squares_that_overflow(scale):
    """Finite gradients whose squared norm is not in float32: clipped or dropped, never more than C."""
    model = net(F32)
    x, y = torch.randn(4, 4), torch.randn(4, 2)
    y[1] = scale
    ordinary = copy.deepcopy(((x[[0, 2, 3]],), y[[0, 2, 3]]))
    whole, rest = run_fused(model, ((x,), y), mse, 0.1), run_fused(model, ordinary, mse, 0.1)
    assert all(s.isfinite().all() for s in whole.sums.values())
    rounding = oracle.Verdict(model, *ordinary, mse, 0.1).sum_tolerances()
    assert distance(whole.sums, rest.sums) <= 0.1 + 2 * sum(rounding.values())


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 0.0])
def test_squares_that_underflow(scale):
    """A tiny or zero gradient is not clipped, and nothing is divided by zero."""
    model = nn.Linear(4, 2).float()
    x, w = torch.randn(3, 4), torch.full((3, 2), scale)
    w[0] = 1.0
    run = run_fused(model, ((x,), w), lambda out, w: (out * w).sum(), 0.5, loss_reduction="sum")
    verdict = oracle.Verdict(model, (x,), w, lambda out, w: (out * w).sum(), 0.5)
    verdict.check_sums(run.sums)
