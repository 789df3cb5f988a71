"""The forms in which one parameter's per-sample gradients are kept until the clipping factors are known.

A use of a parameter in the forward pass becomes one form in the backward pass; the per-sample gradient is the sum
over the parameter's forms (tied or re-used weights have several), and norms of sums need the cross-terms:
:func:`squared_norm` has them all, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast import ops
from dpfast.planning.planner import Plan, Planner, Shape

SMALL = 1 << 20  # bytes of a form whose memory can wait for others of its kind


@dataclass
class Instantiated:
    """Per-sample gradients written out: ``[B, *parameter.shape]``; with squared norms where their op has made them."""

    samples: Tensor
    plan: Plan | None = None
    squares: Tensor | None = None

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

    def is_product(self) -> bool:
        """Whether its norm is a product of its sides' norms, as an op has them for many sides at once."""
        return ops.has_products(self.A, self.G)

    def has_stats(self) -> bool:
        """Whether its norm is a ghost norm, from :meth:`stats`."""
        return self.A.shape[2] > 1 and not self._in_tiles() and ops.has_ghost_stats(self.A, self.G)

    def stats(self) -> Tensor:
        return ops.ghost_stats(self.A, self.G)

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
        return _place_rows(summed, self.row, self.rows, 0)

    def instantiate(self) -> Instantiated:
        samples, squares = ops.grad_samples(self.A, self.G)
        return Instantiated(_place_rows(samples, self.row, self.rows, 1), self.plan, squares)

    def touched(self) -> Tensor:
        return _any_nonzero(self.G)


