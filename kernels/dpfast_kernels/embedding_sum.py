"""The clipped sum of an embedding: a scatter-add in a fixed order, over runs of equal ids after a sort."""

import torch
import triton
import triton.language as tl

from .common import Compile, cdiv, launch, meta
from .embedding import AHEAD, PIECE, columns_of, load_row, warps_of


@triton.jit
def walk_kernel(
    ids,  # [B · T], sorted
    order,  # [B · T]: where they were
    G,  # [B, T, d]
    factors,  # [B]
    table,  # [rows, d], 0 where no id is
    edges,  # [pieces, 2, d]
    total,
    T,
    d,
    blocks,
    g_n,
    g_t,
    g_d,
    f_b,
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # table[v] = Σ_{t: id_t = v} factor · g_t for the runs of equal ids inside of one piece. Of a run that goes beyond,
    # the part in this piece becomes an edge: 0 if it began before, 1 if it begins here.
    index = tl.program_id(0)
    piece = (index // blocks).to(tl.int64)
    columns = (index % blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    start = piece * PIECE
    end = tl.minimum(start + PIECE, total)

    current = tl.load(ids + start)
    before = (tl.load(ids + start - 1, mask=start > 0, other=-1) == current).to(tl.int32)
    s = tl.zeros((BLOCK_D,), dtype=tl.float32)
    factor, g = load_scaled(order + start, factors, G, columns, d, T, g_n, g_t, g_d, f_b)
    for k in range(start, end):
        s += factor * g
        # the next row, while this one is stored
        ahead = tl.minimum(k + 1, end - 1)
        width = tl.where(ahead > k, d, 0)
        factor, g = load_scaled(order + ahead, factors, G, columns, width, T, g_n, g_t, g_d, f_b)
        following = tl.load(ids + k + 1, mask=k + 1 < total, other=-1)
        if (following != current) | (k + 1 == end):
            whole = (following != current) & (before == 0)
            tl.store(table + current * d + columns, s, mask=columns < tl.where(whole, d, 0))
            edge = edges + (2 * piece + 1 - before) * d
            tl.store(edge + columns, s, mask=columns < tl.where(whole, 0, d))
            s = tl.zeros((BLOCK_D,), dtype=tl.float32)
            before = 0
        current = following


@triton.jit
def load_scaled(order, factors, G, columns, width, T, g_n, g_t, g_d, f_b):
    """Factor and row at a place of the sorted order: no row where the factor is 0."""
    at = tl.load(order)
    factor = tl.load(factors + at // T * f_b)
    there = columns < tl.where(factor != 0.0, width, 0)
    return factor, load_row(G, at, columns, there, T, g_n, g_t, g_d)


@triton.jit
def join_kernel(
    ids,  # [B · T], sorted
    table,  # [rows, d]
    edges,  # [pieces, 2, d]
    total,
    d,
    blocks,
    PIECE: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # table[v] = the sum of the edges of the run that begins in one piece and goes beyond it, in order
    index = tl.program_id(0)
    piece = (index // blocks).to(tl.int64)
    columns = (index % blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside = columns < d
    start = piece * PIECE
    end = start + PIECE
    current = tl.load(ids + end - 1, mask=end < total, other=-2)
    goes_on = tl.load(ids + end, mask=end < total, other=-1) == current
    begins = tl.load(ids + start - 1, mask=start > 0, other=-1) != current
    if goes_on & begins:
        s = tl.load(edges + (2 * piece + 1) * d + columns, mask=inside, other=0.0)
        later = piece + 1 + tl.arange(0, AHEAD)
        more = goes_on
        while more:
            # [AHEAD, BLOCK_D]
            same = tl.load(ids + later * PIECE, mask=later * PIECE < total, other=-1) == current
            there = same[:, None] & inside[None, :]
            s += tl.sum(tl.load(edges + 2 * later[:, None] * d + columns[None, :], mask=there, other=0.0), axis=0)
            later += AHEAD
            more = tl.min(same.to(tl.int32)) > 0
        tl.store(table + current * d + columns, s, mask=inside)


@torch.library.custom_op("dpfast_kernels::embedding_sum", mutates_args=())
def embedding_sum(ids: torch.Tensor, G: torch.Tensor, factors: torch.Tensor, rows: int) -> torch.Tensor:
    """``Σ_i factor_i · g_i`` of an embedding of so many rows: ``[rows, d]`` float32.

    ``ids [B, T]`` int64 from 0 to rows - 1, ``G [B, T, d]``, ``factors [B]`` float32; a sample whose factor is 0 is
    left out, not multiplied. Added in an order that the ids alone set: no atomics.
    """
    B, T, d = G.shape
    table = torch.zeros((rows, d), dtype=torch.float32, device=G.device)
    block = columns_of(d)
    blocks, pieces = cdiv(d, block), cdiv(B * T, PIECE)
    ids, order = ids.reshape(-1).sort(stable=True)
    edges = torch.empty((pieces, 2, d), dtype=torch.float32, device=G.device)
    options = {"device": G.device, "PIECE": PIECE, "BLOCK_D": block, "num_warps": warps_of(block)}
    arguments = (ids, order, G, factors, table, edges, B * T, T, d, blocks, *G.stride(), factors.stride(0))
    launch(walk_kernel, (pieces * blocks,), *arguments, **options)
    launch(join_kernel, (pieces * blocks,), ids, table, edges, B * T, d, blocks, **options, AHEAD=AHEAD)
    return table


@embedding_sum.register_fake
def _(ids, G, factors, rows):
    return G.new_empty((rows, G.shape[2]), dtype=torch.float32)


def _case(dtype: torch.dtype, B: int, T: int, d: int) -> Compile:
    ids, G = meta(B, T, dtype=torch.int64), meta(B, T, d, dtype=dtype)
    return Compile(f"embedding_sum {dtype} {B}x{T}x{d}", lambda: embedding_sum._init_fn(ids, G, meta(B), 50257))


COMPILES = [_case(torch.bfloat16, 32, 1024, 1024), _case(torch.float32, 32, 1024, 100)]
