"""Losses per sample for Transformers: a sample's loss looks at its own tokens and at no other sample.

A loss that averages over all tokens of a batch, as Transformers' own does, weighs every sample by the others' lengths:
one sample more changes the gradients of all the others, and clipping bounds nothing. Here tokens are averaged within
each sample first, and samples are reduced after that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpfast.head_losses import position_losses

REDUCTIONS = ("sum", "mean", "none")


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: str = "sum",
    keep_logits: bool | None = None,
) -> Tensor:
    """``token_loss(head(hidden), labels)`` with one tensor of the logits' size in memory, or with none.

    Logits, log-softmax and the gradient of each are five such tensors otherwise, and of a language model the largest
    there are. Here the gradient G of the logits is written over the logits, some positions at a time, and per-sample
    norms and clipped sums are made of the very G that is stored, so that what it was rounded to in 16 bits is no error.
    Without stored logits, they are made anew wherever they are needed: six products in place of four, in float64 for
    the logits, and what two of them may differ by is in the bound on the norm. Where the head's parameters are a
    clipping group of their own, the clipped sum is made as soon as G is there, and G is freed.

    In a private model call it inside of the model's ``forward``, on a submodule ``head``, and return the losses: then
    they are a part of what is checked and clipped. Outside of private training it is an ordinary function of autograd.
    To predict the next token, give ``hidden[:, :-1]`` and ``labels[:, 1:]``.

    Example:
        >>> class Training(nn.Module):
        ...     def forward(self, ids):
        ...         hidden = self.body(ids)
        ...         return linear_cross_entropy(hidden[:, :-1], self.head, ids[:, 1:], reduction="none")

    Args:
        hidden: ``[B, T, d]``.
        head: from hidden states to logits ``[B, T, V]``: ``nn.Linear``, tied to an embedding or not, trained or frozen.
            Of any other module (LoRA, one with hooks on its output) the logits are stored, and G beside them.
        labels: ``[B, T]`` int64; position t is compared with the label at t.
        ignore_index: label of positions that do not count.
        reduction: over the samples, see :func:`causal_lm_loss`; each sample's loss is the mean over its own tokens.
        keep_logits: whether logits are stored. None: if they take no more than half of the memory that is free when
            logits of this size come for the first time. Under ``torch.compile`` and ``torch.func`` they always are.

    Returns:
        A scalar, or ``[B]`` under ``"none"``; float64 for float64, else float32. A sample without a counted token has
        loss 0 and gradient 0, and so has an empty batch.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
        LayoutError: the head of a private model is called outside of the model's forward; or second derivatives are
            asked for, of a head that does not store its logits.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(f"hidden {list(hidden.shape)}, labels {list(labels.shape)}: [B, T, d] and [B, T] are needed")
    _check_reduction(reduction)
    losses = position_losses(hidden, head, labels, ignore_index, keep_logits)
    counted = (labels != ignore_index).sum(1)
    return _reduced(losses.sum(1) / counted.clamp_min(1), reduction)


def causal_lm_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "sum") -> Tensor:
    """Cross-entropy of next tokens: the mean over each sample's own counted tokens, then ``reduction`` over samples.

    Logits at position t are compared with the label at t + 1, as in Transformers: pass the input ids as labels, with
    ``ignore_index`` where a token is not to be predicted (padding, a prompt).

    Args:
        logits: ``[B, T, V]``; 16-bit logits are taken to float32 before the softmax.
        labels: ``[B, T]`` int64.
        ignore_index: label of positions that do not count.
        reduction: over the samples: ``"sum"`` (with ``make_private(loss_reduction="sum")``), ``"mean"`` or ``"none"``.

    Returns:
        A scalar, or ``[B]`` under ``"none"``; float64 for float64 logits, else float32. A sample without a counted
        token has loss 0 and gradient 0, and so has an empty batch.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}: [B, T, V] and [B, T] are needed")
    return token_loss(logits[:, :-1], labels[:, 1:], ignore_index, reduction)


def token_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "sum") -> Tensor:
    """Like :func:`causal_lm_loss` without the shift: for masked language models, tagging and encoder-decoders.

    Args:
        logits: ``[B, T, V]``; position t is compared with the label at t.
        labels: ``[B, T]`` int64.
        ignore_index, reduction: see :func:`causal_lm_loss`, as for what is returned and raised.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}: [B, T, V] and [B, T] are needed")
    flat = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none")
    counted = (labels != ignore_index).sum(1)
    return _reduced(flat.view(labels.shape).sum(1) / counted.clamp_min(1), reduction)


def sequence_classification_loss(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "sum"
) -> Tensor:
    """Cross-entropy of one class per sample.

    Args:
        logits: ``[B, C]``; 16-bit logits are taken to float32 before the softmax.
        labels: ``[B]`` int64. (``[B, 1]`` is refused: broadcast, it would pair each sample with every other.)
        ignore_index: label of samples that do not count; their loss is 0.
        reduction: over the samples; see :func:`causal_lm_loss`. Under ``"mean"`` the divisor is B, not the number of
            counted samples, which would couple them.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}: [B, C] and [B] are needed")
    return _reduced(F.cross_entropy(_wide(logits), labels, ignore_index=ignore_index, reduction="none"), reduction)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: use one of {', '.join(map(repr, REDUCTIONS))}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    _check_reduction(reduction)
    if reduction == "none":
        return losses
    return losses.sum() / max(1, len(losses)) if reduction == "mean" else losses.sum()
