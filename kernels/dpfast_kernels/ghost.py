"""Ghost norms: ‖G_nᵀA_n‖² from A_n A_nᵀ and G_n G_nᵀ, in tiles of both, and no gradient formed."""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    TRITON_DTYPE,
    Chip,
    Compile,
    cdiv,
    chip,
    dot,
    dot_dtype,
    dot_precision,
    launch,
    meta,
    next_power_of_2,
    vectorised,
    wide,
)


@dataclass(frozen=True)
class Config:
    BLOCK_T: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def configure(N: int, T: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """Tiles of 128 × 128, or smaller ones where those would leave half of the processors without work."""
    if INTERPRETED:
        return Config(16, 16, 4, 1)
    slow = dtype == torch.float32 or not vectorised
    block = max(16, min(64 if slow else 128, next_power_of_2(T)))
    while block > 32 and 2 * N * pairs_of(T, block) < chip.processors:
        block //= 2
    warps = 8 if block >= 64 else 4
    if slow:
        return Config(block, 32, warps, 3)
    return Config(block, 64 if block > 16 else 128, warps, 4)


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
def ghost_kernel(
    A,
    G,
    partials,  # [6, N, pairs]
    N,
    T,
    d,
    p,
    pairs,
    tiles,
    a_n,
    a_t,
    a_d,
    g_n,
    g_t,
    g_p,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Σ_{t,s} (a_t · a_s)(g_t · g_s) over one pair of tiles of one sample; twice where t and s are of different tiles
    index = tl.program_id(0)
    n = (index // pairs).to(tl.int64)
    pair = index % pairs
    row, column = tile_pair(pair, tiles)
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_T + tl.arange(0, BLOCK_T)

    # [BLOCK_T, BLOCK_T]
    aa = gram(A + n * a_n, rows, columns, T, d, a_t, a_d, DTYPE, PRECISION, BLOCK_K)
    gg = gram(G + n * g_n, rows, columns, T, p, g_t, g_p, DTYPE, PRECISION, BLOCK_K)
    times = tl.where(row == column, 1.0, 2.0)
    diagonal = rows[:, None] == columns[None, :]

    out = partials + n * pairs + pair
    stats_stride = wide(N) * pairs
    tl.store(out, times * tl.sum(aa * gg))
    tl.store(out + stats_stride, times * tl.sum(tl.abs(aa * gg)))
    tl.store(out + 2 * stats_stride, tl.sum(tl.where(diagonal, aa, 0.0)))
    tl.store(out + 3 * stats_stride, tl.sum(tl.where(diagonal, gg, 0.0)))
    tl.store(out + 4 * stats_stride, times * tl.sum(gg))
    tl.store(out + 5 * stats_stride, times * tl.sum(tl.abs(gg)))


def run(A: torch.Tensor, G: torch.Tensor, config: Config | None = None) -> torch.Tensor:
    """``ghost_norm``, with another configuration where one is given."""
    N, T, d = A.shape
    p = G.shape[2]
    dtype = dot_dtype(A, G)
    config = config or configure(N, T, dtype, vectorised(A, G), chip(A.device))
    pairs = pairs_of(T, config.BLOCK_T)
    partials = torch.empty((6, N, pairs), dtype=torch.float32, device=A.device)
    launch(
        ghost_kernel,
        (N * pairs,),
        *(A, G, partials, N, T, d, p, pairs, cdiv(T, config.BLOCK_T), *A.stride(), *G.stride()),
        device=A.device,
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=dot_precision(dtype),
        **asdict(config),
    )
    return partials.sum(2)  # always in the same order


@torch.library.custom_op("dpfast_kernels::ghost_norm", mutates_args=())
def ghost_norm(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """For each sample of A [N, T, d] and G [N, T, p], rows of a float32 [6, N]:

    ==============  =============================  ==============================================
    squared         Σ_{t,s} (a_t·a_s)(g_t·g_s)     ‖G_nᵀA_n‖², may come out negative
    absolute        Σ_{t,s} |a_t·a_s| |g_t·g_s|    how much of it may have cancelled
    energy_A        Σ_t ‖a_t‖²
    energy_G        Σ_t ‖g_t‖²
    bias_squared    Σ_{t,s} g_t·g_s                ‖Σ_t g_t‖², the bias' part
    bias_absolute   Σ_{t,s} |g_t·g_s|
    ==============  =============================  ==============================================
    """
    return run(A, G)


@ghost_norm.register_fake
def _(A, G):
    return A.new_empty((6, A.shape[0]), dtype=torch.float32)


def _case(dtype: torch.dtype, N: int, T: int, d: int, p: int, wgmma: bool) -> Compile:
    def call():
        run(meta(N, T, d, dtype=dtype), meta(N, T, p, dtype=dtype))

    return Compile(f"ghost_norm {dtype} {N}x{T}x{d}x{p}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 32, 1024, 1024, 4096, True),
    _case(torch.bfloat16, 2, 512, 1024, 4096, True),
    _case(torch.bfloat16, 512, 16, 1024, 4096, False),
    _case(torch.float32, 32, 1024, 1024, 4096, False),
    _case(torch.bfloat16, 32, 1023, 1023, 4095, True),
    _case(torch.bfloat16, 1, 1, 1, 1, False),
]
