"""A random direction z over all trained parameters, which is never written out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpfast import ops
from dpfast.ops.noise import check_overlap

LEAST = 2.0**-100  # what noise can be scaled by; a step of less moves no number that is not as small


class Direction:
    """z ~ N(0, I) over ``params``: a function of ``noise``'s key and step, made anew wherever it is used.

    Args:
        params: float32 or float64, contiguous.
        index: each parameter's index in the noise stream.
        noise: key and step of z, whose own standard deviation is not used. Whoever sees the weights before and after a
            step sees z: its key must be none that hides anything.

    Raises:
        ValueError: parameters share memory.
    """

    def __init__(self, params: list[Any], index: Mapping[Any, int], noise: ops.Noise):
        self._parts: list[Tensor] = [p.detach() for p in params]
        self._indices = [index[p] for p in params]
        self._noise = noise
        check_overlap({"params": self._parts})

    def move(self, length: float) -> None:
        """``w ← w + length · z`` in place, in one pass; each element is rounded once.

        Raises:
            ValueError: ``length`` is 2¹⁰⁰ or more, or not finite; nothing is changed.
        """
        if abs(length) < LEAST:
            return
        # -(-w + |length| z), as a standard deviation has no sign
        noise = replace(self._noise, std=abs(length), grid=0.0, scale=math.copysign(1.0, length))
        if length < 0:
            torch._foreach_neg_(self._parts)
        ops.noisy_grad_(self._parts, self._parts, self._indices, noise)
        torch.autograd.graph.increment_version(self._parts)
