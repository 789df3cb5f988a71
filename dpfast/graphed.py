"""A private step as a graph: forward, backward and clipping of a batch, traced once and replayed without Python.

With batches of one shape, nothing but tensors decides what a step does. So it can be recorded: on a CPU as a list of
operators, on a GPU as a CUDA graph. What looks at samples one by one stays outside of it: which of them a batch has,
and that none counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.capture.refusals import LayoutError
from dpfast.capture.trees import map_tensors, tensors
from dpfast.capture.which_samples import ForwardPass
from dpfast.clipping.at_once import Ended, has_lost, is_fixed, key_of, presence, traced
from dpfast.clipping.closing import Factors, closed
from dpfast.clipping.compiled_backward import mark_backward, with_compiled_backward
from dpfast.model.private_model import FusedHooks
from dpfast.ops import full_precision, needs_full_precision

MOST_GRAPHS = 16  # kinds of calls that are kept: the oldest one goes


class _Seen(NamedTuple):
    """What the first call of a kind has shown."""

    batch: int
    inputs: Any  # of the model: what it was called with, each tensor as its place in the batch


class _Graph(NamedTuple):
    replay: Callable[..., list[Tensor]]
    clipped: list[Any]  # parameters of which it makes clipped sums
    parameters: list[int]  # which objects the model's are


class _Known(NamedTuple):
    """A kind of call."""

    seen: _Seen
    graph: _Graph | None = None


def graphed(model: nn.Module, loss: Callable[..., Tensor], compiled: bool = False) -> Graphed:
    """``loss(model, *batch).backward()`` of a private model, replayed as a graph.

    What it returns is called with each batch, in the place of forward, loss and backward, and gives the loss, without
    a graph of its own. ``optimizer.step()`` and ``zero_grad()`` follow as ever::

        step = graphed(model, lambda model, x, y: F.cross_entropy(model(x), y))
        for x, y in loader:
            step(x, y)
            optimizer.step()
            optimizer.zero_grad()

    The first call of a kind runs as it is written, and the second one is recorded. A kind is a shape, dtype and device
    of every tensor of the batch, with what else a step depends on: what is trained, train() or eval() of every module,
    clipping, plan, autocast, whether an ascent has moved the weights. So batches should be of one size: use
    ``BatchMemoryManager(pad=True)``. Whenever the samples are due to be checked (steps 2, 4, 8, ...), where a sample is
    left out for its norm, for an empty batch and with a clipping function of your own, a step runs as it is written.

    The guarantee is that of a step that is not recorded, and so are its bits on a CPU. As in every recorded graph, the
    Python code of the model and of the loss is not run again: a branch that it takes by a value of its own (a counter,
    a random number of Python's) stays as it was, while random numbers of torch's, as in dropout, are new each time.

    Args:
        model: what ``make_private`` has returned, not compiled.
        loss: called with the model and the batch; the loss over the batch, as for ``backward()``.
        compiled: forward and backward go through Inductor, which takes a while once. What clips is replayed as it is,
            on the very activations and backprops that Inductor's code has written.

    Raises:
        ValueError: ``model`` is not private, or is compiled, sharded or run one sample at a time.
        RuntimeError: from a call, with the operator's name, where the step cannot be recorded.
    """
    return Graphed(model, loss, compiled)


class Graphed:
    """See :func:`graphed`. ``replays`` counts the calls that were replayed, ``recorded`` those that were recorded."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], compiled: bool = False):
        hooks = model
        if hasattr(model, "_orig_mod"):
            raise ValueError("graphed: the model is compiled; give the one that make_private has returned")
        if not isinstance(hooks, FusedHooks):
            raise ValueError(
                f"graphed: {type(model).__name__} is not a private model of grad_sample_mode='fused'; give what "
                f"make_private has returned"
            )
        self.model, self.loss, self.compiled = model, loss, compiled
        self.entry, self.recorder = hooks._model_forward, hooks.clipped_sum
        if self.recorder.ranks.sharded or self.recorder.alone:
            raise ValueError("graphed: models that are sharded, or trained one sample at a time, cannot be recorded")
        self.modules = [*model.modules()]
        self.kinds: dict[Any, _Known] = {}
        self.replays = self.recorded = 0

    def __call__(self, *batch: Any) -> Tensor:
        """Clip and sum a batch, of tensors in any containers; the loss, a tensor without a graph."""
        if not torch.is_grad_enabled():
            raise RuntimeError("graphed: gradients are off; call it outside of torch.no_grad()")
        kind = self._kind(batch)
        known = self.kinds.get(kind)
        if known is None:
            return self._first(kind, batch)
        held = tensors(batch)
        args, kwargs = map_tensors(lambda place: held[place.numpy().item()], known.seen.inputs)
        if not self._is_plain() or self.entry.is_to_look(args, kwargs):
            return self._as_written(batch)
        return self._as_graph(kind, known, batch, args, kwargs)

    def _first(self, kind: Any, batch: Sequence[Any]) -> Tensor:
        """A call of a new kind: run as it is written, looking at what the model is called with."""
        calls: list[Any] = []
        places = {id(x): k for k, x in enumerate(tensors(batch))}

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(map_tensors(lambda x: torch.tensor(places.get(id(x), -1)), (args, kwargs)))
            if len(calls) > 1 or any(place.numpy() < 0 for place in tensors(calls[0])):
                raise ValueError(
                    "graphed: the loss has to call the model once, and with tensors of the batch as they are: which "
                    "samples are in what it makes of them cannot be told. Move other code into the model's forward"
                )

        with self.model.register_forward_pre_hook(look, prepend=True, with_kwargs=True):
            out = self._as_written(batch)
        if calls and self.recorder.batch_size:
            while len(self.kinds) >= MOST_GRAPHS:
                del self.kinds[next(iter(self.kinds))]
            self.kinds[kind] = _Known(_Seen(self.recorder.batch_size, calls[0]))
        return out

    def _as_graph(self, kind: Any, known: _Known, batch: Sequence[Any], args: Any, kwargs: Any) -> Tensor:
        """Replay the call's graph, which is recorded first if there is none."""
        recorder, seen = self.recorder, known.seen
        forward = ForwardPass()
        forward.saw(args, kwargs, seen.batch, self.entry.batch_dim)
        recorder.start_forward()
        recorder.batches.forward(forward)
        self.entry.count_step()
        device = next(iter(recorder.names)).device
        present = presence(seen.batch, recorder.batches.padding([forward]), device)
        given = [recorder.clipping.on(device), present, *recorder.shift.shifts.values(), *tensors(batch)]
        random = torch.get_rng_state()
        if elsewhere := [x.device for x in given if device.type == "cuda" and x.device != device]:
            raise ValueError(
                f"graphed: a tensor of the batch is on {elsewhere[0]}, the model on {device}; a CUDA graph would take "
                f"what is elsewhere for constant: move the batch to {device} first"
            )
        graph = known.graph
        if graph is None or graph.parameters != self._parameters():
            graph = self._record(seen.batch, batch, given)
            self.kinds[kind] = _Known(seen, graph)
            torch.set_rng_state(random)
        with torch.no_grad(), full_precision(device):
            loss, *rest = graph.replay(*given)
        if has_lost(rest[3]):
            torch.set_rng_state(random)
            recorder.batches.take_back(forward)
            return self._as_written(batch)
        setting = recorder.clips_with(seen.batch)
        of_samples, sums = Factors(*rest[:4]), rest[4:]
        sensitivity = setting.clipping.sensitivity
        ended = Ended(graph.clipped, sums, of_samples, setting.scales, sensitivity, seen.batch)
        recorder.end_graph(ended, forward)
        self.replays += 1
        return loss

    def _as_written(self, batch: Sequence[Any]) -> Tensor:
        loss = self.loss(self.model, *batch)
        loss.backward()
        return loss.detach()

    def _is_plain(self) -> bool:
        """Whether the model is one whose layers tell the samples apart, by tensors alone, as its clipping does."""
        by_rows = self.entry.runs_by_sample or self.recorder.follows_rows
        fixed = is_fixed(self.recorder.clipping) and not self.recorder.batches.forwards
        by_rows = by_rows or self.recorder.keeps_grad_samples
        return self.model.training and not by_rows and fixed

    def _kind(self, batch: Sequence[Any]) -> Any:
        """What a graph holds for; another one is recorded where any of it is another."""
        recorder = self.recorder
        device = next(iter(recorder.names)).device.type
        return (
            repr(map_tensors(_shape, batch)),
            tuple([module.training for module in self.modules]),
            tuple([p.requires_grad for p in recorder.names]),
            key_of(recorder.clips_with(1), recorder.tracked),
            len(recorder.clipping.thresholds),
            tuple(recorder.shift.shifts),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            needs_full_precision(device),
        )

    def _parameters(self) -> list[int]:
        """Which objects the model's parameters and buffers are: a graph has these."""
        held = [held for module in self.modules for held in (module._parameters, module._buffers)]
        return [id(x) for each in held for x in each.values()]

    def _record(self, batch_size: int, batch: Sequence[Any], given: Sequence[Tensor]) -> _Graph:
        """The step on ``batch`` as a graph, which has not been used yet."""
        recorder = self.recorder
        shifted = [*recorder.shift.shifts]
        setting = recorder.clips_with(batch_size)
        params: list[Any] = []
        strangers = _Strangers(batch_size)

        def run(thresholds: Tensor, present: Tensor, *rest: Tensor) -> list[Tensor]:
            shifts, its_tensors = rest[: len(shifted)], iter(rest[len(shifted) :])
            result: list[Tensor] = []

            def close() -> None:
                strangers.ended = True
                if self.compiled:
                    mark_backward()
                taken = recorder.take()
                forms = {p: its for p, its in taken.items() if recorder.tracked is None or p in recorder.tracked}
                params[:] = forms
                with torch.no_grad(), torch.autocast(thresholds.device.type, enabled=False):
                    found, sums = closed(forms, setting, thresholds, present)
                result.extend([*found, *sums])

            before = recorder.shift.shifts
            with recorder.setting(inside=True, batch_sizes=[batch_size], new_layouts=set(), closing=close):
                recorder.shift.set(dict(zip(shifted, shifts, strict=True)))
                recorder.shift.start_forward()
                known = [*self.model.parameters(), *self.model.buffers(), *rest, *recorder.shift.at(shifted)]
                try:
                    with strangers:
                        strangers.start(known)
                        loss = self.loss(self.model, *map_tensors(lambda _: next(its_tensors), batch))
                        loss.backward()
                finally:
                    recorder.shift.set(before)
                if strange := recorder.new_layouts - recorder.verified:
                    raise LayoutError(f"layers {sorted(name for name, *_ in strange)} were not seen in the first step")
            return [loss.detach(), *result]

        try:
            replay: Any = run
            if self.compiled or not given[0].is_cuda:
                replay = traced(run, *given)
            if self.compiled:
                replay = with_compiled_backward(replay, given)
            if given[0].is_cuda:
                replay = _captured(replay, given)
        except Exception as error:
            recorder.take()
            recorder.batches.forwards = 0
            raise RuntimeError(
                f"graphed: this step cannot be recorded: {error}. Nothing of the batch was summed. What reads a "
                f"tensor's value in Python (.item(), if, print) has to go from the model and the loss; or train "
                f"without graphed"
            ) from error
        self.recorded += 1
        return _Graph(replay, params, self._parameters())


class _Strangers(TorchDispatchMode):
    """Refuses tensors that come from elsewhere, and may be of the samples: a graph would keep them for all batches."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.known: set[int] = set()
        self.ended = False  # what clips has constants of its own

    def start(self, known: Sequence[Tensor]) -> None:
        """A forward begins, which may use ``known``."""
        self.ended, self.known = False, set(map(_storage, known))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.ended:
            for x in tensors((args, kwargs)):
                if self.batch in x.shape and _storage(x) not in self.known:
                    raise ValueError(
                        f"the loss or the model uses a tensor of shape {list(x.shape)} that is not in the batch, and "
                        f"may be of its samples: give it to the call, beside the others"
                    )
        out = func(*args, **(kwargs or {}))
        self.known.update(map(_storage, tensors(out)))
        return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _captured(run: Callable[..., list[Tensor]], given: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """``run`` as a CUDA graph; what it returns is copied, as the next replay writes over it."""
    held = [x.clone() for x in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever a first run sets up is there when it is captured
        run(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*held)

    def replay(*given: Tensor) -> list[Tensor]:
        torch._foreach_copy_(held, list(given))
        graph.replay()
        return [x.clone() for x in out]

    return replay


def _shape(x: Tensor) -> Any:
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad
