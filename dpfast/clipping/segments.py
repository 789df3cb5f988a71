"""From packed rows to their segments: each is clipped by itself, though a layer has seen them in one row.

The segments of a weight, and of a tied one if it is large, are clipped where they lie. Those of what is small are put
beside each other by their lengths, some layers at a time. A product of a clipped sum has the tokens that are there:
each position comes with the factor of its segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpfast import ops
from dpfast.capture.forms import EmbeddingRows, Factored, Form, Instantiated, Summed, Waiting, by
from dpfast.capture.packed_sides import PackedSides
from dpfast.capture.segments import ELSEWHERE, PACKED, UNMARKED, Segments
from dpfast.capture.which_samples import ForwardPass
from dpfast.clipping.closing import Factors, Setting, weighted
from dpfast.clipping.norms import squared_norms
from dpfast.clipping.segment_kinds import Alike, check_form, kinds_of
from dpfast.clipping.sums_of_forms import combine
from dpfast.clipping.units import Clipped
from dpfast.distributed.ranks import Ranks
from dpfast.ops import index_of
from dpfast.planning.planner import Once, Plan, Planner, Shape
from dpfast.refusals import UnitsError

AT_ONCE = 1 << 26  # bytes of sides that are put beside each other before norms are taken of them
REACHED, REFUSED = 1, 2  # what the ranks of a sharded model tell each other of a pass
LARGE = 1 << 20  # bytes of a segment's sides that are not put beside others, as that takes longer than an op

Named = tuple[Any, int, Sequence[Summed]]  # a parameter, its group and its forms


def clipped_segments(
    recorded: Mapping[Any, list[Form | Waiting]],
    groups: Sequence[int],
    segments: Segments,
    setting: Setting,
    thresholds: Tensor,
) -> Clipped:
    """Norms and factors of segments, from the forms of packed rows; ``recorded`` is emptied on the way.

    What is summed are the very sides or gradients that norms were taken of, so that the bounds on these cover it.
    Positions outside of all segments contribute nothing.

    Raises:
        UnitsError: a parameter's gradients are not kept by positions; it is named.
    """
    for p, its in recorded.items():
        for form in its:
            check_form(form, segments, setting.names[p])
    passing = _Pass(segments, setting.planner, len(thresholds), thresholds.device)
    for group, (p, its) in zip(groups, recorded.items(), strict=True):
        passing.take(p, group, its, setting.names[p])
        its.clear()
    passing.end_chunk()
    passing.add(passing.whole, slice(None))
    squared, bounds = passing.totals
    factors, lost = setting.clipping.factors(squared, bounds, setting.scales.of_norms, thresholds)
    parts, owners = passing.weighted(factors, setting.scales.of_weights)
    return Clipped(Factors(factors, squared, bounds, lost), parts, owners)


class _Pass:
    """One backward pass over packed rows, a parameter after the other."""

    def __init__(self, segments: Segments, planner: Planner, groups: int, device: torch.device):
        self.segments, self.planner = segments, Once(planner)
        self.kinds = kinds_of(segments)
        self.totals = torch.zeros(2, groups, len(segments), dtype=torch.float64, device=device)
        self.whole: list[Named] = []  # forms of all segments, whose norms are taken together
        self._by_position: list[Named] = []  # forms of all positions, for sums alone
        self._of_kinds: list[list[Named]] = [[] for _ in self.kinds]  # kept for sums
        self._chunk: list[list[Named]] = [[] for _ in self.kinds]  # whose norms are still to be taken
        self._bytes = 0
        length = segments.length
        bounds = [(row * length + start, row * length + end) for row, start, end in segments.bounds]
        self._places = ops.Places(bounds, segments.rows * length)

    def take(self, p: Any, group: int, forms: Sequence[Form | Waiting], name: str) -> None:
        """The forms of a parameter, of rows."""
        one = forms[0]
        plan = None
        if len(forms) == 1 and isinstance(one, Factored) and one.A.shape[1] == 1 and one.A.shape[2] > 1:
            plan = self.planner.choose(name, self._shape_of(one))
            if self._stay(one):
                self.whole.append((p, group, [self._packed(one, plan)]))
                return
        summed = [] if plan is not None and plan.way == "instantiate" else self._positions_of(forms)
        if summed:
            self._by_position.append((p, group, summed))
            if sum(x.nbytes for form in forms for x in form.kept()) >= LARGE * len(self.segments):
                for unit, kind in enumerate(self._single):
                    its = combine([kind.regrouped(form) for form in forms], self.planner, name)
                    self.add([(p, group, its)], slice(unit, unit + 1))
                    kind.forget()
                return
        for kind, chunk, kept in zip(self.kinds, self._chunk, self._of_kinds, strict=True):
            its = _planned([kind.regrouped(form) for form in forms], plan, self.planner, name)
            chunk.append((p, group, its))
            if not summed:
                kept.append((p, group, its))
        self._bytes += sum(x.nbytes for form in forms for x in form.kept())
        if self._bytes >= AT_ONCE:
            self.end_chunk()

    @cached_property
    def _single(self) -> list[Alike]:
        """Each segment by itself, so that it is a view."""
        return [Alike(self.segments, [unit]) for unit in range(len(self.segments))]

    def end_chunk(self) -> None:
        """Take the norms of what was put beside each other; if no sum needs it, it can go."""
        for kind, chunk in zip(self.kinds, self._chunk, strict=True):
            self.add(chunk, index_of(kind.units, self.totals.device))
            chunk.clear()
            kind.forget()
        self._bytes = 0

    def add(self, named: Sequence[Named], units: Tensor | slice) -> None:
        """Squared norms and bounds of forms, to those of their units."""
        if named:
            forms, groups = [its for _, _, its in named], [group for _, group, _ in named]
            self.totals[:, :, units] += squared_norms(forms, groups, self.totals.shape[1]).to(self.totals.device)

    def weighted(self, factors: Tensor, scale: float) -> tuple[list[tuple[Summed, Tensor]], list[Any]]:
        """Every form that is summed with the weights of its samples, and the parameter that it is of."""
        parts, owners = _weighted(self.whole, factors, scale)
        for kind, kept in zip(self.kinds, self._of_kinds, strict=True):
            more, of_more = _weighted(kept, factors[:, index_of(kind.units, factors.device)], scale)
            parts, owners = parts + more, owners + of_more
        more, of_more = _weighted(self._by_position, factors, scale)
        return parts + [(form, self._places.by_position(row)) for form, row in more], owners + of_more

    def _shape_of(self, form: Factored) -> Shape:
        """As if all segments were equally long; ghost norms over them cost as much."""
        lengths = self.segments.lengths
        each = form.A.shape[2] // self.segments.length
        T = math.ceil(math.sqrt(sum(n * n for n in lengths) / len(lengths))) * each
        return form.shape._replace(batch=len(lengths), T=T, singly=self._stay(form) and form.G.device.type == "cpu")

    def _stay(self, form: Factored) -> bool:
        """Whether its segments are clipped where they lie."""
        return form.A.shape[2] == self.segments.length and ops.has_packed(form.A, form.G)

    def _packed(self, form: Factored, plan: Plan) -> Summed:
        positions = self.segments.rows * self.segments.length
        A, G = (side.reshape(1, positions, side.shape[-1]) for side in (form.A, form.G))
        sides = PackedSides(A, G, self._places, form.rows, form.row, plan)
        if plan.way != "instantiate":
            return sides
        samples, squares = sides.samples()
        return Instantiated(samples, plan, squares)

    def _positions_of(self, forms: Sequence[Form | Waiting]) -> list[Form]:
        """The forms with each position for a sample, where a sum of these is as exact: a weight, a table, or both."""
        kinds = [type(form) for form in forms]
        if not {*kinds} <= {Factored, EmbeddingRows} or kinds.count(Factored) > 1:
            return []
        made: list[Form] = []
        for form in forms:
            assert isinstance(form, Factored | EmbeddingRows)
            if not ops.sums_by_position(form.G) or form.G.shape[-2] != self.segments.length:
                return []
            if isinstance(form, EmbeddingRows):
                made.append(EmbeddingRows(form.ids.reshape(-1, 1), form.G.reshape(-1, 1, form.G.shape[-1]), form.rows))
            elif form.A.shape[1] == 1:
                A, G = (side.reshape(-1, 1, 1, side.shape[-1]) for side in (form.A, form.G))
                made.append(Factored(A, G, form.rows, form.row))
            else:
                return []
        return made


def _weighted(named: Sequence[Named], factors: Tensor, scale: float) -> tuple[list[tuple[Summed, Tensor]], list[Any]]:
    params, groups, forms = ([*each] for each in zip(*named, strict=True)) if named else ([], [], [])
    return weighted(params, forms, groups, factors, scale)


def _planned(forms: list[Form], plan: Plan | None, planner: Planner, name: str) -> list[Form]:
    if plan is not None and isinstance(one := forms[0], Factored):
        return [by(one, plan)] if one.shape.T > 1 else forms
    if len(forms) == 1 and isinstance(one := forms[0], Factored) and one.shape.T > 1:
        return [by(one, planner.choose(name, one.shape))]
    return combine(forms, planner, name)


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


@contextmanager
def refused_together(ranks: Ranks) -> Iterator[None]:
    """A rank of a sharded model that refuses a pass within tells the others, which are on their way to
    :func:`check_finite`.
    """
    try:
        yield
    except UnitsError:
        if ranks.sharded:
            ranks.gathered([REFUSED])
        raise


def check_finite(passing: Iterable[ForwardPass], lost: Tensor, ranks: Ranks) -> None:
    """Of a backward pass: where segments are kept apart by zeros, what is not finite reaches others of its row.

    The ranks of a sharded model, which would wait for one that stops, tell each other.

    Raises:
        UnitsError: there is one: which others it has taken along would depend on it. Or another rank has refused.
    """
    carrying = [each for each in passing if each.attention is not None and each.attention.carries]
    reached = any(each.segments is not None and each.segments.shares_rows for each in carrying) and bool(lost.any())
    found = [row[0] for row in ranks.gathered([REACHED if reached else 0])] if ranks.sharded else [REACHED * reached]
    if REFUSED in found:
        raise UnitsError(ELSEWHERE)
    if any(found):
        raise UnitsError(
            f"units={PACKED!r}: a sample's gradient is not finite, and attention that is written out in operators, or "
            f"that a checkpoint computes again outside of all modules, carries that to all samples of its row, as "
            f"0 · NaN is NaN. Nothing was summed. Use attn_implementation='sdpa', or "
            f"need_weights=False of nn.MultiheadAttention, which are run for each sample by itself: then only its own "
            f"is lost"
        )
