"""Norms → clipping factors, the functions of csrc/include/dpfast/clip.h."""

from enum import IntEnum

import torch
from torch import Tensor

LARGEST_FACTOR = 2.0**100  # so that float32 holds it times a batch size; smaller factors than asked for are private


class ClippingFunction(IntEnum):
    """From a norm n and a threshold C to a factor, with factor · n ≤ C.

    ==========  ===================  ==============  ========  ==================================
    function    factor               at n = 0        shape     from
    ==========  ===================  ==============  ========  ==================================
    abadi       min(1, C/n)          1               none      Abadi et al. 2016
    global      C/Z · 1[n ≤ Z]       C/Z             Z         Bu et al. 2021
    automatic   C/(n + γ)            C/γ             γ         Bu et al. 2022, AUTO-S
    normalised  C/n                  0               none      Bu et al. 2022, AUTO-V
    psac        C/(n + r/(n + r))    C               r         Xia et al. 2023
    ==========  ===================  ==============  ========  ==================================

    At n = inf and NaN the factor is 0, whatever the function: see :func:`clip_factors`.
    """

    ABADI = 0
    GLOBAL = 1
    AUTOMATIC = 2
    NORMALISED = 3
    PSAC = 4


def clip_factors(
    squared: Tensor, bounds: Tensor, thresholds: Tensor, function: int, shape: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Factors ``[groups, B]`` for the norms ``√(squared + bound) · scale``, and how many samples are not finite.

    A sample with a ``squared + bound`` that is negative, inf or NaN in any group gets factor 0 in all of them, and is
    counted once. All is float64; factor · n is above C by at most its rounding, which bounds cover (the compiled op
    rounds every step to the safe side).

    Args:
        squared: squared norms ``[groups, B]``, and ``bounds`` of their errors.
        thresholds: C of each group, ``[groups]``.
        function: a :class:`ClippingFunction`; ``shape`` is its γ, r or Z.
        scale: what norms are multiplied by: the batch size, where the loss is a mean over the batch.
    """
    certified = squared + bounds
    n = certified.sqrt() * scale
    C = thresholds.unsqueeze(1)
    match ClippingFunction(function):
        case ClippingFunction.ABADI:
            factors = torch.where(n > C, C / n, 1.0)
        case ClippingFunction.GLOBAL:
            factors = torch.where(n <= shape, C / shape, 0.0)
        case ClippingFunction.AUTOMATIC:
            factors = C / (n + shape)
        case ClippingFunction.NORMALISED:
            factors = torch.where(n > 0, C / n, 0.0)
        case ClippingFunction.PSAC:
            factors = C / (n + shape / (n + shape))
    finite = ((certified >= 0) & n.isfinite()).all(0)
    return torch.where(finite, factors.clamp(max=LARGEST_FACTOR), 0.0), (~finite).sum()
