"""From packed rows to their segments: each is clipped by itself, though a layer has seen them in one row.

Segments of about one length are put beside each other, behind their last position zeros up to the longest of them, so
that a segment is a sample and every formula for samples holds for it with its bound. Lengths that are taken together
differ by less than half, and there are two such kinds for each doubling of lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpfast import ops
from dpfast.capture.forms import (
    EmbeddingRows,
    Factored,
    Form,
    Instantiated,
    NormalisedSides,
    NormalisedSum,
    OuterProduct,
    PositionSum,
    Waiting,
    by,
)
from dpfast.capture.recomputed import Recomputed
from dpfast.capture.segments import PACKED, UNMARKED, Segments
from dpfast.capture.which_samples import ForwardPass
from dpfast.clipping.closing import Factors, Setting, factors_of, weighted
from dpfast.clipping.sums_of_forms import combine
from dpfast.clipping.units import Clipped
from dpfast.ops import index_of
from dpfast.planning.planner import Once
from dpfast.refusals import UnitsError


class Alike:
    """Segments of about one length.

    Attributes:
        units: the number of each among all segments.
        longest: positions of the longest.
    """

    def __init__(self, segments: Segments, units: Sequence[int]):
        self.segments, self.units = segments, tuple(units)
        self.longest = max(segments.lengths[unit] for unit in units)
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}  # several layers have one input
        self._sums: dict[int, tuple[Any, tuple[Instantiated, Instantiated]]] = {}

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where the positions stand in all rows, one behind the other, and where they go."""
        source, target = [], []
        for k, unit in enumerate(self.units):
            row, start, end = self.segments.bounds[unit]
            source.append(torch.arange(start, end) + row * self.segments.length)
            target.append(torch.arange(end - start) + k * self.longest)
        return torch.cat(source), torch.cat(target)

    def of(self, x: Tensor) -> Tensor:
        """``x [rows, T, *]``, T whole numbers of positions, as ``[units, longest · T / length, *]``."""
        key = x.data_ptr(), x.shape, x.stride(), x.dtype
        if key not in self._known:
            self._known[key] = x, self._of(x)  # with what keeps the address from being used again
        return self._known[key][1]

    def _of(self, x: Tensor) -> Tensor:
        each = x.shape[1] // self.segments.length
        source, target = (index.to(x.device) for index in self._places)
        rows = x.reshape(self.segments.rows * self.segments.length, each, *x.shape[2:]).index_select(0, source)
        count = len(self.units) * self.longest
        if len(source) < count:
            rows = rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, target, rows)
        return rows.view(len(self.units), self.longest * each, *x.shape[2:])

    def both(self, sides: NormalisedSides) -> tuple[Instantiated, Instantiated]:
        """What weight and bias of a normalisation layer get of each segment."""
        if id(sides) not in self._sums:
            shape = sides.G.shape[:2]
            mean = None if sides.mean is None else self._of(sides.mean.reshape(shape))
            rstd = self._of(sides.rstd.reshape(shape))
            made = NormalisedSides(self.of(sides.G), self.of(sides.x), mean, rstd).made()
            self._sums[id(sides)] = sides, made
        return self._sums[id(sides)][1]


def kinds_of(segments: Segments) -> list[Alike]:
    """Segments by their lengths, in half octaves."""
    kinds: dict[int, list[int]] = {}
    for unit, n in enumerate(segments.lengths):
        kinds.setdefault(math.floor(2 * math.log2(n)), []).append(unit)
    return [Alike(segments, units) for _, units in sorted(kinds.items())]


def clipped_segments(
    recorded: Mapping[Any, list[Form | Waiting]],
    groups: Sequence[int],
    segments: Segments,
    setting: Setting,
    thresholds: Tensor,
) -> Clipped:
    """Norms and factors of segments, from the forms of packed rows; ``recorded`` is emptied on the way.

    What is summed are the very forms that norms were taken of, so that the bounds on these cover it. Positions outside
    of all segments contribute nothing.

    Raises:
        UnitsError: a parameter's gradients are not kept by positions; it is named.
    """
    params = [*recorded]
    for p in params:
        for form in recorded[p]:
            _check(form, segments, setting.names[p])
    kinds = kinds_of(segments)
    its: list[list[list[Form]]] = [[] for _ in kinds]
    once = Once(setting.planner)
    for p in params:
        forms, name = recorded[p], setting.names[p]
        for kind, of_kind in zip(kinds, its, strict=True):
            of_kind.append(_planned([_regrouped(form, kind) for form in forms], once, name))
        forms.clear()
    device = thresholds.device
    squared, bounds, factors = (
        torch.zeros(len(thresholds), len(segments), dtype=torch.float64, device=device) for _ in "123"
    )
    lost = torch.zeros(len(segments), dtype=torch.bool, device=device)
    parts: list[tuple[Form, Tensor]] = []
    owners: list[Any] = []
    for kind, of_kind in zip(kinds, its, strict=True):
        found = factors_of(of_kind, groups, device, setting, thresholds)
        more, of_more = weighted(params, of_kind, groups, found.factors, setting.scales.of_weights)
        parts += more
        owners += of_more
        units = index_of(kind.units, device)
        squared[:, units], bounds[:, units] = found.squared, found.bounds
        factors[:, units], lost[units] = found.factors, found.lost
    return Clipped(Factors(factors, squared, bounds, lost), parts, owners)


