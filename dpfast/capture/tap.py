"""Where a layer's forward and backward meet the recorder: one autograd function for every layer.

A tapped layer computes its output and its input gradient as always; the ordinary weight gradient is not computed,
the per-sample gradients go to the :class:`Recorder` instead.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dpfast.capture import running_pass
from dpfast.capture.forms import Convolved, Factored, Form, OuterProduct, by, form_of
from dpfast.capture.mean_in_16_bits import NARROW
from dpfast.capture.picked_rows import owned, owners_of, places
from dpfast.capture.recorder import OUTSIDE, Recorder, RowLayout, running_backward
from dpfast.capture.refusals import ONE_BY_ONE
from dpfast.capture.segments import check_positions
from dpfast.ops import alike_for_every_batch
from dpfast.refusals import LayoutError, OwnGradientError, ParameterReplacedError

if TYPE_CHECKING:
    from dpfast.layers.base import Layer

taps: WeakValueDictionary[str, Tap] = WeakValueDictionary()  # by what a compiler takes for a constant
_handles = itertools.count()
_process = secrets.token_hex(4)  # compilers keep code in files, and find it again by its constants
OF_THIS_PROCESS = ("uses", "forward_pass", "handle")  # attributes of a tap that no copy has


class Use(NamedTuple):
    """A way in which a layer has called its tap."""

    spec: Any
    params: tuple[Any, ...]
    trained: tuple[bool, ...]
    accumulators: dict[int, Any]  # where gradients of the trained ones arrive

    def all_trained(self) -> list[int]:
        """Which parameters a pass through all of the graph trains."""
        return [index for index, is_trained in enumerate(self.trained) if is_trained]

    def reached(self, name: str, accumulators: dict[int, Any]) -> list[int]:
        """Which parameters the running pass trains, in layer ``name``."""
        return self.all_trained() if running_pass.is_whole() else reached(accumulators, name)


@dataclass
class Tap:
    """A layer's way to the recorder: computes the layer's op and records its per-sample gradients in backward."""

    recorder: Recorder
    layer: Layer
    name: str
    batch_dim: int = 0
    heads_first: bool = False  # of packed rows it was given [rows, heads, length, d]

    def __post_init__(self) -> None:
        self.uses: list[Use] = []
        self.forward_pass = OUTSIDE  # in which the last forward of a compiled graph ran
        self.start_process()

    def start_process(self) -> None:
        """Take a handle that no tap of another process has."""
        self.handle = f"{_process}-{next(_handles)}"
        taps[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in OF_THIS_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def __call__(self, x: Tensor, *params: Tensor | None, spec: Any = None) -> Tensor:
        """The layer's op on ``x``, batch along ``batch_dim``; ``spec`` is what else the op needs (strides, eps)."""
        if torch.compiler.is_compiling():
            return self._in_graph(x, *params, spec=spec)
        recorder = self.recorder
        if not recorder.inside:  # the model's forward has started it, and layers run in no other
            recorder.start_forward()
        if recorder.token is not None:
            return applied(Call(self, spec), recorder.token, x, *params)
        if not recorder.inside:
            recorder.check_inside(self.name)
        dims, least = x.dim(), self.layer.least_dims
        if recorder.batch_size == 0:
            return applied(Call(self, spec), None, x, *params)
        if dims < least:
            raise LayoutError(
                f"layer {self.name!r} got an input of shape {list(x.shape)}, which has no batch dimension"
            )
        if recorder.row_order is not None:
            return self._on_packed_rows(x, recorder.row_order, *params, spec=spec)
        if recorder.follows_rows and (owners := owners_of(x)) is not None:
            return self._on_picked_rows(x, owners, *params, spec=spec)
        dim = self.batch_dim if dims > least else 0
        if dim:
            x = x.movedim(dim, 0)
        swapped = recorder.packed and self._has_heads_first(x, spec)
        if swapped:
            x = x.transpose(1, 2)
        batch, layout = recorder.resolve_rows(self, x.shape[0], dims, spec=spec)
        if recorder.packed:
            check_positions(self.name, x, recorder.segments)
        if layout not in recorder.verified:
            self.note_use(spec, params)
        if x.shape[0] == 1 and batch > 1:  # shared by all samples: each gets its own copy, and so its own gradient
            x = x.expand(batch, *x.shape[1:])
        y = applied(Call(self, spec, batch, layout), None, x, *params)
        if swapped:
            y = y.transpose(1, 2)
        return y.movedim(0, dim) if dim else y

    def _has_heads_first(self, x: Tensor, spec: Any) -> bool:
        """Whether ``x`` is ``[rows, heads, length, d]`` of packed rows, as norms of queries and keys are given it.

        As many heads as positions tell nothing: then it is as it was before.
        """
        segments = self.recorder.segments
        if segments is None or x.dim() != 4 or not self.layer.is_by_last(spec):
            return False
        if x.shape[0] != segments.rows or x.shape[2] != segments.length:
            return False
        if x.shape[1] != segments.length:
            self.heads_first = True
        return self.heads_first

    def _use(self, spec: Any, params: Sequence[Any]) -> int | None:
        """The number of such a use, if there was one."""
        trained = _trained(params)
        for number, use in enumerate(self.uses):
            if use.trained == trained and (use.spec is spec or use.spec == spec):
                return number
        return None

    def note_use(self, spec: Any, params: tuple[Any, ...]) -> None:
        """A compiler that traces the tap can serve such a use from now on."""
        if self._use(spec, params) is None:
            self.uses.append(Use(spec, params, _trained(params), accumulators(params)))

    def holds(self, parameter: Any) -> bool:
        """Whether the layer has the parameter still."""
        model = self.recorder.model
        if model is None:
            return False
        try:
            layer = model.get_submodule(self.name)
        except AttributeError:  # the model itself, or a tap that has the name of a parameter
            layer = model
        return any([p is parameter for p in layer.parameters()])

    def note_narrow(self, G: Tensor) -> None:
        """Backprops of 16 bits have lost something where the loss is a mean over the batch."""
        recorder = self.recorder
        if G.dtype in NARROW and recorder.loss_is_mean and recorder.observer is None:
            recorder.narrowed = recorder.narrowed or (f"layer {self.name!r}", G.dtype)

    def _in_graph(self, x: Tensor, *params: Tensor | None, spec: Any) -> Tensor:
        """:meth:`__call__` as ``torch.compile`` traces it: see :class:`~dpfast.capture.traced_tap.TracedTap`."""
        raise NotImplementedError

    def _on_picked_rows(self, x: Tensor, owners: Tensor, *params: Tensor | None, spec: Any) -> Tensor:
        """``x [n, *]``: row r is of sample ``owners[r]``; the op sees as many of each, zeros where there are less."""
        batch = self.recorder.batch_size or 0
        if not len(x):
            return owned(applied(Call(self, spec), None, x, *params), owners)
        index, most = places(owners, batch)
        batch, layout = self.recorder.resolve_rows(self, batch, x.dim() + 1, batch)
        rows = x.new_zeros(batch * most, *x.shape[1:]).index_copy(0, index, x)
        return owned(applied(Call(self, spec, batch, layout), None, rows, *params).index_select(0, index), owners)

    def _on_packed_rows(self, x: Tensor, order: Tensor, *params: Tensor | None, spec: Any) -> Tensor:
        """``x [b, d]``: row r is of sample ``order[r]``; the op sees all samples in their order, else zeros."""
        batch, layout = self.recorder.resolve_rows(self, len(order), x.dim())
        with running_pass.unseen("the rows of a packed sequence"):
            index = order[: len(x)].clone()
        rows = x.new_zeros(len(order), *x.shape[1:]).index_copy(0, index, x)
        return applied(Call(self, spec, batch, layout), None, rows, *params).index_select(0, index)


