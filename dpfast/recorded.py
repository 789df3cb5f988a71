"""A private step as a graph: forward, backward and clipping of a batch, traced once and replayed without Python.

With batches of one shape, nothing but tensors decides what a step does. So it can be recorded: on a CPU as a list of
operators, on a GPU as a CUDA graph. What looks at samples one by one stays outside of it: which of them a batch has,
and that none counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpfast.capture.strangers import Strangers
from dpfast.capture.trees import map_tensors, tensors
from dpfast.capture.which_samples import ForwardPass
from dpfast.clipping.at_once import Ended, has_lost, is_fixed, key_of, presence, traced
from dpfast.clipping.closing import Factors
from dpfast.clipping.compiled_backward import with_compiled_backward
from dpfast.model.private_model import FusedHooks
from dpfast.model.step_function import StepFunction, captured, is_captured
from dpfast.ops import full_precision, needs_full_precision
from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.optim.recorded_update import RecordedUpdate, why_not_recorded
from dpfast.refusals import NotRecordedError, RecordingError

logger = logging.getLogger(__name__)
MOST_GRAPHS = 16  # kinds of calls that are kept, and graphs of each: the oldest one goes


class _Graph(NamedTuple):
    replay: Callable[..., list[Tensor]]
    clipped: list[Any]  # parameters of which it makes clipped sums
    parameters: list[int]  # which objects the model's are


@dataclass
class _Known:
    """What the first call of a kind has shown."""

    batch: int
    inputs: Any  # of the model: what it was called with, each tensor as its place in the batch
    graphs: dict[Any, _Graph] = field(default_factory=dict)  # by what the update depends on, None without one

    def make_room(self, update: RecordedUpdate | None) -> None:
        """Another graph comes; those of parameters or states that are gone would keep their memory."""
        if update is not None:
            self.graphs = {key: graph for key, graph in self.graphs.items() if key is None or key[0] is update.key[0]}
        while len(self.graphs) >= MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]


def graphed(
    model: nn.Module,
    loss: Callable[..., Tensor],
    optimizer: FusedDPOptimizer | None = None,
    compiled: bool = False,
) -> Graphed:
    """``loss(model, *batch).backward()`` of a private model, replayed as a graph; with an ``optimizer``, a whole step.

    What it returns is called with each batch and gives the loss, without a graph of its own. With an optimizer a call
    is ``optimizer.zero_grad()``, forward, loss, backward and ``optimizer.step()``, so that ``p.grad`` holds the noisy
    gradient afterwards::

        step = graphed(model, lambda model, x, y: F.cross_entropy(model(x), y), optimizer)
        for x, y in loader:
            step(x, y)

    Without one it stands for forward, loss and backward, and ``optimizer.step()`` and ``zero_grad()`` follow as ever.

    The first call of a kind runs as it is written, and the second one is recorded. A kind is a shape, dtype and device
    of every tensor of the batch, with what else a step depends on: what is trained, train() or eval() of every module,
    clipping, plan, autocast, whether an ascent has moved the weights. So batches should be of one size, or of a few:
    use ``BatchMemoryManager(pad=True)``, or ``pad=32``. Whenever the samples are due to be checked (steps 2, 4, 8,
    ...), where a sample is left out for its norm, for an empty batch and with a clipping function of your own, a step
    runs as it is written.

    The guarantee is that of a step that is not recorded, and so are its bits on a CPU. As in every recorded graph, the
    Python code of the model and of the loss is not run again: a branch that it takes by a value of its own (a counter,
    a random number of Python's) stays as it was, while random numbers of torch's, as in dropout, are new each time.

    Of a whole step in particular:

    - Key, step, standard deviation and hyperparameters are tensors that each call gives to the graph. So a key and a
      step never meet two batches, and learning rate schedulers need no other recording.
    - The step is accounted for before the graph runs. What refuses, as an accountant may, does so with nothing written.
      The sum of the call was not made then, and the whole of its logical batch is dropped.
    - Where a sample's norm is not finite the graph writes nothing, no parameter and no state. The step runs as it is
      written, with the noise that was handed out for it and that nothing has met yet.
    - The update is outside of the graph, and ``optimizer.step()`` called, where a physical batch is not the last one of
      its logical batch, under step hooks, adaptive clipping, DiSK, a GradScaler, several ranks, and for optimizers or
      settings whose update is not made in the noise's pass. A warning is logged once for each reason.
    - On a GPU the graph's copies of key, step and hyperparameters are zeros when it has run: replayed without new ones,
      it writes nothing.

    Args:
        model: what ``make_private`` has returned, not compiled.
        loss: called with the model and the batch; the loss over the batch, as for ``backward()``.
        optimizer: what ``make_private`` has returned with the model, for whole steps.
        compiled: forward and backward go through Inductor, which takes a while once. What clips and what updates is
            replayed as it is, on the very activations and backprops that Inductor's code has written.

    Raises:
        ValueError: ``model`` is not private, or is compiled, sharded or run one sample at a time; ``optimizer`` is not
            the model's.
        RuntimeError: from a call, with the operator's name, where the step cannot be recorded.
    """
    return Graphed(model, loss, optimizer, compiled)


class Graphed:
    """See :func:`graphed`. ``replays`` counts the calls that were replayed, ``recorded`` those that were recorded.

    ``updates`` counts the replays that were whole steps.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: FusedDPOptimizer | None = None,
        compiled: bool = False,
    ):
        hooks = model
        if hasattr(model, "_orig_mod"):
            raise RecordingError("graphed: the model is compiled; give the one that make_private has returned")
        if not isinstance(hooks, FusedHooks):
            raise RecordingError(
                f"graphed: {type(model).__name__} is not a private model of grad_sample_mode='fused'; give what "
                f"make_private has returned"
            )
        self.model, self.loss, self.optimizer, self.compiled = model, loss, optimizer, compiled
        self.entry, self.recorder = hooks._model_forward, hooks.clipped_sum
        if self.recorder.ranks.sharded or self.recorder.alone:
            raise RecordingError(
                "graphed: models that are sharded, or trained one sample at a time, cannot be recorded"
            )
        if self.recorder.by_unit or self.recorder.packed:
            raise RecordingError(
                "graphed: units of several rows, or of a part of one (make_private's units= or augmentations=), differ "
                "from batch to batch, and a recorded step cannot; use the model without graphed"
            )
        if optimizer is not None and getattr(optimizer, "clipped_sum", None) is not self.recorder:
            raise RecordingError(
                f"graphed: optimizer is a {type(optimizer).__name__} that is not this model's; give the one that "
                f"make_private has returned with the model, or None to call its step() yourself"
            )
        self.modules = [*model.modules()]
        self.kinds: dict[Any, _Known] = {}
        self.replays = self.recorded = self.updates = 0
        self._told: set[str] = set()  # why updates stay outside

    def __call__(self, *batch: Any) -> Tensor:
        """Clip and sum a batch, of tensors in any containers, and step if there is an optimizer.

        Returns:
            The loss, a tensor without a graph.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("graphed: gradients are off; call it outside of torch.no_grad()")
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        kind = self._kind(batch)
        known = self.kinds.get(kind)
        if known is None:
            return self._first(kind, batch)
        held = tensors(batch)
        args, kwargs = map_tensors(lambda place: held[place.numpy().item()], known.inputs)
        if not self._is_plain() or self.entry.is_to_look(args, kwargs):
            return self._as_written(batch)
        return self._as_graph(known, batch, args, kwargs)

    def _first(self, kind: Any, batch: Sequence[Any]) -> Tensor:
        """A call of a new kind: run as it is written, looking at what the model is called with."""
        calls: list[Any] = []
        places = {id(x): k for k, x in enumerate(tensors(batch))}

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(map_tensors(lambda x: torch.tensor(places.get(id(x), -1)), (args, kwargs)))
            if len(calls) > 1 or any(place.numpy() < 0 for place in tensors(calls[0])):
                raise RecordingError(
                    "graphed: the loss has to call the model once, and with tensors of the batch as they are: which "
                    "samples are in what it makes of them cannot be told. Move other code into the model's forward"
                )

        with self.model.register_forward_pre_hook(look, prepend=True, with_kwargs=True):
            loss = self._backward(batch)
        if calls and self.recorder.batch_size:
            while len(self.kinds) >= MOST_GRAPHS:
                del self.kinds[next(iter(self.kinds))]
            self.kinds[kind] = _Known(self.recorder.batch_size, calls[0])
        self._step()
        return loss

    def _as_graph(self, known: _Known, batch: Sequence[Any], args: Any, kwargs: Any) -> Tensor:
        """Replay the call's graph, which is recorded first if there is none."""
        recorder, size = self.recorder, known.batch
        forward = ForwardPass()
        forward.saw(args, kwargs, size, self.entry.batch_dim)
        recorder.start_forward()
        recorder.batches.forward(forward)
        self.entry.count_step()
        device = next(iter(recorder.names)).device
        present = presence(size, recorder.batches.padding([forward]), device)
        given = [recorder.clipping.on(device), present, *recorder.shift.shifts.values(), *tensors(batch)]
        random = torch.get_rng_state()
        if elsewhere := [x.device for x in given if device.type == "cuda" and x.device != device]:
            raise RecordingError(
                f"graphed: a tensor of the batch is on {elsewhere[0]}, the model on {device}; a CUDA graph would take "
                f"what is elsewhere for constant: move the batch to {device} first"
            )
        update = self._update()
        key = update.key if update is not None else None
        graph = known.graphs.get(key)
        if graph is None or graph.parameters != self._parameters():
            known.make_room(update)
            blank = update.inputs() if update is not None else []
            graph = known.graphs[key] = self._record(size, batch, given, blank, update)
            torch.set_rng_state(random)
        padding: list[int] = []
        if update is not None:
            padding = recorder.begin_graph(forward, size)
            given += self._opened(update)
        with torch.no_grad(), full_precision(device):
            loss, *rest = graph.replay(*given)
        # A graph that updates has written nothing where a sample is lost, so a GPU is waited for.
        if has_lost(rest[3]) if update is None else bool(rest[3].any()):
            torch.set_rng_state(random)
            if update is None:
                recorder.batches.take_back(forward)
                return self._as_written(batch)
            loss, *rest = self._function(size, batch, update)(*given)
        else:
            self.replays += 1
            self.updates += update is not None
        setting = recorder.clips_with(size)
        of_samples, out = Factors(*rest[:4]), rest[4:]
        if update is None:
            in_force = setting.clipping.in_force
            recorder.end_graph(Ended(graph.clipped, out, of_samples, setting.scales, in_force, size), forward)
            self._step()
        else:
            update.end(out)
            recorder.report(of_samples, setting.scales.of_norms, padding)
        return loss

    def _as_written(self, batch: Sequence[Any]) -> Tensor:
        loss = self._backward(batch)
        self._step()
        return loss

    def _backward(self, batch: Sequence[Any]) -> Tensor:
        loss = self.loss(self.model, *batch)
        loss.backward()
        return loss.detach()

    def _step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def _update(self) -> RecordedUpdate | None:
        """The update that ends this call, where it can be a part of the graph."""
        if self.optimizer is None or self.optimizer.is_to_skip:
            return None
        if (why := why_not_recorded(self.optimizer)) is not None:
            if why not in self._told:
                self._told.add(why)
                logger.warning("graphed: noise and update are not a part of the recorded step: %s", why)
            return None
        self.recorder.start_physical_batch()  # sums of another logical batch go
        update = RecordedUpdate(self.optimizer)
        return None if update.why_not is not None else update

    def _opened(self, update: RecordedUpdate) -> list[Tensor]:
        """The step is accounted for, and has its noise; what the graph is given for its update."""
        try:
            if not update.optimizer.begin_step():
                raise AssertionError("a physical batch that was the last one of its logical batch is not any more")
            noise, rounding_key, _ = update.optimizer.open_update()
        except BaseException:
            self.recorder.lose()
            raise
        return update.inputs(noise, rounding_key)

    def _is_plain(self) -> bool:
        """Whether the model is one whose layers tell the samples apart, by tensors alone, as its clipping does."""
        by_rows = self.entry.runs_by_sample or self.recorder.follows_rows
        fixed = is_fixed(self.recorder.clipping) and not self.recorder.batches.forwards
        by_rows = by_rows or self.recorder.keeps_grad_samples
        by_rows = by_rows or self.recorder.by_unit or self.recorder.packed
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

    def _function(self, size: int, batch: Sequence[Any], update: RecordedUpdate | None) -> StepFunction:
        run = update.run if update is not None else None
        return StepFunction(self.model, self.loss, self.recorder, size, batch, run)

    def _record(
        self,
        size: int,
        batch: Sequence[Any],
        given: Sequence[Tensor],
        blank: Sequence[Tensor],
        update: RecordedUpdate | None,
    ) -> _Graph:
        """The step on ``batch`` as a graph, which has not been used yet; ``blank`` is what its update is given."""
        recorder = self.recorder
        secret = [] if update is None else [len(given), len(given) + 1]  # numbers and words
        given = [*given, *blank]
        run = self._function(size, batch, update)
        run.strangers = Strangers(size)
        run.marks = self.compiled
        try:
            replay: Any = run
            on_gpu = is_captured(given[0])
            if self.compiled or not on_gpu:
                replay = traced(run, *given)
            if self.compiled:
                replay = with_compiled_backward(replay, given)
            if on_gpu:
                replay = captured(replay, given, 0 if update is None else update.in_place, secret)
        except Exception as error:
            recorder.take()
            recorder.batches.forwards = 0
            raise NotRecordedError(
                f"graphed: this step cannot be recorded: {error}. Nothing of the batch was summed. What reads a "
                f"tensor's value in Python (.item(), if, print) has to go from the model and the loss; or train "
                f"without graphed"
            ) from error
        self.recorded += 1
        return _Graph(replay, run.clipped, self._parameters())


def _shape(x: Tensor) -> Any:
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad
