"""Layer families: how each kind of module hands its per-sample gradients over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpfast.layers.attention import AppendedRow, MultiheadAttention, OpacusAttention
from dpfast.layers.base import Layer
from dpfast.layers.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from dpfast.layers.embedding_tables import Embedding, EmbeddingBag
from dpfast.layers.linear import Linear, TransposedLinear
from dpfast.layers.normalization import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm, RMSNorm
from dpfast.layers.overridden import OVERRIDDEN
from dpfast.layers.own_rules import own_rule
from dpfast.layers.rms_norm import as_rms_norm
from dpfast.layers.rnn import UNSERVED, Recurrent

FAMILIES: tuple[Layer, ...] = (
    Linear(),
    TransposedLinear(),
    Embedding(),
    EmbeddingBag(),
    Conv1d(),
    Conv2d(),
    Conv3d(),
    ConvTranspose1d(),
    ConvTranspose2d(),
    ConvTranspose3d(),
    LayerNorm(),
    RMSNorm(),
    GroupNorm(),
    InstanceNorm1d(),
    InstanceNorm2d(),
    InstanceNorm3d(),
    MultiheadAttention(),
    AppendedRow(),
    OpacusAttention(),
    Recurrent(),
)
_BY_TYPE: dict[Any, Layer] = {cls: layer for layer in FAMILIES for cls in layer.types}


def family_of_class(cls: type[nn.Module]) -> Layer | None:
    """The family that serves modules of this very class, with its own forward; None where that depends on more."""
    return _BY_TYPE.get(cls) or _BY_TYPE.get(f"{cls.__module__}.{cls.__qualname__}")


def family(module: nn.Module) -> Layer | None:
    """The family that serves ``module``, or None; None as well where its user has registered a rule for it.

    A subclass is served like its base class if it has kept the base class's forward, or is of a family that looks for
    its op in another one; a module whose parameters are not plain ones of its own (parametrised, weight-normed,
    patched) is not.
    """
    bases: tuple[Any, ...] = type(module).__mro__
    if torch.nn.utils.parametrize.is_parametrized(module) or own_rule(module) is not None:
        return None
    forward = vars(module).get("forward")
    if forward is not None and not type(forward).__module__.startswith("dpfast."):
        return None
    known = {cls: family_of_class(cls) for cls in bases}
    base = next((cls for cls in bases if known[cls] is not None), None)
    if base is None:
        return as_rms_norm(module)
    layer = known[base]
    assert layer is not None
    if any(getattr(bases[0], name) is not getattr(base, name) or name in vars(module) for name in layer.inherits):
        return None
    if bases[0].forward is not base.forward:
        if type(layer) not in OVERRIDDEN or not {"weight", "bias"}.issuperset(module._parameters):
            return None
        layer = OVERRIDDEN[type(layer)]
    tensors = [name for name in ("weight", "bias") if isinstance(getattr(module, name, None), Tensor)]
    return layer if all(name in module._parameters for name in tensors) else None


def refusal(module: nn.Module) -> str | None:
    """Why ``module``, taken by itself, cannot be trained privately, and what to do; None if it can."""
    for cls, replacement in UNSERVED.items():
        if isinstance(module, cls):
            return (
                f"nn.{cls.__name__} computes all time steps in one kernel, of which no per-sample gradient can be "
                f"taken; use opacus.layers.{replacement.__name__} (opacus.validators.ModuleValidator.fix)"
            )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return "its parameters have no shape yet; run the model once on a batch before make_private"
    layer = family(module)
    return layer.refusal(module) if layer is not None else None


def exact_alone(module: nn.Module) -> bool:
    """Whether ``module``, refused or not, is exact at a physical batch of one."""
    layer = family(module)
    return layer is None or layer.exact_alone(module)


__all__ = ["FAMILIES", "Layer", "exact_alone", "family", "family_of_class", "refusal"]
