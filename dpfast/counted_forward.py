"""The model's entry, whose outputs tell a backward pass which forward it is of."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dpfast.forwards import trains
from dpfast.layers.recorder import OUTSIDE, running_backward
from dpfast.model_forward import ModelForward
from dpfast.once import ForwardPass
from dpfast.trees import tensors


class CountedForward(ModelForward):
    """Tells the book's :class:`~dpfast.batches.Batches` of training forwards and of backward passes through them."""

    def _call(self, compiler: Any, args: Any, kwargs: Any) -> Any:
        recorder: Any = self.recorder
        outermost = not (recorder.paused or recorder.inside or recorder.token is not None)
        out = super()._call(compiler, args, kwargs)
        if not outermost or recorder.evaluating or not trains(self.module):
            return out
        batches = recorder.batches
        outputs = [x for x in tensors(out) if x.requires_grad]
        forward = ForwardPass(args, kwargs, recorder.batch_size, self.batch_dim)
        if running_backward() == OUTSIDE:  # else a checkpoint computes it again
            forward.samples = batches.forward(recorder.batch_size)
        for x in outputs:
            # Not the output's own node: that would hold the hook, which would hold the node.
            below = [node for node, _ in x.grad_fn.next_functions if node is not None] if x.grad_fn else []
            x.register_hook(partial(_passes, batches.passing, forward, below))
        return out


def _passes(passing: dict[ForwardPass, list[Any]], forward: ForwardPass, below: list[Any], gradient: Tensor) -> None:
    passing[forward] = below
