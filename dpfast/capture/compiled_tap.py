"""A tapped layer under ``torch.compile``: an operator of the graph and one of the backward graph, looked into by none.

The compiler traces the model once and never runs the recording of :class:`~dpfast.capture.tap.LayerOp`; these operators
do the same when the graph runs, where :mod:`dpfast.capture.joint_graph` has not put the layer's own in their place
(as ``expands`` has it do). Each is given the batch's *token*, a tensor ``[B]`` whose gradient only the backward
operator makes, so that no compiler drops an operator that is there for what it records.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.graph_calls import AS_OPERATOR, BESIDE, TAGS, as_autograd_sees, own_memory
from dpfast.capture.recorder import running_backward
from dpfast.capture.tap import Call, Tap, Use, accumulators, check_owners, taps

_sites = itertools.count()  # no two backward operators of a graph are the same call: compilers merge those that are


@torch.library.custom_op("dpfast::tapped", mutates_args=(), tags=TAGS)
def tapped(
    token: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    handle: str,
    number: int,
    shared: bool,
    autocast: torch.dtype | None,
    expands: bool,
) -> Tensor:
    """A layer's output; ``x`` has the samples first, and was one row for all of them if ``shared``."""
    tap = taps[handle]
    use = tap.uses[number]
    tap.recorder.start_forward()
    tap.recorder.check_inside(tap.name)
    tap.recorder.compiled.setdefault(tap.name, AS_OPERATOR)
    owned = use.params
    check_owners(tap, owned, (weight, bias)[: len(owned)])
    tap.forward_pass = running_backward()
    with as_autograd_sees():  # a parameter that was cast to another dtype has a new one
        use.accumulators.update(accumulators(owned))
    call = _call(tap, use, token, x, shared)
    with autocasting(x, autocast):
        return _apart(tap, call.forward(x, *(weight, bias)[: len(owned)]))


@tapped.register_fake
def _(
    token: Any,
    x: Any,
    weight: Any,
    bias: Any,
    handle: str,
    number: int,
    shared: bool,
    autocast: torch.dtype | None,
    expands: bool,
) -> Tensor:
    tap = taps[handle]
    use = tap.uses[number]
    with autocasting(x, autocast):
        return _apart(tap, tap.layer.forward(Call(tap, use.spec), x, *(weight, bias)[: len(use.params)]))


@torch.library.custom_op("dpfast::tapped_backward", mutates_args=(), tags=TAGS)
def tapped_backward(
    token: Tensor,
    G: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    handle: str,
    number: int,
    shared: bool,
    autocast: torch.dtype | None,
    expands: bool,
    site: int,
    wants_gx: bool,
) -> tuple[Tensor, Tensor]:
    """The input gradient (empty unless wanted) and the token's; per-sample gradients are recorded."""
    tap = taps[handle]
    use = tap.uses[number]
    owned = use.params
    call = _call(tap, use, token, x, shared)
    points = (weight, bias)[: len(owned)]
    if tap.layer.saves:
        with autocasting(x, autocast):
            call.forward(x, *points)
    call.record(owned, use.reached(tap.name, use.accumulators), G, x, points, lambda form: own_memory(form, (G, x)))
    gx = call.input_gradient(G, x, *points).contiguous() if wants_gx else x.new_empty(0)
    return gx, torch.zeros_like(token)


@tapped_backward.register_fake
def _(
    token: Any,
    G: Any,
    x: Any,
    weight: Any,
    bias: Any,
    handle: str,
    number: int,
    shared: bool,
    autocast: torch.dtype | None,
    expands: bool,
    site: int,
    wants_gx: bool,
) -> Any:
    gx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_gx else x.new_empty(0)
    return gx, torch.empty_like(token)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    token, x, weight, bias, *rest = inputs
    ctx.rest = (*rest, next(_sites))
    ctx.save_for_backward(token, x, weight, bias)


def _backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
    token, x, weight, bias = ctx.saved_tensors
    gx, gradient = tapped_backward(token, G, x, weight, bias, *ctx.rest, ctx.needs_input_grad[1])
    return gradient, gx if ctx.needs_input_grad[1] else None, *(None,) * 7


tapped.register_autograd(_backward, setup_context=_setup)


@torch.compiler.disable
def out_of_graph(tap: Tap, x: Tensor, *params: Tensor | None, spec: Any) -> Tensor:
    """The tap as it is without a compiler; the next graph may know such a use."""
    tap.note_use(spec, params)
    tap.recorder.compiled[tap.name] = BESIDE
    return tap(x, *params, spec=spec)


def _call(tap: Tap, use: Use, token: Tensor, x: Tensor, shared: bool) -> Call:
    """What :meth:`Tap.__call__` makes of the batch."""
    batch, layout = len(token), None
    if batch:
        batch, layout = tap.recorder.resolve_rows(tap, 1 if shared else x.shape[0], x.dim(), batch, use.spec)
    return Call(tap, use.spec, batch, layout, forward_pass=tap.forward_pass)


def _apart(tap: Tap, y: Tensor) -> Tensor:
    """``y`` with memory of its own, as operators have to return it."""
    return y.clone(memory_format=torch.contiguous_format) if tap.layer.aliases else y


def autocasting(x: Tensor, dtype: torch.dtype | None) -> Any:
    """The autocasting that the graph was traced under; a compiled graph runs without."""
    return torch.autocast(x.device.type, dtype, enabled=dtype is not None)
