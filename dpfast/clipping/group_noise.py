"""How noise is shared out among groups of parameters that are clipped apart.

Group r is clipped to ``C_r`` and gets noise of the standard deviation ``σ γ_r``. Divided by its ``γ_r``, each group's
sum has noise of one standard deviation σ, and one sample moves all of them together by at most ``√Σ (C_r / γ_r)²``
(L2). So ε is that of one sum with the noise multiplier σ wherever ``Σ (C_r / γ_r)² ≤ 1``.

The share ``a_r = C_r / γ_r`` is what is kept: thresholds may move, and ``γ_r = C_r / a_r`` moves with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpfast.ops.numbers import plain

GLOBAL, EQUAL = "global", "equal"
ROUNDING = 1e-9  # of a sum of squares that is meant to be 1


def shares_of(group_noise: Any, thresholds: Sequence[float], names: Sequence[str] | None) -> list[float] | None:
    """The share of each group; None for the one noise of all that ``"global"`` is.

    Args:
        group_noise: ``"global"`` (``γ_r = √Σ C²``), ``"equal"`` (``γ_r = C_r √R``: of R groups each has the same noise
            for its threshold), or ``γ_r`` itself: a list, or a dict with the groups' names.
        thresholds: ``C_r``.
        names: of the groups, if they have any.

    Raises:
        ValueError: it is neither, or less noise than ε is for.
    """
    if isinstance(group_noise, str):
        if group_noise not in (GLOBAL, EQUAL):
            raise ValueError(f"group_noise={group_noise!r}: use 'global', 'equal', or a number for each group")
        return None if group_noise == GLOBAL else [1 / math.sqrt(len(thresholds))] * len(thresholds)
    given = plain(group_noise)
    if isinstance(given, Mapping):
        if names is None or set(given) != set(names):
            has = "no names here" if names is None else f"the names {list(names)}"
            raise ValueError(f"group_noise={given!r}: give a number for each group; groups have {has}")
        given = [given[name] for name in names]
    if not isinstance(given, Sequence) or len(given) != len(thresholds):
        raise ValueError(f"group_noise={group_noise!r}: give a number for each of the {len(thresholds)} groups")
    scales = [plain(value) for value in given]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in scales):
        raise ValueError(f"group_noise={group_noise!r}: give positive finite numbers")
    shares = [C / scale for C, scale in zip(thresholds, scales, strict=True)]
    total = math.fsum(share**2 for share in shares)
    if total > 1 + ROUNDING:
        raise ValueError(
            f"group_noise={group_noise!r}: Σ (C_r / γ_r)² is {total:.6g}, and more than 1 is less noise than ε is for: "
            f"multiply all of them by {math.sqrt(total):.6g} or more"
        )
    return [share / math.sqrt(total) for share in shares] if total > 1 else shares
