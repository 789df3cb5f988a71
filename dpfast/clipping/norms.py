"""Per-sample squared norms of all parameters at once, and bounds on their errors.

Parameters of one kind go through one formula together, with constants of each: a step makes as many small operators as
there are kinds, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast import ops
from dpfast.capture.forms import Convolved, Factored, Form, Instantiated, squared_norm


class Norms(NamedTuple):
    """Squared norms of some parameters, and bounds on their errors, ``[n, B]`` each, float64."""

    places: list[int]  # which of the parameters these are
    squared: Tensor
    bounds: Tensor


def squared_norms(parameters: Sequence[Sequence[Form]]) -> Iterator[Norms]:
    """Of each parameter, whose per-sample gradient is the sum over its forms."""
    by_sides: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    by_stats: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for place, forms in enumerate(parameters):
        form = forms[0]
        if len(forms) > 1:
            yield _alone(place, forms)
        elif isinstance(form, Instantiated) or (isinstance(form, Factored) and form.is_product()):
            sample = form.samples if isinstance(form, Instantiated) else form.G
            kind = sample.device, ops.compute_dtype(sample.dtype)
            by_sides.setdefault(kind, []).append(place)
        elif isinstance(form, (Factored, Convolved)) and form.has_stats():
            groups, dtype = form.shape.groups, ops.compute_dtype(form.G.dtype)
            by_stats.setdefault((form.G.device, dtype, groups), []).append(place)
        else:
            yield _alone(place, forms)
    for places in by_sides.values():
        yield from _of_sides([(place, parameters[place][0]) for place in places])
    for (_, dtype, _), places in by_stats.items():
        forms = [parameters[place][0] for place in places]
        stats = torch.stack([form.stats() for form in forms])  # type: ignore[union-attr]
        sizes = [(form.shape.T, form.shape.d, form.shape.p) for form in forms]  # type: ignore[union-attr]
        yield Norms(places, *ops.certified_ghosts(stats, sizes, dtype))  # type: ignore[arg-type]


def _alone(place: int, forms: Sequence[Form]) -> Norms:
    squared, bound = squared_norm(forms)
    return Norms([place], squared.unsqueeze(0), bound.unsqueeze(0))


def _of_sides(parameters: Sequence[tuple[int, Form]]) -> Iterator[Norms]:
    """Of gradients that are written out, and of products ``a ⊗ g``, from the squared norms of all these together."""
    written = [(place, form) for place, form in parameters if isinstance(form, Instantiated)]
    made = [(place, form, form.squares) for place, form in written if form.squares is not None]
    if made:
        squares = torch.stack([squares for _, _, squares in made])
        yield Norms([place for place, _, _ in made], *ops.certified(squares, [form.samples for _, form, _ in made]))
    products = [(place, form) for place, form in parameters if isinstance(form, Factored)]
    rest = [(place, form.samples) for place, form in written if form.squares is None]
    sides = ops.SquaredNorms([side for _, form in products for side in (form.A, form.G)] + [x for _, x in rest])
    if products:
        of_sides = [(form.A, form.G) for _, form in products]
        yield Norms([place for place, _ in products], *sides.of_products(of_sides))
    if rest:
        yield Norms([place for place, _ in rest], *sides.of_samples([x for _, x in rest]))
