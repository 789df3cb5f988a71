"""From per-sample norms to clipping factors, and the sensitivity that the noise is scaled by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.clipping.functions import Abadi, ClippingFunction
from dpfast.clipping.group_noise import shares_of
from dpfast.ops.numbers import plain
from dpfast.reference.rounding import LEAST_WEIGHT, column
from dpfast.refusals import ParametersChangedError

MOST_CLIPPED = 2.0**64  # times the threshold


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

    ``thresholds[r]`` is C_r. One sample moves the clipped sum by at most ``sensitivity = √Σ_r C_r²`` (L2), whatever
    the :attr:`function`. Setting :attr:`sensitivity` scales every C_r alike, which is what Opacus' clip schedulers do
    to ``optimizer.max_grad_norm``.
    """

    function: ClippingFunction = Abadi()

    def __init__(
        self,
        thresholds: Sequence[float],
        group_of: Mapping[nn.Parameter, int] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.thresholds = [check_threshold("max_grad_norm", value) for value in thresholds]
        self._group_of = dict(group_of) if group_of is not None else None
        self.names = names  # of the groups, where they have any
        self.shares: list[float] | None = None  # of the groups in the noise's budget; None: all get one noise

    def share_noise(self, group_noise: Any) -> None:
        """Have each group get noise of its own: see :mod:`dpfast.clipping.group_noise`.

        Raises:
            ValueError: ``group_noise`` is no way to share it out; nothing is changed.
        """
        self.shares = shares_of(group_noise, self.thresholds, self.names)

    @property
    def in_force(self) -> list[float]:
        """The most that one sample can change each part of the clipped sum (L2) that gets noise of its own."""
        return [self.sensitivity] if self.shares is None else list(self.thresholds)

    @property
    def noise_scales(self) -> list[float]:
        """γ_r of each group: its noise has the standard deviation ``noise_multiplier · γ_r``."""
        if self.shares is None:
            return [self.sensitivity] * len(self.thresholds)
        return [C / share for C, share in zip(self.thresholds, self.shares, strict=True)]

    def part_of(self, parameter: nn.Parameter) -> int:
        """Index into :attr:`in_force` of the parameter's part."""
        return 0 if self.shares is None else self.group_of(parameter)

    @classmethod
    def flat(cls, max_grad_norm: float) -> Clipping:
        """One norm over all parameters."""
        max_grad_norm = plain(max_grad_norm)
        if isinstance(max_grad_norm, (Sequence, Mapping)):
            raise ValueError(
                f"max_grad_norm={max_grad_norm!r} with clipping='flat': give one number, or clipping='per_layer'"
            )
        return cls([max_grad_norm])

    @classmethod
    def per_layer(
        cls, max_grad_norm: float | Sequence[float] | Mapping[str, float], parameters: Mapping[str, nn.Parameter]
    ) -> Clipping:
        """A norm per parameter tensor (a list, in the optimizer's order) or per named group (a dict).

        One number C is shared out among the M parameters, ``C/√M`` each: the sensitivity is C.

        A dict maps name prefixes to norms: ``{"features": 0.5, "head.weight": 1.0}``; the longest prefix that
        matches (whole dotted parts) wins, and every parameter must match one.

        Args:
            parameters: the optimizer's parameters by name, in its order.
        """
        if isinstance(max_grad_norm, Mapping):
            return cls._named_groups(max_grad_norm, parameters)
        max_grad_norm = plain(max_grad_norm)
        if isinstance(max_grad_norm, int | float) and not isinstance(max_grad_norm, bool) and parameters:
            max_grad_norm = _shares(max_grad_norm, len(parameters))
        if not isinstance(max_grad_norm, Sequence) or len(max_grad_norm) != len(parameters):
            raise ValueError(
                f"max_grad_norm={max_grad_norm!r} with clipping='per_layer': give one number, a list of "
                f"{len(parameters)} numbers, one for each parameter of the optimizer, or a dict of name prefixes to "
                f"numbers"
            )
        return cls(max_grad_norm, {p: r for r, p in enumerate(parameters.values())}, list(parameters))

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
        return cls([thresholds[key] for key in order], group_of, order)

    @classmethod
    def equal_shares(
        cls, max_grad_norm: float, groups: Sequence[str], parameters: Mapping[str, nn.Parameter]
    ) -> Clipping:
        """Groups of parameters by name prefixes, with ``C/√M`` each of the M groups (Bu et al.; He et al. 2022)."""
        return cls._named_groups(dict(zip(groups, _shares(max_grad_norm, len(groups)), strict=True)), parameters)

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
            raise ParametersChangedError(
                "a parameter was added to the optimizer after make_private with clipping='per_layer': it belongs to "
                "no group; call make_private again"
            )
        return self._group_of[parameter]

    def members(self, group: int) -> set[nn.Parameter]:
        """The parameters of a group that are trained, where there are several groups."""
        assert self._group_of is not None
        return {p for p, its in self._group_of.items() if its == group and p.requires_grad}

    def on(self, device: torch.device) -> Tensor:
        """The thresholds, float64 ``[groups]``."""
        return column(tuple(self.thresholds), device, dims=1)

    def factors(
        self, squared: Tensor, bounds: Tensor, scale: float, thresholds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factors ``[groups, B]``, float64, and which samples are lost, ``[B]``; ``thresholds`` may be given.

        n is ``√(squared + bound) · scale``, so that ``factor · n ≤ C`` whatever the rounding of the norm. A sample
        whose norm is NaN, infinite or more than 2⁶⁴ C in any group is lost: its factors are 0 in all groups. A factor
        below 2⁻⁶⁴ is 0: what it is multiplied with may underflow, by more than bounds allow.
        """
        thresholds = self.on(squared.device) if thresholds is None else thresholds
        factors = self.function.factors(squared, bounds, thresholds, scale)
        usable = (squared + bounds).sqrt() * scale <= MOST_CLIPPED * thresholds.unsqueeze(1)
        lost = ~usable.all(0)
        return torch.where(lost | (factors < LEAST_WEIGHT), 0.0, factors), lost

    def within(self, squared: Tensor, bounds: Tensor, scale: float) -> Tensor:
        """``1[n ≤ C_r]`` in each group, for the norms of :meth:`factors`: ``[groups, B]``, float64."""
        return ((squared + bounds).sqrt() * scale <= self.on(squared.device).unsqueeze(1)).double()


def _shares(max_grad_norm: Any, count: int) -> list[float]:
    """``C/√M`` for each of M groups: together they have the sensitivity C."""
    return [check_threshold("max_grad_norm", max_grad_norm) / math.sqrt(count)] * count
