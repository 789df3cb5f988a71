"""Where a layer's forward and backward meet the recorder: one autograd function for every layer.

A tapped layer computes its output and its input gradient as always; the ordinary weight gradient is not computed,
the per-sample gradients go to the :class:`Recorder` instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dpfast.capture.forms import Convolved, Factored, Form, by
from dpfast.capture.mean_in_16_bits import NARROW
from dpfast.capture.picked_rows import owned, owners_of, places
from dpfast.capture.recorder import OUTSIDE, Recorder, RowLayout, running_backward
from dpfast.capture.refusals import ONE_BY_ONE, LayoutError
from dpfast.ops import alike_for_every_batch

if TYPE_CHECKING:
    from dpfast.layers.base import Layer

taps: WeakValueDictionary[str, Tap] = WeakValueDictionary()  # by what a compiler takes for a constant
_handles = itertools.count()
OF_THIS_PROCESS = ("uses", "forward_pass", "handle")  # attributes of a tap that no copy has


class Use(NamedTuple):
    """A way in which a layer has called its tap."""

    spec: Any
    params: tuple[Any, ...]
    trained: tuple[bool, ...]
    accumulators: dict[int, Any]  # where gradients of the trained ones arrive

    def owned(self, *given: Tensor | None) -> tuple[Any, ...]:
        """The module's parameters, for those that a compiled graph was given: they are known by identity."""
        for p, q in zip(self.params, given, strict=False):
            if p is not q and (p is None or q is None or p.data_ptr() != q.data_ptr()):
                raise RuntimeError(
                    "a parameter was replaced by another object since the model was made private (as in "
                    "load_state_dict(assign=True)): change its values instead, or make the model private again"
                )
        return self.params


@dataclass
class Tap:
    """A layer's way to the recorder: computes the layer's op and records its per-sample gradients in backward."""

    recorder: Recorder
    layer: Layer
    name: str
    batch_dim: int = 0

    def __post_init__(self) -> None:
        self.uses: list[Use] = []
        self.forward_pass = OUTSIDE  # in which the last forward of a compiled graph ran
        self.handle = str(next(_handles))
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
        recorder.start_forward()
        if recorder.token is not None:
            return applied(Call(self, spec), recorder.token, x, *params)
        recorder.check_inside(self.name)
        if recorder.batch_size == 0:
            return applied(Call(self, spec), None, x, *params)
        if x.dim() < self.layer.least_dims:
            raise LayoutError(
                f"layer {self.name!r} got an input of shape {list(x.shape)}, which has no batch dimension"
            )
        if recorder.row_order is not None:
            return self._on_packed_rows(x, recorder.row_order, *params, spec=spec)
        if recorder.follows_rows and (owners := owners_of(x)) is not None:
            return self._on_picked_rows(x, owners, *params, spec=spec)
        if self._use(spec, params) is None:
            self.uses.append(Use(spec, params, _trained(params), accumulators(params)))
        dim = self.batch_dim if x.dim() > self.layer.least_dims else 0
        if dim:
            x = x.movedim(dim, 0)
        batch, layout = recorder.resolve_rows(self, x.shape[0], x.dim())
        if x.shape[0] == 1 and batch > 1:  # shared by all samples: each gets its own copy, and so its own gradient
            x = x.expand(batch, *x.shape[1:])
        y = applied(Call(self, spec, batch, layout), None, x, *params)
        return y.movedim(0, dim) if dim else y

    def _use(self, spec: Any, params: Sequence[Any]) -> int | None:
        """The number of such a use, if there was one."""
        for number, use in enumerate(self.uses):
            if use.spec == spec and use.trained == _trained(params):
                return number
        return None

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
        with _disable_current_modes():  # an order, of nobody's values
            index = order[: len(x)].clone()
        rows = x.new_zeros(len(order), *x.shape[1:]).index_copy(0, index, x)
        return applied(Call(self, spec, batch, layout), None, rows, *params).index_select(0, index)


