"""From per-sample norms to clipping factors, and the sensitivity that the noise is scaled by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpfast import ops


def check_threshold(name: str, value: Any) -> float:
    """``value`` as a float, if it is a usable clipping norm."""
    number = math.nan if isinstance(value, (bool, str)) or not hasattr(value, "__float__") else float(value)
    if not 0 < number < math.inf:
        raise ValueError(
            f"{name}={value!r}: give a positive finite number, the L2 norm to clip per-sample gradients to"
        )
    return number


class Clipping:
    """Groups of parameters, each clipped to its own norm; flat clipping is one group of all.

    ``thresholds[r]`` is C_r. One sample moves the clipped sum by at most ``sensitivity = √Σ_r C_r²`` (L2).
    Setting :attr:`sensitivity` scales every C_r alike, which is what Opacus' clip schedulers do to
    ``optimizer.max_grad_norm``.
    """

    def __init__(self, thresholds: Sequence[float], group_of: Mapping[nn.Parameter, int] | None = None):
        self.thresholds = [check_threshold("max_grad_norm", value) for value in thresholds]
        self._group_of = dict(group_of) if group_of is not None else None

    @classmethod
    def flat(cls, max_grad_norm: float) -> Clipping:
        """One norm over all parameters."""
        if isinstance(max_grad_norm, (Sequence, Mapping)):
            raise ValueError(
                f"max_grad_norm={max_grad_norm!r} with clipping='flat': give one number, or clipping='per_layer'"
            )
        return cls([max_grad_norm])

    @classmethod
    def per_layer(
        cls, max_grad_norm: Sequence[float] | Mapping[str, float], parameters: Mapping[str, nn.Parameter]
    ) -> Clipping:
        """A norm per parameter tensor (a list, in the optimizer's order) or per named group (a dict).

        A dict maps name prefixes to norms: ``{"features": 0.5, "head.weight": 1.0}``; the longest prefix that
        matches (whole dotted parts) wins, and every parameter must match one.

        Args:
            parameters: the optimizer's parameters by name, in its order.
        """
        if isinstance(max_grad_norm, Mapping):
            return cls._named_groups(max_grad_norm, parameters)
        if not isinstance(max_grad_norm, Sequence) or len(max_grad_norm) != len(parameters):
            raise ValueError(
                f"max_grad_norm={max_grad_norm!r} with clipping='per_layer': give a list of {len(parameters)} "
                f"numbers, one for each parameter of the optimizer, or a dict of name prefixes to numbers"
            )
        return cls(max_grad_norm, {p: r for r, p in enumerate(parameters.values())})

    @classmethod
    def _named_groups(cls, thresholds: Mapping[str, float], parameters: Mapping[str, nn.Parameter]) -> Clipping:
        order = list(thresholds)
        group_of, used = {}, set()
        for name, p in parameters.items():
            matches = [key for key in order if name == key or name.startswith(f"{key}.") or key == ""]
            if not matches:
                raise ValueError(
                    f"max_grad_norm has no group for parameter {name!r}: its keys are {order}; add a name prefix "
                    f"that matches it (the empty string matches every parameter)"
                )
            best = max(matches, key=len)
            used.add(best)
            group_of[p] = order.index(best)
        if unused := [key for key in order if key not in used]:
            raise ValueError(f"max_grad_norm has groups that match no parameter: {unused}; check the spelling")
        return cls([thresholds[key] for key in order], group_of)

    @property
    def sensitivity(self) -> float:
        """The most that one sample can change the clipped sum (L2)."""
        return math.hypot(*self.thresholds)

    @sensitivity.setter
    def sensitivity(self, value: float) -> None:
        scale = check_threshold("max_grad_norm", value) / self.sensitivity
        self.thresholds = [threshold * scale for threshold in self.thresholds]

    def group_of(self, parameter: nn.Parameter) -> int:
        """Index into :attr:`thresholds` of the parameter's group."""
        if self._group_of is None:
            return 0
        if parameter not in self._group_of:
            raise ValueError(
                "a parameter was added to the optimizer after make_private with clipping='per_layer': it belongs to "
                "no group; call make_private again"
            )
        return self._group_of[parameter]

    def factors(self, squared: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Factors ``min(1, C/n)`` (Abadi et al., 2016), ``[groups, B]``, and how many samples are not finite.

        n is ``√(squared + bound) · scale``, so that ``factor · n ≤ C`` whatever the rounding of the norm; a sample with
        a norm that is not finite in any group gets factor 0 in all.

        ====  =====================
        n     factor
        ====  =====================
        0     1 (times a zero gradient)
        ≤ C   1
        inf   0
        NaN   0
        ====  =====================
        """
        thresholds = torch.tensor(self.thresholds, dtype=squared.dtype, device=squared.device)
        return ops.clip_factors(squared, bounds, thresholds, ops.ClippingFunction.ABADI, 0.0, scale)
