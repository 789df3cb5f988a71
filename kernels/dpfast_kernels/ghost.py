"""Ghost norms: ‖G_nᵀA_n‖² from A_n A_nᵀ and G_n G_nᵀ, in tiles of both, and no gradient formed.

Many layers are one launch, whose last programs leave processors idle once and not once a layer. A program has one pair
of tiles of one sample of one input: it forms the tile of A Aᵀ and keeps it for all layers that the input goes to, such
as query, key and value, or gate and up, whose tiles of G Gᵀ it forms one after the other.
"""

from collections.abc import Sequence
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
from .segments import OF_A_CASE, Segments, sample_at
from .weighted_sum import pick

MOST = 4 if INTERPRETED else 8
"""Layers of one launch, unless more have one input: a few waves of programs leave little idle in the last one."""


@dataclass(frozen=True)
class Config:
    BLOCK_T: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def configure(N: int, T: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """Tiles of 128 × 128, or smaller ones where those would leave half of the processors without work; ``N`` samples of
    all inputs together.
    """
    if INTERPRETED:
        return Config(16, 16, 4, 1)
    slow = dtype == torch.float32 or not vectorised
    block = max(16, min(64 if slow else 128, next_power_of_2(T)))
    while block > 32 and 2 * N * pairs_of(T, block) < chip.processors:
        block //= 2
    warps = {16: 2, 32: 4}.get(block, 8)
    if slow:
        return Config(block, 32, warps, 3)
    return Config(block, 64 if block > 16 else 128, warps, 4)


def configure_packed(segments: Segments, inputs: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """Tiles of the least work, as many are mostly empty where segments are short; small tiles do a product slower."""
    if INTERPRETED:
        return Config(16, 16, 4, 1)
    slow = dtype == torch.float32 or not vectorised
    speeds = {16: 0.25, 32: 0.5, 64: 1.0} if slow else {16: 0.2, 32: 0.4, 64: 0.8, 128: 1.0}
    block = min(speeds, key=lambda block: sum(segments.pairs(block)) * block**2 / speeds[block])
    return configure(inputs * sum(segments.pairs(block)), block, dtype, vectorised, chip)


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
    partials,  # [layers, 6, slots]
    bounds,  # of packed rows, whose samples are segments
    owners,  # and the segment of each slot
    firsts,  # of which each segment has those from here on
    layers,  # of each input
    slots,  # of one layer: pairs of tiles of all samples
    T,
    d,
    p,
    pairs,  # of one sample where there are no segments
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
    BLOCK_K: tl.constexpr,
):
    # Σ_{t,s} (a_t · a_s)(g_t · g_s) over one pair of tiles of one sample; twice where t and s are of different tiles
    index = tl.program_id(0)
    which = index // slots
    slot = index % slots
    if owners is None:
        n = (slot // pairs).to(tl.int64)
        pair = slot % pairs
    else:
        n = tl.load(owners + slot).to(tl.int64)
        pair = slot - tl.load(firsts + n)
    sample, first, length = sample_at(bounds, n, slot < slots, T)
    row, column = tile_pair(pair, tl.cdiv(length, BLOCK_T))
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_T + tl.arange(0, BLOCK_T)
    times = tl.where(row == column, 1.0, 2.0)

    # [BLOCK_T, BLOCK_T]
    A = one_of(As, which, INPUTS, ALIGNED) + sample * a_n + first * a_t
    aa = gram(A, rows, columns, length, d, a_t, a_d, DTYPE, PRECISION, BLOCK_K)
    for layer in range(which * layers, which * layers + layers):
        G = one_of(Gs, layer, LAYERS, ALIGNED) + sample * g_n + first * g_t
        gg = gram(G, rows, columns, length, p, g_t, g_p, DTYPE, PRECISION, BLOCK_K)
        diagonal = rows[:, None] == columns[None, :]
        stats_stride = wide(slots)
        out = partials + layer * 6 * stats_stride + slot
        tl.store(out, times * tl.sum(aa * gg))
        tl.store(out + stats_stride, times * tl.sum(tl.abs(aa * gg)))
        tl.store(out + 2 * stats_stride, tl.sum(tl.where(diagonal, aa, 0.0)))
        tl.store(out + 3 * stats_stride, tl.sum(tl.where(diagonal, gg, 0.0)))
        tl.store(out + 4 * stats_stride, times * tl.sum(gg))
        tl.store(out + 5 * stats_stride, times * tl.sum(tl.abs(gg)))


def by_input(As: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor]) -> list[list[list[int]]]:
    """Launches: the numbers of the layers of each of their inputs, as many of each. Layers of a launch differ in where
    their tensors are alone.
    """
    inputs: dict[tuple, list[int]] = {}
    for k, (A, G) in enumerate(zip(As, Gs, strict=True)):
        place = id(A) if A.is_meta else A.data_ptr()
        aligned = not any(X.data_ptr() % 16 for X in (A, G))
        kind = A.dtype, A.shape, A.stride(), G.dtype, G.shape, G.stride(), aligned
        inputs.setdefault((place, kind), []).append(k)
    kinds: dict[tuple, list[list[int]]] = {}
    for (_, kind), layers in inputs.items():
        kinds.setdefault((kind, len(layers)), []).append(layers)
    launches = []
    for (_, layers), alike in kinds.items():
        at_once = max(1, MOST // layers)
        launches += [alike[start : start + at_once] for start in range(0, len(alike), at_once)]
    return launches


def run(
    As: Sequence[torch.Tensor],
    Gs: Sequence[torch.Tensor],
    config: Config | None = None,
    segments: Segments | None = None,
) -> torch.Tensor:
    """``ghost_norms``, with another configuration where one is given, or of the segments of rows As [1, R, d]."""
    sums, order = [], []
    for inputs in by_input(As, Gs):
        layers = [k for some in inputs for k in some]
        A, G = As[layers[0]], Gs[layers[0]]
        N, T, _ = A.shape
        dtype = dot_dtype(A, G)
        if segments is None:
            chosen = config or configure(N * len(inputs), T, dtype, vectorised(A, G), chip(A.device))
            pairs = pairs_of(T, chosen.BLOCK_T)
            tables, slots = (None, None, None), N * pairs
        else:
            chosen = config or configure_packed(segments, len(inputs), dtype, vectorised(A, G), chip(A.device))
            tables = segments.places(A.device), *segments.owners(chosen.BLOCK_T, A.device)
            pairs, slots = 1, len(tables[1])
        partials = torch.empty((len(layers), 6, slots), dtype=torch.float32, device=A.device)
        sides = filled([As[some[0]] for some in inputs]), filled([Gs[k] for k in layers])
        sizes = slots, T, A.shape[2], G.shape[2], pairs
        launch(
            ghost_kernel,
            (len(inputs) * slots,),
            *(*sides, partials, *tables, len(inputs[0]), *sizes, *A.stride(), *G.stride()),
            device=A.device,
            INPUTS=len(sides[0]),
            LAYERS=len(sides[1]),
            ALIGNED=not any(X.data_ptr() % 16 for X in (A, G)),
            DTYPE=TRITON_DTYPE[dtype],
            PRECISION=dot_precision(dtype),
            **asdict(chosen),
        )
        sums += added_up(partials, N, tables[2]).unbind()
        order += layers
    return torch.stack([sums[order.index(k)] for k in range(len(order))])


def added_up(partials: torch.Tensor, N: int, firsts: torch.Tensor | None) -> torch.Tensor:
    """``[layers, 6, N]`` of ``[layers, 6, slots]``, always in the same order; in float64 where segments differ."""
    if firsts is None:
        return partials.unflatten(2, (N, -1)).sum(3) if partials.shape[2] else partials.new_zeros(len(partials), 6, N)
    if partials.is_meta:
        return partials.new_empty(len(partials), 6, len(firsts) - 1)
    by_slot = partials.flatten(0, 1).T.double()
    sums = torch.segment_reduce(by_slot, "sum", offsets=firsts.long(), axis=0, unsafe=True, initial=0)
    return sums.T.unflatten(0, (-1, 6))


def filled(Xs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One of few numbers of tensors; those that fill up are never picked."""
    return (*Xs, *[Xs[-1]] * (next_power_of_2(len(Xs)) - len(Xs)))


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
    return run([A], [G])[0]


@ghost_norm.register_fake
def _(A, G):
    return A.new_empty((6, A.shape[0]), dtype=torch.float32)


@torch.library.custom_op("dpfast_kernels::ghost_norms", mutates_args=())
def ghost_norms(As: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor]) -> torch.Tensor:
    """``ghost_norm`` of layers with A [N, T, d] and G [N, T, p] of one N and T each: float32 [len(As), 6, N].

    One launch for up to 8 layers that are alike in all but where they are in memory. Where that is the same for several
    A, ``A Aᵀ`` is formed once.
    """
    return run(As, Gs)


@ghost_norms.register_fake
def _(As, Gs):
    return As[0].new_empty((len(As), 6, As[0].shape[0]), dtype=torch.float32)


def packed_ghost_norms(As: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor], segments: Segments) -> torch.Tensor:
    """``ghost_norms`` of the segments of rows A [1, R, d] and G [1, R, p], which are not copied: float64.

    A program has a pair of tiles of one segment: there is none for pairs of positions of different segments.
    """
    return run(As, Gs, segments=segments)


def _case(dtype: torch.dtype, N: int, T: int, d: int, p: int, wgmma: bool, layers: int = 1) -> Compile:
    def call():
        inputs = [meta(N, T, d, dtype=dtype) for _ in range(2 if layers > 1 else 1)]
        run(inputs * layers, [meta(N, T, p, dtype=dtype) for _ in inputs * layers])

    return Compile(f"ghost_norm {dtype} {N}x{T}x{d}x{p} {layers}", call, wgmma)


def _packed(dtype: torch.dtype, d: int, p: int, wgmma: bool) -> Compile:
    def call():
        A, G = meta(1, 32_768, d, dtype=dtype), meta(1, 32_768, p, dtype=dtype)
        run([A], [G], segments=OF_A_CASE)

    return Compile(f"packed ghost_norm {dtype} {d}x{p}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 8, 1024, 1024, 1024, True, layers=3),
    _case(torch.bfloat16, 32, 1024, 1024, 4096, True),
    _case(torch.bfloat16, 2, 512, 1024, 4096, True),
    _case(torch.bfloat16, 512, 16, 1024, 4096, False),
    _case(torch.float32, 32, 1024, 1024, 4096, False),
    _case(torch.bfloat16, 32, 1023, 1023, 4095, True),
    _case(torch.bfloat16, 1, 1, 1, 1, False),
    _packed(torch.bfloat16, 1024, 4096, True),
    _packed(torch.float32, 1024, 4096, False),
    _packed(torch.bfloat16, 1023, 4095, True),
]
