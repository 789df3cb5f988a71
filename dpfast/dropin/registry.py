"""Our samplers in Opacus' own registries, for users who stay with its "ghost" and "hooks" modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.layers.dp_rnn import RNNLinear
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from dpfast.capture.forms import Form, form_of
from dpfast.capture.recorder import Recorder
from dpfast.capture.traced_tap import TracedTap
from dpfast.clipping.sums_of_forms import squared_norm
from dpfast.dropin import hooks_mode
from dpfast.layers import FAMILIES, family
from dpfast.layers.attention import AppendedRow, MultiheadAttention, OpacusAttention
from dpfast.layers.rnn import Recurrent

# Opacus serves these through their submodules, or has the batch in another place.
_NOT_REGISTERED = (MultiheadAttention, AppendedRow, OpacusAttention, Recurrent)
_REGISTRIES: tuple[dict[Any, Any], ...] = (
    GradSampleHooksFastGradientClipping.NORM_SAMPLERS,
    GradSampleHooksFastGradientClipping.GRAD_SAMPLERS,
    GradSampleHooks.GRAD_SAMPLERS,
)
_replaced: list[dict[Any, Any]] | None = None


def _forms(module: nn.Module, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, list[Form]]:
    """The layer's forms, from running it once more on ``activations``: one path serves every family."""
    layer = family(module)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} is not as its class made it (parametrised or patched): no sampler fits"
        )
    capture = Recorder({p: name for name, p in module.named_parameters()})
    with torch.enable_grad():
        output = layer.run(module, TracedTap(capture, layer, type(module).__name__), *(x.detach() for x in activations))
        output.backward(backprops.to(output.dtype))
    return {p: [form_of(form) for form in forms] for p, forms in capture.take().items()}


def grad_sampler(module: nn.Module, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients ``[B, *p.shape]`` of the module's trainable parameters."""
    return {
        p: forms[0].instantiate().samples.view(-1, *p.shape).to(p.dtype)
        for p, forms in _forms(module, activations, backprops).items()
    }


def norm_sampler(module: nn.Module, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample norms ``[B]`` (not squared), with the bound on their rounding error added."""
    norms = {}
    for p, forms in _forms(module, activations, backprops).items():
        squared, bound = squared_norm(forms)
        norms[p] = (squared + bound).sqrt().to(backprops.dtype)
    return norms


def register() -> None:
    """Put norm and grad samplers for every layer family into Opacus' registries, until :func:`unregister`.

    Stock ``grad_sample_mode="ghost"`` then takes norms of all these layers without per-sample gradients in memory
    for the whole model, and stock ``"hooks"`` is exact for the cases where Opacus' own samplers are not (padding
    modes, repeated indices in bags), and clips on the compiled ops, each per-sample gradient read once for its norm and
    once for the sum (:mod:`dpfast.dropin.hooks_mode`). The registries are global. Calling it twice changes nothing.
    """
    global _replaced
    if _replaced is not None:
        return
    DPOptimizer.clip_and_accumulate = hooks_mode.clip_and_accumulate
    _replaced = [dict(registry) for registry in _REGISTRIES]
    for layer in FAMILIES:
        if isinstance(layer, _NOT_REGISTERED):
            continue
        for cls in layer.types:
            for registry, sampler in zip(_REGISTRIES, (norm_sampler, grad_sampler, grad_sampler), strict=True):
                # Ghost refuses a layer with a norm sampler that is called twice, as the cells of an RNN are.
                if sampler is grad_sampler or cls is not RNNLinear:
                    registry[cls] = sampler


def unregister() -> None:
    """Restore what the registries held before :func:`register`."""
    global _replaced
    if _replaced is None:
        return
    DPOptimizer.clip_and_accumulate = hooks_mode.stock
    for registry, before in zip(_REGISTRIES, _replaced, strict=True):
        registry.clear()
        registry.update(before)
    _replaced = None
