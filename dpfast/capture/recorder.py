"""What one backward pass records, until it ends; and what is known of the forward that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpfast.capture import running_pass
from dpfast.capture.forms import (
    MOST_WAITING,
    WAITING,
    Form,
    Instantiated,
    Waiting,
    form_of,
    forms_of,
    memory_of,
    version_of,
)
from dpfast.capture.refusals import called_outside, listed, used_by_the_loss
from dpfast.capture.segments import Segments
from dpfast.capture.shift import Shift
from dpfast.distributed.ranks import Ranks
from dpfast.planning.planner import Planner
from dpfast.refusals import BypassedLayersError, ChangedInPlaceError, OutsideForwardError, RowsError

if TYPE_CHECKING:
    from dpfast.capture.tap import Call, Tap

OUTSIDE = -1  # torch's id of "no backward pass is running in this thread"
SHARDED_AS = "dpfast_sharded_as"  # attribute of a gathered parameter: the one of which each rank has a shard
RowLayout = tuple[str, int, str]  # a layer, its input's number of dimensions, and what its rows are taken for


def between_passes() -> dict[str, Any]:
    """Attributes of a recorder of a model that does not run, as of a copy that a forward makes of its model."""
    of_forward: dict[str, Any] = dict(inside=False, paused=False, token=None, row_order=None, copied=None)
    of_look: dict[str, Any] = dict(observer=None, closing=None, bypassed=[])
    of_backward: dict[str, Any] = dict(_forms={}, _versions=[], _waiting=0, _untrusted=[], _ordinary={})
    return of_forward | of_look | of_backward | dict(_pass=None, _pass_batch=None)


def running_backward() -> int:
    """Id of the backward pass that this thread is in, or -1; a compiler that traces this takes it to be in none."""
    if torch.compiler.is_compiling():
        return OUTSIDE
    return torch._C._current_graph_task_id()


class Recorder:
    """Collects the forms that one backward pass produces and calls :meth:`close` when it ends.

    What a use needs is kept in the autograd graph and recorded during backward only, so an exception, an evaluation
    or a forward without a backward leaves nothing behind.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]):
        self.names = dict(names)
        self.planner = Planner()
        self.ranks = Ranks()
        self.shift = Shift()
        # Set by the model's forward:
        self.batch_sizes: list[int] = []  # candidates, from its inputs; [B] once there is no doubt
        self.model: nn.Module | None = None  # the one whose layers these are
        self.alone = False  # it is trained one sample at a time: ordinary gradients are per-sample gradients
        self.input_axes: dict[tuple[int, int], int | None] = {}  # of each of its inputs: where its samples lie
        self.needs_model = False  # layers may run inside of the model's forward only
        self.inside = False  # and this is inside
        self.under_way: Any = None  # the ForwardPass that the model's forward is
        self.token: Tensor | None = None  # a [B] tensor that vmap has batched, while the model runs under vmap
        self.row_order: Tensor | None = None  # sample of each row, while a packed sequence runs through an RNN
        self.copied: Callable[[Tensor], Tensor] | None = None  # a proof is to know of copies of bare parameters
        self.follows_rows = False  # the model picks rows of samples: whose they are is noted
        self.by_unit = False  # rows are clipped together with those of their unit, which the loader's samples tell
        self.packed = False  # rows hold several samples, and each of these is clipped by itself
        self.segments: Segments | None = None  # of the rows of the last forward, or of that whose backward runs
        self.by_position = False  # the observer wants forms by positions, and not what is summed over them
        self.paused = False  # layers run their own forward, untapped
        self.evaluating = False  # the last forward was in eval(): its gradients are not for training
        self.evaluated = False  # and some reached a parameter since the last step
        self.loss_is_mean = False  # over the batch: backprops carry 1/B
        self.narrowed: tuple[str, torch.dtype] | None = None  # where the running backward has gone through 16 bits
        # Which layouts have been seen to keep the samples apart:
        self.verifies = False
        self.verified: set[RowLayout] = set()
        self.new_layouts: set[RowLayout] = set()
        # The backward pass that is being recorded:
        self.passing: dict[
            Any, list[Any]
        ] = {}  # the forwards that it is of, with nodes of its graph below their outputs
        self.observer: Callable[[str, Form, Any], None] | None = None  # gets all forms instead: layer, form, parameter
        self.closing: Callable[[], None] | None = None  # runs at the end of a pass in the place of close
        self.bypassed: list[nn.Parameter] = []  # what the observer will want to know of
        self._forms: dict[nn.Parameter, list[Form | Waiting]] = {}
        self._versions: list[tuple[Form | Waiting, int, str]] = []  # of forms when they came, and their layers
        self._waiting = 0  # bytes that those keep which are to be written out
        self._untrusted: list[tuple[RowLayout, Form]] = []
        self._ordinary: dict[nn.Parameter, list[Tensor]] = {}  # ordinary gradients, which autograd has brought
        self._pass: int | None = None
        self._pass_batch: int | None = None
        self.source = ""  # the compiled graph whose forms are being recorded; none if layers do it themselves
        self.sources: set[str] = set()  # of the forms of the pass
        self.last_source = ""  # the graph that all forms of the last pass have come from
        self.graphs: dict[str, Any] = {}  # compiled graphs of the model, by their names
        self.compiled: dict[str, str] = {}  # layers that a compiler has met, and what has become of them: see explain

    @contextmanager
    def setting(self, **values: Any) -> Iterator[None]:
        """Attributes of the recorder for the time within."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    def close(self) -> None:
        """What is to happen at the end of the backward pass."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int | None:
        """The physical batch size of the last forward, where the model's inputs leave no doubt about it."""
        return self.batch_sizes[0] if len(self.batch_sizes) == 1 else None

    def take(self) -> dict[nn.Parameter, list[Form | Waiting]]:
        """The recorded forms; the recorder is empty afterwards."""
        forms, self._forms = self._forms, {}
        self._untrusted, self._ordinary, self._versions, self._waiting = [], {}, [], 0
        self._pass = self._pass_batch = None
        self.sources = set()
        return forms

    def suspend(self) -> tuple[Any, ...]:
        """Put the pass that is being recorded aside; :meth:`resume` takes what this returns."""
        kept = self._forms, self._versions, self._waiting, self.sources
        state = (kept, self._untrusted, self._ordinary, self.passing, self._pass, self._pass_batch)
        self._forms, self._untrusted, self._ordinary, self.passing = {}, [], {}, {}
        self._versions, self._waiting, self.sources = [], 0, set()
        self._pass = self._pass_batch = None
        return state

    def resume(self, state: tuple[Any, ...]) -> None:
        """Go on with a pass that was put aside."""
        kept, self._untrusted, self._ordinary, self.passing, self._pass, self._pass_batch = state
        self._forms, self._versions, self._waiting, self.sources = kept

    def start_forward(self) -> None:
        """Called in every tapped forward: drops what a failed backward left, or opens the pass that recomputes.

        A reentrant checkpoint runs its layers' backward in an inner pass. Its forward is recomputed in the outer
        one, which is thus opened (and closed) here, once for all inner passes.
        """
        if running_backward() != OUTSIDE:
            if running_pass.is_whole():
                self.open()
        elif self._pass is not None:
            self.take()

    def open(self, batch: int | None = None) -> None:
        """Have :meth:`close` called when the running backward pass ends; ``batch`` is its forward's batch size."""
        if self._pass is None:
            self._pass = running_backward()
            self.planner.start_pass()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if batch is not None:
            self._pass_batch = batch

    def drop_failed(self) -> None:
        """What a pass has left that failed half-way; the running one is within no other."""
        if self._pass not in (None, running_backward()):
            self.take()

    def opens(self) -> bool:
        """Whether :meth:`open` would open a pass."""
        return self._pass is None

    def _finish(self) -> None:
        if self._pass is None:
            return
        for p in self._ordinary:  # autograd has put their unclipped gradient there
            p.grad = None
        if self.observer is not None:
            self.take()
            return
        changed, self._versions = self._changed(), []
        if changed:
            self.take()
            raise ChangedInPlaceError(
                f"layer{'s' if len(changed) > 1 else ''} {listed(changed)}: the gradient of the output, or the input, "
                f"was changed in place after the layer's backward and before the end of the pass, by a tensor hook or "
                f"by a custom function that writes to the gradient that it is given. That tensor belongs to several "
                f"layers: return a new one there (g * 0.5 for g.mul_(0.5))"
            )
        if mixed := sorted({layout[0] for layout, form in self._untrusted if bool(form.touched().any())}):
            self.take()
            raise OutsideForwardError(
                f"layer{'s' if len(mixed) > 1 else ''} {listed(mixed)} got gradients from a part of the loss that does "
                f"not come from what the model's forward returned in the check of its samples (a hidden state or an "
                f"auxiliary loss kept as an attribute, a branch that the check did not take), so nothing has shown "
                f"that they keep the samples apart there. Let forward return that part as well, and make the loss of "
                f"what it returns"
            )
        self._take_whole()
        (self.closing or self.close)()

    def _take_whole(self) -> None:
        """Ordinary gradients of the pass that ends are the per-sample gradients at a physical batch of one alone."""
        whole, self._ordinary = self._ordinary, {}
        batch = self._pass_batch
        if batch is None and self.alone:  # the loss depends on no output: it is made of gradients
            batch = self.batch_size
        if not whole or batch == 0:
            return
        if batch != 1:
            self.take()
            raise used_by_the_loss(self.names, whole)
        if self.shift.in_use:
            self.take()
            are = "parameters {} were" if len(whole) > 1 else "parameter {} was"
            raise BypassedLayersError(
                f"{are.format(listed(self.names[p] for p in whole))} used outside of its module's forward, where an "
                f"ascent's shift does not reach. Call the module that owns it, or set requires_grad_(False), or leave "
                f"ascent out"
            )
        for p, gradients in whole.items():
            for gradient in gradients:
                self.record(p, Instantiated(gradient.unsqueeze(0)))

    def record(self, parameter: Any, form: Form) -> None:
        """Keep a form of one parameter."""
        parameter = self._owner(parameter)
        if self.opens():
            self.open()
        if self.observer is not None:
            self.observer(self.names[parameter], form, parameter)
        else:
            self._forms.setdefault(parameter, []).append(form)
            self.sources.add("")

    def record_call(self, call: Call, forms: Sequence[tuple[Any, Form | Waiting]]) -> None:
        """Keep the forms of the parameters of one call of a layer."""
        if self.observer is not None:
            for owner, form in forms:
                self.observer(call.tap.name, form if self.by_position else form_of(form), owner)  # type: ignore[arg-type]
            return
        if call.forward_pass == OUTSIDE:
            self.drop_failed()
        if self.opens():
            self.open()
        if call.of is not None and call.of not in self.passing:
            self.passing[call.of] = []
        self.sources.add(self.source)
        unseen = call.layout if self.verifies and call.batch > 1 and call.layout not in self.verified else None
        for parameter, form in forms:
            if isinstance(form, WAITING) and not self.packed:  # else it has to be summed by segments
                if unseen is not None or not form.waits():
                    form = form_of(form)
                elif form.is_to_be_written():
                    self._waiting += memory_of(form)
            self._forms.setdefault(self._owner(parameter), []).append(form)
            self._versions.append((form, version_of(form), call.tap.name))
            if unseen is not None:
                self._untrusted.append((unseen, form_of(form)))
        if self._waiting > MOST_WAITING:
            self._write_out()

    def _write_out(self) -> None:
        """What waits is written out now, and what it has kept can go."""
        changed = self._changed()
        written = forms_of([*self._forms.values()])
        self._forms = dict(zip(self._forms, map(list, written), strict=True))  # type: ignore[arg-type]
        self._versions = [
            (form, version, name)
            for form, version, name in self._versions
            if name in changed or not (isinstance(form, WAITING) and form.is_to_be_written())
        ]
        self._waiting = 0

    def _changed(self) -> list[str]:
        """Layers of which something was written to that their forms keep."""
        return sorted({name for form, version, name in self._versions if version_of(form) != version})

    def _owner(self, parameter: Any) -> Any:
        return getattr(parameter, SHARDED_AS, parameter) if self.ranks.sharded else parameter

    def record_whole(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """An ordinary gradient that reached ``parameter``: some use of it bypassed every tapped layer.

        At a physical batch of one it is the per-sample gradient. At any other it cannot be clipped: refused when the
        pass ends, all of them by name. Gradients of a model in eval() are left alone, in ``p.grad``, where the
        optimizer's step overwrites them. ``torch.autograd.grad`` gives them to its caller and trains nothing.
        """
        if not running_pass.arrives(parameter):
            return
        if self.evaluating and self._pass is None:
            self.evaluated = True
            return
        self.open()
        kept = self._ordinary.setdefault(parameter, [])
        if self.observer is not None:  # told at the end of the backward, all of them at once
            self.bypassed.append(parameter)
        elif self._pass_batch in (None, 1):
            kept.append(gradient.detach().clone())

    def link(self, whole: Mapping[str, Any], sharded: Mapping[str, Any]) -> None:
        """Parameters that ``fully_shard`` has gathered for a module stand for those that the optimizer has."""
        for name, p in whole.items():
            if p is not None and p is not sharded[name] and not hasattr(p, SHARDED_AS):
                setattr(p, SHARDED_AS, sharded[name])

    def check_inside(self, name: str) -> None:
        """Layers are called inside of the model's forward, or when a checkpoint computes it again."""
        if self.needs_model and not self.inside and running_backward() == OUTSIDE:
            raise called_outside(name, self.model)

    def resolve_rows(
        self, tap: Tap, rows: int, ndim: int, batch: int | None = None, spec: Any = None
    ) -> tuple[int, RowLayout | None]:
        """The batch size for a layer called with ``rows`` along its batch dimension, and the layout that implies.

        ``batch`` is the batch size where the caller knows it, ``spec`` what the tap was called with.

        Raises:
            LayoutError: if the rows cannot be attributed to samples.
        """
        if batch is None:
            if len(self.batch_sizes) > 1 and rows in self.batch_sizes:
                self.batch_sizes = [rows]
            batch = rows if self.batch_size is None else self.batch_size
        layout = self.layout_of(tap, rows, ndim, batch, spec)
        if layout is not None and layout not in self.verified:
            self.new_layouts.add(layout)
        return batch, layout

    def layout_of(self, tap: Tap, rows: int, ndim: int, batch: int, spec: Any) -> RowLayout | None:
        """What the rows are taken for; None where there are no samples.

        Raises:
            RowsError: they are for no whole number of samples.
        """
        if batch == 0:
            return None
        if rows == batch or rows % batch == 0:
            taken = "per sample" if rows == batch else "samples first"
            return tap.name, ndim, f"{taken}: {spec}" if tap.layer.checks_each_use else taken
        if rows == 1:
            return tap.name, ndim, "shared"
        raise RowsError(f"layer {tap.name!r} was called with {rows} rows at a batch size of {batch}")