def _planned(forms: list[Form], planner: Once, name: str) -> list[Form]:
    if len(forms) == 1 and isinstance(one := forms[0], Factored) and one.shape.T > 1:
        return [by(one, planner.choose(name, one.shape))]
    return combine(forms, planner, name)


def _check(form: Form | Waiting, segments: Segments, name: str) -> None:
    """A form has to be by positions of the rows."""
    T = _positions(form)
    if T is None or form.batch != segments.rows or T == 0 or T % segments.length:
        raise UnitsError(
            f"units={PACKED!r}: the gradient of {name} is not kept by the positions of packed rows, "
            f"{[segments.rows, segments.length]}, so that it cannot be told which sample has which part of it. "
            f"Convolutions, recurrent layers, bare parameters and layers of other packages do that: freeze it with "
            f"requires_grad_(False), or pad samples to rows of their own"
        )


def _positions(form: Form | Waiting) -> int | None:
    """How many a row has; None where they are gone."""
    if isinstance(form, Instantiated | OuterProduct):
        return 1
    if isinstance(form, Factored):
        return form.A.shape[2]
    if isinstance(form, EmbeddingRows | PositionSum):
        return form.G.shape[1]
    if isinstance(form, NormalisedSum):
        return form.sides.G.shape[1]
    return form.sides.x.shape[1] if isinstance(form, Recomputed) else None


def _regrouped(form: Form | Waiting, kind: Alike) -> Form:
    """The form with the segments of one kind for samples."""
    if isinstance(form, Instantiated):  # a row has one position, and is a segment
        return Instantiated(kind.of(form.samples.unsqueeze(1)).squeeze(1))
    if isinstance(form, OuterProduct):
        form = form.factored()
    if isinstance(form, Factored):
        A, G = (_by_group(side, kind.of) for side in (form.A, form.G))
        return Factored(A, G, form.rows, form.row)
    if isinstance(form, EmbeddingRows):
        return EmbeddingRows(kind.of(form.ids), kind.of(form.G), form.rows)
    if isinstance(form, PositionSum):
        samples, squares = ops.sum_positions(kind.of(form.G))
        return Instantiated(samples, squares=squares)
    if isinstance(form, NormalisedSum):
        return kind.both(form.sides)[form.which]
    assert isinstance(form, Recomputed)  # its norm was that of whole rows
    sides, outside = form.sides, kind.of(torch.ones_like(form.sides.targets)) == 0
    weights, normalisers = kind.of(sides.weights), kind.of(sides.normalisers)
    targets = kind.of(sides.targets).masked_fill(outside, ops.IGNORED)
    return Recomputed(sides._replace(x=kind.of(sides.x), targets=targets, normalisers=normalisers, weights=weights))


def _by_group(side: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """``[rows, g, T, d]`` as ``[units, g, T', d]``."""
    if side.shape[1] == 1:
        return of(side.squeeze(1)).unsqueeze(1)
    return of(side.transpose(1, 2)).transpose(1, 2).contiguous()


def check_samples(forward: ForwardPass, drawn: bool) -> None:
    """``forward`` has a segment for each sample that the loader has given; ``drawn``: its batches are Poisson samples.

    Raises:
        UnitsError: a sample is in several segments or beside others in one, or nothing tells.
    """
    segments = forward.segments
    if segments is None:
        raise UnitsError(f"{UNMARKED}. Nothing was summed")
    given = sum(map(len, forward.group))
    if forward.group and given != len(segments):
        raise UnitsError(
            f"units={PACKED!r}: the loader gave {given} samples, and the packed rows have {len(segments)} segments: "
            f"each segment is clipped as a sample of the data set. Let the data set have one sample for each, not rows "
            f"that were packed before, and pack them in collate_fn, as dpfast.data.packed.Packed does. Nothing was "
            f"summed"
        )
    if drawn and not forward.group:
        raise UnitsError(
            f"units={PACKED!r}: it cannot be told which samples of the loader these are. Take the batch from the "
            f"loader that make_private has returned, or from dpfast.BatchMemoryManager around it. Nothing was summed"
        )


def check_finite(passing: Iterable[ForwardPass], lost: Tensor) -> None:
    """Of a backward pass: where segments are kept apart by zeros, what is not finite reaches others of its row.

    Raises:
        UnitsError: there is one: which others it has taken along would depend on it.
    """
    carrying = [each for each in passing if each.attention is not None and each.attention.carries]
    if any(each.segments is not None and each.segments.shares_rows for each in carrying) and bool(lost.any()):
        raise UnitsError(
            f"units={PACKED!r}: a sample's gradient is not finite, and attention that is written out in operators, or "
            f"that a checkpoint computes again outside of all modules, carries that to all samples of its row, as "
            f"0 · NaN is NaN. Nothing was summed. Use attn_implementation='sdpa', or "
            f"need_weights=False of nn.MultiheadAttention, which are run for each sample by itself: then only its own "
            f"is lost"
        )
