"""Per-sample squared norms of tensors ``[B, ...]``, with bounds on their rounding: the compiled ops, Triton's kernels,
else the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dpfast import reference
from dpfast.ops.backends import is_native, is_triton
from dpfast.ops.matmul import BLOCK_UNITS, product_reach
from dpfast.reference.rounding import column, compute_dtype, of_slip, unit_roundoff, with_safety

NARROW = (torch.float32, torch.bfloat16, torch.float16)
Written = tuple[Tensor, Tensor | None]  # per-sample gradients [B, *], and their squared norms where an op has made them


def squared_norm(samples: Tensor) -> tuple[Tensor, Tensor]:
    """``(‖g_i‖² [B], bound [B])``, float64, of per-sample gradients ``[B, *]``."""
    squared, bound = SquaredNorms([samples]).of_samples([samples])
    return squared[0], bound[0]


class SquaredNorms:
    """Squared norms of the rows of several tensors ``[B, *]`` of one B, compute dtype and device, made in one launch.

    A tensor that is given twice is read once.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.rows: dict[int, int] = {}  # by the tensor's id: who asks for its row still has it
        distinct: list[Tensor] = []
        for x in tensors:
            if id(x) not in self.rows:
                self.rows[id(x)] = len(distinct)
                distinct.append(x)
        if not distinct:
            return
        if is_native("squared_norms", distinct[0].device):
            self.squared = torch.ops.dpfast.squared_norms([x.contiguous() for x in distinct])
        elif is_triton("squared_norms", *distinct):
            from dpfast_kernels.weighted_sum import squared_norms

            self.squared = squared_norms(distinct)
        else:
            self.squared = torch.stack([reference.row_squares(x) for x in distinct])

    def of_samples(self, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``‖g_i‖²`` and bounds, ``[n, B]``, of per-sample gradients ``[B, *]`` that are written out."""
        return certified(self._of(samples), samples)

    def of_products(self, sides: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """``‖a‖²·‖g‖²`` and bounds, ``[n, B]``, of ``A [B, d]`` and ``G [B, p]`` of each of n weights."""
        # Each sum is rounded, and what one side loses to underflow is multiplied by the other one.
        a, slack_a = certified(self._of([A for A, _ in sides]), [A for A, _ in sides])
        g, slack_g = certified(self._of([G for _, G in sides]), [G for _, G in sides])
        (A, G), product = sides[0], a * g
        slack = (a + slack_a) * (g + slack_g) - product
        sizes = column(tuple([A.shape[-1] * G.shape[-1] for A, G in sides]), G.device)
        squared, bound = with_safety(product, slack, G.dtype, squares=sizes)
        if is_triton("clipped_weight_gradient", A, G):  # which makes the sum, and may round both sides of it
            bound = bound + of_slip(squared, product_reach(1, A, G) * squared.sqrt())
        return squared, bound

    def _of(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = [self.rows[id(x)] for x in tensors]
        if rows == [*range(len(self.squared))]:
            return self.squared
        return self.squared.index_select(0, index_of(tuple(rows), self.squared.device))


def side_norms(
    products: Sequence[tuple[Tensor, Tensor]], written: Sequence[Written], groups: Sequence[int], count: int
) -> Tensor:
    """Squared norms and bounds on their errors, summed over the parameters of each group: ``[2, count, B]``, float64.

    Args:
        products: ``A [B, d]`` and ``G [B, p]`` of weights whose gradient is their product: see :func:`has_products`.
        written: gradients that are written out. All are of one B, compute dtype and device.
        groups: of each of the products, then of each of what is written out.
    """
    first = products[0][0] if products else written[0][0]
    batch = len(first)
    if not is_native("side_norms", first.device):
        return _side_norms(products, written, groups, count)
    of_products = [side for pair in products for side in pair]
    made = [(samples, squares) for samples, squares in written if squares is not None]
    rest = [samples for samples, squares in written if squares is None]
    rows: dict[int, int] = {}
    sides: list[Tensor] = []
    for x in (*of_products, *rest):
        if id(x) not in rows:
            rows[id(x)] = len(sides)
            sides.append(x)
    left, right = [rows[id(A)] for A, _ in products], [rows[id(G)] for _, G in products]
    known = len(sides)
    for samples, squares in written:
        right.append(-1)
        left.append(rows[id(samples)] if squares is None else known)
        known += squares is not None
    sizes = [samples.numel() // max(1, batch) for samples, _ in made]
    wide = compute_dtype(first.dtype) == torch.float64
    given = [squares for _, squares in made]
    sides = [x.contiguous() for x in sides]
    return torch.ops.dpfast.side_norms(sides, given, sizes, left, right, list(groups), count, batch, wide)


def _side_norms(
    products: Sequence[tuple[Tensor, Tensor]], written: Sequence[Written], groups: Sequence[int], count: int
) -> Tensor:
    """:func:`side_norms` by a few operators for each kind, whatever the number of parameters."""
    of_written = groups[len(products) :]
    rest = [(samples, group) for (samples, squares), group in zip(written, of_written, strict=True) if squares is None]
    made = [(*one, group) for one, group in zip(written, of_written, strict=True) if one[1] is not None]
    sides = SquaredNorms([*(side for pair in products for side in pair), *(samples for samples, _ in rest)])
    parts = []
    if products:
        parts.append(in_groups(*sides.of_products(products), groups[: len(products)], count))
    if rest:
        parts.append(in_groups(*sides.of_samples([x for x, _ in rest]), [group for _, group in rest], count))
    if made:
        squares = torch.stack([squares for _, squares, _ in made])  # type: ignore[misc]
        found = certified(squares, [samples for samples, _, _ in made])
        parts.append(in_groups(*found, [group for _, _, group in made], count))
    return torch.stack(parts).sum(0)


def in_groups(squared: Tensor, bounds: Tensor, groups: Sequence[int], count: int) -> Tensor:
    """Squared norms ``[n, B]`` of n parameters and their bounds, summed over each group: ``[2, count, B]``."""
    both = torch.stack([squared, bounds])
    if count == 1:
        return both.sum(1, keepdim=True)
    totals = both.new_zeros(2, count, both.shape[2])
    return totals.index_add_(1, index_of(tuple(groups), both.device), both)


@lru_cache(maxsize=256)
def index_of(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Row numbers on a device, copied there once."""
    return torch.tensor(rows, dtype=torch.long, device=device)


def certified(squared: Tensor, samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared norms ``[n, B]`` of n tensors ``[B, *]``, as an op gave them, with bounds on their rounding.

    Float64 ones are sums of exact squares, or nearly; float32 ones were summed in blocks in float32.
    """
    blocks = BLOCK_UNITS * unit_roundoff(torch.float32) if squared.dtype == torch.float32 else 0.0
    sizes = column(tuple([x.numel() // max(1, len(x)) for x in samples]), squared.device)
    return with_safety(squared, 0.0, samples[0].dtype, squares=sizes, relative=blocks)


def has_products(A: Tensor, G: Tensor) -> bool:
    """Whether there is :meth:`SquaredNorms.of_products` for ``A [B, d]`` and ``G [B, p]`` of one position."""
    return A.dtype in NARROW and G.dtype in NARROW and is_native("squared_norms", G.device)


def one_position_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_groups ‖a‖²·‖g‖²`` for ``A [B, g, 1, d]``, ``G [B, g, 1, p]``."""
    if A.shape[1] == 1 and has_products(A, G):
        A, G = A.flatten(1), G.flatten(1)
        squared, bound = SquaredNorms([A, G]).of_products([(A, G)])
        return squared[0], bound[0]
    squared, bound = reference.one_position_squared_norm(A, G)
    if is_triton("clipped_weight_gradient", A, G):  # which makes the sum, and may round both sides of it
        bound = bound + of_slip(squared, product_reach(1, A, G) * squared.sqrt())
    return squared, bound
