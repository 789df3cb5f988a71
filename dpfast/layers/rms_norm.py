"""RMS norms of other libraries, told by what they compute: Transformers has one class for every family of models."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpfast.capture.tap import Call, Tap
from dpfast.layers.base import Layer
from dpfast.layers.normalization import RMSNorm

EPS = ("variance_epsilon", "eps")  # names of ε in Llama's and in Gemma's


class ForeignRMSNorm(RMSNorm):
    """``y = x̂ ∘ (plus + w)``, with ``x̂ = x / √(mean x² + ε)`` over the last dimension.

    Where the values are rounded is Llama's way (``plus = 0``: x̂ is rounded to x's dtype, then multiplied) and Gemma's
    (``plus = 1``: the product is).
    """

    types = ()

    def __init__(self, plus: float):
        self.plus = plus

    def run(self, module: Any, tap: Tap, x: Tensor) -> Tensor:
        return tap(x, module.weight, spec=(module.weight.shape, _eps(module)))

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        normalised, _, _ = self._normalised(call, x)
        if self.plus:
            return (normalised * (self.plus + params[0].to(normalised.dtype))).to(x.dtype)
        return params[0] * normalised.to(x.dtype)

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        weight = params[0] + self.plus if self.plus else params[0]
        return super().input_gradient(call, G, x, weight).to(x.dtype)


_FAMILIES = (ForeignRMSNorm(0.0), ForeignRMSNorm(1.0))
_PLAIN = frozenset(vars(nn.Module())) | {"forward"}  # attributes that every module has
_tried: WeakKeyDictionary[type, dict[Any, Layer | None]] = WeakKeyDictionary()


def as_rms_norm(module: nn.Module) -> Layer | None:
    """The family that computes what ``module`` does, if that is an RMS norm; shown on random numbers.

    Once for a class and its instances' attributes, all of which the forward may go by.
    """
    weight = module._parameters.get("weight")
    if len(module._parameters) != 1 or weight is None or weight.dim() != 1 or _eps(module) is None:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()) or weight.is_meta:
        return None
    own = {name: value for name, value in vars(module).items() if name not in _PLAIN}
    try:
        attributes = (weight.numel(), frozenset(own.items()))
    except TypeError:  # a list, say, which may change unseen
        return None
    tried = _tried.setdefault(type(module), {})
    if attributes not in tried:
        tried[attributes] = next((family for family in _FAMILIES if _computes(module, family)), None)
    return tried[attributes]


def _eps(module: Any) -> float | None:
    return next((getattr(module, name) for name in EPS if isinstance(getattr(module, name, None), float)), None)


def _computes(module: Any, family: ForeignRMSNorm) -> bool:
    return all(
        _agree(module, family, shape, size, training)
        for training in (True, False)
        for shape in ((3, 2), (5,))
        for size in (0.05, 1.0, 1e3)  # small: ε counts; large: it may clamp
    )


def _agree(module: Any, family: ForeignRMSNorm, shape: tuple[int, ...], size: float, training: bool) -> bool:
    draw = torch.Generator().manual_seed(0)
    x = size * torch.randn(*shape, module.weight.numel(), generator=draw)
    twin = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(torch.randn(x.shape[-1], generator=draw))}
    twin.training = training
    call: Any = Call(None, (x.shape[-1:], _eps(module)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            return torch.allclose(type(module).forward(twin, x), family.forward(call, x, twin.weight), 1e-5, 1e-7)
    except Exception:  # its forward takes something else than one tensor
        return False
