"""Norms and clipped sums of parameters whose per-sample gradient is the sum over several forms.

A tied or re-used weight has a form for each use. Norms of sums need the cross-terms: :func:`squared_norm` has them all,
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast import ops
from dpfast.capture.forms import (
    PRODUCTS,
    SMALL,
    Convolved,
    EmbeddingRows,
    Factored,
    Form,
    Instantiated,
    OuterProduct,
    Summed,
    by,
    stored,
)
from dpfast.capture.recomputed import Recomputed, one_after_the_other
from dpfast.planning.planner import Planner


def combine(forms: Sequence[Form], planner: Planner, name: str) -> list[Form]:
    """The same per-sample gradient in at most one form of each kind: factored, embedding rows, instantiated.

    A head whose logits are not stored stays so beside embedding rows and others like it, in the place of what is
    factored.
    """
    if len(forms) == 1:
        return list(forms)
    heads = [form for form in forms if isinstance(form, Recomputed)]
    if heads:
        embedded = [form for form in forms if isinstance(form, EmbeddingRows)]
        if len(heads) + len(embedded) == len(forms):
            head = heads[0] if len(heads) == 1 else one_after_the_other(heads)
            return [head, *(combine(embedded, planner, name) if embedded else [])]
        forms = [stored(form) if isinstance(form, Recomputed) else form for form in forms]
    forms = [form.factored() if isinstance(form, OuterProduct) else form for form in forms]
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


def squared_norm(forms: Sequence[Summed]) -> tuple[Tensor, Tensor]:
    """``‖Σ_f form_f‖²`` per sample and a bound on its error, cross-terms included.

    A form's bound covers what its clipped sum errs by: ``σ_f`` in norm, by which its norm with the bound exceeds its
    norm. Of several forms that point the same way all these add up, each beside the length of the others.
    """
    squared, bound = forms[0].squared_norm()
    if len(forms) == 1:
        return squared.clamp_min(0), bound
    of_each = [(squared, bound), *(form.squared_norm() for form in forms[1:])]
    lengths = [(norm.clamp_min(0) + slack).sqrt() for norm, slack in of_each]
    over = [length - norm.clamp_min(0).sqrt() for length, (norm, _) in zip(lengths, of_each, strict=True)]
    for more, slack in of_each[1:]:
        squared, bound = squared + more, bound + slack
    for one, other in combinations(range(len(forms)), 2):
        term, slack = _cross_term(forms[one], forms[other])
        squared = squared + 2 * term
        bound = bound + 2 * (slack + lengths[one] * over[other] + lengths[other] * over[one])
    return squared.clamp_min(0), bound


def clipped_sums(parts: list[tuple[Summed, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Each form's clipped sum with its factors, and its place in ``parts``; all that are written out in one launch.

    ``parts`` is emptied on the way: what a sum was made of can go.
    """
    written: dict[tuple[object, ...], list[tuple[int, Tensor, Tensor]]] = {}
    products: dict[tuple[object, ...], list[tuple[int, OuterProduct | Factored, Tensor]]] = {}
    for place in reversed(range(len(parts))):
        form, factors = parts.pop()
        if isinstance(form, Instantiated):
            samples = form.samples
            kind = samples.dtype, samples.device, samples.shape[0]
            written.setdefault(kind, []).append((place, samples, factors))
        elif isinstance(form, PRODUCTS) and form.G.nbytes + form.A.nbytes < SMALL:
            product = form.batch, form.G.dtype, form.G.device, ops.is_small(form.A, form.G)  # segments are by lengths
            products.setdefault(product, []).append((place, form, factors))
        else:
            yield place, form.clipped_sum(factors)
        del form
    for alike in products.values():
        sides = [(form.A, form.G) for _, form, _ in alike]
        sums = ops.clipped_weight_gradients(sides, [factors for _, _, factors in alike])
        for (place, form, _), summed in zip(alike, sums, strict=True):
            yield place, summed if summed.shape[0] == form.rows else form.placed(summed)
    for group in written.values():
        places, samples_of, factors_of = zip(*group, strict=True)
        yield from zip(places, ops.weighted_sums(samples_of, factors_of), strict=True)


def _cross_term(one: Summed, other: Summed) -> tuple[Tensor, Tensor]:
    """``⟨one_i, other_i⟩``; :func:`combine` leaves the kinds in the order factored, embedding, instantiated."""
    if isinstance(one, Recomputed):
        assert isinstance(other, EmbeddingRows)
        return ops.head_embedding_cross_term(one.sides, other.ids, other.G)
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
