"""Norms → factors → weights of a backward pass, as functions of tensors: what a step runs, and what a graph holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfast.capture.forms import Form, Summed, Waiting, forms_of
from dpfast.clipping.norms import squared_norms
from dpfast.clipping.sums_of_forms import clipped_sums, combine
from dpfast.clipping.thresholds import Clipping
from dpfast.ops import compute_dtype
from dpfast.planning.planner import Planner


class Factors(NamedTuple):
    """What clipping makes of the samples of one backward pass, all in float64."""

    factors: Tensor  # [groups, B]
    squared: Tensor  # norms, [groups, B], of what autograd has brought
    bounds: Tensor  # on the errors of these, [groups, B]
    lost: Tensor  # which samples contribute nothing for their norm, [B]


class Scales(NamedTuple):
    """What the loss has done to backprops: B from a mean over the batch, and a scale of the loss besides."""

    of_norms: float
    of_weights: float  # a loss's scale is left in what is summed, so that no weight is too small for a bound


class Setting(NamedTuple):
    """All that clipping depends on besides tensors; graphs that were traced under another one are not used."""

    clipping: Clipping
    planner: Planner
    names: Mapping[Any, str]
    scales: Scales


def whole_forms(recorded: Mapping[Any, list[Form | Waiting]], setting: Setting) -> list[list[Form]]:
    """The forms of each parameter: those that waited are written out, several of one parameter are put together."""
    return [
        forms if len(forms) == 1 else combine(forms, setting.planner, setting.names[p])
        for p, forms in zip(recorded, forms_of([*recorded.values()]), strict=True)
    ]


def factors_of(
    forms: Sequence[Sequence[Form]], groups: Sequence[int], device: torch.device, setting: Setting, thresholds: Tensor
) -> Factors:
    """Clipping factors of samples from the ``forms`` of all parameters; ``thresholds`` are C of each group."""
    squared, bounds = squared_norms(forms, groups, len(thresholds)).to(device)
    factors, lost = setting.clipping.factors(squared, bounds, setting.scales.of_norms, thresholds)
    return Factors(factors, squared, bounds, lost)


def weighted(
    params: Sequence[Any], forms: Sequence[Sequence[Summed]], groups: Sequence[int], factors: Tensor, scale: float
) -> tuple[list[tuple[Summed, Tensor]], list[Any]]:
    """Each form with the weights of its samples, and the parameter that it is of."""
    parts: list[tuple[Summed, Tensor]] = []
    owners: list[Any] = []
    known: dict[Any, Tensor] = {}  # parameters of one kind have the same weights
    for p, group, its in zip(params, groups, forms, strict=True):
        kind = group, p.dtype, p.device
        row = known.get(kind)
        if row is None:
            row = known[kind] = _towards_zero(factors[group] * scale, compute_dtype(p.dtype)).to(p.device)
        for form in its:
            parts.append((form, row))
            owners.append(p)
    return parts, owners


def closed(
    recorded: Mapping[Any, list[Form | Waiting]], setting: Setting, thresholds: Tensor, present: Tensor
) -> tuple[Factors, list[Tensor]]:
    """All of it at once: the factors, and the clipped sum of each parameter, in the order of ``recorded``.

    ``present [B]`` is 1 for a sample and 0 for a row that none is in.
    """
    params = list(recorded)
    forms = whole_forms(recorded, setting)
    groups = [setting.clipping.group_of(p) for p in params]
    found = factors_of(forms, groups, params[0].device, setting, thresholds)
    found = found._replace(factors=found.factors * present)
    parts, owners = weighted(params, forms, groups, found.factors, setting.scales.of_weights)
    sums: dict[Any, Tensor] = {}
    for k, clipped in clipped_sums(parts):
        p = owners[k]
        clipped = clipped if clipped.shape == p.shape else clipped.reshape(p.shape)
        sums[p] = sums[p].add_(clipped) if p in sums else clipped
    return found, [sums[p] for p in params]


def _towards_zero(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 weights in ``dtype``, none of them larger than it was."""
    rounded = weights.to(dtype)
    return torch.where(rounded.double() > weights, rounded.nextafter(torch.zeros_like(rounded)), rounded)
