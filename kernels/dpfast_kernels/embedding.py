"""Norms of an embedding's per-sample gradients, ``g_i[v] = Σ_{t: id_t = v} G_t``, never one-hot and never ``V × d``.

There are two ways: pairs of positions with equal ids, picked out of tiles of G Gᵀ, or sums over runs of equal ids
after a sort. Neither depends on how large the vocabulary is.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    TRITON_DTYPE,
    Compile,
    cdiv,
    launch,
    meta,
    next_power_of_2,
    vectorised,
    wide,
)
from .ghost_tiles import gram, pairs_of, tile_pair

PIECE = 8 if INTERPRETED else 32
"""Sorted positions that one program walks over."""
AHEAD = 4
"""Rows read at a time where a run of equal ids goes on."""


@dataclass(frozen=True)
class Tiles:
    BLOCK_T: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def configure_tiles(T: int, dtype: torch.dtype, vectorised: bool) -> Tiles:
    """For the norm from pairs and the cross-term. A pair of tiles without equal ids costs nothing: small ones, then."""
    if INTERPRETED:
        return Tiles(16, 16, 4, 1)
    if not vectorised:
        return Tiles(32, 32, 4, 2)
    block = max(16, min(64, next_power_of_2(T)))
    # In four warps float32 tiles' sums and products are more than registers hold.
    return Tiles(block, 32, 8, 3) if dtype == torch.float32 else Tiles(block, 64, 4, 3)


def columns_of(d: int) -> int:
    """Columns that one program sums over a run: 8 a thread, see warps_of."""
    return 16 if INTERPRETED else min(1024, max(32, next_power_of_2(d)))


def warps_of(columns: int) -> int:
    return max(1, columns // 256)


def choose(B: int, T: int, d: int, dtype: torch.dtype) -> str:
    """The way for norms, by modelled time: pairs do ``B T² d`` flops (in text nearly every pair of tiles has a word in
    common), runs sort and read G once. The ids are not looked at: that would wait for the device.
    """
    rate = 300e12 if dtype != torch.float32 else 30e12
    pairs = B * max(T, 16) ** 2 * d / rate
    runs = 40e-6 + B * T * (d * dtype.itemsize + 48) / 2e12
    return "pairs" if pairs <= runs else "runs"


@triton.jit
def pairs_kernel(
    ids,  # [B, T]
    G,  # [B, T, d]
    partials,  # [2, B, pairs]
    B,
    T,
    d,
    pairs,
    tiles,
    i_n,
    i_t,
    g_n,
    g_t,
    g_d,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Σ_{t,s} 1[id_t = id_s] g_t · g_s over one pair of tiles; twice where t and s are of different tiles
    index = tl.program_id(0)
    n = (index // pairs).to(tl.int64)
    pair = index % pairs
    row, column = tile_pair(pair, tiles)
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_T + tl.arange(0, BLOCK_T)
    ids += n * i_n
    # [BLOCK_T, BLOCK_T]
    left = tl.load(ids + rows.to(tl.int64) * i_t, mask=rows < T, other=-1)
    right = tl.load(ids + columns.to(tl.int64) * i_t, mask=columns < T, other=-2)
    equal = left[:, None] == right[None, :]

    signed = 0.0
    absolute = 0.0
    if tl.max(equal.to(tl.int32)) > 0:
        gg = gram(G + n * g_n, rows, columns, T, d, g_t, g_d, DTYPE, PRECISION, BLOCK_K)
        gg = tl.where(equal, gg, 0.0)
        times = tl.where(row == column, 1.0, 2.0)
        signed = times * tl.sum(gg)
        absolute = times * tl.sum(tl.abs(gg))
    out = partials + n * pairs + pair
    tl.store(out, signed)
    tl.store(out + wide(B) * pairs, absolute)


@triton.jit
def load_row(G, at, columns, there, T, g_n, g_t, g_d):
    """Row [BLOCK_D] of a position, counted over all samples, in float32."""
    n = at // T
    return tl.load(G + n * g_n + (at - n * T) * g_t + columns * g_d, mask=there, other=0.0).to(tl.float32)


@triton.jit
def runs_kernel(
    ids,  # [B, T], each sample's sorted
    order,  # [B, T]: where they were in the sample
    G,  # [B, T, d]
    partials,  # [2, B, programs]
    B,
    T,
    d,
    pieces,
    blocks,
    g_n,
    g_t,
    g_d,
    PIECE: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Σ over the runs of equal ids that begin in one piece of ‖s‖², s = Σ_t g_t over the run, for one block of columns.
    # A run of m rows with r = Σ_t |g_t| has |error of s| ≤ (m-1) u r, so ‖s‖² is off by at most u · Σ (2 (m-1) |s| r +
    # u (m-1)² r²).
    index = tl.program_id(0)
    block = index % blocks
    piece = index // blocks % pieces
    n = (index // (blocks * pieces)).to(tl.int64)
    columns = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside = columns < d
    ids += n * T
    order += n * T
    G += n * g_n

    start = piece * PIECE
    end = tl.minimum(start + PIECE, T)
    current = tl.load(ids + start - 1, mask=start > 0, other=-1)
    width = 0  # d where a run has begun here
    rows = 0.0  # of the run, less one
    # [BLOCK_D]
    s = tl.zeros((BLOCK_D,), dtype=tl.float32)
    r = tl.zeros((BLOCK_D,), dtype=tl.float32)
    squared = tl.zeros((BLOCK_D,), dtype=tl.float32)
    slack = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in range(start, end):
        id = tl.load(ids + k)
        begins = id != current
        width = tl.where(begins, d, width)
        g = load_row(G, tl.load(order + k), columns, columns < width, T, g_n, g_t, g_d)
        squared += tl.where(begins, s * s, 0.0)
        slack += tl.where(begins, run_slack(s, r, rows), 0.0)
        s = tl.where(begins, g, s + g)
        r = tl.where(begins, tl.abs(g), r + tl.abs(g))
        rows = tl.where(begins, 0.0, rows + 1)
        current = id

    k = end.to(tl.int64)
    more = (width > 0) & (end < T)
    while more:  # the last run goes on behind the piece
        # [AHEAD, BLOCK_D]
        at = k + tl.arange(0, AHEAD)
        same = tl.load(ids + at, mask=at < T, other=-1) == current
        position = tl.load(order + at, mask=same, other=0)
        there = same[:, None] & inside[None, :]
        g = load_row(G, position[:, None], columns[None, :], there, T, g_n, g_t, g_d)
        s += tl.sum(g, axis=0)
        r += tl.sum(tl.abs(g), axis=0)
        rows += tl.sum(same.to(tl.float32))
        k += AHEAD
        more = tl.min(same.to(tl.int32)) > 0
    squared += s * s
    slack += run_slack(s, r, rows)

    tl.store(partials + index, tl.sum(squared))
    tl.store(partials + wide(B) * pieces * blocks + index, tl.sum(slack))


@triton.jit
def run_slack(s, r, rows):
    """What the sum of a run of ``rows`` + 1 rows may add to ‖s‖², over u and over 8 (see embedding_squared_norm)."""
    reach = rows * r
    return 0.25 * tl.abs(s) * reach + 2.0**-27 * reach * reach


def totals(partials: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the rows of ``[2, B, *]``, through float64, always in the same order."""
    first, second = (side.flatten(1).sum(1, dtype=torch.float64).float() for side in partials)
    return first, second


