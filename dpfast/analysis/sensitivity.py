"""Leave-one-out check of a user's own model and loss: does one sample move the clipped sum by more than C?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping import Clipping, check_threshold
from dpfast.explain import call, pristine_copy
from dpfast.grad_sample import FusedHooks, FusedModule
from dpfast.layers.recorder import LayoutError
from dpfast.model_forward import normalises_over_batch
from dpfast.trees import map_tensors, tensors

MOST_LEFT_OUT = 32  # samples left out in turn; spread over a larger batch
ROUNDING = 1e-4  # relative slack for float32 sums of a batch


@dataclass(frozen=True)
class SensitivityReport:
    """What leaving samples out showed.

    Attributes:
        ok: no sample moved the clipped sum by more than ``sensitivity``, and none changed another one's gradient.
        largest_move: the largest L2 distance between the clipped sums with and without a sample.
        sensitivity: the bound it must keep.
        largest_change: the largest relative change of another sample's norm when a sample was left out; 0 if the
            samples are independent.
        worst_sample: index of the sample with the largest move.
        left_out: how many samples were left out in turn.
        cause: the likely cause in words, empty if ok.
    """

    ok: bool
    largest_move: float
    sensitivity: float
    largest_change: float
    worst_sample: int
    left_out: int
    cause: str

    def __str__(self) -> str:
        verdict = "holds" if self.ok else "is BROKEN"
        lines = [
            f"sensitivity check: the guarantee {verdict} on this batch",
            f"  left out {self.left_out} samples in turn; the clipped sum moved by at most {self.largest_move:.6g} "
            f"(sample {self.worst_sample}), allowed {self.sensitivity:.6g}",
            f"  other samples' gradient norms changed by at most {100 * self.largest_change:.3g} %",
        ]
        return "\n".join([*lines, f"  likely cause: {self.cause}"] if self.cause else lines)


def check_sensitivity(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: Any,
    max_grad_norm: float,
    *,
    batch_first: bool = True,
    loss_reduction: str = "mean",
) -> SensitivityReport:
    """Run ``model`` and ``loss_fn`` on a real batch, noise off, with every sample left out in turn.

    The first thing to run on a new model: the library makes a layer's gradients exact, but a loss that couples the
    samples of a batch is the user's own, and no library can clip its way out of that.

    Args:
        model: plain or private; it is copied, not touched. Dropout is switched off in the copy.
        loss_fn: a criterion module, called as ``loss_fn(model(x), y)`` on a batch ``(x, y)``; or any
            callable ``loss_fn(model, batch)`` that returns the loss (per-sample losses are reduced).
        batch: nested tuples, lists and dicts of tensors with at least two samples.
        max_grad_norm: C, the sensitivity to check against.
        batch_first: whether dimension 0 (else 1) of the batch's tensors is the batch.
        loss_reduction: how the loss is reduced over the batch.

    Returns:
        A report; ``print(report)`` tells all of it.
    """
    C = check_threshold("max_grad_norm", max_grad_norm)
    dim = 0 if batch_first else 1
    sizes = [x.shape[dim if x.dim() > dim else 0] for x in tensors(batch) if x.dim()]
    if not sizes or sizes[0] < 2:
        raise ValueError(f"batch: leaving one out needs tensors with at least two samples, got {sizes[:1] or 'none'}")
    run = _Runner(model, loss_fn, loss_reduction, batch_first, C)
    count = sizes[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        everything, norms = run(batch)
        left_out = sorted({round(i * (count - 1) / (MOST_LEFT_OUT - 1)) for i in range(MOST_LEFT_OUT)})
        if count <= MOST_LEFT_OUT:
            left_out = list(range(count))
        moves, changes, ratios = [], [], []
        for i in left_out:
            keep = torch.tensor([j for j in range(count) if j != i])
            total, rest = run(_select(batch, keep, count, dim))
            moves.append(float(torch.linalg.vector_norm(everything - total)))
            before = norms[keep]
            ratio = (rest + 1e-30) / (before + 1e-30)
            changes.append(float((ratio - 1).abs().nan_to_num(0, 0, 0).max()))
            ratios.append(ratio)
    worst = max(range(len(moves)), key=lambda k: moves[k])
    change = max(changes)
    slack = ROUNDING * (C + 1e-3 * float(torch.linalg.vector_norm(everything)))
    ok = moves[worst] <= C + slack and change <= 1e-2
    cause = "" if ok else _cause(run.twin, caught, ratios, run.shapes)
    return SensitivityReport(ok, moves[worst], C, change, left_out[worst], len(left_out), cause)


class _Runner:
    """The clipped sum and the norms of a batch, on a private copy of the model."""

    def __init__(self, model: nn.Module, loss_fn: Any, loss_reduction: str, batch_first: bool, C: float):
        self.twin = pristine_copy(model._module if isinstance(model, FusedModule) else model).eval()
        for module in self.twin.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.train()  # as it would be in training: that is where it couples samples
                module.requires_grad_(False)  # its own parameters have no per-sample gradients to measure
        self.hooks = FusedHooks(
            self.twin, batch_first=batch_first, loss_reduction=loss_reduction, clipping=Clipping.flat(C)
        )
        self.hooks.book.needs_model = False  # gradients count in eval() too
        self.loss_fn, self.loss_reduction = loss_fn, loss_reduction
        self.shapes: tuple[Any, ...] = ()

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Clipped sum ``[n]`` and norms ``[B]``."""
        try:
            return self._measure(batch)
        except (LayoutError, ValueError):
            if not self.hooks.book.verifies:
                raise
            self.hooks.book.verifies = False  # what mixes samples is to be measured here, not refused
            return self._measure(batch)

    def _measure(self, batch: Any) -> tuple[Tensor, Tensor]:
        for p in self.twin.parameters():
            p.summed_grad = None  # type: ignore[attr-defined]
        with torch.enable_grad():
            loss = self._loss(batch)
            if loss.dim():
                loss = loss.mean() if self.loss_reduction == "mean" else loss.sum()
            loss.backward()
        sums = [
            (torch.zeros_like(p) if p.summed_grad is None else p.summed_grad).double().reshape(-1)  # type: ignore[attr-defined]
            for p in self.twin.parameters()
            if p.requires_grad
        ]
        return torch.cat(sums), self.hooks.per_sample_gradient_norms.double().cpu()

    def _loss(self, batch: Any) -> Tensor:
        if not isinstance(self.loss_fn, nn.Module):
            return self.loss_fn(self.twin, batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                "loss_fn is a criterion: give batch as a pair (inputs, targets), or a callable (model, batch)"
            )
        output = call(self.twin, batch[0])
        self.shapes = tuple(getattr(x, "shape", None) for x in (output, batch[1]))
        return self.loss_fn(output, batch[1])


