"""Losses per sample for Transformers: a sample's loss looks at its own tokens and at no other sample.

A loss that averages over all tokens of a batch, as Transformers' own does, weighs every sample by the others' lengths:
one sample more changes the gradients of all the others, and clipping bounds nothing. Here tokens are averaged within
each sample first, and samples are reduced after that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpfast.capture.segments import Segments
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
    _check_logits(logits, labels)
    return token_loss(logits[:, :-1], labels[:, 1:], ignore_index, reduction)


def token_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "sum") -> Tensor:
    """Like :func:`causal_lm_loss` without the shift: for masked language models, tagging and encoder-decoders.

    Args:
        logits: ``[B, T, V]``; position t is compared with the label at t.
        labels: ``[B, T]`` int64.
        ignore_index, reduction: see :func:`causal_lm_loss`, as for what is returned and raised.
    """
    _check_logits(logits, labels)
    flat = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none")
    counted = (labels != ignore_index).sum(1)
    return _reduced(flat.view(labels.shape).sum(1) / counted.clamp_min(1), reduction)


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}: [B, T, V] and [B, T] are needed")


def segment_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """:func:`causal_lm_loss` of packed rows: the mean over each segment's counted tokens, then ``reduction`` over all
    segments of all rows.

    Logits at position t are compared with the label at t + 1, within a segment: a sample's first token is not
    predicted from the sample before.

    Args:
        logits: ``[rows, length, V]``; 16-bit logits are taken to float32 before the softmax.
        labels: ``[rows, length]`` int64: the input ids, with ``ignore_index`` where a token is not to be predicted.
        position_ids, seq_idx, cu_seqlens: what the model was told of where samples begin, one of these or several;
            ``batch["cu_seq_lens_q"]`` of Transformers is ``cu_seqlens``.
        ignore_index: label of positions that do not count.
        reduction: over the segments; see :func:`causal_lm_loss`.

    Returns:
        A scalar, or ``[segments]`` under ``"none"``, in order of rows; float64 for float64 logits, else float32. A
        segment without a counted token, as one of a single token, has loss 0 and gradient 0.

    Raises:
        ValueError: shapes that do not fit, marks that are missing or disagree, or an unknown reduction.
    """
    _check_logits(logits, labels)
    segments = _segments(labels, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    targets = _next_in_segment(labels, segments, ignore_index)
    flat = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none")
    return _by_segment(flat.view(labels.shape), targets != ignore_index, segments, reduction)


def segment_linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
    keep_logits: bool | None = None,
) -> Tensor:
    """:func:`segment_cross_entropy` of ``head(hidden)``, with the memory of :func:`linear_cross_entropy`.

    In a private model call it inside of the model's ``forward``, and return the losses. Give all of ``hidden`` and
    ``labels``: targets are shifted here.

    Args:
        hidden: ``[rows, length, d]``.
        head, keep_logits: see :func:`linear_cross_entropy`.
        labels, position_ids, seq_idx, cu_seqlens, ignore_index, reduction: see :func:`segment_cross_entropy`, as for
            what is returned and raised.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(f"hidden {list(hidden.shape)}, labels {list(labels.shape)}: [B, T, d] and [B, T] are needed")
    segments = _segments(labels, position_ids=position_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    targets = _next_in_segment(labels, segments, ignore_index)
    losses = position_losses(hidden, head, targets, ignore_index, keep_logits)
    return _by_segment(losses, targets != ignore_index, segments, reduction)


def _segments(labels: Tensor, **marks: Tensor | None) -> Segments:
    if all(mark is None for mark in marks.values()):
        raise ValueError(
            "give position_ids=, seq_idx= or cu_seqlens=, as to the model: nothing else says where samples begin"
        )
    return Segments.of(marks, *labels.shape)


def _next_in_segment(labels: Tensor, segments: Segments, ignore_index: int) -> Tensor:
    """``labels`` moved one to the left, within segments."""
    numbers = segments.numbers.to(labels.device)
    targets = torch.full_like(labels, ignore_index)
    inside = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] >= 0)
    targets[:, :-1] = labels[:, 1:].masked_fill(~inside, ignore_index)
    return targets


def _by_segment(losses: Tensor, counted: Tensor, segments: Segments, reduction: str) -> Tensor:
    """Losses of positions, 0 where they do not count, as means over what counts of each segment."""
    owners = segments.numbers.to(losses.device).flatten()
    inside = owners >= 0
    owners = owners.masked_fill(~inside, 0)
    zeros = losses.new_zeros(max(1, len(segments)))
    sums = zeros.index_add(0, owners, losses.flatten().masked_fill(~inside, 0))
    counts = zeros.index_add(0, owners, (counted.flatten() & inside).to(losses.dtype))
    return _reduced((sums / counts.clamp_min(1))[: len(segments)], reduction)


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
