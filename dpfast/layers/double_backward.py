"""Double backward: gradients of what ``torch.autograd.grad(..., create_graph=True)`` of a tapped layer returned.

Gradient penalties, forces and differential equations train on input gradients, which depend on the layer's parameters
too. Their per-sample gradients come from running the layer once more, under vmap, with its own copy of the parameters
for every sample, and differentiating that as often as is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.forms import Instantiated
from dpfast.capture.refusals import ONE_BY_ONE
from dpfast.capture.tap import Call, accumulators, applied, reached
from dpfast.capture.traced_tap import TracedTap
from dpfast.layers.generic import Copies
from dpfast.refusals import TransformedError


class InputGradient(torch.autograd.Function):
    """A layer's input gradient, which can be differentiated again; backward records per-sample gradients.

    Guarantee: what it records, summed over a sample's rows, is that sample's part of the gradient of each parameter,
    and counts into the sample's norm with every other use of the parameter in the same backward pass.
    """

    @staticmethod
    def forward(call: Call, points: Sequence[Any], G: Tensor, x: Tensor, *params: Any) -> Tensor:
        return call.input_gradient(G, x, *points)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call, points, G, x, *params = inputs
        ctx.call, ctx.params = call, params
        ctx.save_for_backward(G, x, *points)
        ctx.accumulators = accumulators(params)

    @staticmethod
    def backward(ctx: Any, GG: Tensor) -> tuple[Any, ...]:
        call, (G, x, *points) = ctx.call, ctx.saved_tensors
        again = torch.is_grad_enabled()  # create_graph=True once more
        needed = reached(ctx.accumulators, call.tap.name)
        nothing = (None, None, None, None, *(None for _ in ctx.params))
        if call.batch == 0 or x.numel() == 0:
            return nothing
        with torch.enable_grad(), torch.autocast(G.device.type, enabled=False):
            if again:
                G, x = G.view_as(G), x.view_as(x)  # G may depend on x: partial derivatives are wanted
                copies = {i: _copies(call, ctx.params[i]) for i in ctx.accumulators}
            else:
                G, x = (side.detach().requires_grad_() for side in (G, x))
                copies = {i: points[i].detach().expand(call.batch, *points[i].shape).requires_grad_() for i in needed}
            try:
                dG, dx, *by_sample = _differentiated(call, GG, G, x, points, copies, again)
            except (RuntimeError, NotImplementedError) as error:
                raise TransformedError(
                    f"layer {call.tap.name!r} ({type(call.tap.layer).__name__}): the gradient of its input gradient "
                    f"(create_graph=True) cannot be taken sample by sample ({error}). {ONE_BY_ONE}"
                ) from error
        recorder = call.tap.recorder
        if needed:
            recorder.open()
        found = [(i, samples) for i, samples in zip(copies, by_sample, strict=True) if samples is not None]
        recorder.record_call(call, [(ctx.params[i], Instantiated(x.detach())) for i, x in found if i in needed])
        return (None, None, dG, dx, *(None for _ in ctx.params))


def _copies(call: Call, parameter: Any) -> Tensor:
    """Every sample's copy of ``parameter``, in the graph: what flows back into it is recorded."""
    tap = TracedTap(call.tap.recorder, Copies(), call.tap.name)
    each = torch.zeros(call.batch, device=parameter.device)
    return applied(call.like(tap, None, call.batch), None, each, parameter)


def _differentiated(
    call: Call,
    GG: Tensor,
    G: Tensor,
    x: Tensor,
    points: Sequence[Any],
    copies: Mapping[int, Tensor],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """The gradient of ``⟨GG, input gradient⟩`` for ``G``, for ``x`` and for the ``copies`` ``[B, *shape]``."""

    def one(x: Tensor, own: Mapping[int, Tensor]) -> Tensor:
        params = [own.get(i, None if p is None else p.detach()) for i, p in enumerate(points)]
        return call.tap.layer.forward(call.like(call.tap, call.spec, 1), x, *params)

    dtype = next(p.dtype for p in points if p is not None)  # under autocast x may be narrower
    rows = x.to(dtype).unflatten(0, (call.batch, len(x) // call.batch))
    y = torch.func.vmap(one)(rows, dict(copies)).flatten(0, 1)
    (gx,) = torch.autograd.grad(y, x, G.to(y.dtype), create_graph=True)
    wanted = [side for side in (G, x, *copies.values()) if side.requires_grad]
    found = iter(
        torch.autograd.grad(gx, wanted, GG.to(gx.dtype), allow_unused=True, create_graph=create_graph)
        if gx.requires_grad and wanted
        else [None] * len(wanted)
    )
    return [next(found) if side.requires_grad else None for side in (G, x, *copies.values())]


Call.twice = InputGradient  # taps do not import what is built on them
