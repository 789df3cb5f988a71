"""Losses of each position from hidden states and a head: which of the ways a call takes, and what that stores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

from dpfast import ops
from dpfast.layers import family
from dpfast.layers.head import can_recompute, head_losses
from dpfast.layers.linear import Linear
from dpfast.model.forwards import LayerForward, trains
from dpfast.planning.logits import fit

POSITIONS = 1 << 24  # elements of logits at a time, where an ordinary head stores no more of them


def position_losses(
    hidden: Tensor, head: nn.Module, labels: Tensor, ignore_index: int, keep_logits: bool | None
) -> Tensor:
    """``[B, T]``: 0 where the label is ``ignore_index``. See :func:`dpfast.losses.linear_cross_entropy`."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plainly(head(hidden), labels, ignore_index)
    targets = labels.masked_fill(labels == ignore_index, ops.IGNORED)
    if not _is_linear(head):
        return _Stored.apply(_checked(head(hidden), targets), targets, False)
    weight: Any = head.weight
    _check_range(targets, len(weight))
    if torch.is_grad_enabled() and not _keeps(hidden, head, keep_logits):
        forward = vars(head).get("forward")
        if isinstance(forward, LayerForward) and trains(head):
            return head_losses(forward.tap, hidden, weight, head.bias, targets)
        return _in_parts(hidden, head, targets)
    return _Stored.apply(head(hidden), targets, True)


def _plainly(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """For a compiler, or under vmap."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none")
    return flat.view(labels.shape)


def _is_linear(head: nn.Module) -> bool:
    """Whether nobody but us has the logits that ``head`` returns: a plain linear layer, with no hooks on its output."""
    seen = head._forward_hooks or any(
        not hook.__module__.startswith("dpfast.") for hook in hooks._global_forward_hooks.values()
    )
    return isinstance(head, nn.Linear) and type(family(head)) is Linear and not seen


def _keeps(hidden: Tensor, head: Any, keep_logits: bool | None) -> bool:
    """Whether the logits are stored."""
    forward = vars(head).get("forward")
    private = isinstance(forward, LayerForward) and trains(head)
    if private and not can_recompute(forward.tap, hidden):  # type: ignore[union-attr]
        return True
    if private and head.bias is not None and forward.tap.recorder.packed:  # type: ignore[union-attr]
        return True  # its gradient would come as a sum over the row
    if keep_logits is not None:
        return keep_logits
    device = hidden.device
    narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    nbytes = hidden.shape[0] * hidden.shape[1] * len(head.weight) * narrow.itemsize
    if not private:
        return fit(nbytes, device)
    tap = forward.tap  # type: ignore[union-attr]
    return tap.recorder.planner.stores_logits(tap.name, nbytes, device)


def _checked(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[:2] != targets.shape or logits.dim() != 3:
        raise ValueError(
            f"head returned {list(logits.shape)} for hidden states of {list(targets.shape)} positions: a tensor "
            f"[B, T, V] of logits is needed"
        )
    _check_range(targets, logits.shape[2])
    return logits


def _check_range(targets: Tensor, classes: int) -> None:
    """Without a wait, and without a look of Python's at what samples hold."""
    right = ((targets >= 0) & (targets < classes)) | (targets == ops.IGNORED)
    torch._assert_async(right.all(), f"labels: one is neither ignore_index nor a class of the {classes} of the head")


class _Stored(torch.autograd.Function):
    """Losses ``[B, T]`` of logits ``[B, T, V]``; with ``alone`` nobody else has these, and G is written over them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, alone: bool) -> Tensor:  # type: ignore[override]
        losses, normalisers = ops.token_losses(logits.detach(), targets)
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.alone = alone
        return losses

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, targets, normalisers = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: gradients of this gradient may be asked for
            return _differentiable(logits, targets, weights), None, None
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph=True
        weights = weights.masked_fill(targets == ops.IGNORED, 0)
        return ops.logit_gradient(logits, targets, normalisers, weights, ctx.alone and not again), None, None


def _differentiable(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the logits, as a function of them and of ``weights``."""
    counts = targets != ops.IGNORED
    wide = logits.to(weights.dtype)
    hits = F.one_hot(targets.masked_fill(~counts, 0), logits.shape[2])
    G = (wide.softmax(2) - hits) * (weights * counts).unsqueeze(2)
    return G.to(logits.dtype)


def _in_parts(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Of an ordinary head: some positions at a time, each computed again in the backward."""

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return _Stored.apply(head(hidden), targets, True)

    step = max(1, POSITIONS // max(1, hidden.shape[0] * len(head.weight)))  # type: ignore[arg-type]
    parts = zip(hidden.split(step, 1), targets.split(step, 1), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts], 1)
