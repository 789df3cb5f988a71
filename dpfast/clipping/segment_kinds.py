"""Segments of about one length beside each other, where nothing else tells a formula for samples where they lie.

Behind their last position are zeros up to the longest of them, so that a segment is a sample and every formula for
samples holds for it with its bound. Lengths that are taken together differ by less than half, and there are two such
kinds for each doubling of lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
)
from dpfast.capture.recomputed import Recomputed
from dpfast.capture.segments import PACKED, Segments
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
        """Where each position stands in all rows, one behind the other, and which ones no segment has."""
        first, length = torch.tensor(
            [(row * self.segments.length + start, end - start) for row, start, end in map(self._bounds, self.units)]
        ).T
        position = torch.arange(self.longest)
        there = position < length[:, None]
        source = first[:, None] + torch.where(there, position, 0)
        return source.flatten(), (~there).flatten().nonzero()[:, 0]

    def _bounds(self, unit: int) -> tuple[int, int, int]:
        return self.segments.bounds[unit]

    def of(self, x: Tensor) -> Tensor:
        """``x [rows, T, *]``, T whole numbers of positions, as ``[units, longest · T / length, *]``."""
        key = x.data_ptr(), x.shape, x.stride(), x.dtype
        if key not in self._known:
            self._known[key] = x, self._of(x)  # with what keeps the address from being used again
        return self._known[key][1]

    def forget(self) -> None:
        """What was put beside each other is not asked for again."""
        self._known.clear()
        self._sums.clear()

    def _of(self, x: Tensor) -> Tensor:
        each = x.shape[1] // self.segments.length
        if len(self.units) == 1:
            row, start, end = self._bounds(self.units[0])
            return x[row : row + 1, start * each : end * each]
        source, nobody = (index.to(x.device) for index in self._places)
        rows = x.reshape(self.segments.rows * self.segments.length, each, *x.shape[2:]).index_select(0, source)
        if len(nobody):
            rows.index_fill_(0, nobody, 0)
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

    def regrouped(self, form: Form | Waiting) -> Form:
        """The form with these segments for samples."""
        if isinstance(form, Instantiated):  # a row has one position, and is a segment
            return Instantiated(self.of(form.samples.unsqueeze(1)).squeeze(1))
        if isinstance(form, OuterProduct):
            form = form.factored()
        if isinstance(form, Factored):
            A, G = (_by_group(side, self.of) for side in (form.A, form.G))
            return Factored(A, G, form.rows, form.row)
        if isinstance(form, EmbeddingRows):
            return EmbeddingRows(self.of(form.ids), self.of(form.G), form.rows)
        if isinstance(form, PositionSum):
            samples, squares = ops.sum_positions(self.of(form.G))
            return Instantiated(samples, squares=squares)
        if isinstance(form, NormalisedSum):
            return self.both(form.sides)[form.which]
        assert isinstance(form, Recomputed)  # its norm was that of whole rows
        sides, outside = form.sides, self.of(torch.ones_like(form.sides.targets)) == 0
        weights, normalisers = self.of(sides.weights), self.of(sides.normalisers)
        targets = self.of(sides.targets).masked_fill(outside, ops.IGNORED)
        return Recomputed(sides._replace(x=self.of(sides.x), targets=targets, normalisers=normalisers, weights=weights))


def kinds_of(segments: Segments) -> list[Alike]:
    """Segments by their lengths, in half octaves."""
    kinds: dict[int, list[int]] = {}
    for unit, n in enumerate(segments.lengths):
        kinds.setdefault(math.floor(2 * math.log2(n)), []).append(unit)
    return [Alike(segments, units) for _, units in sorted(kinds.items())]


def check_form(form: Form | Waiting, segments: Segments, name: str) -> None:
    """A form has to be by positions of the rows.

    Raises:
        UnitsError: it is not; the parameter is named.
    """
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


def _by_group(side: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """``[rows, g, T, d]`` as ``[units, g, T', d]``."""
    if side.shape[1] == 1:
        return of(side.squeeze(1)).unsqueeze(1)
    return of(side.transpose(1, 2)).transpose(1, 2).contiguous()
