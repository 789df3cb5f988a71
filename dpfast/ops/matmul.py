"""Norms, per-sample gradients and clipped sums that are matrix products: Triton kernels on a GPU, else the reference.

``A [B, g, T, d]`` are activations and ``G [B, g, T, p]`` backprops of g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast import reference
from dpfast.native import instruction_set
from dpfast.ops.backends import is_native, is_triton
from dpfast.reference.rounding import column, drift, of_slip, smallest, underflow, unit_roundoff, with_safety

# Units of 2⁻²⁴ that a product may be off where few positions make a kernel scale backprops before they are rounded to
# two bfloat16, and those that a kernel's float32 sum of squares may be off: a tree in each block, then the blocks.
SPLIT_UNITS, BLOCK_UNITS = 2.0**8, 64.0
TF32_UNITS = 2.0**15  # that a product may be off whose sides are rounded to tf32
# Columns from which a copy with aligned rows costs less than reading them as they are (a vocabulary of 50257).
WIDE = 1024
MOST_COPIED = 1 << 24  # bytes of one side that are in float32, or have aligned rows, at a time: of a head they are many
SMALL_PRODUCT = 1 << 20  # multiplications, up to which a call of an op takes as long as its work


def ghost_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``‖g_i‖² = Σ_{t,s} (a_t·a_s)(g_t·g_s)`` and the bound on its error, ``[B]`` each, float64."""
    squared, bound = ghost_squared_norms([(A, G)])
    return squared[0], bound[0]


