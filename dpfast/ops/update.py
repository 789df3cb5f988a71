"""Clipped sums → noisy gradients → updated parameters, in one pass: torch's SGD, Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpfast.ops.noise import Noise, by_device, check_overlap, check_places, check_tensor

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class SGD:
    """Hyperparameters of ``torch.optim.SGD``; ``first`` if the momentum buffers are still empty."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    first: bool = False


@dataclass(frozen=True)
class Adam:
    """Hyperparameters of ``torch.optim.Adam``, of ``AdamW`` if ``decoupled``; ``t`` counts this step, from 1.

    ``noise`` is the part that noise has in the second moments, as this step leaves them: its variance in each step,
    with their weights. If it is not 0 it is taken off, and what is left is ``floor`` at least; their root is that of
    ``max((exp_avg_sq - noise) / (1 - beta2^t), floor)``. The second moments themselves are torch's.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    t: float
    noise: float = 0.0
    floor: float = 0.0
    decoupled: bool = False
    maximize: bool = False


def noisy_step_(
    rule: SGD | Adam,
    params: Sequence[Tensor],
    summed: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    masters: Sequence[Tensor],
    parameters: Sequence[int],
    noise: Noise,
    rounding: str = "nearest",
    rounding_key: tuple[int, int] = (0, 0),
    offsets: Sequence[int] | None = None,
    checked: bool = False,
) -> None:
    """:func:`noisy_grad_` and the optimizer's update in one pass over memory, by the compiled library alone.

    Equal to torch's optimizer fed the same noisy gradient to 2 ulp in float32. bfloat16 and float16 parameters are
    updated from the float32 noisy gradient in float32 arithmetic.

    Args:
        params: float32, bfloat16 or float16, contiguous, updated in place.
        summed: float32 clipped sums.
        grads: noisy gradients in the parameters' dtype are written here; for float32 it may be ``summed`` itself.
        states: lists of state tensors in the parameters' dtype: momentum buffers (SGD), or first and second moments
            and, with amsgrad, the largest second moments (Adam). An empty list where there is none.
        masters: float32 copies of 16-bit parameters that take the update, the parameters being their rounding, or an
            empty list. Where a parameter is not its copy's rounding it was set from outside, and counts.
        rounding: ``"nearest"``, or ``"stochastic"``: 16-bit parameters keep the update's mean.
        rounding_key: two words of 32 bits for stochastic rounding.
        offsets: where in its parameter a tensor starts (0), for shards.
        checked: ``params`` and ``masters`` are those of a call before, which has found nothing wrong with them, and
            ``summed`` and ``grads`` are new. Then states alone are looked at.

    Raises:
        ValueError: names the tensor that does not fit; nothing is written.
    """
    offsets = [0] * len(params) if offsets is None else list(offsets)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}: use one of {ROUNDINGS}")
    named = {"summed": summed, "params": params, "grads": grads}
    named |= {f"states[{s}]": state for s, state in enumerate(states) if len(state)}
    named |= {"masters": masters} if len(masters) else {}
    if not checked:
        check_places(params, parameters, offsets)
        check_overlap(named)
    for name, items in named.items():
        if len(items) != len(params):
            raise ValueError(f"{name} has {len(items)} tensors for {len(params)} parameters: give one each")
        if checked and not name.startswith("states"):
            continue
        for k, tensor in enumerate(items):
            wide = (torch.float32,)
            allowed = PARAMETER_DTYPES if name == "params" else wide if name in ("summed", "masters") else None
            check_tensor(f"{name}[{k}]", tensor, summed[k], allowed or (params[k].dtype,))
    lists = [summed, grads, params, *states, masters]
    alike = all([p.is_cpu for p in params])
    for mine in [None] if alike else by_device(params).values():
        tensors = [_picked(items, mine) for items in lists]
        places = [_picked(items, mine) for items in (parameters, offsets)]
        common = [*places, list(noise.key), noise.step, noise.std, noise.grid, noise.scale]
        rounded = [ROUNDINGS.index(rounding), list(rounding_key)]
        numbers: list[Any]
        if isinstance(rule, SGD):
            op = torch.ops.dpfast.noisy_sgd_
            numbers = [rule.lr, rule.momentum, rule.dampening, rule.weight_decay]
            numbers += [rule.nesterov, rule.maximize, rule.first]
        else:
            op = torch.ops.dpfast.noisy_adam_
            numbers = [rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, rule.t, rule.noise, rule.floor]
            numbers += [rule.decoupled, rule.maximize]
        op(*tensors, *common, *numbers, *rounded)


def _picked(items: Sequence[Any], mine: Sequence[int] | None) -> list[Any]:
    """Those of one device; all, if there is one."""
    return list(items) if mine is None or not len(items) else [items[k] for k in mine]
