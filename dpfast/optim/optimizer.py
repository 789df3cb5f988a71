"""The optimizer side of the "fused" mode: noise and scale what the book has summed, then step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from dpfast.bookkeeping import Book
from dpfast.clipping import Clipping
from dpfast.noise import add_noise_
from dpfast.ops import compute_dtype


class FusedDPOptimizer(DPOptimizer):
    """Adds noise once to the clipped sums of a logical batch, divides, and lets the wrapped optimizer step.

    ``p.grad = (summed_grad + noise_multiplier · sensitivity · z) / expected_batch_size`` for every trainable
    parameter, also for those that the batch did not reach, and for an empty batch. Sum, noise and division are
    float32 (float64 for float64 parameters); only the result is rounded to the parameter's dtype.

    Privacy: the noise is scaled by the largest sensitivity that was in force when any part of the logical batch was
    clipped, so a clip scheduler that steps between backward and step cannot leave it too small.

    Args:
        optimizer: the wrapped optimizer.
        noise_multiplier: noise standard deviation over sensitivity; schedulers may change it.
        clipping: thresholds; ``max_grad_norm`` is its sensitivity, and setting it scales all thresholds.
        book: where backward passes are summed up.
        expected_batch_size: divisor under ``loss_reduction="mean"``.
        loss_reduction: ``"mean"`` or ``"sum"``.
        generator: source of the noise; torch's global one if None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        clipping: Clipping,
        book: Book,
        expected_batch_size: int | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ):
        check_noise_multiplier(noise_multiplier)
        self.clipping = clipping
        self.book = book
        self._stepped = False  # and not cleared since
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping.sensitivity,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
        )
        book.clipping = clipping
        book.tracked = set(self._all_parameters())

    @property
    def max_grad_norm(self) -> float:
        """The sensitivity of the clipped sum: C under flat clipping, ``√Σ C_r²`` over groups."""
        return self.clipping.sensitivity

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipping.sensitivity = value

    @property
    def max_grad_norms(self) -> list[float]:
        """The thresholds C_r of all groups."""
        return list(self.clipping.thresholds)

    @property
    def accumulated_iterations(self) -> int:
        """Backward passes that one step accounts for: those between two calls of ``step`` (at least one)."""
        return max(1, self.book.accumulated)

    @property
    def grad_samples(self) -> list[torch.Tensor]:
        """Not to be had: the fused mode never keeps per-sample gradients."""
        raise AttributeError(
            "grad_samples: the fused mode keeps no per-sample gradients; use grad_sample_mode='hooks' if you need them"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the same model; they are clipped and noised from the next backward on."""
        given: Any = param_group["params"]
        added: list[Any] = [given] if isinstance(given, torch.Tensor) else list(given)
        if any(p not in self.book.names for p in added):
            raise ValueError("add_param_group: a parameter is not one of the model given to make_private")
        self.original_optimizer.add_param_group({**param_group, "params": added})
        assert self.book.tracked is not None
        self.book.tracked.update(added)
        for p in added:
            p.summed_grad = None

    def clip_and_accumulate(self) -> None:
        """Nothing is left to do: the book has clipped and summed at the end of every backward."""

    def add_noise(self) -> None:
        """Add noise to every trainable parameter's ``summed_grad``, once."""
        sensitivity = self.book.sensitivity or self.clipping.sensitivity
        check_noise_multiplier(self.noise_multiplier)
        for p in self._all_parameters():
            if not p.requires_grad:
                continue
            if getattr(p, "summed_grad", None) is None:
                p.summed_grad = torch.zeros(p.shape, dtype=compute_dtype(p.dtype), device=p.device)
            add_noise_(p.summed_grad, self.noise_multiplier * sensitivity, self.generator, self.secure_mode)

    def scale_grad(self) -> None:
        """Move the noisy sums to ``p.grad``, divided under ``loss_reduction="mean"``."""
        divisor = 1.0
        if self.loss_reduction == "mean":
            assert self.expected_batch_size is not None
            divisor = self.expected_batch_size * self.accumulated_iterations
        for p in self._all_parameters():
            p.grad = p.summed_grad.div_(divisor).to(p.dtype) if p.requires_grad else None
            p.summed_grad = None

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noise and scale, and account; False if this call only ends a physical batch."""
        if self._stepped:
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. In order to obtain privacy guarantees "
                "you must call optimizer.zero_grad() on each step"
            )
        self.book.end_physical_batch()
        if self.book.evaluated and not self.book.accumulated:
            raise ValueError(
                "step: the only backward since the last step was of the model in eval() mode, whose gradients are not "
                "clipped and not used; call model.train() before the forward of a training step"
            )
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self.book.start_logical_batch()
        self._stepped = True
        self._is_last_step_skipped = False
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; the sums of earlier physical batches of an unfinished logical batch stay."""
        if not self._is_last_step_skipped:
            for p in self._all_parameters():
                p.summed_grad = None
            self.book.start_logical_batch()
            self._stepped = False
        self.original_optimizer.zero_grad(set_to_none)

    def _all_parameters(self) -> list[Any]:
        """Frozen ones too (``params`` leaves them out): they may be unfrozen between steps."""
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))


def check_noise_multiplier(value: Any) -> None:
    """Refuse what is no standard deviation."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"noise_multiplier={value!r}: give a finite number that is not negative")