@dataclass
class Call:
    """One call of a layer: what its backward needs besides the saved tensors."""

    twice: ClassVar[Any] = None  # a function of autograd: its input gradient, to be differentiated again

    tap: Tap
    spec: Any
    batch: int = 0
    layout: RowLayout | None = None
    saved: tuple[Tensor, ...] = ()
    forward_pass: int = field(default_factory=running_backward)
    of: Any = None  # the model's forward that it is a part of; None where a checkpoint computes it again

    def __post_init__(self) -> None:
        if self.of is None and self.tap is not None:
            self.of = self.tap.recorder.under_way

    def forward(self, x: Tensor, *params: Any) -> Tensor:
        """The layer's output."""
        with alike_for_every_batch(x.device):
            return self.tap.layer.forward(self, x, *params)

    def input_gradient(self, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        """The gradient with respect to ``x``."""
        with alike_for_every_batch(G.device):
            return self.tap.layer.input_gradient(self, G, x, *params)

    def planned(self, form: Factored | Convolved) -> Form:
        """The form as the model's planner wants it."""
        if isinstance(form, Factored) and form.A.shape[2] == 1:  # there is no choice
            return form
        return by(form, self.tap.recorder.planner.choose(self.tap.name, form.shape))

    def record(
        self,
        owners: Sequence[Any],
        needed: Sequence[int],
        G: Tensor,
        x: Tensor,
        points: Sequence[Any],
        keep: Callable[[Form], Form] = lambda form: form,
    ) -> None:
        """Hand over the per-sample gradients of the ``needed`` ones of the ``owners``, which computed as ``points``."""
        recorder = self.tap.recorder
        if not needed:
            return
        recorder.open()
        if recorder.loss_is_mean and G.dtype in NARROW and recorder.observer is None:
            recorder.narrowed = recorder.narrowed or (f"layer {self.tap.name!r}", G.dtype)
        if self.batch == 0:
            return
        if torch.is_autocast_enabled(G.device.type):  # a backward inside of such a region would make sums in 16 bits
            with torch.autocast(G.device.type, enabled=False):
                self._record(owners, needed, G, x, points, keep)
        else:
            self._record(owners, needed, G, x, points, keep)

    def _record(self, owners: Any, needed: Any, G: Tensor, x: Tensor, points: Any, keep: Any) -> None:
        record = self.tap.recorder.record
        for index, form in self.tap.layer.forms(self, needed, G, x, *points):
            record(owners[index], keep(form), self)


def _trained(params: Sequence[Any]) -> tuple[bool, ...]:
    return tuple([p is not None and p.requires_grad for p in params])


def accumulators(params: Sequence[Any]) -> dict[int, Any]:
    """The nodes of the graph at which gradients of the trained ones arrive, by their place in ``params``."""
    return {index: torch.autograd.graph.get_gradient_edge(p).node for index, p in enumerate(params) if _trained([p])[0]}


def reaches(accumulator: Any, name: str) -> bool:
    """Whether the running backward pass trains the parameter: ``torch.autograd.grad(loss, x)`` does not."""
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError as error:
        raise RuntimeError(
            f"torch.autograd.grad with respect to a parameter of a private model, in layer {name!r}: its gradients are "
            f"clipped and summed by backward() only. Take others on a copy that is not private (to_standard_module()), "
            f"or, to train on what such a gradient leads to, one sample at a time. {ONE_BY_ONE}"
        ) from error


class _Op(torch.autograd.Function):
    """``y = layer(x)``; backward returns the input gradient and records the per-sample gradients."""

    @staticmethod
    def forward(ctx: Any, call: Call, token: Tensor | None, x: Tensor, *params: Any) -> Tensor:  # type: ignore[override]
        points = call.tap.recorder.shift.at(params)
        _keep(ctx, call, x, points, params, None)
        return call.forward(x, *points)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        call, (x, *params) = ctx.call, ctx.saved_tensors
        edges = _edges(ctx) if ctx.accumulators is None else ctx.accumulators
        needed = [i for i, node in edges.items() if reaches(node, call.tap.name)]
        none = (None,) * len(params)
        if not torch.is_grad_enabled():
            call.record(ctx.params, needed, G, x, params)
            return (None, None, call.input_gradient(G, x, *params) if ctx.needs_input_grad[2] else None, *none)
        with torch.no_grad():  # create_graph=True: gradients of this gradient may be asked for
            call.record(ctx.params, needed, G, x, params)
        if not ctx.needs_input_grad[2]:
            return (None, None, None, *none)
        return (None, None, Call.twice.apply(call, params, G, x, *ctx.params), *none)


class LayerOp(_Op):
    """The same inside of ``torch.func``'s transforms."""

    @staticmethod
    def forward(call: Call, token: Tensor | None, x: Tensor, *params: Tensor | None) -> Tensor:  # type: ignore[override]
        return call.forward(x, *call.tap.recorder.shift.at(params))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call, _, x, *params = inputs
        _keep(ctx, call, x, call.tap.recorder.shift.at(params), params, accumulators(params))

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


def _keep(ctx: Any, call: Call, x: Tensor, points: Sequence[Any], params: Sequence[Any], found: Any) -> None:
    """For the backward. ``found``: where gradients of the parameters arrive, if the function's own edges do not say."""
    ctx.call, ctx.accumulators = call, found
    ctx.save_for_backward(x, *points)
    ctx.params = params  # a checkpoint gives back copies of what is saved; parameters are known by identity


def _edges(ctx: Any) -> dict[int, Any]:
    """Where gradients of those parameters arrive that are trained: the edges after that of ``x``."""
    given = [i for i, p in enumerate(ctx.params) if p is not None]
    return {i: node for i, (node, _) in zip(given, ctx.next_functions[1:], strict=True) if node is not None}


def applied(*args: Any) -> Any:
    """The layer's op on a call, a token, an input and parameters."""
    return (LayerOp if torch._C._are_functorch_transforms_active() else _Op).apply(*args)
