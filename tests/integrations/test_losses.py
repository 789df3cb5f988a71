"""Per-sample losses: what they compute, and that no sample sees another."""

import pytest
import torch
from torch.nn import functional as F

from dpfast.losses import causal_lm_loss, sequence_classification_loss, token_loss


def batch(rows=4, length=6, vocabulary=11, dtype=torch.float32):
    logits = torch.randn(rows, length, vocabulary, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[1, 3:] = -100
    labels[2] = -100
    return logits, labels


def test_causal_loss_is_each_samples_own_mean():
    logits, labels = batch()
    found = causal_lm_loss(logits, labels, reduction="none")
    for k in (0, 1, 3):  # one sample alone: a mean over all its tokens, as in Transformers
        torch.testing.assert_close(found[k], F.cross_entropy(logits[k, :-1], labels[k, 1:]))
    assert found[2] == 0
    torch.testing.assert_close(causal_lm_loss(logits, labels), found.sum())
    torch.testing.assert_close(causal_lm_loss(logits, labels, reduction="mean"), found.sum() / 4)


def test_token_loss_is_not_shifted():
    logits, labels = batch()
    torch.testing.assert_close(token_loss(logits, labels, reduction="none")[0], F.cross_entropy(logits[0], labels[0]))


@pytest.mark.parametrize("loss", [causal_lm_loss, token_loss])
def test_a_samples_gradient_does_not_depend_on_the_others(loss):
    logits, labels = batch()
    (whole,) = torch.autograd.grad(loss(logits, labels), logits)
    alone = logits[:1].detach().requires_grad_()
    (single,) = torch.autograd.grad(loss(alone, labels[:1]), alone)
    assert torch.equal(whole[:1], single)
    assert not whole[2].any() and whole.isfinite().all()  # nothing counted: no gradient, and no NaN


def test_classification():
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([4, -100, 0])
    found = sequence_classification_loss(logits, labels, reduction="none")
    torch.testing.assert_close(found[0], F.cross_entropy(logits[0], labels[0]))
    assert found[1] == 0
    torch.testing.assert_close(sequence_classification_loss(logits, labels, reduction="mean"), found.sum() / 3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty_batches_have_loss_zero(reduction):
    logits = torch.randn(0, 6, 11, requires_grad=True)
    loss = causal_lm_loss(logits, torch.zeros(0, 6, dtype=torch.long), reduction=reduction)
    loss.backward()
    assert loss == 0
    assert sequence_classification_loss(torch.randn(0, 3), torch.zeros(0, dtype=torch.long), reduction=reduction) == 0


def test_sixteen_bits_are_taken_to_float32():
    logits, labels = batch(dtype=torch.bfloat16)
    found = causal_lm_loss(logits, labels, reduction="none")
    assert found.dtype == torch.float32
    assert torch.equal(found, causal_lm_loss(logits.float(), labels, reduction="none"))
    assert causal_lm_loss(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize(
    "call",
    [
        lambda: causal_lm_loss(torch.randn(2, 3, 5), torch.zeros(2, 2, dtype=torch.long)),
        lambda: token_loss(torch.randn(6, 5), torch.zeros(6, dtype=torch.long)),
        lambda: sequence_classification_loss(torch.randn(2, 5), torch.zeros(2, 1, dtype=torch.long)),
        lambda: sequence_classification_loss(torch.randn(2, 5), torch.zeros(2, dtype=torch.long), reduction="avg"),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError):
        call()