@dataclass
class EmbeddingRows:
    """``g_i[v] = Σ_{t: id_t = v} G_t``, with ``ids [B, T]``, ``G [B, T, d]``, for a table of ``rows`` rows."""

    ids: Tensor
    G: Tensor
    rows: int

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

    @cached_property
    def shape(self) -> Shape:
        groups, positions, d, p = ops.convolution_sizes(self.x, self.G, self.weight, self.geometry)
        T = positions * (len(self.x) // self.batch)
        sides = self.x.nbytes + self.G.nbytes
        return Shape(self.batch, groups, T, d, p, self.G.dtype, self.G.device, sides, patches=True)

    def has_stats(self) -> bool:
        """As of :class:`Factored`."""
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


Form = Instantiated | Factored | EmbeddingRows | Convolved


def by(form: Factored | Convolved, plan: Plan) -> Form:
    """The form as the plan says: kept, or written out now so that its sides can go."""
    form.plan = plan
    return form.instantiate() if plan.way == "instantiate" else form


def combine(forms: Sequence[Form], planner: Planner, name: str) -> list[Form]:
    """The same per-sample gradient in at most one form of each kind: factored, embedding rows, instantiated."""
    if len(forms) == 1:
        return list(forms)
    factored = [form for form in forms if isinstance(form, Factored)]
    embedded = [form for form in forms if isinstance(form, EmbeddingRows)]
    written = [form.instantiate().samples for form in forms if isinstance(form, (Instantiated, Convolved))]
    combined: list[Form] = []
    if factored:
        one: Form = factored[0]
        if len(factored) > 1:
            whole = _concatenate(factored)
            one = by(whole, planner.choose(name, whole.shape))
        if isinstance(one, Instantiated):
            written.append(one.samples)
        else:
            combined.append(one)
    if embedded:
        ids, G = (torch.cat([getattr(form, name) for form in embedded], 1) for name in ("ids", "G"))
        combined.append(EmbeddingRows(ids, G, embedded[0].rows))
    if written:
        total = written[0]
        for samples in written[1:]:
            total = total + samples.view(total.shape)
        combined.append(Instantiated(total))
    return combined


def squared_norm(forms: Sequence[Form]) -> tuple[Tensor, Tensor]:
    """``‖Σ_f form_f‖²`` per sample and a bound on its error, cross-terms included."""
    squared, bound = forms[0].squared_norm()
    for form in forms[1:]:
        more, slack = form.squared_norm()
        squared, bound = squared + more, bound + slack
    for one, other in combinations(forms, 2):
        term, slack = _cross_term(one, other)
        squared, bound = squared + 2 * term, bound + 2 * slack
    return squared.clamp_min(0), bound


def clipped_sums(parts: list[tuple[Form, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Each form's clipped sum with its factors, and its place in ``parts``; all that are written out in one launch.

    ``parts`` is emptied on the way: what a sum was made of can go.
    """
    written: dict[tuple[object, ...], list[tuple[int, Instantiated, Tensor]]] = {}
    products: dict[torch.device, list[tuple[int, Factored, Tensor]]] = {}
    while parts:
        form, factors = parts.pop()
        if isinstance(form, Instantiated):
            kind = (form.samples.dtype, form.samples.device, form.batch)
            written.setdefault(kind, []).append((len(parts), form, factors))
        elif isinstance(form, Factored) and form.G.nbytes + form.A.nbytes < SMALL:
            products.setdefault(form.G.device, []).append((len(parts), form, factors))
        else:
            yield len(parts), form.clipped_sum(factors)
        del form
    for small in products.values():
        places, factored, weights = zip(*small, strict=True)
        sums = ops.clipped_weight_gradients([(form.A, form.G) for form in factored], weights)
        for place, form, summed in zip(places, factored, sums, strict=True):
            yield place, form.placed(summed)
    for group in written.values():
        places, forms, weights = zip(*group, strict=True)
        yield from zip(places, ops.weighted_sums([form.samples for form in forms], weights), strict=True)


def _cross_term(one: Form, other: Form) -> tuple[Tensor, Tensor]:
    """``⟨one_i, other_i⟩``; :func:`combine` leaves the kinds in the order factored, embedding, instantiated."""
    if isinstance(one, Factored) and isinstance(other, EmbeddingRows):
        whole = _whole_rows(one)
        return ops.embedding_cross_term(other.ids, other.G, whole.A, whole.G)
    if isinstance(one, Factored) and isinstance(other, Instantiated):
        whole = _whole_rows(one)
        return ops.factored_times_grad_samples(whole.A, whole.G, other.samples)
    assert isinstance(one, EmbeddingRows) and isinstance(other, Instantiated)
    return ops.embedding_times_grad_samples(one.ids, one.G, other.samples)


def _concatenate(forms: Sequence[Factored]) -> Factored:
    """Uses of one weight, one after the other along T."""
    if len({(form.row, form.G.shape[-1]) for form in forms}) > 1:
        forms = [_whole_rows(form) for form in forms]
    A, G = (torch.cat([getattr(form, name) for form in forms], 2) for name in ("A", "G"))
    return Factored(A, G, forms[0].rows, forms[0].row)


def _whole_rows(form: Factored) -> Factored:
    """The form with G padded by zeros to all rows of the parameter (only ungrouped layers use a part of them)."""
    groups, p = form.G.shape[1], form.G.shape[-1]
    if groups * p == form.rows:
        return form
    return Factored(form.A, F.pad(form.G, (form.row, form.rows - form.row - p)), form.rows)


def _place_rows(values: Tensor, row: int, rows: int, dim: int) -> Tensor:
    """``values`` at ``[row, row + n)`` of ``rows`` zero rows along ``dim``."""
    n = values.shape[dim]
    if n == rows:
        return values
    shape = list(values.shape)
    shape[dim] = rows
    out = values.new_zeros(shape)
    out.narrow(dim, row, n).copy_(values)
    return out


def sketch(form: Form) -> Tensor:
    """``[B, n]`` numbers that tell whether anything of a sample's form has changed: sums, sums of sizes, of squares."""
    if isinstance(form, Instantiated):
        sides = [form.samples]
    elif isinstance(form, EmbeddingRows):
        sides = [form.ids, form.G]
    elif isinstance(form, Factored):
        sides = [form.A, form.G]
    else:
        sides = [side.unflatten(0, (form.batch, -1)) for side in (form.x, form.G)]
    numbers = []
    for side in sides:
        row = side.reshape(form.batch, math.prod(side.shape[1:]))
        row = row if row.is_floating_point() else row.double()
        sizes = (torch.linalg.vector_norm(row, order, dim=1).double() for order in (1, 2))
        numbers += [row.sum(1, dtype=torch.float64), *sizes]
    return torch.stack(numbers, 1).nan_to_num(0.0, 1e300, -1e300)


def _any_nonzero(values: Tensor) -> Tensor:
    """Per sample: is anything there? NaN counts as nothing (``0 · inf`` is no sign of a dependence)."""
    return (values.reshape(len(values), math.prod(values.shape[1:])).nan_to_num(0.0, 1.0, 1.0) != 0).any(1)
