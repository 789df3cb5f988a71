"""A private step as a function of tensors, which can be traced, captured, or run as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.strangers import Strangers
from dpfast.capture.trees import map_tensors, tensors
from dpfast.clipping.clipped_sum import ClippedSum
from dpfast.clipping.closing import closed
from dpfast.clipping.compiled_backward import mark_backward
from dpfast.refusals import LayoutError

# Clipped sums by parameter, tensors of its own and which samples are lost, to what takes the place of the sums.
UpdateFunction = Callable[[Mapping[Any, Tensor], Sequence[Tensor], Tensor], list[Tensor]]


class StepFunction:
    """Forward, loss, backward, norms, factors and clipped sums of a batch, and the update if there is one.

    It is called with thresholds, presence, shifts, the batch's tensors and those of the update. It returns loss,
    factors, and what is made of the sums.

    Args:
        model, recorder: of the private model.
        loss: called with the model and the batch.
        size: how many samples the batch has.
        batch: what else is in it than the tensors that a call gives.
        update: what follows the clipped sums in the same function.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        recorder: ClippedSum,
        size: int,
        batch: Sequence[Any],
        update: UpdateFunction | None = None,
    ):
        self.model, self.loss, self.recorder, self.size, self.batch = model, loss, recorder, size, batch
        self.update = update
        self.shifted = [*recorder.shift.shifts]
        self.setting = recorder.clips_with(size)
        self.clipped: list[Any] = []  # parameters of which the last call has made sums
        self.strangers: Strangers | None = None  # of a recording: what it would keep is refused
        self.marks = False  # where the backward ends

    def __call__(self, thresholds: Tensor, present: Tensor, *rest: Tensor) -> list[Tensor]:
        """In a recording nothing is updated where a sample is lost; otherwise such samples are left out of the sums."""
        recorder, strangers = self.recorder, self.strangers
        shifts, rest = rest[: len(self.shifted)], rest[len(self.shifted) :]
        count = len(tensors(self.batch))
        its_tensors, of_update = iter(rest[:count]), rest[count:]
        result: list[Tensor] = []

        def close() -> None:
            if strangers is not None:
                strangers.ended = True
            if self.marks:
                mark_backward()
            taken = recorder.take()
            forms = {p: its for p, its in taken.items() if recorder.tracked is None or p in recorder.tracked}
            self.clipped[:] = forms
            with torch.no_grad(), torch.autocast(thresholds.device.type, enabled=False):
                found, out = closed(forms, self.setting, thresholds, present)
                if self.update is not None:
                    lost = torch.zeros_like(found.lost) if strangers is None else found.lost
                    out = self.update(dict(zip(self.clipped, out, strict=True)), of_update, lost)
            result.extend([*found, *out])

        before = recorder.shift.shifts
        with recorder.setting(inside=True, batch_sizes=[self.size], new_layouts=set(), closing=close):
            recorder.shift.set(dict(zip(self.shifted, shifts, strict=True)))
            recorder.shift.start_forward()
            try:
                if strangers is not None:
                    shifted = recorder.shift.at(self.shifted)
                    strangers.start([*self.model.parameters(), *self.model.buffers(), *shifts, *rest, *shifted])
                with strangers or nullcontext():
                    loss = self.loss(self.model, *map_tensors(lambda _: next(its_tensors), self.batch))
                    loss.backward()
            finally:
                recorder.shift.set(before)
            if strange := recorder.new_layouts - recorder.verified:
                raise LayoutError(f"layers {sorted(name for name, *_ in strange)} were not seen in the first step")
        return [loss.detach(), *result]


def is_captured(x: Tensor) -> bool:
    """Whether a step on tensors such as ``x`` is recorded as a CUDA graph."""
    return x.is_cuda


def captured(
    run: Callable[..., list[Tensor]], given: Sequence[Tensor], in_place: int = 0, used_up: Sequence[int] = ()
) -> Callable[..., list[Tensor]]:
    """``run`` as a CUDA graph; what it returns is copied, as the next replay writes over it.

    Args:
        in_place: so many of the last of ``given`` are memory that the graph works on, and not copied into it.
        used_up: places of what serves one replay alone, as a key does: it is zeros in the graph when it has run.
    """
    copied = len(given) - in_place
    held = [*(x.clone() for x in given[:copied]), *given[copied:]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever a first run sets up is there when it is captured
        run(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*held)
        for place in used_up:
            held[place].zero_()

    def replay(*given: Tensor) -> list[Tensor]:
        torch._foreach_copy_(held[:copied], list(given[:copied]))
        graph.replay()
        return [x.clone() for x in out]

    return replay