def ghost_squared_norms(sides: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """:func:`ghost_squared_norm` of several weights of one B, g, T and dtype of sums: ``[n, B]`` each.

    In one call, or one launch for those that are alike. An input that several weights share is read once for all.
    """
    sizes = [(A.shape[2], A.shape[3], G.shape[3]) for A, G in sides]
    if not is_triton("ghost_squared_norm", *sides[0]):
        return reference.certified_ghosts(_dense_stats(sides), sizes, sides[0][1].dtype)
    from dpfast_kernels.ghost import ghost_norms

    def one(A: Tensor, G: Tensor) -> Tensor:
        return ghost_norms([_aligned(A).flatten(0, 1)], [_aligned(G).flatten(0, 1)])[0]

    together = [k for k, (_, G) in enumerate(sides) if not _is_cut(G)]
    found = {k: _by_sample(one, *sides[k]) for k in range(len(sides)) if k not in together}
    if together:
        of = {id(side): side for k in together for side in sides[k]}
        aligned = {name: _aligned(side).flatten(0, 1) for name, side in of.items()}
        stats = ghost_norms([aligned[id(sides[k][0])] for k in together], [aligned[id(sides[k][1])] for k in together])
        found |= dict(zip(together, stats, strict=True))
    made = torch.stack([found[k] for k in range(len(sides))])
    return certified_stats(made, sides, [(d, p) for _, d, p in sizes])


def _dense_stats(sides: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """:func:`dpfast.reference.matmul.ghost_stats` of several weights: ``[n, 5, B, g]``."""
    B, groups, T, _ = sides[0][1].shape
    if not has_native_stats(sides):
        return torch.stack([_by_sample(reference.ghost_stats, A, G) for A, G in sides])
    rows = [(A.reshape(B * groups, T, A.shape[3]), G.reshape(B * groups, T, G.shape[3])) for A, G in sides]
    return native_stats(rows, _whole_rows(B * groups, T)).view(len(sides), 5, B, groups)


@lru_cache(maxsize=64)
def _whole_rows(count: int, T: int) -> Samples:
    return Samples(range(count), [0] * count, [T] * count)


class Samples(NamedTuple):
    """Where each sample is: its row, and from which position of this on to which end, in order."""

    row: Sequence[int]
    first: Sequence[int]
    end: Sequence[int]


def has_native_stats(sides: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether there is :func:`native_stats` for these weights, and it is faster than products of torch's."""
    G = sides[0][1]
    native = is_native("ghost_stats", G.device) and reference.compute_dtype(G.dtype) == torch.float32
    return native and _has_vectors()


@lru_cache(maxsize=1)
def _has_vectors() -> bool:
    return instruction_set() != "scalar"


def native_stats(sides: Sequence[tuple[Tensor, Tensor]], samples: Samples) -> Tensor:
    """What ghost norms and their bounds are made of: ``[n, 5, samples]``, float64, by the compiled library.

    ``sides`` are ``A [N, T, d]`` and ``G [N, T, p]`` of n weights. Those in float32 are taken together, where they lie;
    the Gram matrix of an input that several have is made once. Of others no more than :data:`MOST_COPIED` bytes, or
    one sample, are in float32 at a time, of weights that have one input.
    """
    by_input: dict[Any, list[int]] = {}
    for k, (A, G) in enumerate(sides):
        wide = A.dtype == G.dtype == torch.float32
        by_input.setdefault(None if wide else (A.data_ptr(), A.shape, A.stride(), A.dtype), []).append(k)
    found: dict[int, Tensor] = {}
    for of_input, places in by_input.items():
        some = [sides[k] for k in places]
        stats = _stats_of(some, samples) if of_input is None else _stats_in_parts(some, samples)
        found |= dict(zip(places, stats.unbind(), strict=True))
    return torch.stack([found[k] for k in range(len(sides))])


def _stats_of(sides: Sequence[tuple[Tensor, Tensor]], samples: Samples) -> Tensor:
    """Of sides in float32."""
    A, G = ([x if x.stride(2) == 1 else x.contiguous() for x in each] for each in zip(*sides, strict=True))
    return torch.ops.dpfast.ghost_stats(A, G, *samples, smallest(torch.float32))


def _stats_in_parts(sides: Sequence[tuple[Tensor, Tensor]], samples: Samples) -> Tensor:
    """Of weights with one input, a few samples at a time in float32."""
    T = sides[0][0].shape[1]
    one_row = [
        x.reshape(1, -1, x.shape[2]) if x.shape[2] else x.new_zeros(1, x.shape[0] * T, 0)
        for x in (sides[0][0], *(G for _, G in sides))
    ]
    first = [row * T + t for row, t in zip(samples.row, samples.first, strict=True)]
    end = [row * T + t for row, t in zip(samples.row, samples.end, strict=True)]
    most = max(1, MOST_COPIED // (4 * max(1, sum(x.shape[2] for x in one_row))))
    parts: list[Tensor] = []
    k = 0
    while k < len(first) or not parts:
        last = k + 1
        while last < len(first) and end[last] - first[k] <= most:
            last += 1
        at, to = (first[k], end[last - 1]) if first else (0, 0)
        A, *G = (x[:, at:to].float() for x in one_row)
        where = Samples([0] * len(first[k:last]), [t - at for t in first[k:last]], [t - at for t in end[k:last]])
        parts.append(_stats_of([(A, each) for each in G], where))
        k = last
    return torch.cat(parts, 2)


def are_small(sides: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether one native call for all of these weights takes less time than a matrix product of torch for each."""
    return all([is_small(A, G) for A, G in sides])


def is_small(A: Tensor, G: Tensor) -> bool:
    """The same of one weight."""
    one_group = A.dim() < 4 or A.shape[1] == 1
    narrow = A.dtype == G.dtype == torch.float32 and one_group and A.numel() * G.shape[-1] <= SMALL_PRODUCT
    return narrow and is_native("weighted_products", G.device)


def all_grad_samples(sides: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """:func:`grad_samples` of several weights of one B that :func:`is_small`, with their squared norms."""
    A, G = ([side.contiguous() for side in each] for each in zip(*sides, strict=True))
    samples, squares = torch.ops.dpfast.product_samples(A, G)
    return list(zip(samples, squares.unbind(), strict=True))


def has_tiles(A: Tensor, G: Tensor) -> bool:
    """Whether there is :func:`tile_squared_norm` for these."""
    return is_triton("tile_squared_norm", A, G)


def tile_squared_norm(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`ghost_squared_norm`, from tiles of ``G_iᵀ A_i`` that are squared and dropped (norm-GEMM)."""
    from dpfast_kernels.sample_gradients import gradient_norm

    stats = _by_sample(lambda A, G: gradient_norm(*(_aligned(side).flatten(0, 1) for side in (A, G))), A, G)
    squared, bound = certified_stats(stats.unsqueeze(0), [(A, G)], [()])
    return squared[0], bound[0]


def grad_samples(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor | None]:
    """``g_i = G_iᵀ A_i``: ``[B, g·p, d]`` in float32 (float64 for float64); squared norms where its op made them."""
    if not is_triton("grad_samples", A, G):
        return reference.grad_samples(A, G), None
    from dpfast_kernels.sample_gradients import sample_gradients

    B, groups = A.shape[:2]
    samples, squares = sample_gradients(A.flatten(0, 1), G.flatten(0, 1), torch.float32)
    return samples.view(B, groups * G.shape[-1], A.shape[-1]), squares.view(B, groups).sum(1)


def clipped_weight_gradient(A: Tensor, G: Tensor, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · G_iᵀ A_i``: ``[g·p, d]``; nothing that was rounded to 16 bits is scaled."""
    p, columns = G.shape[-1], MOST_COPIED // max(1, 4 * G[..., :16].numel()) * 16
    if G.shape[1] == 1 and G.nbytes > MOST_COPIED and 0 < columns < p and _copies(G):
        parts = (_clipped_weight_gradient(A, part.contiguous(), factors) for part in G.split(columns, -1))
        return torch.cat([*parts])
    return _clipped_weight_gradient(A, G, factors)


def _clipped_weight_gradient(A: Tensor, G: Tensor, factors: Tensor) -> Tensor:
    if not is_triton("clipped_weight_gradient", A, G):
        return reference.clipped_weight_gradient(A, G, factors)
    from dpfast_kernels.weight_gradient import clipped_weight_gradient as kernel

    (groups, d), p = (A.shape[1], A.shape[-1]), G.shape[-1]
    summed = kernel(_aligned(A), _aligned(G), factors.float().contiguous(), False)[0]
    return summed.unflatten(0, (groups, -1))[:, :p, :d].flatten(0, 1)


def clipped_weight_gradients(sides: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor]) -> Iterator[Tensor]:
    """:func:`clipped_weight_gradient` of several weights; sides may be ``[B, d]`` and ``[B, p]`` where T = 1."""
    if are_small(sides):
        A, G = ([side.contiguous() for side in each] for each in zip(*sides, strict=True))
        yield from torch.ops.dpfast.weighted_products(A, G, stacked(factors, torch.float32))
        return
    sides = [(A, G) if A.dim() == 4 else (A[:, None, None], G[:, None, None]) for A, G in sides]
    if any(is_triton("clipped_weight_gradient", A, G) for A, G in sides):
        yield from (clipped_weight_gradient(A, G, row) for (A, G), row in zip(sides, factors, strict=True))
    else:
        yield from reference.clipped_weight_gradients(sides, factors)


def place_rows(values: Tensor, row: int, rows: int, dim: int) -> Tensor:
    """``values`` at ``[row, row + n)`` of ``rows`` zero rows along ``dim``."""
    n = values.shape[dim]
    if n == rows:
        return values
    shape = list(values.shape)
    shape[dim] = rows
    out = values.new_zeros(shape)
    out.narrow(dim, row, n).copy_(values)
    return out


def stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Factors ``[B]`` of each of n tensors: ``[n, B]``, or ``[B]`` where they are the same for all."""
    if all([row is factors[0] for row in factors]):
        return factors[0].to(dtype)
    return torch.stack([row.to(dtype) for row in factors])


def _copies(G: Tensor) -> bool:
    """Whether an op would have to copy such backprops as a whole."""
    if is_triton("clipped_weight_gradient", G):
        return aligned_columns(G.shape[-1]) > 0
    return G.dtype != reference.compute_dtype(G.dtype)


def _is_cut(G: Tensor) -> bool:
    """Whether such backprops are taken a few samples at a time, as copies of all would take much."""
    return G.nbytes > MOST_COPIED and len(G) > _at_once(G) and _copies(G)


def _at_once(G: Tensor) -> int:
    return max(1, MOST_COPIED // max(1, 4 * G[:1].numel()))


def _by_sample(stats: Callable[[Tensor, Tensor], Tensor], A: Tensor, G: Tensor) -> Tensor:
    """``stats`` ``[n, samples, ...]``, of a few samples at a time if need be."""
    if not _is_cut(G):
        return stats(A, G)
    parts = zip(A.split(_at_once(G)), G.split(_at_once(G)), strict=True)
    return torch.cat([stats(*part) for part in parts], 1)


def aligned_columns(n: int) -> int:
    """How many are to be added to rows of n, to align them."""
    return 0 if n % 16 == 0 or n < WIDE else -n % 16


def _aligned(side: Tensor) -> Tensor:
    """With zero columns up to whole 16, where rows are long: kernels read other rows element by element."""
    more = aligned_columns(side.shape[-1])
    return F.pad(side, (0, more)) if more else side


def certified_stats(
    stats: Tensor, sides: Sequence[tuple[Tensor, Tensor]], products: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Squared norms ``[n, B]`` and their bounds, of a kernel's rows ``[n, 4, B·g]``: squared, absolute, ``‖A_i‖²``,
    ``‖G_i‖²``.

    ``products`` are the lengths of those that make the norm itself. Besides, the contribution that is summed later is
    a sum over T that errs by at most ``units · u · ‖A_i‖·‖G_i‖`` in norm; so does the norm, where it is of a gradient
    that a kernel made.
    """
    B, groups, T, _ = sides[0][0].shape
    squared, absolute, energy_a, energy_g = stats.double().unflatten(2, (B, groups)).unbind(1)
    u, grown = unit_roundoff(torch.float32), scaling_growth(T)
    sizes = [(A.shape[-1], G.shape[-1]) for A, G in sides]
    lost = underflow(torch.float32) * T
    constants = (
        tuple(
            grown * u * (sum(drift(n) + units_of_a_product(A, G) for n in lengths) or BLOCK_UNITS)
            for (A, G), lengths in zip(sides, products, strict=True)
        ),
        tuple(grown * product_reach(T, A, G) for A, G in sides),
        tuple(lost * d for d, _ in sizes),
        tuple(lost * p for _, p in sizes),
        tuple(lost * d * p * T for d, p in sizes),
    )
    of_norm, of_sum, of_g, of_a, of_both = (column(each, stats.device, 3) for each in constants)
    bound = of_norm * absolute + of_slip(squared, of_sum * (energy_a * energy_g).sqrt())
    bound = bound + of_g * energy_g + of_a * energy_a + of_both
    return with_safety(squared.sum(2), bound.sum(2), torch.float32, relative=grown - 1)


def scaling_growth(T: int) -> float:
    """By what a squared norm may grow where a kernel multiplies its sum by ratios of factors: see its file."""
    from dpfast_kernels.weight_gradient import BY_SAMPLE, SCALING_UNITS

    return (1 + SCALING_UNITS * unit_roundoff(torch.float32)) ** 2 if T >= BY_SAMPLE else 1.0


def product_reach(T: int, A: Tensor, G: Tensor) -> float:
    """What a per-sample gradient may be off for its norm, and again for its contribution, over ``‖A_i‖·‖G_i‖``."""
    from dpfast_kernels.weight_gradient import BY_SAMPLE

    split = SPLIT_UNITS if T < BY_SAMPLE else 0.0
    return (2 * drift(T) + 2 * units_of_a_product(A, G) + split) * unit_roundoff(torch.float32)


def units_of_a_product(A: Tensor, G: Tensor) -> float:
    """Units of float32 that a kernel's product may be off before it is added, where the user has allowed tf32."""
    from dpfast_kernels.common import dot_dtype, dot_precision

    return TF32_UNITS if dot_precision(dot_dtype(A, G)) == "tf32" else 0.0
