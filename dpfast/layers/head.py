"""The head of a language model with its loss: ``linear_cross_entropy`` where the logits are not to be stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast import ops
from dpfast.capture.forms import Form, Instantiated
from dpfast.capture.recomputed import Recomputed
from dpfast.capture.tap import Call, Tap
from dpfast.layers.base import Layer
from dpfast.refusals import OwnGradientError


class Targets:
    """Of one call, ``[B, T]``; equal to no other's."""

    def __init__(self, targets: Tensor):
        self.targets = targets


class HeadLoss(Layer):
    """``x [B, T, d]`` → losses ``[B, T]`` of a linear head; ``spec`` has the targets.

    Guarantee: as of any layer. What is clipped is made again, and the bounds on the norms hold for what that may differ
    from what the norms were of.
    """

    saves = True

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            raise OwnGradientError(
                "linear_cross_entropy with keep_logits=False has no second derivatives: keep the logits"
            )
        weight, bias = params
        losses, normalisers = ops.head_losses(x, weight, bias, call.spec.targets)
        call.saved = (normalisers,)
        return losses

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        found = self._found(call, G, x, *params)
        return found.gx  # type: ignore[return-value]

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form]]:
        found = self._found(call, G, x, *params, needed=needed)
        if 0 in needed:
            yield 0, Recomputed(self._sides(call, G, x, *params), found.squared, found.bound)
        if 1 in needed:
            assert found.bias is not None
            yield 1, Instantiated(found.bias)

    def _sides(self, call: Call, G: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> ops.HeadSides:
        bias, targets = None if bias is None else bias.detach(), call.spec.targets
        weights = G.masked_fill(targets == ops.IGNORED, 0)
        return ops.HeadSides(x.detach(), weight.detach(), bias, targets, call.saved[0], weights)

    def _found(self, call: Call, G: Tensor, x: Tensor, *params: Any, needed: Sequence[int] = ()) -> ops.HeadBackward:
        """All that this backward is to have, once: whoever asks first has it made, and the second one takes it."""
        if len(call.saved) > 1:
            found: Any = call.saved[1]
            call.saved = call.saved[:1]
            return found
        found = ops.head_backward(self._sides(call, G, x, *params), True, 0 in needed, 1 in needed)
        if needed:
            call.saved = (call.saved[0], found)
        return found


class HeadTap(Tap):
    """A tap of one call: no other has its targets, so that there is no use of it to note."""

    def note_use(self, spec: Any, params: tuple[Any, ...]) -> None:
        """Nothing: no compiler traces it."""


def head_losses(tap: Tap, hidden: Tensor, weight: Any, bias: Any, targets: Tensor) -> Tensor:
    """Losses ``[B, T]`` of the head that ``tap`` is of, no logits being stored."""
    own = HeadTap(tap.recorder, HeadLoss(), tap.name, tap.batch_dim)
    return own(hidden, weight, bias, spec=Targets(targets))


def can_recompute(tap: Tap, hidden: Tensor) -> bool:
    """Whether the rows of ``hidden`` are the samples, each once and in order, and nothing else is to be minded."""
    recorder = tap.recorder
    plain = recorder.token is None and recorder.row_order is None and not (recorder.follows_rows or recorder.by_unit)
    return plain and not recorder.ranks.sharded and tap.batch_dim == 0 and len(hidden) == recorder.batch_size
