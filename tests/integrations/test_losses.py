"""Per-sample losses: what they compute, and that no sample sees another."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast import head_losses
from dpfast.losses import causal_lm_loss, linear_cross_entropy, sequence_classification_loss, token_loss
from dpfast.planning import logits as planning
from dpfast.reference import cross_entropy


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


def head_batch(rows=3, length=5, width=4, vocabulary=11, dtype=torch.float64):
    hidden = torch.randn(rows, length, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[1:2, 3:], labels[2:] = -100, -100
    return hidden, nn.Linear(width, vocabulary, dtype=dtype), labels


@pytest.mark.parametrize("keep", [True, False, None])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_head_with_its_loss_is_the_loss_of_its_logits(monkeypatch, keep, reduction, rows):
    """Outside of private training: an ordinary function, differentiable twice."""
    monkeypatch.setattr(head_losses, "POSITIONS", 2 * 3 * 11)
    monkeypatch.setattr(cross_entropy, "CHUNK", 22)
    hidden, head, labels = head_batch(rows)
    inputs = (hidden, *head.parameters())
    want = token_loss(head(hidden), labels, reduction=reduction)
    found = linear_cross_entropy(hidden, head, labels, reduction=reduction, keep_logits=keep)
    torch.testing.assert_close(found, want)
    weights = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, weights), torch.autograd.grad(want, inputs, weights))


def test_a_head_with_its_loss_can_be_differentiated_again():
    hidden, head, labels = head_batch()
    weight, bias = head.parameters()

    found, want = (
        torch.autograd.grad(loss, hidden, create_graph=True)[0]
        for loss in (linear_cross_entropy(hidden, head, labels), token_loss(head(hidden), labels))
    )
    torch.testing.assert_close(found, want)
    inputs = (hidden, weight, bias)
    twice = [torch.autograd.grad(slope.square().sum(), inputs) for slope in (found, want)]
    torch.testing.assert_close(*twice)


def test_a_graph_that_is_kept_keeps_the_logits():
    hidden, head, labels = head_batch()
    loss = linear_cross_entropy(hidden, head, labels, keep_logits=True)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), first)


def test_a_hook_keeps_the_logits_that_it_was_shown():
    hidden, head, labels = head_batch()
    shown = []
    head.register_forward_hook(lambda module, args, logits: shown.append(logits.detach()))
    linear_cross_entropy(hidden, head, labels, keep_logits=True).backward()
    torch.testing.assert_close(shown[0], head(hidden).detach())


def test_a_head_that_is_no_linear_layer():
    """Its last operator needs its output, which nobody writes over."""
    hidden, head, labels = head_batch()
    head = nn.Sequential(head, nn.Tanh())
    want = token_loss(head(hidden), labels)
    found = linear_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(found, want)
    inputs = (hidden, *head.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(want, inputs))


class Largest(TorchDispatchMode):
    """How many tensors of at least ``least`` elements come to be."""

    def __init__(self, least):
        super().__init__()
        self.least, self.known, self.made = least, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and x.numel() >= self.least:
                storage = x.untyped_storage()._cdata
                self.made += storage not in [each.untyped_storage()._cdata for each in self.known]
                self.known.append(x)  # or another one would have its address
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep, tensors", [(True, 1), (False, 0)])
def test_tensors_as_large_as_the_logits(monkeypatch, dtype, keep, tensors):
    monkeypatch.setattr(head_losses, "POSITIONS", 30)
    monkeypatch.setattr(cross_entropy, "CHUNK", 22)
    hidden, head, labels = head_batch(dtype=dtype)
    with Largest(3 * 5 * 11) as largest:
        linear_cross_entropy(hidden, head, labels, keep_logits=keep).backward()
    assert largest.made == tensors
    with Largest(3 * 5 * 11) as largest:
        token_loss(head(hidden), labels).backward()
    assert largest.made >= 4


def test_free_memory_decides(monkeypatch):
    cpu = torch.device("cpu")
    assert planning.fit(1 << 20, cpu)
    assert planning.free_memory(cpu) is None or planning.free_memory(cpu) > 0
    monkeypatch.setattr(planning, "SMALL", 0)
    for free, nbytes, stored in ((100, 50, True), (100, 51, False), (None, 1 << 60, True)):
        monkeypatch.setattr(planning, "free_memory", lambda device, free=free: free)
        assert planning.fit(nbytes, cpu) == stored
    assert planning.free_memory(torch.device("meta")) is None


def test_hidden_states_labels_and_heads_that_do_not_fit_are_refused():
    hidden, head, labels = head_batch()
    for bad in (hidden[0], hidden[:, :-1]):
        with pytest.raises(ValueError, match=r"\[B, T, d\] and \[B, T\] are needed"):
            linear_cross_entropy(bad, head, labels)
    with pytest.raises(ValueError, match="reduction='max'"):
        linear_cross_entropy(hidden, head, labels, reduction="max")
    with pytest.raises(ValueError, match="head returned"):
        linear_cross_entropy(hidden, nn.Sequential(head, nn.Flatten()), labels)
    labels[0, 0] = 11
    for keep in (True, False):
        with pytest.raises(RuntimeError, match="labels: one is neither ignore_index nor a class of the 11"):
            linear_cross_entropy(hidden, head, labels, keep_logits=keep)
    with pytest.raises(RuntimeError, match="labels: one is neither"):
        linear_cross_entropy(hidden, nn.Sequential(head), labels)
