"""The criterion of a four-value ``make_private``: per-sample losses with a ``backward()``, as in Opacus' ghost mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.recorder import Recorder
from dpfast.refusals import LossCouplesError


class PerSampleLoss:
    """Losses ``[B]`` of a batch; :meth:`backward` reduces them and runs the one backward pass.

    Arithmetic with numbers, ``[B]`` tensors and other losses acts on the per-sample losses.
    """

    def __init__(self, loss_per_sample: Tensor, loss_reduction: str, recorder: Recorder | None = None):
        self.loss_per_sample = loss_per_sample
        self.loss_reduction = loss_reduction
        self.recorder = recorder

    def reduced(self) -> Tensor:
        """The loss that training minimises: the mean or the sum over the batch."""
        return self.loss_per_sample.mean() if self.loss_reduction == "mean" else self.loss_per_sample.sum()

    def backward(self) -> None:
        """One ordinary backward pass; the clipped sums are there when it returns.

        Clipping takes the mean's 1/B out again, so it is not put in: exact in 16 bits too.
        """
        recorder = self.recorder
        if self.loss_reduction == "mean" and recorder and self.loss_per_sample.shape == (recorder.batch_size,):
            with recorder.setting(loss_is_mean=False):
                self.loss_per_sample.sum().backward()
        else:
            self.reduced().backward()

    def detach(self) -> Tensor:
        """The reduced loss, out of the graph."""
        return self.reduced().detach()

    def item(self) -> float:
        """The reduced loss as a number."""
        return self.detach().item()

    def _with(self, op: Callable[[Any, Any], Tensor], other: Any) -> PerSampleLoss:
        if isinstance(other, Tensor) and other.dim() and other.shape != self.loss_per_sample.shape:
            raise LossCouplesError(
                f"a loss per sample of shape {list(self.loss_per_sample.shape)} and a tensor of shape "
                f"{list(other.shape)} would pair samples with each other: give the same shape"
            )
        if isinstance(other, PerSampleLoss):
            if other.loss_reduction != self.loss_reduction:
                raise LossCouplesError(
                    f"losses with different reductions: {self.loss_reduction!r} and {other.loss_reduction!r}"
                )
            other = other.loss_per_sample
        return PerSampleLoss(op(self.loss_per_sample, other), self.loss_reduction, self.recorder)

    def __add__(self, other: Any) -> PerSampleLoss:
        return self._with(torch.add, other)

    def __sub__(self, other: Any) -> PerSampleLoss:
        return self._with(torch.sub, other)

    def __rsub__(self, other: Any) -> PerSampleLoss:
        return self._with(lambda loss, number: number - loss, other)

    def __mul__(self, other: Any) -> PerSampleLoss:
        return self._with(torch.mul, other)

    def __truediv__(self, other: Any) -> PerSampleLoss:
        return self._with(torch.div, other)

    def __neg__(self) -> PerSampleLoss:
        return PerSampleLoss(-self.loss_per_sample, self.loss_reduction, self.recorder)

    __radd__ = __add__
    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"PerSampleLoss({self.item():.4f}, loss_reduction={self.loss_reduction!r})"


class PerSampleCriterion:
    """Calls ``criterion`` without its reduction and returns a :class:`PerSampleLoss`.

    A criterion with a ``reduction`` attribute is asked for ``"none"``; one without is called as it is, and a scalar
    that it returns is taken as the reduced loss (clipping happens in backward, so that is exact too).
    """

    def __init__(self, criterion: Any, loss_reduction: str):
        if getattr(criterion, "reduction", loss_reduction) != loss_reduction:
            raise ValueError(
                f"criterion.reduction={criterion.reduction!r} but loss_reduction={loss_reduction!r}: make them the same"
            )
        self.criterion = criterion
        self.loss_reduction = loss_reduction
        self.recorder: Recorder | None = None  # of the model that it is for

    def __call__(self, *args: Any, shape: tuple[int, ...] | None = None, **kwargs: Any) -> PerSampleLoss:
        """Per-sample losses; ``shape = (B, T, ...)`` says that the criterion sees B·T tokens, samples first."""
        given = [x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        loss = self._unreduced(*args, **kwargs)
        if len(given) > 1 and given[0] == (*given[1], 1) and loss.shape == (given[0][0], *given[1]):
            raise LossCouplesError(
                f"the criterion's inputs of shapes {list(given[0])} and {list(given[1])} broadcast, which pairs every "
                f"sample with every other: give both the same shape (target.unsqueeze(1) or output.squeeze(1))"
            )
        if shape is not None and loss.dim() and len(loss) == shape[0] * shape[1]:
            loss = loss.view(shape[0], shape[1])
            targets = kwargs.get("target", args[1] if len(args) > 1 else None)
            ignored = getattr(self.criterion, "ignore_index", None)
            if self.loss_reduction == "mean" and ignored is not None and targets is not None:
                counted = (targets.reshape(shape[0], shape[1]) != ignored).sum(1).clamp_min(1)
                return PerSampleLoss(loss.sum(1) / counted, self.loss_reduction, self.recorder)
        if loss.dim() > 1:  # a sample's loss is one number
            loss = loss.flatten(1).mean(1) if self.loss_reduction == "mean" else loss.flatten(1).sum(1)
        return PerSampleLoss(loss, self.loss_reduction, self.recorder)

    def _unreduced(self, *args: Any, **kwargs: Any) -> Tensor:
        if not hasattr(self.criterion, "reduction"):
            return self.criterion(*args, **kwargs)
        self.criterion.reduction = "none"
        try:
            return self.criterion(*args, **kwargs)
        finally:
            self.criterion.reduction = self.loss_reduction
