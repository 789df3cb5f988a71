"""From rows to units: what is clipped as one may be several rows of a batch, as all rows of a user are.

A unit's gradient is the mean of its rows' gradients. Rows of a unit are put one behind the other along T, so that a
unit is a sample of more positions, and every formula for samples holds for it with its bound. Units of equally many
rows are clipped together, so that nothing is padded: of R rows there are at most ``√(2R)`` such kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfast.capture.forms import Convolved, EmbeddingRows, Factored, Form, Instantiated, OuterProduct, Summed, by
from dpfast.clipping.closing import Factors, Scales, Setting, factors_of, weighted
from dpfast.clipping.grad_samples import gradients
from dpfast.ops import compute_dtype, index_of
from dpfast.planning.planner import Planner


@dataclass(frozen=True)
class Alike:
    """Units that have equally many rows.

    Attributes:
        rows: of the batch: all of the first unit, then all of the second one, and so on.
        each: how many rows a unit has.
        units: the number of each unit, in the order in which units appear in the batch.
    """

    rows: tuple[int, ...]
    each: int
    units: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        """``x [R, *]`` as ``[units, each, *]``: a view where the rows stand together."""
        first, count = self.rows[0], len(self.rows)
        if self.rows == tuple(range(first, first + count)):
            picked = x.narrow(0, first, count)
        else:
            picked = x.index_select(0, index_of(self.rows, x.device))
        return picked.unflatten(0, (len(self.units), self.each))


class Clipped(NamedTuple):
    """What clipping makes of the units of a backward pass."""

    found: Factors  # of all units, in the order in which they appear
    parts: list[tuple[Summed, Tensor]]  # forms, each with the weights of its units
    owners: list[Any]  # the parameter that each is of


def kinds_of(owners: Sequence[Any]) -> list[Alike]:
    """Units by their number of rows, from the unit of each row; None is a row of no unit."""
    rows: dict[Any, list[int]] = {}
    for row, owner in enumerate(owners):
        if owner is not None:
            rows.setdefault(owner, []).append(row)
    kinds: dict[int, list[int]] = {}
    its = [*rows.values()]
    for unit, of_unit in enumerate(its):
        kinds.setdefault(len(of_unit), []).append(unit)
    return [
        Alike(tuple(row for unit in units for row in its[unit]), each, tuple(units))
        for each, units in sorted(kinds.items())
    ]


def of_units(forms: Sequence[Form], kind: Alike, planner: Planner, name: str) -> list[Form]:
    """The forms of one parameter, whose samples are rows, as forms whose samples are the units of one kind.

    What has more positions now may be cheaper to write out; of a parameter with several forms the kinds stay.
    """
    regrouped = [_regrouped(form, kind) for form in forms]
    if len(regrouped) == 1 and kind.each > 1 and isinstance(one := regrouped[0], (Factored, Convolved)):
        return [by(one, planner.choose(name, one.shape))]
    return regrouped


def _regrouped(form: Form, kind: Alike) -> Form:
    """The sums over the rows of each unit, in a form whose samples are the units."""
    if isinstance(form, Instantiated):
        return _summed(form, kind)
    if isinstance(form, OuterProduct):
        if kind.each == 1:
            return OuterProduct(kind.of(form.A)[:, 0], kind.of(form.G)[:, 0], form.rows, form.row)
        form = form.factored()
    if isinstance(form, EmbeddingRows):
        return EmbeddingRows(kind.of(form.ids).flatten(1, 2), kind.of(form.G).flatten(1, 2), form.rows)
    if isinstance(form, Convolved):
        x, G = (kind.of(side.unflatten(0, (form.batch, -1))).flatten(0, 2) for side in (form.x, form.G))
        return Convolved(x, G, form.weight, form.geometry, len(kind.units), form.plan)
    assert isinstance(form, Factored), "a head makes its logits again only where a row is a unit"
    A, G = (kind.of(side).transpose(1, 2).flatten(2, 3) for side in (form.A, form.G))
    return Factored(A, G, form.rows, form.row, form.plan)


def _summed(form: Instantiated, kind: Alike) -> Instantiated:
    """What is clipped is the sum as it was rounded, so that its norm needs no bound for that."""
    samples = kind.of(form.samples)
    if kind.each > 1:
        return Instantiated(samples.sum(1, dtype=compute_dtype(samples.dtype)), form.plan)
    squares = None if form.squares is None else kind.of(form.squares)[:, 0]
    return Instantiated(samples[:, 0], form.plan, squares)


def clipped_units(
    params: Sequence[Any],
    forms: Sequence[Sequence[Form]],
    groups: Sequence[int],
    kinds: Sequence[Alike],
    setting: Setting,
    thresholds: Tensor,
) -> Clipped:
    """Norms and factors of units, from the forms of rows; a unit without a finite norm contributes exact zeros.

    In what it returns squared norms and bounds are those of means over rows. The weights have the mean's divisor.
    """
    device = thresholds.device
    count = sum(len(kind.units) for kind in kinds)
    squared, bounds, factors = (torch.zeros(len(thresholds), count, dtype=torch.float64, device=device) for _ in "123")
    lost = torch.zeros(count, dtype=torch.bool, device=device)
    parts: list[tuple[Summed, Tensor]] = []
    owners: list[Any] = []
    for kind in kinds:
        its = [of_units(each, kind, setting.planner, setting.names[p]) for p, each in zip(params, forms, strict=True)]
        scales = Scales(setting.scales.of_norms / kind.each, setting.scales.of_weights / kind.each)
        found = factors_of(its, groups, device, setting._replace(scales=scales), thresholds)
        more, of_more = weighted(params, its, groups, found.factors, scales.of_weights)
        parts += more
        owners += of_more
        units = index_of(kind.units, device)
        squared[:, units] = found.squared / kind.each**2
        bounds[:, units] = found.bounds / kind.each**2
        factors[:, units] = found.factors
        lost[units] = found.lost
    return Clipped(Factors(factors, squared, bounds, lost), parts, owners)


def mean_gradients(forms: Sequence[Form], kinds: Sequence[Alike]) -> Tensor:
    """``[units, *]``: the mean over the rows of each unit, in the order in which units appear."""
    samples = gradients(forms)
    means = samples.new_zeros(sum(len(kind.units) for kind in kinds), *samples.shape[1:])
    for kind in kinds:
        means[index_of(kind.units, samples.device)] = kind.of(samples).mean(1)
    return means
