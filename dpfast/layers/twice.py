"""Double backward: gradients of what ``torch.autograd.grad(..., create_graph=True)`` of a tapped layer returned.

Gradient penalties and forces train on an input gradient, which depends on the layer's parameters too. Their per-sample
gradients come from running the layer once more, under vmap, with its own copy of the parameters for every sample, and
differentiating that twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpfast.layers.forms import Instantiated
from dpfast.layers.refusals import ONE_BY_ONE, LayoutError
from dpfast.layers.tap import Call, accumulators, reaches


class InputGradient(torch.autograd.Function):
    """A layer's input gradient, which can be differentiated once more; backward records per-sample gradients.

    Guarantee: what it records, ``Σ`` over a sample's rows, is that sample's part of the gradient of each parameter, and
    counts into the sample's norm with every other use of the parameter in the same backward pass.
    """

    @staticmethod
    def forward(call: Call, points: Sequence[Any], G: Tensor, x: Tensor, *params: Any) -> Tensor:
        return call.tap.layer.input_gradient(call, G, x, *points)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call, points, G, x, *params = inputs
        ctx.call, ctx.params = call, params
        ctx.save_for_backward(G, x, *points)
        ctx.accumulators = accumulators(params)

    @staticmethod
    def backward(ctx: Any, GG: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise LayoutError(
                f"layer {ctx.call.tap.name!r}: its gradient is differentiated a third time (create_graph=True twice), "
                f"of which per-sample gradients cannot be taken. {ONE_BY_ONE}"
            )
        return _backward(ctx, GG)


@once_differentiable
def _backward(ctx: Any, GG: Tensor) -> tuple[Any, ...]:
    call, (G, x, *points) = ctx.call, ctx.saved_tensors
    needed = [i for i, node in ctx.accumulators.items() if reaches(node)]
    dG = dx = None
    if call.batch > 0 and x.numel() > 0:
        with torch.enable_grad(), torch.autocast(G.device.type, enabled=False):
            try:
                dG, dx, *by_sample = _differentiated(call, GG, G, x, points, needed)
            except (RuntimeError, NotImplementedError) as error:
                raise LayoutError(
                    f"layer {call.tap.name!r} ({type(call.tap.layer).__name__}): the gradient of its input gradient "
                    f"(create_graph=True) cannot be taken sample by sample ({error}). {ONE_BY_ONE}"
                ) from error
        recorder = call.tap.recorder
        if needed:
            recorder.open()
        for i, samples in zip(needed, by_sample, strict=True):
            if samples is not None:
                recorder.record(ctx.params[i], Instantiated(samples.detach()), call)
    return (None, None, dG, dx, *(None for _ in ctx.params))


def _differentiated(
    call: Call, GG: Tensor, G: Tensor, x: Tensor, points: Sequence[Any], needed: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """``∂⟨GG, gx⟩`` for ``G``, ``x``, and every sample's copy of the ``needed`` parameters: ``[B, *shape]``."""
    G, x = (side.detach().requires_grad_() for side in (G, x))
    copies = {i: points[i].detach().expand(call.batch, *points[i].shape).requires_grad_() for i in needed}

    def one(x: Tensor, own: dict[int, Tensor]) -> Tensor:
        params = [own.get(i, None if p is None else p.detach()) for i, p in enumerate(points)]
        return call.tap.layer.forward(replace(call, batch=1), x, *params)

    rows = x.unflatten(0, (call.batch, len(x) // call.batch))
    y = torch.func.vmap(one)(rows, copies).flatten(0, 1)
    (gx,) = torch.autograd.grad(y, x, G.to(y.dtype), create_graph=True)
    wanted = [G, x, *copies.values()]
    if not gx.requires_grad:
        return (None,) * len(wanted)
    return torch.autograd.grad(gx, wanted, GG.to(gx.dtype), allow_unused=True)
