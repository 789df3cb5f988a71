"""Adam whose second moments are relieved of the noise's own variance.

Source: Tang, Shpilevskiy and Lécuyer, *DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)*,
AAAI 2024. Noise of variance Φ is in every squared gradient, so that ``v̂`` is Φ too large, which is most of it where
the noise is; Adam then divides all elements by one number. The update is
``-lr · m̂ / (√max(v̂ - Φ̂, γ') + eps)``, and the moments themselves stay torch's.

Φ is ``(σC/B)²``, of each step: schedules change it. ``Φ̂`` is what is in v̂ of all steps so far, with their weights. What
is taken off is public, so that ε stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Adam, AdamW, Optimizer

from dpfast import ops
from dpfast.ops.numbers import plain

FLOOR = 5e-8  # γ' where none is given
NOISE_VARIANCE = (
    "noise_variance"  # in the optimizer's state, a number: Σ (1 - β2) β2^(t - s) Φ_s, what exp_avg_sq has of it
)


def check_noise_correction(
    value: Any,
    optimizer: Optimizer,
    names: Mapping[Any, str],
    *,
    filters: bool = False,
    why_not: str | None = None,
) -> float:
    """γ', the least that is left of a second moment; 0 for no correction.

    Args:
        value: what was asked for: True, False, or γ'.
        names: of the optimizer's parameters.
        filters: whether an ascent gives the optimizer other gradients than the noisy ones.
        why_not: why the update is not made in the noise's pass, where alone the variance is taken off.

    Raises:
        ValueError: ``value`` is neither, or ``optimizer`` cannot have its noise's variance taken off.
    """
    value = plain(value)
    if value is False:
        return 0.0
    number = isinstance(value, int | float)
    if not (value is True or (number and 0 < value < math.inf)):
        raise ValueError(f"noise_correction={value!r}: give True, False, or the least that is left of a second moment")
    floor = FLOOR if value is True else float(value)
    if (reason := _why_no_correction(optimizer, names, filters) or why_not) is not None:
        raise ValueError(f"noise_correction={value!r}: {reason}; leave it out")
    return floor


def _why_no_correction(optimizer: Optimizer, names: Mapping[Any, str], filters: bool) -> str | None:
    if type(optimizer) not in (Adam, AdamW):
        return f"{type(optimizer).__name__} is neither torch's Adam nor its AdamW, whose second moments it is about"
    if any(group["amsgrad"] for group in optimizer.param_groups):
        return "of amsgrad's largest second moments nobody knows what the noise's part is"
    trained = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    if (narrow := next((p for p in trained if p.dtype in (torch.bfloat16, torch.float16)), None)) is not None:
        name = names.get(narrow, list(narrow.shape))
        return f"parameter {name!r} is {narrow.dtype}, and so are its second moments, which are too coarse for it"
    if filters:
        return "the ascent gives the optimizer filtered gradients, whose noise is not a step's own"
    return None


def corrected(rule: ops.Adam, before: float | None, noise: ops.Noise) -> ops.Adam:
    """``rule`` for a step with ``noise``; ``before`` is what second moments had of noise until then.

    Where that is not known, as in a state that was made without a correction, all steps are taken to be like this one.
    """
    variance = (noise.std * noise.scale) ** 2
    if before is None:
        before = (1 - rule.beta2 ** (rule.t - 1)) * variance
    return ops.Adam(**vars(rule) | {"noise": rule.beta2 * before + (1 - rule.beta2) * variance})


def note(rule: ops.SGD | ops.Adam, states: Iterable[dict[str, Any]]) -> None:
    """After the step: what the second moments in ``states`` have of noise, if it is known."""
    for state in states:
        if isinstance(rule, ops.Adam) and rule.floor:
            state[NOISE_VARIANCE] = rule.noise
        else:
            state.pop(NOISE_VARIANCE, None)
