"""Scaled losses for float16, with differential privacy."""

from __future__ import annotations

import math
from typing import Any

import torch

from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.refusals import CheckpointError, ScalerError


def check_scale(name: str, scale: float) -> None:
    """Refuse a scale that does not divide out exactly."""
    if not 2.0**-60 <= scale <= 2.0**60 or math.frexp(scale)[0] != 0.5:
        raise ValueError(f"{name}={scale!r}: give a power of two, so that dividing it out rounds nothing")


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for a private optimizer, with a scale that stays as it is.

    Per-sample norms, clipping and noise are of the unscaled gradients: the scale is divided out where norms become
    factors. It is constant because one that follows the gradients (torch's halves itself, and leaves a step out, when
    any gradient overflows) would tell of samples what no noise covers. A sample whose gradient overflows contributes
    exact zeros and is counted (``model.nonfinite_samples``); choose the scale on public data.

    Args:
        optimizer: as ``make_private`` has returned it.
        init_scale: what the loss is multiplied by; a power of two, so that dividing it out is exact.
        device: of the loss.
        enabled: False makes every method do what it does without a scale.

    Example:
        >>> scaler = GradScaler(optimizer, init_scale=2.0**12)
        >>> scaler.scale(loss).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()

    Raises:
        ValueError: not a private optimizer, or not a power of two.
    """

    def __init__(
        self, optimizer: FusedDPOptimizer, init_scale: float = 2.0**16, *, device: str = "cuda", enabled: bool = True
    ):
        if not isinstance(optimizer, FusedDPOptimizer):
            raise ScalerError(f"optimizer is a {type(optimizer).__name__}: give the one that make_private has returned")
        check_scale("init_scale", init_scale)
        super().__init__(device, init_scale=init_scale, growth_interval=2**31 - 1, enabled=enabled)
        self.optimizer = optimizer
        self._scaled = False
        optimizer.clipped_sum.loss_scale = init_scale if self.is_enabled() else 1.0

    def scale(self, outputs: Any) -> Any:
        """The loss, or several, times the scale."""
        self._scaled = True
        return super().scale(outputs)

    def unscale_(self, optimizer: Any) -> None:
        """Nothing is left to do: clipped sums are of unscaled gradients."""

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step()``; no step is left out.

        Raises:
            ValueError: another optimizer than this scaler's, or a loss that was not scaled.
        """
        if optimizer is not self.optimizer:
            raise ScalerError("optimizer is not the one that this GradScaler was made for: give each its own")
        if self.is_enabled() and not self._scaled and optimizer.clipped_sum.used:
            raise ScalerError("backward() of a loss that was not scaled: call scaler.scale(loss).backward()")
        self._scaled = False
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        """The scale stays.

        Raises:
            ValueError: a ``new_scale`` is given.
        """
        if new_scale is not None:
            raise ValueError(
                f"new_scale={new_scale!r}: the scale of private training is constant; make a new GradScaler"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scale that was saved.

        Raises:
            ValueError: it is another than this one's.
        """
        if self.is_enabled() and state_dict.get("scale") != self.optimizer.clipped_sum.loss_scale:
            raise CheckpointError(
                f"scale: saved as {state_dict.get('scale')}, and this GradScaler has "
                f"{self.optimizer.clipped_sum.loss_scale}; make it with init_scale={state_dict.get('scale')}"
            )
