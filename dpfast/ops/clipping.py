"""Squared norms → clipping factors, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfast.ops.backends import is_native
from dpfast.reference import clipping as reference
from dpfast.reference.clipping import ClippingFunction

__all__ = ["ClippingFunction", "clip_factors"]


def clip_factors(
    squared: Tensor,
    bounds: Tensor,
    thresholds: Tensor,
    function: ClippingFunction = ClippingFunction.ABADI,
    shape: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Factors ``[groups, B]`` for the norms ``n = √(squared + bound) · scale``, and how many samples are not finite.

    ``factor · n ≤ C``. A sample with a norm that is not finite in any group gets factor 0 in all, and is counted once.

    Args:
        squared, bounds: ``[groups, B]``, float64.
        thresholds: C of each group, ``[groups]``, float64.
        function, shape: see :class:`ClippingFunction`.
        scale: what norms are multiplied by: the batch size, where the loss is a mean over the batch.
    """
    if is_native("clip_factors", squared.device):
        arguments = (squared.contiguous(), bounds.contiguous(), thresholds.contiguous())
        return torch.ops.dpfast.clip_factors(*arguments, int(function), shape, scale)
    return reference.clip_factors(squared, bounds, thresholds, function, shape, scale)
