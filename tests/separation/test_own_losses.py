"""Models that return their own loss: trained in layers where it is a mean of the samples' own, refused where not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import oracle
from tests.helpers import F64, SLACK, distance
from tests.integrations.transformer_models import model, tokens
from tests.privacy.judging import TIGHT, Private, examine

B, D = 6, 5


class Classifier(nn.Module):
    def __init__(self, drop=lambda m, h: h):
        super().__init__()
        self.first, self.head, self.drop, self.dropout = nn.Linear(D, 8), nn.Linear(8, 3), drop, nn.Dropout(0.2)

    def forward(self, x, labels):
        logits = self.head(self.drop(self, self.first(x).tanh()))
        return F.cross_entropy(logits, labels), logits


DROPOUT = {
    "none": lambda m, h: h,
    "module": lambda m, h: m.dropout(h),
    "functional": lambda m, h: F.dropout(h, 0.2, m.training),
    "attention": lambda m, h: F.scaled_dot_product_attention(*[h[:, None, :, None]] * 3, dropout_p=0.2)[:, 0, :, 0],
}


def first(out, target):
    return out[0]


@pytest.mark.parametrize("drop", DROPOUT)
def test_a_mean_loss_trains_in_layers(drop):
    inputs = torch.randn(B, D, dtype=F64), torch.randint(3, (B,))
    private = Private(Classifier(DROPOUT[drop]).double(), TIGHT)
    private.backward(inputs, inputs[1], first)
    assert not private.wrapped.runs_by_sample
    assert private.wrapped.separation.proved
    if drop == "none":
        examine(Classifier(), inputs, inputs[1], first)


def test_bert_with_dropout():
    """Opacus' BERT tutorial."""
    given = {**tokens(), "labels": torch.randint(3, (3,))}
    private = Private(model("bert", hidden_dropout_prob=0.1), TIGHT, lambda m, x: m(**x)[0])
    for module in private.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    private.backward((given,), given["labels"], lambda out, y: out)
    assert not private.wrapped.runs_by_sample


def test_a_mean_over_tokens_and_a_later_batch_that_ignores_some():
    """The first batch ignores nothing; in the second a sample is ignored whole, so the others would count more."""
    gpt2 = model("gpt2").to(F64)
    private = Private(gpt2, TIGHT, lambda m, x: m(**x)[0])
    ids = torch.randint(3, 50, (4, 7))
    given = {"input_ids": ids, "labels": ids.clone()}
    private.backward((given,), ids, lambda out, y: out)
    assert not private.wrapped.runs_by_sample
    labels = ids.clone()
    labels[3] = -100
    later = {"input_ids": ids, "labels": labels}
    with pytest.raises(RuntimeError, match="nll_loss"):
        private.backward((later,), ids, lambda out, y: out)
    assert private.nothing_summed()


def as_many_of_each(x, labels):
    """Some ignored, as many of each sample."""
    labels = labels.clone()
    labels[:, :2] = -100
    return x, labels


class Tagger(nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.inner, self.head, self.reduce = nn.Linear(D, 8), nn.Linear(8, 3), reduce

    def forward(self, x, labels):
        return self.reduce(self.head(self.inner(x).tanh()), labels)


def over_tokens(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def by_hand(logits, labels):
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.sum() / (labels != -100).sum()


def of_samples(logits, labels):
    losses = F.cross_entropy(logits.mT, labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1).clamp_min(1)).mean()


def test_ignored_alike_and_then_not():
    x, labels = torch.randn(B, 4, D, dtype=F64), torch.randint(3, (B, 4))
    private = Private(Tagger(over_tokens).double(), TIGHT)
    private.backward(as_many_of_each(x, labels), labels, lambda out, y: out)
    later = labels.clone()
    later[0, :3] = -100
    with pytest.raises(RuntimeError, match="nll_loss"):
        private.backward((x, later), labels, lambda out, y: out)


def test_a_weighted_mean_by_hand_never_moves_the_others():
    x, labels = torch.randn(B, 4, D, dtype=F64), torch.randint(3, (B, 4))
    private = Private(Tagger(by_hand).double(), TIGHT)
    inputs = (x, labels)
    try:
        whole = private.backward(inputs, labels, lambda out, y: out)
    except RuntimeError as refusal:
        assert "aten.sum" in str(refusal) or "aten.div" in str(refusal)
        return
    for i in range(B):
        rest = oracle.take((inputs, labels), [j for j in range(B) if j != i])
        assert distance(whole, private.backward(*rest, lambda out, y: out)) <= TIGHT * SLACK


def test_a_mean_of_each_sample_trains_whatever_is_ignored():
    x, labels = torch.randn(B, 4, D, dtype=F64), torch.randint(3, (B, 4))
    labels[1] = labels[2, 1:] = -100
    private = examine(Tagger(of_samples), (x, labels), labels, lambda out, y: out)
    assert not private.wrapped.runs_by_sample


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: logits.logsumexp((0, 1)).sum(),
        lambda logits, labels: logits.max(),
        lambda logits, labels: logits.norm(),
        lambda logits, labels: F.cross_entropy(logits[:, 0], labels[:, 0]) * logits.detach().mean(),
        lambda logits, labels: F.cross_entropy(logits[:, 0] @ logits[:, 0].mT, torch.arange(len(logits))),
        lambda logits, labels: F.cross_entropy(logits[labels >= 0], labels[labels >= 0]),
        lambda logits, labels: F.cross_entropy(logits.mT, labels, reduction="none")[labels >= 0].mean(),
        lambda logits, labels: F.mse_loss(logits[labels >= 0], torch.zeros_like(logits[labels >= 0])),
        lambda logits, labels: F.cross_entropy(logits.mT, labels, weight=torch.ones(3).to(logits)),
        lambda logits, labels: F.cross_entropy(logits.mT, labels, ignore_index=0),
    ],
    ids=[
        *("logsumexp", "max", "norm", "scaled", "contrastive", "picked", "a mean of picked", "squares of picked"),
        *("class weights", "a padding id"),
    ],
)
def test_other_losses_of_the_batch(loss):
    x, labels = torch.randn(B, 4, D, dtype=F64), torch.randint(3, (B, 4))
    private = Private(Tagger(loss).double(), TIGHT)
    try:
        private.backward((x, labels), labels, lambda out, y: out)
    except RuntimeError as refusal:
        assert "aten" in str(refusal)
        assert private.nothing_summed()
    else:
        assert private.wrapped.runs_by_sample  # which computes the same on this batch
