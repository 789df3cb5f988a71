"""Per-sample squared norms of all parameters at once, and bounds on their errors.

Parameters of one kind go through one formula together, with constants of each: a step makes as many small operators as
there are kinds, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast import ops
from dpfast.capture.forms import Convolved, Factored, Instantiated, OuterProduct, Summed
from dpfast.capture.packed_sides import PackedSides
from dpfast.clipping.sums_of_forms import squared_norm


def squared_norms(parameters: Sequence[Sequence[Summed]], groups: Sequence[int], count: int) -> Tensor:
    """``‖g_i‖²`` and the bound on its error, over the parameters of each group: ``[2, count, B]``, float64.

    A parameter's per-sample gradient is the sum over its forms.
    """
    by_sides: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    by_stats: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    by_ghost: dict[tuple[torch.device, torch.dtype, int, int], list[int]] = {}
    by_packed: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    parts = []
    for place, forms in enumerate(parameters):
        form = forms[0]
        if len(forms) > 1:
            parts.append(_alone(forms, groups[place], count))
        elif isinstance(form, Instantiated):
            by_sides.setdefault(_kind(form.samples), []).append(place)
        elif isinstance(form, OuterProduct) and ops.has_products(form.A, form.G):
            by_sides.setdefault(_kind(form.G), []).append(place)
        elif isinstance(form, Convolved) and form.has_stats():
            by_stats.setdefault((*_kind(form.G), form.shape.groups), []).append(place)
        elif isinstance(form, Factored) and form.is_ghost():
            by_ghost.setdefault((*_kind(form.G), form.shape.groups, form.shape.T), []).append(place)
        elif isinstance(form, PackedSides) and form.is_ghost():
            by_packed.setdefault((*_kind(form.G), id(form.places)), []).append(place)
        else:
            parts.append(_alone(forms, groups[place], count))
    for places in by_sides.values():
        parts.append(_of_sides([(parameters[place][0], groups[place]) for place in places], count))
    for (_, dtype, _), places in by_stats.items():
        forms = [parameters[place][0] for place in places]
        stats = torch.stack([form.stats() for form in forms])  # type: ignore[union-attr]
        sizes = [(form.shape.T, form.shape.d, form.shape.p) for form in forms]  # type: ignore[union-attr]
        certified = ops.certified_ghosts(stats, sizes, dtype)
        parts.append(ops.in_groups(*certified, [groups[place] for place in places], count))
    for places in by_ghost.values():
        forms = [parameters[place][0] for place in places]
        certified = ops.ghost_squared_norms([(form.A, form.G) for form in forms])  # type: ignore[union-attr]
        parts.append(ops.in_groups(*certified, [groups[place] for place in places], count))
    for places in by_packed.values():
        forms = [parameters[place][0] for place in places]
        sides = [(form.A, form.G) for form in forms]  # type: ignore[union-attr]
        certified = ops.packed_ghost_squared_norms(sides, forms[0].places)  # type: ignore[union-attr]
        parts.append(ops.in_groups(*certified, [groups[place] for place in places], count))
    return parts[0] if len(parts) == 1 else torch.stack([part.to(parts[0].device) for part in parts]).sum(0)


def _kind(x: Tensor) -> tuple[torch.device, torch.dtype]:
    return x.device, ops.compute_dtype(x.dtype)


def _alone(forms: Sequence[Summed], group: int, count: int) -> Tensor:
    squared, bound = squared_norm(forms)
    return ops.in_groups(squared.unsqueeze(0), bound.unsqueeze(0), [group], count)


def _of_sides(parameters: Sequence[tuple[Summed, int]], count: int) -> Tensor:
    """Of gradients that are written out, and of products ``a ⊗ g``, from the squared norms of all these together."""
    products, written, of_products, of_written = [], [], [], []
    for form, group in parameters:
        if isinstance(form, OuterProduct):
            products.append((form.A, form.G))
            of_products.append(group)
        elif isinstance(form, Instantiated):
            written.append((form.samples, form.squares))
            of_written.append(group)
    return ops.side_norms(products, written, of_products + of_written, count)
