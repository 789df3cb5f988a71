"""check_sensitivity: the first thing to run on a new model. Right ones pass, coupled ones are named in words."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpfast
from tests import snapshot
from tests.helpers import F64, make_private, mse, token_loss
from tests.oracle import Verdict
from tests.zoo import TinyGPT, every_layer, loss_of, specimen


def regression(outputs: int = 2, n: int = 6) -> tuple:
    return torch.randn(n, 4), torch.randn(n, outputs)


def net(outputs: int = 2, layer: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), layer or nn.Tanh(), nn.Linear(5, outputs))


@pytest.mark.parametrize("share", [0.01, 0.5, 100.0], ids=["all clipped", "some", "none"])
@every_layer
def test_every_layer_passes(name, share):
    model, inputs, target = specimen(name)
    bound = Verdict(model, inputs, target, loss_of(name)).max_grad_norm * share

    def loss_fn(model, batch):
        return loss_of(name)(model(*batch[0]), batch[1])

    report = dpfast.check_sensitivity(model, loss_fn, (inputs, target), bound)
    assert report.ok is True, str(report)
    assert not report.cause


def test_a_criterion_on_a_pair():
    report = dpfast.check_sensitivity(net(), nn.MSELoss(), regression(), 0.1)
    assert report.ok, str(report)


def test_a_callable_on_a_dict():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    batch = {"x": torch.randn(5, 4), "labels": torch.randint(2, (5,))}
    report = dpfast.check_sensitivity(net(), loss_fn, batch, 0.1)
    assert report.ok, str(report)


def test_a_private_model_is_accepted():
    model = net()
    wrapped, _, _ = make_private(model)
    report = dpfast.check_sensitivity(wrapped, nn.MSELoss(), regression(), 0.1)
    assert report.ok, str(report)


def test_dropout_is_no_coupling():
    report = dpfast.check_sensitivity(net(layer=nn.Dropout(0.5)), nn.MSELoss(), regression(), 0.1)
    assert report.ok, str(report)


@pytest.mark.parametrize("bound", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("trained", [True, False], ids=["affine", "not affine"])
def test_batch_norm_is_named(trained, bound):
    model = net(layer=nn.BatchNorm1d(5, affine=trained))
    report = dpfast.check_sensitivity(model, nn.MSELoss(), regression(), bound)
    assert report.ok is False
    assert "BatchNorm" in report.cause


@pytest.mark.parametrize("bound", [0.1, 1.0])
def test_a_mean_over_the_tokens_of_the_batch_is_named(bound):
    """Samples of one and of many tokens: a long one makes the others count less."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    ids, labels = torch.randint(9, (6, 12)), torch.randint(9, (6, 12))
    labels[1:, 1:] = -100

    def of_tokens(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    report = dpfast.check_sensitivity(model, of_tokens, (ids, labels), bound)
    assert report.ok is False
    assert "tokens" in report.cause

    def of_samples(model, batch):
        losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")
        return (losses.sum(1) / (batch[1] != -100).sum(1)).mean()

    assert dpfast.check_sensitivity(model, of_samples, (ids, labels), bound).ok


def test_equally_many_tokens_are_no_coupling():
    ids = torch.randint(9, (5, 5))
    report = dpfast.check_sensitivity(TinyGPT(), lambda m, b: token_loss(m(b), b), ids, 0.1)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("bound", [0.05, 1.0])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss()], ids=lambda c: type(c).__name__)
def test_a_broadcast_loss_is_named(loss, bound):
    """[B, 1] against [B] is B×B losses to PyTorch."""
    x, y = torch.randn(6, 4), (5 + torch.rand(6)) * torch.tensor([1, -1, 1, -1, 1, -1])  # both sides of any output
    report = dpfast.check_sensitivity(net(1), loss, (x, y), bound)
    assert report.ok is False
    assert "broadcast" in report.cause
    assert dpfast.check_sensitivity(net(1), loss, (x, y[:, None]), bound).ok


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (lambda: net(layer=Centred()), mse),
        (net, lambda out, y: mse(out / out.std(), y)),
        (net, lambda out, y: F.cross_entropy(out @ y.t(), torch.arange(len(y)))),
    ],
    ids=["centred over the batch", "scaled by the batch", "contrastive"],
)
def test_other_couplings_are_found(model, loss):
    x, y = regression()
    report = dpfast.check_sensitivity(model(), lambda m, b: loss(m(b[0]), b[1]), (x, y), 0.5)
    assert report.ok is False
    assert report.cause


def test_the_report_can_be_printed(capsys):
    print(dpfast.check_sensitivity(net(layer=nn.BatchNorm1d(5)), nn.MSELoss(), regression(), 1.0))
    said = capsys.readouterr().out
    assert "BatchNorm" in said
    print(dpfast.check_sensitivity(net(), nn.MSELoss(), regression(), 1.0))
    assert "BatchNorm" not in capsys.readouterr().out


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_model_is_untouched(layer, mode):
    """Weights, running statistics, gradients, mode, attributes, and the state of the random numbers."""
    model = net(layer=copy.deepcopy(layer)).train(mode)
    x, y = regression()
    mse(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before, buffers = snapshot.of_model(model), [b.clone() for b in model.buffers()]
    rng = torch.get_rng_state()
    dpfast.check_sensitivity(model, nn.MSELoss(), (x, y), 0.1)
    assert snapshot.of_model(model) == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())


def test_untouched_when_the_loss_raises():
    model = net()
    before = snapshot.of_model(model)
    with pytest.raises(ZeroDivisionError):
        dpfast.check_sensitivity(model, lambda m, b: 1 / 0, regression(), 0.1)
    assert snapshot.of_model(model) == before


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_bad_bound_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="max_grad_norm"):
        dpfast.check_sensitivity(net(), nn.MSELoss(), regression(), bad)


def test_a_single_sample_cannot_be_left_out():
    with pytest.raises(ValueError, match="batch"):
        dpfast.check_sensitivity(net(), nn.MSELoss(), regression(n=1), 0.1)


def test_float64_and_quiet():
    """No warnings of its own on a good model."""
    x, y = (t.to(F64) for t in regression())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dpfast.check_sensitivity(net().double(), nn.MSELoss(), (x, y), 0.1).ok
