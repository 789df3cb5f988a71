"""How sharp is the minimum? The loss's curvature at a model's weights, on a batch.

Two measures of Park, Kim, Choi, Lee, *Differentially Private Sharpness-Aware Training* (ICML 2023), after Foret,
Kleiner, Mobahi, Neyshabur, *Sharpness-Aware Minimization* (ICLR 2021):

    λ           the largest eigenvalue of the Hessian of L, by power iteration on Hessian-vector products
    L(w + ρĝ) − L(w),  ĝ = ∇L(w)/‖∇L(w)‖        what a step of length ρ uphill costs

The weights are those that are trained. These figures come from private data without noise: they are for research, and
no release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from dpfast.analysis.explain import pristine_copy
from dpfast.model.private_model import FusedModule


@dataclass(frozen=True)
class Sharpness:
    """What :func:`sharpness` found; ``print(report)`` tells all of it.

    Attributes:
        loss: L(w).
        gradient_norm: ‖∇L(w)‖.
        rho: ρ.
        rise: L(w + ρĝ) − L(w); 0 where the gradient is.
        top_eigenvalue: the largest eigenvalue of the Hessian (largest, not largest in magnitude).
        residual: ‖Hv − λv‖ for the unit vector v that the iteration ended with: an eigenvalue is this near.
        converged: whether the residual came below the tolerance.
        iterations: Hessian-vector products taken.
    """

    loss: float
    gradient_norm: float
    rho: float
    rise: float
    top_eigenvalue: float
    residual: float
    converged: bool
    iterations: int

    def __str__(self) -> str:
        end = "" if self.converged else ", not converged"
        return (
            f"sharpness at L = {self.loss:.6g}, ‖∇L‖ = {self.gradient_norm:.4g}\n"
            f"  top eigenvalue of the Hessian  {self.top_eigenvalue:.6g} ± {self.residual:.2g} "
            f"({self.iterations} products{end})\n"
            f"  L(w + ρĝ) − L(w), ρ = {self.rho:<8g}{self.rise:.6g}"
        )


def sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    *,
    rho: float = 0.1,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Sharpness:
    """The curvature of the loss at the model's present weights; the model is not touched, a copy of it is.

    The copy is in eval mode: dropout is off, batch normalisation uses its running statistics. Attention runs in its
    plain form there, as the fused ones have no second derivative.

    Args:
        model: plain or private; only parameters with ``requires_grad`` count as weights.
        loss_fn: ``loss_fn(outputs, targets)``, a number, or one for each sample, of which the mean is taken.
        inputs: what the model is called on: a tensor, a tuple of positional or a mapping of keyword arguments, each
            ``[n, ...]``.
        targets: ``[n, ...]``, or None.
        rho: ρ, the length of the step uphill, in the weights' own units.
        tolerance: stop once ‖Hv − λv‖ is below this share of the largest ‖Hv‖ seen.
        max_iterations: Hessian-vector products at most; as many again where they did not suffice, or the largest
            eigenvalue is not the largest in magnitude.
        dtype: to compute in; the weights' own if None, and float32 for 16-bit weights. float32 reaches a tolerance of
            about 1e-4, float64 one of 1e-8.
        batch_size: samples in one pass, if all at once take too much memory; ``loss_fn`` has to be a mean over them.
        seed: of the vector that the iteration starts with.

    Raises:
        ValueError: names the argument and its value; or the loss is not finite.
    """
    _check(rho, tolerance, max_iterations, dtype, batch_size)
    loss = _Loss(model, loss_fn, inputs, targets, dtype, batch_size)
    at, gradient = loss.value(), loss.gradient()
    norm = float(gradient.norm())
    if not math.isfinite(at) or not math.isfinite(norm):
        raise ValueError(f"model: its loss here is {at}, with a gradient of norm {norm}: there is no curvature to tell")
    start = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = (start / start.norm()).to(gradient)
    value, residual, converged, iterations = _top(loss.product, start, tolerance, max_iterations)
    rise = 0.0
    if norm > 0:
        loss.move(gradient * (rho / norm))
        rise = loss.value() - at
    return Sharpness(at, norm, rho, rise, value, residual, converged, iterations)


def _check(rho: Any, tolerance: Any, max_iterations: Any, dtype: Any, batch_size: Any) -> None:
    for name, number in {"rho": rho, "tolerance": tolerance}.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ValueError(f"{name}={number!r}: give a positive finite number")
    for name, whole in {"max_iterations": max_iterations, "batch_size": batch_size}.items():
        if whole is None and name == "batch_size":
            continue
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
            raise ValueError(f"{name}={whole!r}: give a whole number of at least 1")
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype!r}: give torch.float32, torch.float64 or None")


class _Loss:
    """The mean loss of a batch as a function of the trained weights ``[P]``, with its derivatives."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        inputs: Any,
        targets: Any,
        dtype: torch.dtype | None,
        batch_size: int | None,
    ):
        self.model = pristine_copy(model._module if isinstance(model, FusedModule) else model).eval()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        if not self.weights:
            raise ValueError("model: no parameter has requires_grad, so there are no weights to move")
        wide = dtype or (torch.float64 if any(p.dtype == torch.float64 for p in self.weights) else torch.float32)
        self.model.to(wide)
        self.loss_fn = loss_fn
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        tensors = [x for x in tree_leaves((inputs, targets)) if isinstance(x, Tensor)]
        sizes = {len(x) if x.dim() else 0 for x in tensors}
        if len(sizes) != 1 or 0 in sizes:
            shapes = [list(x.shape) for x in tensors]
            raise ValueError(f"inputs and targets of shapes {shapes}: give tensors that all have one row a sample")
        (samples,) = sizes

        def part(first: int) -> Any:
            def rows(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                x = x.detach()[first : first + size]
                return x.to(wide) if x.is_floating_point() else x

            return tree_map(rows, (inputs, targets))

        size = batch_size or samples
        self.parts: list[tuple[float, Any]] = [
            (min(size, samples - k) / samples, part(k)) for k in range(0, samples, size)
        ]

    def _of(self, inputs: Any, targets: Any) -> Tensor:
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(*(inputs if isinstance(inputs, Sequence) else [inputs]))
        loss = self.loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise ValueError(f"loss_fn: it returned {type(loss).__name__}; let it return a tensor of losses")
        return loss.mean()

    def value(self) -> float:
        with torch.no_grad():
            return sum(share * float(self._of(*batch)) for share, batch in self.parts)

    def gradient(self) -> Tensor:
        """``[P]``."""
        return sum((share * self._gradient(batch, False) for share, batch in self.parts), torch.zeros(()))

    def product(self, v: Tensor) -> Tensor:
        """``Hv``, ``[P]``: the gradient of ∇L · v."""
        total = torch.zeros_like(v)
        for share, batch in self.parts:
            gradient = self._gradient(batch, True)
            if gradient.requires_grad:  # else it is the same everywhere
                rows = torch.autograd.grad(gradient, self.weights, share * v, materialize_grads=True)
                total += torch.cat([row.reshape(-1) for row in rows])
        return total

    def move(self, by: Tensor) -> None:
        """Shift the copy's weights by ``[P]``."""
        with torch.no_grad():
            for p, shift in zip(self.weights, by.split([p.numel() for p in self.weights]), strict=True):
                p.add_(shift.view_as(p))

    def _gradient(self, batch: Any, again: bool) -> Tensor:
        """``[P]``, of a part's mean loss; with a graph of its own if it is differentiated ``again``."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = self._of(*batch)
            if not loss.requires_grad:
                raise ValueError("loss_fn: its losses do not depend on the model's trained parameters by autograd")
            rows = torch.autograd.grad(loss, self.weights, create_graph=again, materialize_grads=True)
            return torch.cat([row.reshape(-1) for row in rows])


def _top(
    product: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, most: int
) -> tuple[float, float, bool, int]:
    """The largest eigenvalue, the residual, whether it is within the tolerance, and how many products it took."""
    v, scale, value, residual, taken = _iterate(product, start, 0.0, 0.0, tolerance, most)
    if value < 0 or residual > tolerance * scale:
        # A negative one may be larger in magnitude, or as large. H + ‖H‖ has none below 0, and the same vectors.
        begin = v if value > 0 else start
        v, scale, value, residual, more = _iterate(product, begin, scale, scale, tolerance, most)
        taken += more
    return value, residual, residual <= tolerance * scale, taken


def _iterate(
    product: Callable[[Tensor], Tensor], v: Tensor, shift: float, scale: float, tolerance: float, most: int
) -> tuple[Tensor, float, float, float, int]:
    """Power iteration on ``H + shift``: v, the largest ‖Hv‖ seen, v · Hv, ‖Hv − (v · Hv) v‖, and the products taken."""
    for k in range(1, most + 1):
        hv = product(v)
        value = float(v @ hv)
        residual = float((hv - value * v).norm())
        scale = max(scale, float(hv.norm()))
        moved = hv + shift * v
        norm = float(moved.norm())
        if residual <= tolerance * scale or norm == 0 or k == most:
            break
        v = moved / norm
    return v, scale, value, residual, k
