"""Settings and loops at the edge: secure mode, frozen and repeated parameters, odd thresholds, failed backwards."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpfast
from tests.helpers import F64, make_private, run_fused, sums_of
from tests.oracle import Verdict
from tests.privacy.judging import TIGHT, Private, examine, plainly
from tests.privacy.test_layouts import Positions, TwoViews

B, D = 8, 5


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, D, dtype=F64), torch.randint(3, (B,))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def step(model, optimizer, batch) -> dict[str, torch.Tensor]:
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    return {name.removeprefix("_module."): p.grad for name, p in model.named_parameters()}


def test_a_list_of_norms_with_frozen_parameters():
    """Exact: one norm for each parameter that is trained, as in Opacus."""
    model, (x, y) = net(), data()
    model[0].requires_grad_(False)
    norms = {"2.weight": 0.03, "2.bias": 0.05}
    verdict = Verdict(model, (x,), y, F.cross_entropy, norms, groups={name: name for name in norms})
    run = run_fused(model, ((x,), y), F.cross_entropy, list(norms.values()), clipping="per_layer")
    verdict.check_norms(run.norms)
    verdict.check_sums(run.sums)
    with pytest.raises(ValueError, match="list of 2 numbers"):
        make_private(net()[2:], max_grad_norm=[1.0] * 4, clipping="per_layer")


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, np.array], ids=lambda f: f.__name__)
def test_a_norm_that_is_another_kind_of_number(number):
    """Exact: the same as the float."""
    model, (x, y) = net(), data()
    want = run_fused(model, ((x,), y), F.cross_entropy, 0.125)
    got = run_fused(model, ((x,), y), F.cross_entropy, number(0.125))
    assert got.optimizer.max_grad_norm == 0.125
    for name in want.sums:
        assert torch.equal(got.sums[name], want.sums[name])


@pytest.mark.parametrize("value", [np.float32("nan"), torch.tensor(0.0), np.float64(-1), True, "1"], ids=str)
def test_a_norm_that_is_no_norm(value):
    """Refused by name."""
    with pytest.raises(ValueError, match="max_grad_norm"):
        make_private(net(), max_grad_norm=value)


def test_check_sensitivity_of_models_that_run_by_sample():
    """They are exact in training, and so the report says."""
    ids, y = torch.randint(10, (6, 4)), torch.randn(6)

    def shared(model, batch):
        return (model(batch[0], torch.arange(4)) * batch[1]).mean()

    report = dpfast.check_sensitivity(Positions("positions").double(), shared, (ids, y.double()), TIGHT)
    assert report.ok, str(report)

    def apart(model, batch):
        a, b = model(*batch)
        return (a - b).square().sum(1).mean()

    views = (torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64))
    report = dpfast.check_sensitivity(TwoViews().double(), apart, views, TIGHT)
    assert report.ok, str(report)


def test_check_sensitivity_names_a_frozen_batch_norm():
    model = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[:2].requires_grad_(False)
    report = dpfast.check_sensitivity(model, nn.CrossEntropyLoss(), data(), TIGHT)
    assert not report.ok
    assert "BatchNorm" in report.cause


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice_to_the_optimizer():
    """Exact, or refused by name; noise is added once."""
    batch, linear, got = data(), nn.Linear(D, 3).double(), []
    for twice in (False, True):
        model = copy.deepcopy(linear)
        params = [model.weight, model.bias, *([model.weight] if twice else [])]
        wrapped, optimizer, _ = make_private(
            model, size=B, optimizer=torch.optim.SGD(params, lr=0.0), noise_multiplier=1.0,
            noise_generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        got.append(step(wrapped, optimizer, batch))
    for name in got[0]:
        torch.testing.assert_close(got[1][name], got[0][name])


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=False))


def outside(model, x):
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize(("model", "call"), [(Inside, plainly), (net, outside), (net, plainly)])
def test_a_failed_backward_then_another_graph(model, call):
    """Exact: what the failed pass recorded is not part of the next one."""
    private = Private(model().double(), TIGHT, call)
    x, y = data()
    verdict = Verdict(private.model, (x,), y, F.cross_entropy, TIGHT)
    bad, good = (t.requires_grad_() for t in (torch.randn(B, D, dtype=F64), x.clone()))
    bad.register_hook(fail)
    losses = [F.cross_entropy(call(private.wrapped, t), y) for t in (bad, good)]
    with pytest.raises(RuntimeError, match="on purpose"):
        losses[0].backward()
    losses[1].backward()
    verdict.check_norms(private.wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(private.model))


def fail(gradient):
    raise RuntimeError("on purpose")


WEIGHT = torch.tensor([1.0, 5.0, 0.125], dtype=F64)


class ScalarLoss(nn.Module):
    def forward(self, output, target):
        return F.cross_entropy(output, target)


@pytest.mark.parametrize(
    ("criterion", "own"),
    [
        (nn.CrossEntropyLoss(weight=WEIGHT), lambda o, y: F.cross_entropy(o, y, WEIGHT.to(o), reduction="sum")),
        (nn.CrossEntropyLoss(ignore_index=0), lambda o, y: F.cross_entropy(o, y, ignore_index=0, reduction="sum")),
        (ScalarLoss(), F.cross_entropy),
    ],
    ids=["class weights", "ignore_index", "a scalar"],
)
def test_a_criterion(criterion, own):
    """Exact: a sample's loss depends on nothing but the sample."""
    model, (x, y) = net(), data()
    verdict = Verdict(model, (x,), y, own, TIGHT)
    twin = copy.deepcopy(model)
    wrapped, _, private_criterion, _ = make_private(
        twin, size=B, max_grad_norm=TIGHT, criterion=criterion, grad_sample_mode="ghost"
    )
    private_criterion(wrapped(x), y).backward()
    verdict.check_norms(wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(twin))


def test_shapes_that_pair_samples_with_each_other():
    """Refused: [B, 1] against [B] broadcasts to [B, B]."""
    x = torch.randn(B, D)
    wrapped, _, criterion, _ = make_private(nn.Linear(D, 1), size=B, criterion=nn.MSELoss(), grad_sample_mode="ghost")
    with pytest.raises(ValueError, match="broadcast"):
        criterion(wrapped(x), torch.randn(B))
    loss = criterion(wrapped(x), torch.randn(B, 1))
    with pytest.raises(ValueError, match="same shape"):
        loss * torch.rand(B, 1)
    assert (loss * torch.rand(B)).loss_per_sample.shape == (B,)


@pytest.mark.parametrize("first", [True, False])
def test_make_private_twice_with_and_without_poisson_sampling(first):
    """The last call counts: accumulation is allowed without Poisson sampling only."""
    model, (x, y) = net(), data()
    wrapped, _, _ = make_private(model, poisson_sampling=first)
    wrapped, _, _ = make_private(wrapped, poisson_sampling=not first)
    F.cross_entropy(wrapped(x), y).backward()
    if first:
        F.cross_entropy(wrapped(torch.randn(B, D, dtype=F64)), y).backward()
    else:
        with pytest.raises(ValueError, match="Poisson"):
            F.cross_entropy(wrapped(torch.randn(B, D, dtype=F64)), y).backward()


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm1d(4, affine=True)])
def test_a_norm_on_no_positions(norm):
    """Exact: nothing, where PyTorch computes it."""
    x = torch.randn(2, 4, 0)
    try:
        norm()(x).sum().backward()
    except (ValueError, RuntimeError):
        pytest.skip("PyTorch itself refuses such an input")
    examine(norm(), (x,), torch.zeros(2), lambda out, y: out.sum())
