"""Models that are trained one sample at a time: the ordinary gradient is the per-sample gradient.

No layer is tapped, so whatever autograd can differentiate is exact, a gradient of a gradient too. Autograd adds up the
uses of a parameter; its hook hands the sum over when the pass ends: see :meth:`Recorder.record_whole`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.recorder import Recorder
from dpfast.capture.shift import swapped
from dpfast.capture.traced_tap import TracedTap
from dpfast.layers.generic import Copies
from dpfast.model.forwards import Forward, trains
from dpfast.refusals import NotOneSampleError


class OneByOneForward(Forward):
    """A module with parameters, in such a model. It runs as it is, on a batch of one or none."""

    def __init__(self, module: nn.Module, name: str, recorder: Recorder):
        super().__init__(module)
        self.name, self.recorder = name, recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.recorder
        if recorder.paused or not trains(self.module):
            return self.untapped(recorder, *args, **kwargs)
        recorder.start_forward()
        recorder.check_inside(self.name)
        if recorder.batch_size not in (0, 1):
            raise NotOneSampleError(
                f"module {self.name!r} ({type(self.module).__name__}) is trained at a physical batch of one, as "
                f"make_private(..., max_physical_batch_size=1) has it, but got inputs of {recorder.batch_sizes}: "
                f"iterate over BatchMemoryManager(max_physical_batch_size=1)"
            )
        if not recorder.shift.in_use or recorder.batch_size == 0:
            return self.plain(*args, **kwargs)
        with swapped(self._owners(), self._copies()):
            return self.plain(*args, **kwargs)

    def _owners(self) -> Iterator[nn.Module]:
        """The module and, below it, what has parameters but no forward, such as a ``ParameterList``."""
        yield self.module
        for child in self.module.modules():
            if type(child).forward is nn.Module.forward:
                yield child

    def _copies(self) -> dict[nn.Parameter, Tensor]:
        """The one sample's shifted copy of every trained parameter; the gradient is recorded where it was made."""
        copies = {}
        for p in (p for owner in self._owners() for p in owner._parameters.values()):
            if p in self.recorder.names and p.requires_grad and p not in copies:
                tap = TracedTap(self.recorder, Copies(), self.recorder.names[p])
                copies[p] = tap(torch.zeros(1, device=p.device), p).squeeze(0)
        return copies
