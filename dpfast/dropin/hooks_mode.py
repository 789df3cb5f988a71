"""Stock Opacus in "hooks" mode on the compiled ops: norms and weighted sums of ``p.grad_sample``, each read once."""

from __future__ import annotations

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor

from dpfast import ops

stock = DPOptimizer.clip_and_accumulate


def clip_and_accumulate(self: DPOptimizer) -> None:
    """Opacus' own flat clipping, ``min(1, C / (n + 1e-6))``, with norms in float64 and sums in float32.

    A sample whose norm is not finite contributes exact zeros (stock Opacus makes the whole sum NaN). Where the compiled
    library cannot serve, it is the stock method.
    """
    backwards = _grad_samples(self)
    if backwards is None:
        return stock(self)
    with torch.no_grad():
        for samples in backwards:
            norms = torch.ops.dpfast.squared_norms(samples).sum(0).sqrt()
            factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            factors = torch.where(norms.isfinite(), factors, 0.0)
            for p, total in zip(self.params, torch.ops.dpfast.weighted_sums(samples, factors), strict=True):
                total = total.view(p.shape).to(p.dtype)
                p.summed_grad = total if p.summed_grad is None else p.summed_grad.add_(total)
    for p in self.params:
        _mark_as_processed(p.grad_sample)


def _grad_samples(optimizer: DPOptimizer) -> list[list[Tensor]] | None:
    """All parameters' ``grad_sample`` for each backward; None where the ops cannot take them."""
    by_parameter: list[list[Tensor]] = []
    for p in optimizer.params:
        _check_processed_flag(p.grad_sample)
        by_parameter.append(p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample])
    every = [samples for chunks in by_parameter for samples in chunks]
    served = all(
        type(samples) is Tensor and samples.is_floating_point() and ops.is_native("squared_norms", samples.device)
        for samples in every
    )
    if not every or not served or len({s.device for s in every}) > 1 or len({len(c) for c in by_parameter}) > 1:
        return None
    return [[samples.contiguous() for samples in chunk] for chunk in zip(*by_parameter, strict=True)]
