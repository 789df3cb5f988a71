"""The form of a language model's head whose logits are not stored: their gradient is made again where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpfast import ops
from dpfast.ops import HeadSides


@dataclass
class Recomputed:
    """``g_i = G_iᵀ x_i`` with G ``[B, T, V]`` of ``sides``; the squared norms were found when G was made for ``x``."""

    sides: HeadSides
    squared: Tensor | None = None
    bound: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.sides.x.shape[0]

    @property
    def rows(self) -> int:
        return self.sides.weight.shape[0]

    def kept(self) -> tuple[Tensor, ...]:
        s = self.sides
        return s.x, s.weight, *([] if s.bias is None else [s.bias]), *self.of_samples()[1:]

    def of_samples(self) -> tuple[Tensor, ...]:
        """What it is made of, samples first."""
        s = self.sides
        return s.x, s.targets, s.normalisers, s.weights

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        if self.squared is None or self.bound is None:
            found = ops.head_backward(self.sides, False, True, False)
            self.squared, self.bound = found.squared, found.bound
        assert self.squared is not None and self.bound is not None
        return self.squared, self.bound

    def clipped_sum(self, factors: Tensor) -> Tensor:
        return ops.head_clipped_sum(self.sides, factors)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A [B, 1, T, d]`` and ``G [B, 1, T, V]``, stored after all."""
        return self.sides.x.unsqueeze(1), ops.head_gradient(self.sides).unsqueeze(1)

    def touched(self) -> Tensor:
        return (self.sides.weights.nan_to_num(0.0, 1.0, 1.0) != 0).any(1)


def one_after_the_other(forms: Sequence[Recomputed]) -> Recomputed:
    """Uses of one head, along T."""
    first = forms[0].sides
    along = ("x", "targets", "normalisers", "weights")
    joined = {name: torch.cat([getattr(form.sides, name) for form in forms], 1) for name in along}
    return Recomputed(first._replace(**joined))
