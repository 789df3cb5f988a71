"""Our samplers in Opacus' own registries, for users who stay with its "ghost" and "hooks" modes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.layers.dp_rnn import RNNLinear
from opacus.optimizers import DPOptimizer
from opacus.utils.module_utils import trainable_parameters
from torch import Tensor, nn

from dpfast.capture.forms import Form, form_of, written
from dpfast.capture.recorder import Recorder
from dpfast.capture.traced_tap import TracedTap
from dpfast.clipping.sums_of_forms import squared_norm
from dpfast.dropin import hooks_mode
from dpfast.layers import FAMILIES, Layer, family
from dpfast.layers.attention import AppendedRow, MultiheadAttention, OpacusAttention
from dpfast.layers.rnn import Recurrent

# Opacus serves these through their submodules, or has the batch in another place.
_NOT_REGISTERED = (MultiheadAttention, AppendedRow, OpacusAttention, Recurrent)
_ABSENT = object()
_REGISTRIES: tuple[dict[Any, Any], ...] = (
    GradSampleHooksFastGradientClipping.NORM_SAMPLERS,
    GradSampleHooksFastGradientClipping.GRAD_SAMPLERS,
    GradSampleHooks.GRAD_SAMPLERS,
)
_replaced: tuple[dict[Any, Any], ...] = tuple({} for _ in _REGISTRIES)  # what each held where a sampler of ours is now
_clip_and_accumulate: Any = _ABSENT  # and DPOptimizer, likewise


def _forms(module: nn.Module, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, list[Form]]:
    """The layer's forms, from running it once more on ``activations``: one path serves every family."""
    layer = family(module)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} is not as its class made it (parametrised or patched): no sampler fits"
        )
    capture = Recorder({p: name for name, p in module.named_parameters()})
    capture.closing = lambda: None  # the forms are taken below; a sampler may be called outside of any backward, too
    with torch.enable_grad():
        output = layer.run(module, TracedTap(capture, layer, type(module).__name__), *(x.detach() for x in activations))
        output.backward(backprops.to(output.dtype))
    return {p: [form_of(form) for form in forms] for p, forms in capture.take().items()}


def grad_sampler(module: nn.Module, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients ``[B, *p.shape]`` of the module's trainable parameters; B may be 0."""
    if backprops.numel() == 0:
        return {p: p.new_zeros(len(backprops), *p.shape) for _, p in trainable_parameters(module)}
    found = {p: written(forms[0]) for p, forms in _forms(module, activations, backprops).items()}
    return {p: samples.view(len(samples), *p.shape).to(p.dtype) for p, samples in found.items()}


def norm_sampler(module: nn.Module, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample norms ``[B]`` (not squared), with the bound on their rounding error added; B may be 0."""
    if backprops.numel() == 0:
        return {p: backprops.new_zeros(len(backprops)) for _, p in trainable_parameters(module)}
    norms = {}
    for p, forms in _forms(module, activations, backprops).items():
        squared, bound = squared_norm(forms)
        norms[p] = (squared + bound).sqrt().to(backprops.dtype)
    return norms


_SAMPLERS = (norm_sampler, grad_sampler, grad_sampler)  # of each of the registries


def _classes(layer: Layer) -> Iterator[type[nn.Module]]:
    """The family's module classes; none of a library that has not been imported."""
    for cls in layer.types:
        if isinstance(cls, str):
            module, _, name = cls.rpartition(".")
            cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            yield cls


def _may_be_replaced(held: Any, override: bool) -> bool:
    """Whether it is Opacus' own or nothing; by where its code is, as ``functools.wraps`` copies the rest."""
    code_is_in = getattr(held, "__globals__", {}).get("__name__", "")
    return override or held is _ABSENT or code_is_in.startswith(("opacus.grad_sample.", "opacus.optimizers."))


def register(*, override: bool = False) -> None:
    """Put norm and grad samplers for every layer family into Opacus' registries, until :func:`unregister`.

    Stock ``grad_sample_mode="ghost"`` then takes norms of all these layers without per-sample gradients in memory
    for the whole model, and stock ``"hooks"`` is exact for the cases where Opacus' own samplers are not (padding
    modes, repeated indices in bags), and clips on the compiled ops, each per-sample gradient read once for its norm and
    once for the sum (:mod:`dpfast.dropin.hooks_mode`). The registries are global. Calling it twice changes nothing,
    unless a library whose layers are served has been imported since: its layers are added.

    Args:
        override: also replace what is not Opacus' own: samplers that somebody else has registered for these very
            classes, and another ``DPOptimizer.clip_and_accumulate``. By default they stay.
    """
    global _clip_and_accumulate
    for layer in FAMILIES:
        if isinstance(layer, _NOT_REGISTERED):
            continue
        for cls in _classes(layer):
            for registry, sampler, replaced in zip(_REGISTRIES, _SAMPLERS, _replaced, strict=True):
                # Ghost refuses a layer with a norm sampler that is called twice, as the cells of an RNN are.
                if sampler is norm_sampler and cls is RNNLinear:
                    continue
                held = registry.get(cls, _ABSENT)
                if held is not sampler and _may_be_replaced(held, override):
                    replaced[cls], registry[cls] = held, sampler
    held = DPOptimizer.clip_and_accumulate
    if held is not hooks_mode.clip_and_accumulate and _may_be_replaced(held, override):
        _clip_and_accumulate, DPOptimizer.clip_and_accumulate = held, hooks_mode.clip_and_accumulate


def unregister() -> None:
    """Take out what :func:`register` put in, and put back what was there.

    What somebody else has put in its place since, stays.
    """
    global _clip_and_accumulate
    for registry, sampler, replaced in zip(_REGISTRIES, _SAMPLERS, _replaced, strict=True):
        for cls, before in replaced.items():
            if registry.get(cls) is not sampler:
                continue
            if before is _ABSENT:
                del registry[cls]
            else:
                registry[cls] = before
        replaced.clear()
    if _clip_and_accumulate is not _ABSENT:
        if DPOptimizer.clip_and_accumulate is hooks_mode.clip_and_accumulate:
            DPOptimizer.clip_and_accumulate = _clip_and_accumulate
        _clip_and_accumulate = _ABSENT