def _select(batch: Any, keep: Tensor, count: int, dim: int) -> Any:
    def pick(x: Tensor) -> Tensor:
        axis = dim if x.dim() > dim else 0
        return x.index_select(axis, keep.to(x.device)) if x.dim() and x.shape[axis] == count else x

    return map_tensors(pick, batch)


def _cause(model: nn.Module, caught: list[Any], ratios: list[Tensor], shapes: tuple[Any, ...]) -> str:
    """The likely cause in words."""
    if coupled := [name for name, module in model.named_modules() if normalises_over_batch(module)]:
        return (
            f"BatchNorm normalises every sample by the others in its batch ({', '.join(coupled)}); replace it with "
            f"opacus.validators.ModuleValidator.fix(model)"
        )
    sizes_differ = any("target size" in str(warning.message) for warning in caught)
    if sizes_differ or (
        len(shapes) == 2 and None not in shapes and len(shapes[0]) == 2 and shapes[0] == (*shapes[1], 1)
    ):
        return (
            "broadcast of a [B, 1] output against [B] targets in the loss pairs every sample with every other; give "
            "both the same shape (targets.unsqueeze(1) or outputs.squeeze(1))"
        )
    if all(bool((ratio / ratio.median() - 1).abs().max() < 1e-3) for ratio in ratios if len(ratio) > 1):
        return (
            "the loss is scaled by something of the whole batch, as in an average over all tokens (or weights) of the "
            "batch: each sample's scale then depends on the others'; average over each sample's own tokens first"
        )
    return (
        "samples are coupled in the model or in the loss (a mean or interaction over the batch, a contrastive loss); "
        "make each sample's loss a function of that sample alone"
    )
