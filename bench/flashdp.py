"""FlashDP's way of per-layer clipping, corrected, as a peer to measure: every layer alone, inside its own backward.

FlashDP's own code scales its noise without C, leaves fused norms without any, and adds norms onto uninitialised memory.
Here each of M layers is clipped to C/√M, and its noise has the standard deviation σ·C: one sample moves all layers
together by at most C. As in FlashDP a linear layer's gradient is one product a sample; on a GPU it is the Triton kernel
that makes norms, factors, sum and noise in two launches.

Nothing here is certified against rounding, and only linear, embedding and normalisation layers are served: it is for
the table, not for training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sums = Callable[[Tensor, Tensor, float], list[Tensor]]  # x, G, C → the clipped sum of each parameter


def clip_each_layer(model: nn.Module, batch_size: int, noise_multiplier: float, max_grad_norm: float) -> list[str]:
    """Have every backward leave noisy clipped gradients in ``grad``; the names of the layers.

    Raises:
        ValueError: for a layer that has trained parameters and is of no known kind, or shares them.
    """
    seen: set[nn.Parameter] = set()
    layers = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        if type(module) not in SERVED:
            raise ValueError(f"no per-layer clipping of {type(module).__name__} ({name})")
        if seen.intersection(own):
            raise ValueError(f"{name} shares its weight: clipped in two layers, it would count in neither")
        seen.update(own)
        layers.append((name, module))
    bound, std = max_grad_norm / math.sqrt(max(len(layers), 1)), noise_multiplier * max_grad_norm
    for number, (name, module) in enumerate(layers):
        module.forward = _Layer(name, number, module, batch_size, bound, std)  # type: ignore[method-assign]
    return [name for name, _ in layers]


class _Layer:
    """A layer's forward, and what its backward needs to know."""

    def __init__(self, name: str, number: int, module: Any, batch_size: int, bound: float, std: float):
        self.name, self.number, self.module, self.batch_size = name, number, module, batch_size
        self.bound, self.std = bound, std
        self.step = 0
        self.sums = SERVED[type(module)]

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] != self.batch_size:
            raise ValueError(f"{self.name} sees {x.shape[0]} rows of a batch of {self.batch_size}")
        return _Clipped.apply(self, x, self.module.weight, getattr(self.module, "bias", None))

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own function."""
        if isinstance(self.module, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(self.module, nn.Embedding):
            return F.embedding(x, weight)
        if isinstance(self.module, nn.LayerNorm):
            return F.layer_norm(x, self.module.normalized_shape, weight, bias, self.module.eps)
        return F.rms_norm(x, self.module.normalized_shape, weight, self.module.eps)

    def noisy(self, x: Tensor, G: Tensor) -> list[Tensor]:
        """The gradients of weight and bias."""
        self.step += 1
        if isinstance(self.module, nn.Linear) and x.is_cuda:
            return self._on_gpu(x, G)
        sums = self.sums(self.module, x, G.float(), self.bound)
        return [(s + self.std * torch.randn_like(s)) / self.batch_size for s in sums]

    def _on_gpu(self, x: Tensor, G: Tensor) -> list[Tensor]:
        from dpfast_kernels.noise import noise_stream
        from dpfast_kernels.per_layer import per_layer_noisy_gradient

        sides = (side.reshape(len(side), -1, side.shape[-1]).contiguous() for side in (x, G))
        stream = noise_stream((0,) * 8, self.step, x.device)
        numbers = 2 * self.number, 2 * self.number + 1
        scale, biased = 1 / self.batch_size, self.module.bias is not None
        weight, bias, _ = per_layer_noisy_gradient(*sides, self.bound, stream, *numbers, self.std, scale, biased)
        return [weight, bias] if biased else [weight]


class _Clipped(torch.autograd.Function):
    """The layer; the gradients of its parameters are clipped sums with noise, over the batch size."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight, bias)
        return layer.plain(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layer, (x, weight, bias) = ctx.layer, ctx.saved_tensors
        gx = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (gx,) = torch.autograd.grad(layer.plain(leaf, weight.detach(), bias), leaf, G)
        gradients: list[Any] = [None, None]
        if weight.requires_grad:
            found = layer.noisy(x, G * layer.batch_size)  # the loss is a mean
            for i, (p, one) in enumerate(zip((weight, bias), found, strict=False)):
                gradients[i] = one.to(p.dtype)
        return None, gx, *gradients


def _factor(square: Tensor, bound: float) -> Tensor:
    return (bound / square.sqrt()).clamp(max=1.0)


def _linear(module: nn.Linear, x: Tensor, G: Tensor, bound: float) -> list[Tensor]:
    weight = torch.zeros_like(module.weight, dtype=torch.float32)
    biased = module.bias is not None
    bias = torch.zeros(len(weight), device=G.device)
    for a, g in zip(x.float(), G, strict=True):  # one product for each sample, as FlashDP has it
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        one, total = g.T @ a, g.sum(0)
        factor = _factor(one.square().sum() + (total.square().sum() if biased else 0.0), bound)
        weight += one.mul_(factor)
        bias += total.mul_(factor)
    return [weight, bias] if biased else [weight]


def _embedding(module: nn.Embedding, ids: Tensor, G: Tensor, bound: float) -> list[Tensor]:
    weight = torch.zeros_like(module.weight, dtype=torch.float32)
    for row, g in zip(ids.flatten(1), G.flatten(1, -2), strict=True):
        words, places = row.unique(return_inverse=True)
        one = torch.zeros(len(words), g.shape[-1], device=g.device).index_add_(0, places, g)
        weight.index_add_(0, words, one.mul_(_factor(one.square().sum(), bound)))
    return [weight]


def _norm(module: Any, x: Tensor, G: Tensor, bound: float) -> list[Tensor]:
    shape = module.normalized_shape
    centred = isinstance(module, nn.LayerNorm)
    normed = F.layer_norm(x, shape, eps=module.eps) if centred else F.rms_norm(x, shape, eps=module.eps)
    positions = list(range(1, x.dim() - len(shape)))
    parts = [G * normed.float()] + ([G] if getattr(module, "bias", None) is not None else [])
    parts = [part.sum(positions) if positions else part for part in parts]
    factors = _factor(sum(part.flatten(1).square().sum(1) for part in parts), bound)  # type: ignore[arg-type]
    return [torch.tensordot(factors, part, 1) for part in parts]


SERVED: dict[type, Any] = {nn.Linear: _linear, nn.Embedding: _embedding, nn.LayerNorm: _norm, nn.RMSNorm: _norm}
