"""The model's entry, whose outputs tell a backward pass which forward it is of."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dpfast.capture.mean_in_16_bits import Watch
from dpfast.capture.recorder import OUTSIDE, running_backward
from dpfast.capture.trees import tensors
from dpfast.capture.which_samples import ForwardPass
from dpfast.model.forwards import trains
from dpfast.model.model_forward import ModelForward
from dpfast.model.packed_forward import PackedForward
from dpfast.separation import aside


class CountedForward(ModelForward):
    """Tells :class:`~dpfast.clipping.samples_once.Batches` of training forwards and of backward passes through them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.watch = Watch(self.recorder)

    def _call(self, compiler: Any, args: Any, kwargs: Any) -> Any:
        recorder: Any = self.recorder
        outermost = not (recorder.paused or recorder.inside or recorder.token is not None)
        if not outermost:
            return super()._call(compiler, args, kwargs)
        forward, before = ForwardPass(), running_backward() == OUTSIDE  # else a checkpoint computes it again
        with recorder.setting(under_way=forward if before else None):
            out = super()._call(compiler, args, kwargs)
        if recorder.evaluating or not trains(self.module):
            return out
        outputs = [x for x in tensors(out) if x.requires_grad]
        forward.saw(args, kwargs, recorder.batch_size, self.batch_dim)
        if recorder.packed:
            forward.segments, forward.attention = recorder.segments, self.packed.attention
        if before:
            recorder.batches.forward(forward)
        compiled = partial(self._plainly, args, kwargs) if self._compiler is not None else None
        self.watch.look(outputs, compiled)
        for x in outputs:
            # Not the output's own node: that would hold the hook, which would hold the node.
            below = [node for node, _ in x.grad_fn.next_functions if node is not None] if x.grad_fn else []
            x.register_hook(partial(_passes, recorder, self.packed, forward, below))
        return out

    def _plainly(self, args: Any, kwargs: Any) -> Any:
        """What the model returns without taps and compilers; nothing of it stays."""
        with aside(self.module), self.recorder.setting(paused=True), self._uncompiled():
            return self._run(args, kwargs)


def _passes(recorder: Any, packed: PackedForward, forward: ForwardPass, below: list[Any], gradient: Tensor) -> None:
    if recorder.packed:
        packed.is_of(forward.segments, forward.attention)
    if recorder.opens():  # torch.autograd.grad
        return
    if not forward.told:  # a checkpoint around the model has computed it again, within this pass
        recorder.batches.forward(forward)
    recorder.passing[forward] = below
