"""Case 2: regression on [B, 1], and criteria that return a mean, a sum, or losses that the user reduces."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import F32, F64, assert_exact, assert_sensitivity, make_private, mse, sse, sums_of
from tests.oracle import Verdict


def net(outputs: int, dtype=F64) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).to(dtype)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("outputs", [1, 3])
def test_regression(outputs, loss, dtype):
    x, y = torch.randn(5, 4, dtype=dtype), torch.rand(5, outputs, dtype=dtype)
    assert_exact(net(outputs, dtype), (x,), y, loss)
    if dtype == F64:
        assert_sensitivity(net(outputs), ((x,), y), loss, 0.05)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (lambda out, y: F.mse_loss(out, y, reduction="none").mean(), "mean"),
        (lambda out, y: F.mse_loss(out, y, reduction="none").sum(1).mean(0), "mean"),
        (lambda out, y: (out - y).square().sum() / len(y), "mean"),
        (lambda out, y: F.mse_loss(out, y, reduction="none").sum(), "sum"),
        (lambda out, y: (out - y).square().mean(1).sum(), "sum"),
    ],
    ids=["none then mean", "sum then mean", "sum over B", "none then sum", "mean then sum"],
)
def test_losses_that_the_user_reduces(loss, reduction):
    x, y = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    assert_exact(net(3), (x,), y, loss, loss_reduction=reduction)


CRITERIA = {
    "nn, mean": (nn.MSELoss(), mse, "mean"),
    "nn, sum": (nn.MSELoss(reduction="sum"), sse, "sum"),
    "function, mean": (lambda out, y: F.mse_loss(out, y), mse, "mean"),
    "function, sum": (lambda out, y: F.mse_loss(out, y, reduction="sum"), sse, "sum"),
    "losses of samples, mean": (lambda out, y: (out - y).square().mean(1), mse, "mean"),
    "losses of samples, sum": (lambda out, y: (out - y).square().sum(1), sse, "sum"),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", CRITERIA)
def test_criterion_given_to_make_private(name, outputs):
    """Four things come back, as in Opacus' "ghost"; scalars and [B, 1] losses are clipped all the same."""
    criterion, plain, reduction = CRITERIA[name]
    model = net(outputs)
    x, y = torch.randn(5, 4, dtype=F64), torch.randn(5, outputs, dtype=F64)
    verdict = Verdict(model, (x,), y, plain)
    wrapped, optimizer, private, _ = make_private(
        model,
        criterion=criterion,
        grad_sample_mode="ghost",
        max_grad_norm=verdict.max_grad_norm,
        loss_reduction=reduction,
    )
    loss = private(wrapped(x), y)
    assert loss.item() == pytest.approx(plain(model(x), y).item())
    loss.backward()
    verdict.check_norms(wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(model))
    optimizer.step()
    optimizer.zero_grad()


def test_cross_entropy_criterion_with_opacus_shape_argument():
    """``criterion(logits, targets, shape=...)`` as Opacus has it for language models."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double()
    ids, targets = torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    targets[0, 2:] = -100  # padding: not counted in its sample's mean

    def of_one(logits, t):
        return F.cross_entropy(logits.flatten(0, 1), t.flatten())

    verdict = Verdict(model, (ids,), targets, of_one)
    wrapped, _, criterion, _ = make_private(
        model, criterion=nn.CrossEntropyLoss(), grad_sample_mode="ghost", max_grad_norm=verdict.max_grad_norm
    )
    logits = wrapped(ids)
    criterion(logits.flatten(0, 1), targets.flatten(), shape=logits.shape).backward()
    verdict.check_norms(wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(model))


def test_arithmetic_on_the_criterions_result():
    """As in Opacus: weights and sums of losses before ``backward``."""
    model = net(3)
    x, y, z = (torch.randn(5, n, dtype=F64) for n in (4, 3, 3))

    def plain(out, t):
        return 2 * mse(out, t[0]) + mse(out, t[1]) / 4

    verdict = Verdict(model, (x,), (y, z), plain)
    wrapped, _, criterion, _ = make_private(
        model, criterion=nn.MSELoss(), grad_sample_mode="ghost", max_grad_norm=verdict.max_grad_norm
    )
    out = wrapped(x)
    (2 * criterion(out, y) + criterion(out, z) / 4).backward()
    verdict.check_norms(wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(model))


def test_the_criterion_object_is_given_back_as_it_was():
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    before = dict(vars(criterion))
    _, _, private, _ = make_private(net(3), criterion=criterion, grad_sample_mode="ghost")
    private(torch.randn(4, 3), torch.randint(3, (4,)))
    assert vars(criterion) == before
