"""The forms in which one parameter's per-sample gradients are kept until the clipping factors are known.

A use of a parameter in the forward pass becomes one form in the backward pass; the per-sample gradient is the sum
over the parameter's forms (tied or re-used weights have several): see :mod:`dpfast.clipping.sums_of_forms`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpfast import ops
from dpfast.capture.packed_sides import PackedSides
from dpfast.capture.recomputed import Recomputed
from dpfast.planning.planner import Plan, Shape

SMALL = 1 << 20  # bytes of a form whose memory can wait for others of its kind
LEAST = 1 << 18  # and of one that keeps what would be freed else, with all of the memory that its tensors are views of
SKETCHED = 1 << 24  # bytes of a side that are looked at in one go
MOST_WAITING = 1 << 25  # bytes that such forms of one backward pass keep together


@dataclass
class Instantiated:
    """Per-sample gradients written out: ``[B, *parameter.shape]``; with squared norms where their op has made them."""

    samples: Tensor
    plan: Plan | None = None
    squares: Tensor | None = None

    def kept(self) -> tuple[Tensor, ...]:
        return (self.samples,)

    @property
    def batch(self) -> int:
        return self.samples.shape[0]

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        if self.squares is None:
            return ops.squared_norm(self.samples)
        squared, bound = ops.certified(self.squares.unsqueeze(0), [self.samples])
        return squared[0], bound[0]

    def clipped_sum(self, factors: Tensor) -> Tensor:
        return ops.weighted_sum(self.samples, factors)

    def instantiate(self) -> Instantiated:
        return self

    def touched(self) -> Tensor:
        return _any_nonzero(self.samples)


@dataclass
class OuterProduct:
    """``g_i = g aᵀ``, a layer's only position: ``A [B, d]``, ``G [B, p]``, for rows ``[row, row + p)`` of ``rows``."""

    A: Tensor
    G: Tensor
    rows: int
    row: int = 0

    @property
    def batch(self) -> int:
        return self.A.shape[0]

    def kept(self) -> tuple[Tensor, ...]:
        return self.A, self.G

    def factored(self) -> Factored:
        return Factored(self.A[:, None, None], self.G[:, None, None], self.rows, self.row)

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        return self.factored().squared_norm()

    def clipped_sum(self, factors: Tensor) -> Tensor:
        return self.factored().clipped_sum(factors)

    def placed(self, summed: Tensor) -> Tensor:
        return ops.place_rows(summed, self.row, self.rows, 0)

    def instantiate(self) -> Instantiated:
        return self.factored().instantiate()

    def touched(self) -> Tensor:
        return _any_nonzero(self.G)


@dataclass
class Factored:
    """``g_i = G_iᵀ A_i``, with ``A [B, g, T, d]``, ``G [B, g, T, p]``, for rows ``[row, row + g·p)`` of ``rows``."""

    A: Tensor
    G: Tensor
    rows: int
    row: int = 0
    plan: Plan | None = None

    @property
    def batch(self) -> int:
        return self.A.shape[0]

    @cached_property
    def shape(self) -> Shape:
        B, groups, T, d = self.A.shape
        return Shape(B, groups, T, d, self.G.shape[-1], self.A.dtype, self.A.device, self.A.nbytes + self.G.nbytes)

    def is_ghost(self) -> bool:
        """Whether its norm is a ghost norm, of an op for several weights at once."""
        return self.A.shape[2] > 1 and not self._in_tiles()

    def kept(self) -> tuple[Tensor, ...]:
        return self.A, self.G

    def waits(self) -> bool:
        """Whether it is to be written out, and may be with others of its kind."""
        B, _, _, d = self.A.shape
        small = self.is_to_be_written() and ops.is_small(self.A, self.G) and 4 * B * d * self.G.shape[-1] < LEAST
        return small and memory_of(self) < LEAST

    def is_to_be_written(self) -> bool:
        return self.plan is not None and self.plan.way == "instantiate"

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        if self.A.shape[2] == 1:
            return ops.one_position_squared_norm(self.A, self.G)
        if self._in_tiles():
            return ops.tile_squared_norm(self.A, self.G)
        return ops.ghost_squared_norm(self.A, self.G)

    def _in_tiles(self) -> bool:
        return self.plan is not None and self.plan.way == "norm-GEMM" and ops.has_tiles(self.A, self.G)

    def clipped_sum(self, factors: Tensor) -> Tensor:
        return self.placed(ops.clipped_weight_gradient(self.A, self.G, factors))

    def placed(self, summed: Tensor) -> Tensor:
        """A sum over its rows at their place among the parameter's."""
        return ops.place_rows(summed, self.row, self.rows, 0)

    def instantiate(self) -> Instantiated:
        return self._written(*ops.grad_samples(self.A, self.G))

    @staticmethod
    def all_made(them: Sequence[Factored]) -> list[Instantiated]:
        made = ops.all_grad_samples([(form.A, form.G) for form in them])
        return [form._written(*one) for form, one in zip(them, made, strict=True)]

    def _written(self, samples: Tensor, squares: Tensor | None) -> Instantiated:
        return Instantiated(ops.place_rows(samples, self.row, self.rows, 1), self.plan, squares)

    def touched(self) -> Tensor:
        return _any_nonzero(self.G)


