"""From a per-sample norm n and a threshold C to the factor that the sample's gradient is multiplied by.

Whatever the function, ``factor · n ≤ C``: C is the sensitivity of the clipped sum, which the noise is scaled by. n is
the norm with the bound on its rounding. A sample whose norm is NaN or infinite gets factor 0; see
:class:`dpfast.clipping.clipped_sum.ClippedSum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpfast import ops
from dpfast.reference.clipping import LARGEST_FACTOR
from dpfast.refusals import ClippingFunctionError


class ClippingFunction:
    """What ``make_private(clipping_fn=...)`` takes, by its name or as an object."""

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        """Factors ``[groups, B]``, float64, for the norms ``n = √(squared + bound) · scale``.

        Args:
            squared, bounds: squared norms and the bounds on their errors, ``[groups, B]``, float64.
            thresholds: C of each group, ``[groups]``, float64.
            scale: the batch size where the loss is a mean over the batch, else 1.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Abadi(ClippingFunction):
    """``min(1, C/n)``: Abadi et al. 2016, *Deep Learning with Differential Privacy*.

    Sensitivity C. At n = 0: 1, times a zero gradient.
    """

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        return ops.clip_factors(squared, bounds, thresholds, ops.ClippingFunction.ABADI, 0.0, scale)[0]


@dataclass(frozen=True)
class Global(ClippingFunction):
    """``C/Z · 1[n ≤ Z]``: all that is kept is scaled alike (Bu et al., *On the Convergence and Calibration of ...*).

    Sensitivity C. Without a threshold Z = C, which is the 0/1 function ``1[n ≤ C]``. At n = 0: C/Z, times a zero
    gradient; past Z: 0, and the sample is left out.

    Args:
        threshold: Z; over groups each has its share, ``Z · C_r / √Σ C²``. Schedulers that change C leave it.
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _check("Global", "threshold", self.threshold)

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        # In units where Z is the same number for every group: of C_r, or of its share of all of them.
        one = torch.ones_like(thresholds) if self.threshold is None else thresholds.norm().expand_as(thresholds)
        unit, z = (thresholds / one).unsqueeze(1).square(), self.threshold or 1.0
        return ops.clip_factors(squared / unit, bounds / unit, one, ops.ClippingFunction.GLOBAL, z, scale)[0]


@dataclass(frozen=True)
class AutoS(ClippingFunction):
    """``C/(n + γ)``: AUTO-S of Bu et al. 2022, *Automatic Clipping*.

    Sensitivity C, which no sample quite reaches. At n = 0: C/γ, times a zero gradient.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        _check("AutoS", "gamma", self.gamma)

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        return ops.clip_factors(squared, bounds, thresholds, ops.ClippingFunction.AUTOMATIC, self.gamma, scale)[0]


@dataclass(frozen=True)
class AutoV(ClippingFunction):
    """``C/n``: AUTO-V of Bu et al. 2022, *Automatic Clipping*; every gradient is made as long as C.

    Sensitivity C. At n = 0: 0.
    """

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        return ops.clip_factors(squared, bounds, thresholds, ops.ClippingFunction.NORMALISED, 0.0, scale)[0]


@dataclass(frozen=True)
class PSAC(ClippingFunction):
    """``C/(n + r/(n + r))``: Xia et al. 2023, *Differentially Private Learning with Per-Sample Adaptive Clipping*.

    Sensitivity C. At n = 0: C, times a zero gradient.
    """

    r: float = 0.1

    def __post_init__(self) -> None:
        _check("PSAC", "r", self.r)

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        return ops.clip_factors(squared, bounds, thresholds, ops.ClippingFunction.PSAC, self.r, scale)[0]


@dataclass(frozen=True)
class CustomClipping(ClippingFunction):
    """A function of one's own: norms ``[B]`` to factors ``[B]``, with ``0 ≤ factor(n) · n ≤ sensitivity``.

    At ``max_grad_norm=sensitivity`` it is that function; at another C it is stretched, ``factor(n · sensitivity / C)``,
    so that the sensitivity is C, as with every other function. Promised at all n, and not at those of the grid alone:
    a factor above ``C/n`` is cut to that, one that is negative or NaN to 0.

    It is called under ``torch.vmap``, for one sample's norm at a time: a factor that depends on other samples' norms
    (their maximum, their median) would move everyone's gradient with one sample. For the same reason it must not
    remember norms from call to call.

    Args:
        function: of a float64 norm ``[]`` that is finite and not negative.
        sensitivity: the most that ``factor(n) · n`` can be; checked on a grid of norms from 1e-9 to 1e9 times it.

    Raises:
        ValueError: it is more somewhere on the grid, or not one finite factor a norm.
    """

    function: Callable[[Tensor], Tensor]
    sensitivity: float

    def __post_init__(self) -> None:
        _check("CustomClipping", "sensitivity", self.sensitivity)
        norms = torch.cat([torch.zeros(1).double(), torch.logspace(-9, 9, 3601, dtype=torch.float64)])
        norms *= self.sensitivity
        try:
            found = self._each(norms)
        except Exception as error:
            raise ClippingFunctionError(
                f"CustomClipping: the function does not run under torch.vmap: {error}"
            ) from error
        if not isinstance(found, Tensor) or found.shape != norms.shape:
            raise ClippingFunctionError(
                "CustomClipping: the function must return one factor, a tensor [], for a norm []"
            )
        found = found.double()
        wrong = ~((found >= 0) & (found * norms <= self.sensitivity * (1 + 1e-9)))
        if bool(wrong.any()):
            n, factor = norms[wrong][0].item(), found[wrong][0].item()
            raise ClippingFunctionError(
                f"CustomClipping: sensitivity={self.sensitivity:g} is exceeded: at n={n:g} the factor is {factor:g}, "
                f"their product {n * factor:g}; declare what the product can be, and return no negative factors"
            )

    def factors(self, squared: Tensor, bounds: Tensor, thresholds: Tensor, scale: float) -> Tensor:
        C = thresholds.unsqueeze(1)
        n = (squared + bounds).sqrt() * scale
        usable = torch.where(n.isfinite(), n, 0.0)
        rows = [self._each(row * (self.sensitivity / c)).double() for row, c in zip(usable, thresholds, strict=True)]
        most = torch.where(n > 0, C * (1 - 2.0**-50) / n, torch.inf)
        factors = torch.stack(rows).nan_to_num(0.0).clamp(0.0, LARGEST_FACTOR).minimum(most)
        return torch.where(n.isfinite(), factors, 0.0)

    def _each(self, norms: Tensor) -> Tensor:
        """The function of every norm ``[B]`` alone."""
        return torch.vmap(self.function)(norms) if len(norms) else norms


NAMED: dict[str, type[ClippingFunction]] = {
    "abadi": Abadi,
    "global": Global,
    "automatic": AutoS,
    "normalised": AutoV,
    "psac": PSAC,
}


def clipping_function(given: Any) -> ClippingFunction:
    """The function that a name or an object stands for.

    Raises:
        ValueError: neither.
    """
    if isinstance(given, ClippingFunction):
        return given
    if isinstance(given, str) and given in NAMED:
        return NAMED[given]()
    hint = "; wrap a function of your own in dpfast.CustomClipping(function, sensitivity)" if callable(given) else ""
    raise ValueError(
        f"clipping_fn={given!r}: use one of {', '.join(NAMED)}, or an object such as AutoS(gamma=0.1){hint}"
    )


def _check(function: str, name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise ValueError(f"{function}: {name}={value!r}: give a positive finite number")