def norm_from_pairs(
    ids: torch.Tensor, G: torch.Tensor, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, d = G.shape
    tiles = tiles or configure_tiles(T, G.dtype, vectorised(G))
    pairs = pairs_of(T, tiles.BLOCK_T)
    partials = torch.empty((2, B, pairs), dtype=torch.float32, device=G.device)
    arguments = (ids, G, partials, B, T, d, pairs, cdiv(T, tiles.BLOCK_T), *ids.stride(), *G.stride())
    options = {"DTYPE": TRITON_DTYPE[G.dtype], "PRECISION": "ieee", **asdict(tiles)}
    launch(pairs_kernel, (B * pairs,), *arguments, device=G.device, **options)
    return totals(partials)


def norm_from_runs(ids: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, d = G.shape
    block = columns_of(d)
    blocks, pieces = cdiv(d, block), cdiv(T, PIECE)
    ids, order = ids.contiguous().sort(dim=1, stable=True)
    partials = torch.empty((2, B, pieces * blocks), dtype=torch.float32, device=G.device)
    arguments = (ids, order, G, partials, B, T, d, pieces, blocks, *G.stride())
    options = {"PIECE": PIECE, "AHEAD": AHEAD, "BLOCK_D": block, "num_warps": warps_of(block)}
    launch(runs_kernel, (B * pieces * blocks,), *arguments, device=G.device, **options)
    return totals(partials)


@torch.library.custom_op("dpfast_kernels::embedding_squared_norm", mutates_args=())
def embedding_squared_norm(ids: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms of ``g_i[v] = Σ_{t: id_t = v} G_t``, and how much rounding can have changed them.

    Args:
        ids: ``[B, T]`` int64, not negative.
        G: ``[B, T, d]``.

    Returns:
        ``squared [B]`` and ``absolute [B]``, float32, so that squared errs by at most ``(√d + d/32 + 8) 2⁻²⁴ absolute``
        and the rounding of the last sum, a few units. From pairs it is Σ 1[id_t = id_s] |g_t·g_s|; from runs an eighth
        of what the sums of the runs can lose, in units of 2⁻²⁴, 0 where no id comes twice.
    """
    B, T, d = G.shape
    return (norm_from_pairs if choose(B, T, d, G.dtype) == "pairs" else norm_from_runs)(ids, G)


@embedding_squared_norm.register_fake
def _(ids, G):
    return tuple(G.new_empty(G.shape[0], dtype=torch.float32) for _ in range(2))


def _case(way: Callable, dtype: torch.dtype, B: int, T: int, d: int, wgmma: bool = False) -> Compile:
    call = lambda: way(meta(B, T, dtype=torch.int64), meta(B, T, d, dtype=dtype))  # noqa: E731
    return Compile(f"{way.__name__} {dtype} {B}x{T}x{d}", call, wgmma)


COMPILES = [
    _case(norm_from_pairs, torch.bfloat16, 32, 1024, 1024, True),
    _case(norm_from_pairs, torch.float32, 32, 1024, 1024),
    _case(norm_from_pairs, torch.bfloat16, 32, 1000, 1023),
    _case(norm_from_runs, torch.bfloat16, 32, 1024, 1024),
    _case(norm_from_runs, torch.float32, 32, 1024, 100),
]