def _after_fork() -> None:
    global _process
    _process = secrets.token_hex(4)
    for tap in {id(tap): tap for tap in taps.values()}.values():
        tap.start_process()


os.register_at_fork(after_in_child=_after_fork)


class Call:
    """One call of a layer: what its backward needs besides the saved tensors."""

    __slots__ = ("accumulators", "batch", "forward_pass", "layout", "of", "params", "saved", "spec", "tap")
    twice: ClassVar[Any] = None  # a function of autograd: its input gradient, to be differentiated again

    def __init__(
        self, tap: Tap, spec: Any, batch: int = 0, layout: RowLayout | None = None, forward_pass: int | None = None
    ):
        self.tap, self.spec, self.batch, self.layout = tap, spec, batch, layout
        self.saved: tuple[Tensor, ...] = ()
        self.params: Sequence[Any] = ()  # a checkpoint gives back copies of what is saved; these are the ones known
        self.accumulators: dict[int, Any] | None = None  # where their gradients arrive, if no edge of the graph says
        self.forward_pass = running_backward() if forward_pass is None else forward_pass
        # The model's forward that it is a part of; None where a checkpoint computes it again.
        self.of: Any = None if tap is None else tap.recorder.under_way
        self.count()

    def count(self) -> None:
        """Its layer will have gradients of this forward."""
        if self.of is not None and self.tap.recorder.observer is None:
            self.of.calls[self.tap.name] += 1

    def like(self, tap: Tap, spec: Any, batch: int) -> Call:
        """Another one of the same forward of the model, without what a forward of its own has saved."""
        other = Call(tap, spec, batch, self.layout)
        other.of = self.of
        return other

    def forward(self, x: Tensor, *params: Any) -> Tensor:
        """The layer's output."""
        return alike_for_every_batch(x, self.tap.layer.forward, self, x, *params)

    def input_gradient(self, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        """The gradient with respect to ``x``."""
        return alike_for_every_batch(G, self.tap.layer.input_gradient, self, G, x, *params)

    def planned(self, form: OuterProduct | Factored | Convolved) -> Form:
        """The form as the model's planner wants it."""
        if isinstance(form, OuterProduct) or self.tap.recorder.packed:  # there is no choice, or it comes by segments
            return form
        return by(form, self.tap.recorder.planner.choose(self.tap.name, form.shape), may_wait=True)

    def record(
        self,
        owners: Sequence[Any],
        needed: Sequence[int],
        G: Tensor,
        x: Tensor,
        points: Sequence[Any],
        keep: Callable[[Form], Form] | None = None,
    ) -> None:
        """Hand over the per-sample gradients of the ``needed`` ones of the ``owners``, which computed as ``points``."""
        recorder = self.tap.recorder
        if not needed:
            return
        if recorder.opens():
            recorder.open()
        self.tap.note_narrow(G)
        if self.batch == 0:
            return
        if torch._C._is_any_autocast_enabled():  # a backward inside of such a region would make sums in 16 bits
            with torch.autocast(G.device.type, enabled=False):
                self._record(owners, needed, G, x, points, keep)
        else:
            self._record(owners, needed, G, x, points, keep)

    def _record(self, owners: Any, needed: Any, G: Tensor, x: Tensor, points: Any, keep: Any) -> None:
        forms = self.tap.layer.forms(self, needed, G, x, *points)
        recorded = [(owners[index], keep(form_of(form)) if keep else form) for index, form in forms]
        self.tap.recorder.record_call(self, recorded)


def check_owners(tap: Tap, owners: Sequence[Any], given: Sequence[Tensor | None]) -> None:
    """A compiled graph was ``given`` the parameters that it was traced with, or where a shift has put them.

    They are known by identity, and to a graph by what they hold alone. Of some a graph has a copy: Inductor lays the
    weights of convolutions out in another order, and another forward has shifted them anew.
    """
    for owner, p, q in zip(owners, tap.recorder.shift.at(owners), given, strict=True):
        if p is not q and (p is None or q is None or (p.data_ptr() != q.data_ptr() and not tap.holds(owner))):
            raise ParameterReplacedError(
                "a parameter was replaced by another object since the model was made private (as in "
                "load_state_dict(assign=True)): change its values instead, or make the model private again"
            )


def _trained(params: Sequence[Any]) -> tuple[bool, ...]:
    return tuple([p is not None and p.requires_grad for p in params])


def accumulators(params: Sequence[Any]) -> dict[int, Any]:
    """The nodes of the graph at which gradients of the trained ones arrive, by their place in ``params``."""
    return {index: torch.autograd.graph.get_gradient_edge(p).node for index, p in enumerate(params) if _trained([p])[0]}


def reached(accumulators: dict[int, Any], name: str) -> list[int]:
    """Which parameters the running backward pass trains: ``torch.autograd.grad(loss, x)`` trains none."""
    try:
        return [index for index, node in accumulators.items() if torch._C._will_engine_execute_node(node)]
    except RuntimeError as error:
        raise OwnGradientError(
            f"torch.autograd.grad with respect to a parameter of a private model, in layer {name!r}: its gradients are "
            f"clipped and summed by backward() only. Take others on a copy that is not private (to_standard_module()), "
            f"or, to train on what such a gradient leads to, one sample at a time. {ONE_BY_ONE}"
        ) from error


class _Op(torch.autograd.Function):
    """``y = layer(x)``; backward returns the input gradient and records the per-sample gradients."""

    @staticmethod
    def forward(ctx: Any, call: Call, token: Tensor | None, x: Tensor, *params: Any) -> Tensor:  # type: ignore[override]
        points = call.tap.recorder.shift.at(params)
        call.params, ctx.call = params, call
        ctx.save_for_backward(x, *points)
        return call.forward(x, *points)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        call, (x, *params), (_, _, wants_gx, *trained) = ctx.call, ctx.saved_tensors, ctx.needs_input_grad
        if call.accumulators is not None:
            needed = reached(call.accumulators, call.tap.name)
        elif running_pass.is_whole():  # all of the graph is run
            needed = [i for i, is_trained in enumerate(trained) if is_trained]
        else:
            needed = reached(_edges(ctx), call.tap.name)
        none = (None,) * len(params)
        if not torch.is_grad_enabled():
            call.record(call.params, needed, G, x, params)
            return (None, None, call.input_gradient(G, x, *params) if wants_gx else None, *none)
        with torch.no_grad():  # create_graph=True: gradients of this gradient may be asked for
            call.record(call.params, needed, G, x, params)
        if not wants_gx:
            return (None, None, None, *none)
        call.count()
        return (None, None, Call.twice.apply(call, params, G, x, *call.params), *none)


class LayerOp(_Op):
    """The same inside of ``torch.func``'s transforms."""

    @staticmethod
    def forward(call: Call, token: Tensor | None, x: Tensor, *params: Tensor | None) -> Tensor:  # type: ignore[override]
        return call.forward(x, *call.tap.recorder.shift.at(params))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call, _, x, *params = inputs
        call.params, call.accumulators, ctx.call = params, accumulators(params), call
        ctx.save_for_backward(x, *call.tap.recorder.shift.at(params))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], call: Call, token: Any, x: Tensor, *params: Any) -> Any:
        """The model runs one sample at a time under vmap: the batched dimension is the samples, whatever the shape."""
        dim = in_dims[2]
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        layer = call.tap.layer
        merge = layer.needs_batch and x.dim() > layer.least_dims
        rows = x.flatten(0, 1) if merge else x
        y = applied(Call(call.tap, call.spec, info.batch_size), None, rows, *params)
        return (y.unflatten(0, x.shape[:2]) if merge else y), 0


def _edges(ctx: Any) -> dict[int, Any]:
    """Where gradients of those parameters arrive that are trained: the edges after that of ``x``."""
    given = [i for i, p in enumerate(ctx.call.params) if p is not None]
    return {i: node for i, (node, _) in zip(given, ctx.next_functions[1:], strict=True) if node is not None}


# Without what torch.autograd.Function.apply does for torch.func, a third of the time of a small layer's forward.
_apply = super(torch.autograd.Function, _Op).apply


def applied(*args: Any) -> Any:
    """The layer's op on a call, a token, an input and parameters."""
    return LayerOp.apply(*args) if torch._C._are_functorch_transforms_active() else _apply(*args)
