"""The tiles of a ghost norm: pairs (t, s) of positions with t ≤ s, and Σ (a_t · a_s)(g_t · g_s) over them."""

import triton
import triton.language as tl

from .common import cdiv, dot, wide
from .weighted_sum import pick


def pairs_of(T: int, block: int) -> int:
    """Pairs (t, s) of tiles with t ≤ s."""
    tiles = cdiv(T, block)
    return tiles * (tiles + 1) // 2


@triton.jit
def tile_pair(index, tiles):
    """(row, column) with row ≤ column < tiles, each once for index < tiles (tiles + 1) / 2. The triangle is folded into
    a rectangle: row r of the triangle, then row tiles - 1 - r (tiles - r where tiles is odd), fill one row of it.
    """
    width = tiles | 1
    r = index // width
    c = index % width
    upper = c < tiles - r
    row = tl.where(upper, r, tiles - r - 1 + tiles % 2)
    column = tl.where(upper, r + c, row + c - (tiles - r))
    return row, column


@triton.jit
def gram(
    X, rows, columns, T, d, stride_t, stride_d, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """x_t · x_s for the given rows t and columns s of X [T, d], in float32."""
    k = tl.arange(0, BLOCK_K)
    left = X + rows.to(tl.int64)[:, None] * stride_t + k.to(tl.int64)[None, :] * stride_d
    right = X + columns.to(tl.int64)[None, :] * stride_t + k.to(tl.int64)[:, None] * stride_d
    sums = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        # [BLOCK_T, BLOCK_K]
        x = tl.load(left, mask=(rows < T)[:, None] & (k < d - start)[None, :], other=0.0).to(DTYPE)
        # [BLOCK_K, BLOCK_T]
        y = tl.load(right, mask=(columns < T)[None, :] & (k < d - start)[:, None], other=0.0).to(DTYPE)
        sums = dot(x, y, sums, PRECISION)
        left += BLOCK_K * wide(stride_d)
        right += BLOCK_K * wide(stride_d)
    return sums


@triton.jit
def one_of(Xs, which, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """Xs[which]."""
    # as a distance from the first tensor: what is known of a distance's alignment outlives the addition
    bytes: tl.constexpr = Xs[0].dtype.element_ty.primitive_bitwidth // 8
    distance = (pick(Xs, which, COUNT) - Xs[0].to(tl.int64)) // bytes
    if ALIGNED:
        distance = tl.multiple_of(distance, 16 // bytes)
    return Xs[0] + distance


@triton.jit(do_not_specialize=["layers"])  # of a loop of 1, Triton 3.6 makes products that wait for each other
def ghost_kernel(
    As,  # tuple: [N, T, d]
    Gs,  # tuple: [N, T, p], for each input those of its layers
    partials,  # [layers, 4, N, pairs]
    kept,  # [programs, BLOCK_S + BLOCK_T, BLOCK_T] where BLOCK_S > BLOCK_T
    layers,  # of each input
    N,
    T,
    d,
    p,
    pairs,
    tiles,
    all_pairs,  # of all samples of all inputs
    a_n,
    a_t,
    a_d,
    g_n,
    g_t,
    g_p,
    INPUTS: tl.constexpr,
    LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Σ_{t,s} (a_t · a_s)(g_t · g_s) over one tile of one sample; twice where t and s are of different blocks
    if BLOCK_S == BLOCK_T:
        index = tl.program_id(0)
        which = index // (N * pairs)
        n = (index // pairs % N).to(tl.int64)
        row, column = tile_pair(index % pairs, tiles)
        A = one_of(As, which, INPUTS, ALIGNED) + n * a_n
        out = partials + wide(which * layers) * 4 * N * pairs + index % (N * pairs)
        in_registers(
            *(A, Gs, out, which * layers, layers, n, T, d, p, wide(N) * pairs, row, column),
            *(a_t, a_d, g_n, g_t, g_p, LAYERS, ALIGNED, DTYPE, PRECISION, BLOCK_T, BLOCK_K),
        )
    else:
        kept += tl.program_id(0).to(tl.int64) * ((BLOCK_S + BLOCK_T) * BLOCK_T)
        for index in range(tl.program_id(0), all_pairs, tl.num_programs(0)):
            which = index // (N * pairs)
            n = (index // pairs % N).to(tl.int64)
            pair = index % pairs
            row, column = tile_pair(pair // 2, tiles)
            first = (2 * row + pair % 2) * BLOCK_T
            A = one_of(As, which, INPUTS, ALIGNED) + n * a_n
            out = partials + wide(which * layers) * 4 * N * pairs + index % (N * pairs)
            in_memory(
                *(A, Gs, out, kept, which * layers, layers, n, T, d, p, wide(N) * pairs, first, column - row),
                *(a_t, a_d, g_n, g_t, g_p, LAYERS, ALIGNED, DTYPE, PRECISION, BLOCK_T, BLOCK_S, BLOCK_K),
            )


@triton.jit
def in_registers(
    A, Gs, out, first_layer, layers, n, T, d, p, stride, row, column, a_t, a_d, g_n, g_t, g_p,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One square tile, with that of A Aᵀ in registers while those of G Gᵀ are made."""
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_T + tl.arange(0, BLOCK_T)
    times = tl.where(row == column, 1.0, 2.0)
    # [BLOCK_T, BLOCK_T]
    aa = gram(A, rows, columns, T, d, a_t, a_d, DTYPE, PRECISION, BLOCK_K)
    for layer in range(first_layer, first_layer + layers):
        G = one_of(Gs, layer, LAYERS, ALIGNED) + n * g_n
        gg = gram(G, rows, columns, T, p, g_t, g_p, DTYPE, PRECISION, BLOCK_K)
        diagonal = rows[:, None] == columns[None, :]
        tl.store(out, times * tl.sum(aa * gg))
        tl.store(out + stride, times * tl.sum(tl.abs(aa * gg)))
        tl.store(out + 2 * stride, tl.sum(tl.where(diagonal, aa, 0.0)))
        tl.store(out + 3 * stride, tl.sum(tl.where(diagonal, gg, 0.0)))
        out += 4 * stride


@triton.jit
def in_memory(
    A, Gs, out, kept, first_layer, layers, n, T, d, p, stride, first, right, a_t, a_d, g_n, g_t, g_p,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_T × 2 BLOCK_T, as large as registers hold one of; that of A Aᵀ is in memory that the program
    writes over and over, so that it stays in the L2 cache. Columns begin at the row's own: the first of a row's tiles
    has its block on the diagonal, which is whole and counts once, and one beside it.
    """
    rows = first + tl.arange(0, BLOCK_T)
    columns = first + right * BLOCK_S + tl.arange(0, BLOCK_S)
    left = kept + tl.arange(0, BLOCK_S // 16)[:, None] * (8 * BLOCK_T) + tl.arange(0, 8 * BLOCK_T)[None, :]
    times = tl.where(right == 0, 1.0, 2.0)
    # [BLOCK_T, BLOCK_S]
    aa = gram(A, rows, columns, T, d, a_t, a_d, DTYPE, PRECISION, BLOCK_K)
    aa_left, aa_right = halves(aa, BLOCK_T)
    tl.debug_barrier()  # what was there has been read
    tl.store(left, aa_left)
    tl.store(left + BLOCK_T * BLOCK_T, aa_right)
    for layer in range(first_layer, first_layer + layers):
        G = one_of(Gs, layer, LAYERS, ALIGNED) + n * g_n
        gg = gram(G, rows, columns, T, p, g_t, g_p, DTYPE, PRECISION, BLOCK_K)
        gg_left, gg_right = halves(gg, BLOCK_T)
        tl.debug_barrier()
        if right == 0:  # for its diagonal, which is not found in registers without many more of them
            tl.store(left + BLOCK_T * BLOCK_S, gg_left)
        both = tl.load(left) * gg_left
        squared = times * tl.sum(both)
        absolute = times * tl.sum(tl.abs(both))
        tl.debug_barrier()  # also keeps the second half's loads from beginning before the first half is done with
        both = tl.load(left + BLOCK_T * BLOCK_T) * gg_right
        tl.store(out, squared + 2.0 * tl.sum(both))
        tl.store(out + stride, absolute + 2.0 * tl.sum(tl.abs(both)))
        if right == 0:
            tl.store(out + 2 * stride, tl.sum(diagonal_of(kept, BLOCK_T)))
            tl.store(out + 3 * stride, tl.sum(diagonal_of(kept + BLOCK_T * BLOCK_S, BLOCK_T)))
        else:
            tl.store(out + 2 * stride, 0.0)
            tl.store(out + 3 * stride, 0.0)
        out += 4 * stride


@triton.jit
def halves(tile, SIZE: tl.constexpr):
    """The left and the right half of [SIZE, 2 SIZE], each as [SIZE / 8, 8 SIZE] in another order: that in which threads
    hold a product on sm_90. So each stores what it has 16 bytes at a time, and loads the same again.
    """
    parts = tl.reshape(tile, (SIZE // 16, 2, 8, 2, SIZE // 8, 4, 2))
    both = tl.reshape(tl.permute(parts, (4, 0, 2, 5, 1, 6, 3)), (SIZE // 8, 8 * SIZE, 2))
    return tl.split(both)


@triton.jit
def diagonal_of(stored, SIZE: tl.constexpr):
    """[SIZE] of a half [SIZE, SIZE] that was stored in the order of ``halves``."""
    i = tl.arange(0, SIZE)
    return tl.load(stored + i // 8 * (8 * SIZE) + (i // 16 * 8 + i % 8) * 16 + i % 8 // 2 * 4 + i // 8 % 2 * 2 + i % 2)
