"""Packed batches: which positions of which row are of one sample.

A packed row holds several samples, its segments, one behind the other. What says where they begin is among the
arguments of the model's forward, under the names that Transformers has for it (:data:`MARKS`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dpfast.capture.running_pass import unseen
from dpfast.capture.trees import tensors
from dpfast.refusals import UnitsError

POSITIONS, NUMBERS = "position_ids", "seq_idx"
LENGTHS = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seqlens_q")
MARKS = (*LENGTHS, NUMBERS, POSITIONS)
PACKED = "packed"  # what make_private's units= is for such batches
UNMARKED = (
    f"units={PACKED!r}: the model was called without anything that says where the samples of a packed row begin. Give "
    f"it one of {', '.join(MARKS)}, as DataCollatorWithFlattening of Transformers and dpfast.data.packed.Packed do"
)

ELSEWHERE = f"units={PACKED!r}: another rank has refused its batch, and says why. Nothing was summed"


@dataclass(frozen=True)
class Segments:
    """The samples of ``rows`` packed rows of ``length`` positions each.

    Attributes:
        bounds: row, first position and end of each segment, in order. Positions outside of all are padding.
    """

    rows: int
    length: int
    bounds: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.bounds)

    @cached_property
    def lengths(self) -> list[int]:
        return [end - start for _, start, end in self.bounds]

    @cached_property
    def shares_rows(self) -> bool:
        """Whether anything has to be kept apart within a row: several segments, or one beside padding."""
        return any(n < self.length for n in self.lengths)

    @cached_property
    def most_in_a_row(self) -> int:
        """How many segments the row has that has most of them."""
        return max(Counter(row for row, _, _ in self.bounds).values(), default=0)

    @cached_property
    def runs(self) -> list[list[int]]:
        """How each row is cut: the lengths of its segments, and of the padding between and behind them, in order."""
        cuts: list[list[int]] = [[] for _ in range(self.rows)]
        ends = [0] * self.rows
        for row, start, end in self.bounds:
            cuts[row] += [start - ends[row]] if start > ends[row] else []
            cuts[row].append(end - start)
            ends[row] = end
        return [its + ([self.length - end] if end < self.length else []) for its, end in zip(cuts, ends, strict=True)]

    @cached_property
    def numbers(self) -> Tensor:
        """``[rows, length]``: the number of the segment at each position; -1 for padding."""
        found = torch.full((self.rows, self.length), -1)
        for number, (row, start, end) in enumerate(self.bounds):
            found[row, start:end] = number
        return found

    @classmethod
    def of(cls, marks: Mapping[str, Any], rows: int, length: int) -> Segments:
        """From all marks that there are, which have to agree.

        Position ids that begin at 0 once in a row are taken for mere positions where something else says how rows are
        packed.

        Raises:
            UnitsError: there are none, or they are none of rows of this size, or disagree.
        """
        given = {name: marks[name] for name in MARKS if isinstance(marks.get(name), Tensor)}
        if not given:
            raise UnitsError(UNMARKED)
        if not length:
            return cls(rows, length, ())
        found: dict[str, tuple[tuple[int, int, int], ...]] = {}
        with unseen("the segments of packed rows"):  # where they lie is nobody's value
            for name, mark in given.items():
                read = _by_lengths if name in LENGTHS else _by_numbers if name == NUMBERS else _by_positions
                try:
                    found[name] = read(name, mark.detach().cpu(), rows, length)
                except UnitsError:
                    if name != POSITIONS or len(given) == 1:
                        raise  # else they are mere positions, of a kind of their own
        if len(found) > 1 and POSITIONS in found:
            others = {start for name, its in found.items() if name != POSITIONS for start in _starts(its)}
            if {start for start in _starts(found[POSITIONS]) if start[1]} <= others:
                del found[POSITIONS]
        first = next(iter(found))
        if other := next((name for name in found if found[name] != found[first]), None):
            raise UnitsError(
                f"units={PACKED!r}: {first} and {other} say different things of where the samples of a packed row "
                f"begin: give the model those of one collate function"
            )
        return cls(rows, length, found[first])

    @classmethod
    def of_call(cls, forward: Callable[..., Any], args: Any, kwargs: Any) -> Segments:
        """Those of the arguments that ``forward`` is called with.

        Raises:
            UnitsError: see :meth:`of`; or no argument has positions.
        """
        given = named(forward, args, kwargs)
        shapes = [x.shape for name, x in given.items() if name not in MARKS and isinstance(x, Tensor) and x.dim() > 1]
        shapes += [given[name].shape for name in (NUMBERS, POSITIONS) if isinstance(given.get(name), Tensor)]
        shapes += [x.shape for x in tensors((args, kwargs)) if x.dim() > 1]
        if not shapes or len(shapes[0]) < 2:
            raise UnitsError(
                f"units={PACKED!r}: none of the model's inputs has rows of positions: give ids [rows, length]"
            )
        return cls.of(given, shapes[0][0], shapes[0][1])


def of_batch(batch: Any) -> Segments:
    """The segments of a batch ``{name: tensor}`` for a model, of one row.

    Raises:
        UnitsError: it is something else, or does not say where samples begin.
    """
    if not isinstance(batch, Mapping):
        raise UnitsError(
            f"units={PACKED!r}: batch is a {type(batch).__name__}; give the mapping of tensors that the model is "
            f"called with, position_ids among them, or the samples and collate_fn="
        )
    shapes = [x.shape for x in batch.values() if isinstance(x, Tensor) and x.dim() > 1]
    if not shapes or shapes[0][0] != 1:
        raise UnitsError(
            f"units={PACKED!r}: batch has tensors of shapes {[list(shape) for shape in shapes[:3]]}; samples are left "
            f"out of one row, [1, total]: give a row alone, or the samples and collate_fn="
        )
    return Segments.of(batch, *shapes[0][:2])


def only(batch: Mapping[str, Any], segments: Segments, keep: Sequence[int]) -> dict[str, Any]:
    """``batch``, of one row, with the segments ``keep`` alone."""
    of = [torch.arange(*segments.bounds[k][1:]) for k in keep]
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *of])
    ends = [0, *torch.tensor([len(its) for its in of], dtype=torch.int64).cumsum(0).tolist()]

    def one(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if name.startswith("cu_seq"):
            return x.new_tensor(ends)
        return x.index_select(1, index.to(x.device)) if x.shape[:2] == (1, segments.length) else x

    return {name: one(name, x) for name, x in batch.items()}


def named(forward: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of ``forward`` by their names."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # of what has none, or does not fit, as the call itself will say
        return dict(kwargs)
    variadic = [p.name for p in bound.signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    return {**bound.arguments, **bound.arguments.get(variadic[0], {})} if variadic else dict(bound.arguments)


def _starts(bounds: tuple[tuple[int, int, int], ...]) -> list[tuple[int, int]]:
    return [(row, start) for row, start, _ in bounds]


def _by_lengths(name: str, mark: Tensor, rows: int, length: int) -> tuple[tuple[int, int, int], ...]:
    cuts = mark.reshape(-1).tolist()
    if rows != 1:
        raise UnitsError(
            f"units={PACKED!r}: {name} is for samples that stand in one row, and there are {rows}: flatten them to "
            f"[1, total], or give seq_idx"
        )
    if not cuts or cuts[0] != 0 or cuts[-1] > length or any(a >= b for a, b in pairwise(cuts)):
        raise UnitsError(
            f"units={PACKED!r}: {name} has to go up from 0 to at most {length}, the row's length, each sample with a "
            f"token at least; got {cuts[:8]}{' and so on' if len(cuts) > 8 else ''}"
        )
    return tuple((0, start, end) for start, end in pairwise(cuts))


def _by_rows(name: str, mark: Tensor, rows: int, length: int) -> list[list[int]]:
    if mark.dim() == 1:
        mark = mark.unsqueeze(0)
    if mark.dim() != 2 or mark.shape[1] != length or len(mark) not in (1, rows) or mark.is_floating_point():
        raise UnitsError(
            f"units={PACKED!r}: {name} has shape {list(mark.shape)}, and rows are {[rows, length]}: give a whole "
            f"number for each position"
        )
    return mark.expand(rows, length).tolist()


def _by_numbers(name: str, mark: Tensor, rows: int, length: int) -> tuple[tuple[int, int, int], ...]:
    bounds = []
    for row, its in enumerate(_by_rows(name, mark, rows, length)):
        starts = [t for t in range(length) if not t or its[t] != its[t - 1]]
        its_bounds = list(zip(starts, [*starts[1:], length], strict=True))
        seen = [its[start] for start, _ in its_bounds if its[start] >= 0]
        if len({*seen}) < len(seen):
            raise UnitsError(f"units={PACKED!r}: {name} has a number of row {row} in two places: samples are whole")
        bounds += [(row, start, end) for start, end in its_bounds if its[start] >= 0]
    return tuple(bounds)


def _by_positions(name: str, mark: Tensor, rows: int, length: int) -> tuple[tuple[int, int, int], ...]:
    bounds = []
    for row, its in enumerate(_by_rows(name, mark, rows, length)):
        starts = [t for t in range(length) if its[t] == 0]
        if its[0] != 0 or any(its[t] not in (0, its[t - 1] + 1) for t in range(1, length)):
            raise UnitsError(
                f"units={PACKED!r}: {name} of row {row} neither count on nor begin at 0 again, so that it cannot be "
                f"told where samples begin: give seq_idx or cu_seqlens too"
            )
        bounds += [(row, start, end) for start, end in zip(starts, [*starts[1:], length], strict=True)]
    return tuple(bounds)


def check_positions(layer: str, x: Tensor, segments: Segments | None) -> None:
    """``x``, samples first, is what a layer is given: packed rows, whose second dimension goes over their positions.

    Raises:
        UnitsError: it is something else, of which nobody knows which sample is where.
    """
    if segments is None:
        raise UnitsError(UNMARKED)
    rows = segments.rows, segments.length
    if x.shape[:2] != rows and x.shape[:1] not in ((rows[0] * rows[1],), (1,) if x.shape[1:2] == rows[1:] else ()):
        raise UnitsError(
            f"units={PACKED!r}: layer {layer!r} got an input of shape {list(x.shape)}, and packed rows are "
            f"{list(rows)}: its positions are not those of the rows, so that its gradients cannot be told apart by "
            f"samples. A convolution over positions, a pooling, a part of a row (hidden[:, :-1]), a mixture of experts "
            f"or another order of dimensions does that. Freeze the layer, give it the whole rows, or pad samples to "
            f"rows of their own"
        )
