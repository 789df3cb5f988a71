"""What a model's entry does where rows are packed: where segments lie, their attention, trials that they are apart."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.recorder import OUTSIDE, Recorder, running_backward
from dpfast.capture.segments import ELSEWHERE, PACKED, Segments
from dpfast.capture.shift import inside_checkpoint
from dpfast.capture.trees import map_tensors, tensors
from dpfast.distributed.ranks import Ranks
from dpfast.layers.segment_attention import SegmentAttention
from dpfast.refusals import SamplesMeetError, UnitsError
from dpfast.separation import SegmentsApart, kept, kind
from dpfast.separation.schedule import Schedule

MOST_KINDS = 32  # of calls that are tried


class PackedForward:
    """The part of :class:`~dpfast.model.model_forward.ModelForward` that is there for packed rows."""

    def __init__(self, module: nn.Module, recorder: Recorder, forward: Callable[..., Any]):
        self.module, self.recorder, self.forward = module, recorder, forward
        self.attention: SegmentAttention | None = None  # of the last forward, or of that whose backward runs
        self.carries = False  # a trial has shown that what is not finite reaches other segments
        self._schedule = Schedule()
        self._kinds: set[Any] = set()
        self._together = 0  # forwards of a sharded model, from the first that could show something
        self._read: tuple[Any, list[Any], Segments] | None = None  # in this forward, of inputs that are held
        self._hooks: list[Any] = []
        self._entered = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "attention": None, "_read": None, "_hooks": [], "_entered": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _entered=threading.local())

    def starts(self, compiled: bool, args: Any, kwargs: Any) -> None:
        """A training forward starts.

        Raises:
            UnitsError: it is compiled, or does not say where its samples begin.
        """
        if compiled:
            raise UnitsError(f"units={PACKED!r} with torch.compile: leave compiling out")
        self._hook_recomputing()
        self._read = self.attention = None
        segments = self._segments(args, kwargs)
        self.recorder.segments = segments
        self.recorder.batch_sizes = [segments.rows if len(segments) else 0]

    def _segments(self, args: Any, kwargs: Any) -> Segments:
        """Those of a call; a device is waited for once in each forward, though it is asked several times."""
        held = tensors((args, kwargs))
        if any(x.is_inference() for x in held):  # what was written to them nobody knows
            return Segments.of_call(self.forward, args, kwargs)
        key = [(x.data_ptr(), x._version, x.shape, x.stride(), x.dtype) for x in held]
        if self._read is None or self._read[0] != key:
            self._read = key, held, Segments.of_call(self.forward, args, kwargs)
        return self._read[2]

    @contextmanager
    def running(self, args: Any, kwargs: Any) -> Iterator[None]:
        """The model runs within, in training: attention is over one segment at a time, and what the model has compiled
        runs as it is written, where that can be seen."""
        recorder = self.recorder
        evaluates = not (torch.is_grad_enabled() or inside_checkpoint())
        plain = not recorder.packed or recorder.paused or evaluates or recorder.batch_size == 0
        if plain or SegmentAttention.running() is not None:
            yield
            return
        segments = recorder.segments = self._segments(args, kwargs)
        self.attention = SegmentAttention(segments)
        self.attention.carries |= self.carries
        with self.attention, _uncompiled():
            yield

    def is_of(self, segments: Segments | None, attention: SegmentAttention | None) -> None:
        """What comes now, a backward perhaps, is of a forward with these."""
        self.recorder.segments, self.attention = segments, attention

    def on_none(self, run: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
        """``run(args, kwargs)`` on rows without a position, for which one of zeros stands in; no layer records it."""

        def one(x: Tensor) -> Tensor:
            return x.new_zeros([n or 1 for n in x.shape]) if x.numel() == 0 and x.dim() > 1 else x

        with kept(self.module), self.recorder.setting(segments=None):
            out = run(*map_tensors(one, (args, kwargs)))
        return map_tensors(lambda x: x.narrow(1, 0, 0) if x.dim() > 1 else x.masked_fill(x.new_ones(()).bool(), 0), out)

    def check(self, run: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> None:
        """Try on this batch whether segments are kept apart, if it is time.

        Raises:
            SamplesMeetError: they are not.
        """
        recorder = self.recorder
        if not recorder.verifies or running_backward() != OUTSIDE or not len(recorder.segments or ()):
            return
        segments = self._segments(args, kwargs)  # a look at rows may have come before
        if segments.most_in_a_row < 2:
            return
        this = kind(args, kwargs, recorder.batch_size, 0)
        new = self._is_new(this)
        due = self._schedule.due()
        if not (new or due):
            return
        with self._schedule.checking(again=not new):
            self._try(run, args, kwargs, segments, self._schedule.steps, digits=None if new else 1)
        self._kinds.add(this)

    def _is_new(self, this: Any) -> bool:
        return this not in self._kinds and len(self._kinds) < MOST_KINDS

    def check_together(self, run: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> list[int]:
        """As :meth:`check`, of a sharded model, whose ranks gather its parameters in each forward of a trial.

        In forwards 1, 2, 4, 8 and so on all ranks try the batch of that rank which has most samples in a row; and one
        that its rank has not called the model in such a way with before.

        Returns:
            The rows that each rank has.

        Raises:
            SamplesMeetError: samples of a row are not kept apart.
            UnitsError: of some rank's batch it cannot be told where its samples begin.
        """
        recorder = self.recorder
        segments: Segments | None = None
        error: UnitsError | None = None
        try:
            segments = self._segments(args, kwargs)
        except UnitsError as raised:  # the other ranks would wait for this one
            error = raised
        most, rows = (-1, 0) if segments is None else (segments.most_in_a_row, segments.rows if len(segments) else 0)
        new = most > 1 and self._is_new(kind(args, kwargs, rows, 0))
        every = recorder.ranks.gathered([most, rows, new])
        if any(its[0] < 0 for its in every):
            raise error or UnitsError(ELSEWHERE)
        most_of = [its[0] for its in every]
        anew = [rank for rank, its in enumerate(every) if its[2]]
        forwards = self._together + (self._together > 0 or max(most_of) > 1)
        if recorder.verifies and max(most_of) > 1 and (anew or not forwards & (forwards - 1)):
            rank = anew[0] if anew else most_of.index(max(most_of))
            args, kwargs = batch_of(recorder.ranks, rank, (args, kwargs))
            segments = Segments.of_call(self.forward, args, kwargs)
            self._try(run, args, kwargs, segments, forwards, digits=None)
            self._kinds.add(kind(args, kwargs, segments.rows, 0))
        self._together = forwards
        return [int(its[1]) for its in every]

    def _try(
        self,
        run: Callable[[Any, Any], Any],
        args: Any,
        kwargs: Any,
        segments: Segments,
        seed: int,
        digits: int | None,
    ) -> None:
        recorder = self.recorder
        inputs = args, kwargs
        trial = SegmentsApart(run, self.forward, inputs, segments, recorder, self.module, seed, self._agreed)
        with torch.random.fork_rng(), recorder.setting(segments=segments):
            why = trial.why(digits)
            self.carries = self.carries or (not why and trial.carries())
        if why:
            raise SamplesMeetError(why)

    def _agreed(self, why: str) -> str:
        """``why``, or that another rank of a sharded model has one, which would go on alone with other forwards."""
        ranks = self.recorder.ranks
        if ranks.sharded and any(its[0] for its in ranks.gathered([bool(why)])):
            return why or ELSEWHERE
        return why

    def remove(self) -> None:
        """No module has a hook of ours any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook_recomputing(self) -> None:
        """What a checkpoint computes again runs in the backward, outside of the model's forward."""
        if self._hooks:
            return
        for module in self.module.modules():  # the model itself is being called, and has an entry of its own
            if module._modules and module is not self.module:
                self._hooks.append(module.register_forward_pre_hook(self._enter))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, args: Any) -> None:
        again = running_backward() != OUTSIDE and SegmentAttention.running() is None
        within = self.attention if again and self.recorder.packed and not self.recorder.paused else None
        if within is not None:
            within.__enter__()
        self._stack().append((module, within))

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        stack = self._stack()
        if not stack or stack[-1][0] is not module:  # a hook of others has raised before ours
            return
        _, within = stack.pop()
        if within is not None:
            within.__exit__(None, None, None)

    def _stack(self) -> list[tuple[nn.Module, SegmentAttention | None]]:
        if not hasattr(self._entered, "stack"):
            self._entered.stack = []
        return self._entered.stack


def batch_of(ranks: Ranks, rank: int, inputs: Any) -> Any:
    """The inputs of a model on that rank, on the device of those of this one; all ranks ask together."""
    given = tensors(inputs)
    device = given[0].device if given else torch.device("cpu")
    held = ranks.from_rank(rank, map_tensors(lambda x: x.detach().cpu(), inputs))
    return map_tensors(lambda x: x.to(device), held)


def _uncompiled() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    from dpfast.model import compiling

    return compiling.uncompiled()
