"""The model's entry, whose outputs tell a backward pass which forward it is of."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dpfast.forwards import trains
from dpfast.layers.recorder import OUTSIDE, Recorder, running_backward
from dpfast.layers.shift import inside_recomputation
from dpfast.model_forward import ModelForward
from dpfast.once import ForwardPass
from dpfast.trees import tensors


class CountedForward(ModelForward):
    """Tells the book's :class:`~dpfast.batches.Batches` of training forwards and of backward passes through them."""

    def _call(self, compiler: Any, args: Any, kwargs: Any) -> Any:
        recorder: Any = self.recorder
        outermost = not (recorder.paused or recorder.inside or recorder.token is not None)
        if not outermost:
            return super()._call(compiler, args, kwargs)
        forward = ForwardPass()
        with recorder.setting(under_way=forward if running_backward() == OUTSIDE else None):
            out = super()._call(compiler, args, kwargs)
        if recorder.evaluating or not trains(self.module):
            return out
        batches = recorder.batches
        outputs = [x for x in tensors(out) if x.requires_grad]
        forward.saw(args, kwargs, recorder.batch_size, self.batch_dim)
        if running_backward() == OUTSIDE or inside_recomputation():  # else a checkpoint computes it again
            batches.forward(forward)
        for x in outputs:
            # Not the output's own node: that would hold the hook, which would hold the node.
            below = [node for node, _ in x.grad_fn.next_functions if node is not None] if x.grad_fn else []
            x.register_hook(partial(_passes, recorder, forward, below))
        return out


def _passes(recorder: Recorder, forward: ForwardPass, below: list[Any], gradient: Tensor) -> None:
    recorder.passing[forward] = below
