"""Gradients of 16 bits on their way from the loss to the parameters, which a mean over the batch does not survive.

A mean divides every backprop by B. In float32 multiplying by B takes that back, to some units of the last digit; a
backprop of 16 bits has been rounded by up to 2⁻⁹ (bfloat16) or 2⁻¹² (float16) in between, each B another way. So one
sample more or less turns the clipped gradients of all others a little: by B of such errors together, 9 times the norm
they are clipped to for 4096 samples alike. Scaling by B before the rounding would not do: the quotient has been rounded
in float32, and the product may fall to the other side of a 16-bit number's limit. A sum has no divisor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dpfast.capture.recorder import Recorder
from dpfast.capture.trees import tensors

NARROW = (torch.bfloat16, torch.float16)


class Watch:
    """Of the whole model's forwards: has the recorder told if a backward goes through 16 bits anywhere.

    Layers tell of their own backprops; between them, and where those with parameters compute in float32 (adapters of a
    frozen 16-bit model, float32 heads), this looks at the graph, down to the first 16-bit operators. Where there are
    none, it looks again at forwards 2, 4, 8 and so on, and where a layer is met in a new layout. What the loss does to
    the model's output is not seen.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.forwards = 0
        self.found = False

    def look(self, outputs: list[torch.Tensor], uncompiled: Callable[[], Any] | None = None) -> None:
        """A training forward has returned ``outputs``, which have gradients.

        What a compiler has made shows nothing of what is inside; ``uncompiled`` then runs the model without it.
        """
        if not (self.recorder.loss_is_mean and outputs):
            return
        self.forwards += 1
        again = not self.forwards & (self.forwards - 1) or bool(self.recorder.new_layouts - self.recorder.verified)
        if uncompiled is None:
            if self.found or again or self._possible(outputs):
                self.found = self._mark(outputs, hook=True)
            return
        if again:
            self.found = self._mark([x for x in tensors(uncompiled()) if x.requires_grad], hook=False)
        for x in outputs if self.found else []:
            x.register_hook(partial(_tell, self.recorder, "a compiled part of the model", torch.bfloat16))

    def _possible(self, outputs: list[torch.Tensor]) -> bool:
        held = (*self.recorder.names, *outputs)
        return torch.is_autocast_enabled(outputs[0].device.type) or any([x.dtype in NARROW for x in held])

    def _mark(self, outputs: list[torch.Tensor], hook: bool) -> bool:
        """Whether there are 16-bit operators below; with ``hook`` they tell of gradients that come to them."""
        found = False
        nodes: list[Any] = [x.grad_fn for x in outputs]
        seen = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            narrow = next((meta.dtype for meta in node._input_metadata if meta.dtype in NARROW), None)
            if narrow is None:
                nodes += [below for below, _ in node.next_functions]
                continue
            found = True
            if hook:
                node.register_prehook(partial(_tell, self.recorder, f"{node.name()} of the model", narrow))
        return found


def _tell(recorder: Recorder, where: str, dtype: torch.dtype, gradients: Any) -> None:
    if isinstance(gradients, torch.Tensor) or any(gradient is not None for gradient in gradients):
        recorder.narrowed = recorder.narrowed or (where, dtype)


def refusal(where: str, dtype: torch.dtype, batch: int) -> str:
    """Why, and what to do instead."""
    name = str(dtype).removeprefix("torch.")
    return (
        f"loss_reduction='mean' with gradients of {name} (at {where}): the mean has divided them by {batch}, which in "
        f"16 bits rounds every sample's gradient, differently for each batch size, so that one sample would move the "
        f"clipped sum by more than max_grad_norm. Give make_private loss_reduction='sum', let the loss add up the "
        f"samples (reduction='sum') and divide the learning rate by the batch size; or give it criterion= and "
        f"grad_sample_mode='ghost', and call the criterion that it returns, which needs no divisor and keeps the mean"
    )