@dataclass
class EmbeddingRows:
    """``g_i[v] = Σ_{t: id_t = v} G_t``, with ``ids [B, T]``, ``G [B, T, d]``, for a table of ``rows`` rows."""

    ids: Tensor
    G: Tensor
    rows: int

    def kept(self) -> tuple[Tensor, ...]:
        return self.ids, self.G

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        return ops.embedding_squared_norm(self.ids, self.G)

    def clipped_sum(self, factors: Tensor) -> Tensor:
        return ops.embedding_sum(self.ids, self.G, factors, self.rows)

    def instantiate(self) -> Instantiated:
        return Instantiated(ops.embedding_grad_samples(self.ids, self.G, self.rows))

    def touched(self) -> Tensor:
        return _any_nonzero(self.G)


@dataclass
class Convolved:
    """A convolution's ``x [rows, C, *]`` and ``G [rows, p, *]``: factored over its patches, which are not kept."""

    x: Tensor
    G: Tensor
    weight: Tensor
    geometry: ops.Geometry
    batch: int
    plan: Plan | None = None

    def kept(self) -> tuple[Tensor, ...]:
        return self.x, self.G

    @cached_property
    def shape(self) -> Shape:
        groups, positions, d, p = ops.convolution_sizes(self.x, self.G, self.weight, self.geometry)
        T = positions * (len(self.x) // self.batch)
        sides = self.x.nbytes + self.G.nbytes
        return Shape(self.batch, groups, T, d, p, self.G.dtype, self.G.device, sides, patches=True)

    def has_stats(self) -> bool:
        """Whether its norm is a ghost norm, from :meth:`stats`."""
        return ops.has_convolution_stats(self.x, self.G, self.shape.T)

    def stats(self) -> Tensor:
        return ops.convolution_stats(self.x, self.G, self.weight, self.geometry, self.batch)

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        return ops.convolution_squared_norm(self.x, self.G, self.weight, self.geometry, self.batch)

    def clipped_sum(self, factors: Tensor) -> Tensor:
        return ops.convolution_clipped_gradient(self.x, self.G, self.weight, self.geometry, factors)

    def instantiate(self) -> Instantiated:
        sides = (self.x, self.G, self.weight, self.geometry)
        samples, squares = ops.convolution_grad_samples(*sides, self.batch)
        return Instantiated(samples, self.plan, squares)

    def touched(self) -> Tensor:
        return _any_nonzero(self.G.unflatten(0, (self.batch, -1)))


@dataclass
class PositionSum:
    """``g_i = Σ_t G_t``, with ``G [B, T, d]``: written out with all others of a backward pass, where it is small."""

    G: Tensor

    @property
    def batch(self) -> int:
        return self.G.shape[0]

    def kept(self) -> tuple[Tensor, ...]:
        return (self.G,)

    def waits(self) -> bool:
        return memory_of(self) < LEAST

    def is_to_be_written(self) -> bool:
        return True

    def instantiate(self) -> Instantiated:
        samples, squares = ops.sum_positions(self.G)
        return Instantiated(samples, squares=squares)

    @staticmethod
    def all_made(them: Sequence[PositionSum]) -> list[Instantiated]:
        made = ops.all_position_sums([form.G for form in them])
        return [Instantiated(samples, squares=squares) for samples, squares in made]


@dataclass
class NormalisedSides:
    """``G`` and ``x [B, T, d]`` of a layer that normalises each position; mean (or None) and rstd of each, in order."""

    G: Tensor
    x: Tensor
    mean: Tensor | None
    rstd: Tensor
    sums: tuple[Instantiated, Instantiated] | None = None

    def made(self) -> tuple[Instantiated, Instantiated]:
        if self.sums is None:
            self.sums = _both(*ops.normalised_sums(self.G, self.x, self.mean, self.rstd))
        return self.sums

    @staticmethod
    def all_made(them: Sequence[NormalisedSides]) -> list[tuple[Instantiated, Instantiated]]:
        made = ops.all_normalised_sums([(sides.G, sides.x, sides.mean, sides.rstd) for sides in them])
        return [_both(*sums) for sums in made]


def _both(
    weight: Tensor, weight_squares: Tensor, bias: Tensor, bias_squares: Tensor
) -> tuple[Instantiated, Instantiated]:
    return Instantiated(weight, squares=weight_squares), Instantiated(bias, squares=bias_squares)


@dataclass
class NormalisedSum:
    """``Σ_t g_t ∘ x̂_t`` (``which`` 0) or ``Σ_t g_t`` (1) of a normalisation layer, waiting as :class:`PositionSum`."""

    sides: NormalisedSides
    which: int

    @property
    def batch(self) -> int:
        return self.sides.G.shape[0]

    def kept(self) -> tuple[Tensor, ...]:
        return self.sides.G, self.sides.x

    def waits(self) -> bool:
        return memory_of(self) < LEAST

    def is_to_be_written(self) -> bool:
        return True

    def instantiate(self) -> Instantiated:
        return self.sides.made()[self.which]


Form = Instantiated | OuterProduct | Factored | EmbeddingRows | Convolved | Recomputed
Summed = Form | PackedSides  # what norms and sums are of; layers hand over forms
PRODUCTS = (OuterProduct, Factored)
WAITING = (PositionSum, NormalisedSum, Factored)
Waiting = PositionSum | NormalisedSum | Factored  # a backward pass may write these out at its end


def memory_of(form: Form | Waiting) -> int:
    """Bytes that stay while the form is there: of all that its tensors are views of."""
    return sum([x.untyped_storage().nbytes() for x in form.kept()])


def version_of(form: Form | Waiting) -> int:
    """Another number once something that the form keeps has been written to."""
    return sum([x._version for x in form.kept()])


def form_of(given: Form | Waiting) -> Form:
    """What ``given`` is kept as, without waiting."""
    if isinstance(given, WAITING) and given.is_to_be_written():
        return given.instantiate()
    return given  # type: ignore[return-value]


def forms_of(given: Sequence[list[Form | Waiting]]) -> list[list[Form]]:
    """The same of all parameters of a backward pass, in one call of an op for all of a kind."""
    waiting: dict[tuple[Any, ...], dict[int, Any]] = {}
    for forms in given:
        for form in forms:
            if isinstance(form, WAITING) and form.is_to_be_written():
                what = form.sides if isinstance(form, NormalisedSum) else form
                kind = type(what), form.batch, what.G.dtype, what.G.device
                waiting.setdefault(kind, {})[id(what)] = what
    if not waiting:
        return given  # type: ignore[return-value]
    made: dict[int, Any] = {}
    for (made_by, *_), alike in waiting.items():
        made.update(zip(alike, made_by.all_made([*alike.values()]), strict=True))

    def one(form: Form | Waiting) -> Form:
        if isinstance(form, NormalisedSum):
            return made[id(form.sides)][form.which]
        return made.get(id(form), form)

    return [[one(form) for form in forms] for forms in given]


def by(form: Factored | Convolved, plan: Plan, may_wait: bool = False) -> Form:
    """The form as the plan says: kept, or written out now so that its sides can go; a small one ``may_wait``."""
    form.plan = plan
    if plan.way != "instantiate" or (may_wait and isinstance(form, Factored) and form.waits()):
        return form
    return form.instantiate()


def stored(form: Recomputed) -> Factored:
    """A head's form with the gradient of its logits."""
    return Factored(*form.factors(), form.rows)


def written(form: Form) -> Tensor:
    """Its per-sample gradients ``[B, *parameter.shape]``, or with those dimensions in one."""
    return (stored(form) if isinstance(form, Recomputed) else form).instantiate().samples


def sketch(form: Form) -> Tensor:
    """``[B, n]`` numbers that tell whether anything of a sample's form has changed: sums, sums of sizes, of squares."""
    if isinstance(form, Instantiated):
        sides = [form.samples]
    elif isinstance(form, EmbeddingRows):
        sides = [form.ids, form.G]
    elif isinstance(form, PRODUCTS):
        sides = [form.A, form.G]
    elif isinstance(form, Recomputed):
        sides = [*form.of_samples()]
    else:
        sides = [side.unflatten(0, (form.batch, -1)) for side in (form.x, form.G)]
    numbers = []
    for side in sides:
        row = side.reshape(form.batch, math.prod(side.shape[1:]))
        few = row.split(max(1, SKETCHED // max(1, row[:1].nbytes)))  # a sum in float64 copies what it is of
        numbers += [torch.cat(each) for each in zip(*[_sizes(part) for part in few], strict=True)]
    return torch.stack(numbers, 1).nan_to_num(0.0, 1e300, -1e300)


def _sizes(row: Tensor) -> list[Tensor]:
    """``[B]`` each, of ``[B, n]``: the sum, the sum of sizes, the root of the sum of squares."""
    row = row if row.is_floating_point() else row.double()
    sizes = (torch.linalg.vector_norm(row, order, dim=1).double() for order in (1, 2))
    return [row.sum(1, dtype=torch.float64), *sizes]


def _any_nonzero(values: Tensor) -> Tensor:
    """Per sample: is anything there? NaN counts as nothing (``0 · inf`` is no sign of a dependence)."""
    return (values.reshape(len(values), math.prod(values.shape[1:])).nan_to_num(0.0, 1.0, 1.0) != 0).any(1)
