"""FlashDP's way of per-layer clipping, corrected, as a peer to measure: every layer alone, inside its own backward.

FlashDP's own code scales its noise without C, leaves fused norms without any, and adds norms onto uninitialised memory.
Here each of M layers is clipped to C/√M, and its noise has the standard deviation σ·C: one sample moves all layers
together by at most C. As in FlashDP the norm of a linear layer's gradient comes from a product for each sample that is
not kept, and the sum from one product of all; on a GPU the Triton kernel makes norms, factors, sum and noise in two
launches.

The loss is a mean, so backprops are those of a sample over the batch size: they are clipped to C over the batch size.

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
    bound = max_grad_norm / math.sqrt(max(len(layers), 1)) / batch_size
    std = noise_multiplier * max_grad_norm / batch_size
    for number, (name, module) in enumerate(layers):
        module.forward = _Layer(name, number, module, batch_size, bound, std)  # type: ignore[method-assign]
    return [name for name, _ in layers]


class _Layer:
    """A layer's forward, and what its backward needs to know."""

    def __init__(self, name: str, number: int, module: Any, batch_size: int, bound: float, std: float):
        self.name, self.number, self.module, self.batch_size = name, number, module, batch_size
        self.bound, self.std = bound, std
        self.stream: Tensor | None = None  # on a GPU, of this layer's noise
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

    def input_gradient(self, x: Tensor, G: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.module, nn.Linear):
            return G @ weight
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.plain(leaf, weight.detach(), bias), leaf, G)[0]

    def noisy(self, x: Tensor, G: Tensor) -> list[Tensor]:
        """The gradients of weight and bias."""
        if isinstance(self.module, nn.Linear) and x.is_cuda:
            return self._on_gpu(x, G)
        sums = self.sums(self.module, x, G.float(), self.bound)
        return [s + self.std * torch.randn_like(s) for s in sums]

    def _on_gpu(self, x: Tensor, G: Tensor) -> list[Tensor]:
        from dpfast_kernels.noise import noise_stream
        from dpfast_kernels.per_layer import per_layer_noisy_gradient

        if self.stream is None:
            self.stream = noise_stream((0,) * 8, 0, x.device)
        sides = (side.reshape(len(side), -1, side.shape[-1]).contiguous() for side in (x, G))
        numbers = 2 * self.number, 2 * self.number + 1
        biased = self.module.bias is not None
        weight, bias, _ = per_layer_noisy_gradient(*sides, self.bound, self.stream, *numbers, self.std, 1.0, biased)
        self.stream[-1] += 1
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
        gx = layer.input_gradient(x, G, weight, bias) if ctx.needs_input_grad[1] else None
        gradients: list[Any] = [None, None]
        if weight.requires_grad:
            found = layer.noisy(x, G)
            for i, (p, one) in enumerate(zip((weight, bias), found, strict=False)):
                gradients[i] = one.to(p.dtype)
        return None, gx, *gradients


def _factor(square: Tensor, bound: float) -> Tensor:
    return (bound / square.sqrt()).clamp(max=1.0)


def _linear(module: nn.Linear, x: Tensor, G: Tensor, bound: float) -> list[Tensor]:
    A, G = (side.reshape(len(side), -1, side.shape[-1]) for side in (x.float(), G))
    totals = G.sum(1)
    squares = torch.stack([(g.T @ a).square_().sum() for a, g in zip(A, G, strict=True)])
    if module.bias is not None:
        squares += totals.square().sum(1)
    factors = _factor(squares, bound)
    weight = (G * factors[:, None, None]).flatten(0, 1).T @ A.flatten(0, 1)
    return [weight] if module.bias is None else [weight, factors @ totals]


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
