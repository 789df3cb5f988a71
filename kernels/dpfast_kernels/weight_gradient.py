"""Clipped weight gradients: Σ_i factor_i · G_iᵀA_i, one product over all samples and positions, in float32.

From BY_SAMPLE positions on, a tile has one accumulator for all samples, so that it can be as large as registers hold.
It is in units of f_b while sample b is added, and is multiplied by f_b / f_{b+1} where that sample ends:

    (((S_1 · f_1/f_2 + S_2) · f_2/f_3 + S_3) · ... + S_n) · f_n = Σ_b f_b · S_b        with S_b = G_bᵀA_b

What becomes of a factor. A ratio is rounded, and the unit after it is what makes the rounded ratio exact: not f_{b+1},
but at most one unit of rounding (u = 2⁻²⁴) beside it, from which the next ratio is taken. So the errors of ratios do
not add up, and f_b is off by two units at most, the last product's included. Besides, each product with a ratio rounds
each element: by another unit, of n - b. These add up where elements are alike (up to 456 units have been seen of 512
samples), so that all are counted: sample b adds (1 + e) f_b · S_b elementwise, |e| ≤ (n + 2) u, apart from what is
rounded in the last place of the sum. More samples than RUN have several accumulators, which are added up at the end,
so that (RUN + 2) u bounds e whatever the batch, and norms are raised by that: a bound that followed n would have a
sample's factor depend on how many others there are.

A ratio is not larger than LARGEST, which leaves less of all samples before, never more, and one below 1 / LARGEST is 0.
What clipping gives is far from that: factors are 0, or 2⁻⁶⁴ and more, and a bound on underflow keeps them below 2⁵⁰ C,
so that the sum is at most n · C · 2⁶⁴ in any unit, which float32 holds. What is below 2⁻¹²⁶ in a unit is below 2⁻⁷⁶ C
in the sum. A sample of factor 0 has no unit, and nothing of it is read.
"""

from dataclasses import asdict, dataclass, replace

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
    tile_at,
    vectorised,
)
from .segments import OF_A_CASE, Segments, sample_at

BY_SAMPLE = 32  # positions from which the accumulator is scaled, and below which rows of G are
RUN = 512  # samples, at most, that have one accumulator
LARGEST = tl.constexpr(2.0**120)  # ratio
SCALING_UNITS = RUN + 2.0  # of 2⁻²⁴: what a contribution to the sum may be off for ratios of factors


def accumulators(B: int, T: int) -> int:
    """How many a tile must have, at least."""
    return cdiv(B, RUN) if T >= BY_SAMPLE else 1


@dataclass(frozen=True)
class Config:
    BLOCK_T: int
    BLOCK_P: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    splits: int
    GROUP: int = 8


def configure(B: int, groups: int, T: int, d: int, p: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """Tiles of 128 × 256 where they are read 16 bytes at a time and are not mostly empty: registers hold no more. Of
    float32 they are of 128 × 128, for which a thread reads 16 numbers of shared memory for 64 products.
    """
    if INTERPRETED:
        return Config(16, 16, 32, 4, 1, splits=max(min(2, B), accumulators(B, T), 1))
    block_p, block_d = (64 if p <= 64 else 128), (64 if d <= 64 else 128)
    block_t, warps, stages = (64 if chip.large else 32), 8, 4
    if dtype == torch.float32 and vectorised and T >= BY_SAMPLE and min(d, p) > 64:
        block_t, stages = 16, 3
    elif dtype == torch.float32 or (dtype == torch.float16 and T < BY_SAMPLE):
        block_t, block_p, block_d, stages = 16, 64, 64, 3
    elif not vectorised:
        block_t, block_p, block_d, stages = 32, 64, 64, 3
    elif T < BY_SAMPLE:
        stages = 3
    elif chip.large and p > 64 and d > 128:
        block_d, stages = 256, 3
    elif chip.large:
        warps = 4  # of eight, each with half of the accumulator, Triton 3.6 makes products that wait for each other
    if T >= BY_SAMPLE:
        block_t = min(block_t, next_power_of_2(T))
    tiles = groups * cdiv(p, block_p) * max(cdiv(d, block_d), 1)
    splits = splits_of(tiles, 2 * block_p * block_d * B * T, groups * p * d, B, chip.processors)
    return Config(block_t, block_p, block_d, warps, stages, max(splits, accumulators(B, T)))


def splits_of(tiles: int, tile_flops: int, elements: int, B: int, processors: int) -> int:
    """Into how many parts to cut the samples: those of the least time, where processors would be idle in the last of
    the rounds that all tiles take, and each part is written and read once more.
    """
    flops, bandwidth = 4e12, 2e12  # a second: of one processor, and bytes of the memory

    def seconds(splits: int) -> float:
        traffic = 0 if splits == 1 else 8 * splits * elements
        return cdiv(tiles * splits, processors) * tile_flops / splits / flops + traffic / bandwidth

    return min(range(1, max(min(B, 32), 1) + 1), key=seconds)


@triton.jit
def weight_gradient_kernel(
    A,
    G,
    factors,
    weights,  # [splits, groups * p, d]
    biases,  # [splits * tiles_d, groups * p] where BIAS
    bounds,  # of packed rows, whose samples are segments
    blocks,  # and how many blocks of positions those before each one have
    B,
    groups,
    T,
    d,
    p,
    tiles_p,
    tiles_d,
    samples,  # of one split
    a_b,
    a_g,
    a_t,
    a_d,
    g_b,
    g_g,
    g_t,
    g_p,
    factors_b,
    w_s,
    w_p,
    w_d,
    BIAS: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    # weight[i, j] = Σ_b factor_b Σ_t G[b, t, i] A[b, t, j] in one tile (i, j) of one group, over one split of b
    index = tl.program_id(0)
    tiles = tiles_p * tiles_d
    row, column = tile_at(index % tiles, tiles_p, tiles_d, GROUP)
    group = (index // tiles % groups).to(tl.int64)
    split = (index // tiles // groups).to(tl.int64)
    i = row * BLOCK_P + tl.arange(0, BLOCK_P)
    j = column * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.minimum(split * samples, B).to(tl.int32)
    last = tl.minimum(split * samples + samples, B).to(tl.int32)
    G_i = G + group * g_g + i.to(tl.int64)[:, None] * g_p
    A_j = A + group * a_g + j.to(tl.int64)[None, :] * a_d

    if BY_SAMPLE:
        total = sum_by_sample(
            A_j, G_i, factors, bounds, blocks, first, last, i < p, j < d, T, a_b, a_t, g_b, g_t, factors_b,
            DTYPE, PRECISION, BLOCK_T, BLOCK_P, BLOCK_D,
        )  # fmt: skip
    else:
        total = sum_by_row(
            A_j, G_i, factors, first, last, i < p, j < d, T, a_b, a_t, g_b, g_t, factors_b,
            DTYPE, PRECISION, BLOCK_T, BLOCK_P, BLOCK_D,
        )  # fmt: skip
    w_at = weights + split * w_s + (group * p + i)[:, None] * w_p + j.to(tl.int64)[None, :] * w_d
    inside = (i < p)[:, None] & (j < d)[None, :]
    tl.store(w_at, total, mask=inside)

    if BIAS:
        part = bias_part(G_i, factors, first, last, column, tiles_d, i < p, T, g_b, g_t, factors_b, BLOCK_T, BLOCK_P)
        tl.store(biases + ((split * tiles_d + column) * groups + group) * p + i, part, mask=i < p)


@triton.jit
def sum_by_sample(
    A_j, G_i, factors, bounds, blocks, first, last, in_p, in_d, T, a_b, a_t, g_b, g_t, factors_b,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One loop over the positions of all samples, so that loads run ahead into the next sample."""
    t = tl.arange(0, BLOCK_T)
    sums = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    b = first.to(tl.int64)
    start = 0
    factor = tl.load(factors + b * factors_b, mask=first < last, other=0.0)
    unit = tl.where(factor != 0.0, factor, 1.0).to(tl.float64)
    if bounds is None:
        count = (last - first) * tl.cdiv(T, BLOCK_T)
    else:
        count = tl.load(blocks + last) - tl.load(blocks + first)
    row, begin, length = sample_at(bounds, b, first < last, T)
    for _ in range(count):
        at = (start + t).to(tl.int64)
        there = at < tl.where(factor != 0.0, length, 0)
        at += begin
        # [BLOCK_P, BLOCK_T]
        g = tl.load(G_i + row * g_b + at[None, :] * g_t, mask=in_p[:, None] & there[None, :], other=0.0).to(DTYPE)
        # [BLOCK_T, BLOCK_D]
        a = tl.load(A_j + row * a_b + at[:, None] * a_t, mask=there[:, None] & in_d[None, :], other=0.0).to(DTYPE)
        sums = dot(g, a, sums, PRECISION)
        complete = start + BLOCK_T >= length
        if complete:
            ratio, unit = ratio_to(tl.load(factors + (b + 1) * factors_b, mask=b + 1 < last, other=0.0), unit)
            sums *= ratio
        start = tl.where(complete, 0, start + BLOCK_T)
        b += complete.to(tl.int64)
        factor = tl.load(factors + b * factors_b, mask=b < last, other=0.0)  # ahead: loads that wait for one are late
        if bounds is None:
            row = b
        else:
            row, begin, length = sample_at(bounds, b, b < last, T)
    return sums * unit.to(tl.float32)


@triton.jit
def ratio_to(factor, unit):
    """What multiples of ``unit`` are multiplied by to be those of the next unit, and that one, as it follows from the
    ratio: ``factor``, but for its rounding.
    """
    next = tl.where(factor != 0.0, factor.to(tl.float64), unit)
    exact = unit / next
    inside = (exact <= LARGEST) & (exact >= 1 / LARGEST)
    ratio = tl.where(inside, exact, tl.where(exact > 1.0, LARGEST, 0.0)).to(tl.float32)
    return ratio, tl.where(inside, unit / tl.where(inside, ratio.to(tl.float64), 1.0), next)


@triton.jit
def sum_by_row(
    A_j, G_i, factors, first, last, in_p, in_d, T, a_b, a_t, g_b, g_t, factors_b,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Positions of several samples in one block: rows of G are scaled in float32 as they are loaded. bfloat16 is
    multiplied as a sum of two bfloat16, which leaves 2^-16 of an element to rounding. float16 has no such pair, as the
    small part of a small number is below its least: it is multiplied as float32.
    """
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(first * T, last * T, BLOCK_T):
        r = start + tl.arange(0, BLOCK_T)
        b = (r // T).to(tl.int64)
        t = (r % T).to(tl.int64)
        factor = tl.load(factors + b * factors_b, mask=r < last * T, other=0.0)
        # [BLOCK_P, BLOCK_T]; a row whose factor is 0 is not read
        g_mask = in_p[:, None] & (factor != 0)[None, :]
        g = tl.load(G_i + (b * g_b + t * g_t)[None, :], mask=g_mask, other=0.0).to(tl.float32) * factor[None, :]
        # [BLOCK_T, BLOCK_D]
        a_mask = (factor != 0)[:, None] & in_d[None, :]
        a = tl.load(A_j + (b * a_b + t * a_t)[:, None], mask=a_mask, other=0.0)
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            high = g.to(tl.bfloat16)
            low = (g - high.to(tl.float32)).to(tl.bfloat16)
            total = dot(high, a, total, PRECISION)
            total = dot(low, a, total, PRECISION)
        else:
            total = dot(g, a.to(tl.float32), total, PRECISION)
    return total


@triton.jit
def bias_part(
    G_i, factors, first, last, column, columns, in_p, T, g_b, g_t, factors_b,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Σ_b factor_b Σ_t G[b, t, i] over every ``columns``-th block of positions: a program of each column takes some."""
    sums = tl.zeros((BLOCK_P, BLOCK_T), dtype=tl.float32)
    for start in range(first * T + column * BLOCK_T, last * T, columns * BLOCK_T):
        r = start + tl.arange(0, BLOCK_T)
        b = (r // T).to(tl.int64)
        t = (r % T).to(tl.int64)
        factor = tl.load(factors + b * factors_b, mask=r < last * T, other=0.0)
        # [BLOCK_P, BLOCK_T]
        g_mask = in_p[:, None] & (factor != 0)[None, :]
        sums += tl.load(G_i + (b * g_b + t * g_t)[None, :], mask=g_mask, other=0.0).to(tl.float32) * factor[None, :]
    return tl.sum(sums, 1)


def run(
    A: torch.Tensor,
    G: torch.Tensor,
    factors: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: Config | None = None,
    by_sample: bool = False,
    segments: Segments | None = None,
) -> None:
    """Writes ``weight`` [groups * p, d] and ``bias`` [groups * p]; ``by_sample``: of few positions too.

    Of the ``segments`` of rows A [1, R, d] and G [1, R, p] it is always by sample, and there is no ``bias``.
    """
    if A.dim() == 3:
        A, G = A.unsqueeze(1), G.unsqueeze(1)
    B, groups, T, d = A.shape
    p = G.shape[3]
    if segments is not None:
        assert bias is None and groups == 1
        B, T, by_sample = len(segments), segments.mean, True
    assert B * T < 2**30, "rows are counted in 32 bits"
    dtype = dot_dtype(A, G)
    positions = max(T, BY_SAMPLE) if by_sample else T
    config = config or configure(B, groups, positions, d, p, dtype, vectorised(A, G), chip(A.device))
    bounds = blocks = None
    if segments is not None:
        # blocks of a quarter of a segment leave a tenth of their positions empty
        config = replace(config, BLOCK_T=max(16, min(config.BLOCK_T, next_power_of_2(T // 4 + 1))))
        bounds, blocks = segments.places(A.device), segments.blocks(config.BLOCK_T, A.device)
    options = asdict(config)
    splits = options.pop("splits")
    tiles_p, tiles_d = cdiv(p, config.BLOCK_P), max(cdiv(d, config.BLOCK_D), 1)  # one has the bias where d = 0
    weights = weight[None] if splits == 1 else weight.new_empty((splits, *weight.shape))
    biases = None if bias is None else bias.new_empty((splits * tiles_d, *bias.shape))
    launch(
        weight_gradient_kernel,
        (splits * groups * tiles_p * tiles_d,),
        *(A, G, factors, weights, biases, bounds, blocks, B, groups, T, d, p, tiles_p, tiles_d, cdiv(B, splits)),
        *(*A.stride(), *G.stride(), factors.stride(0), *weights.stride()),
        device=A.device,
        BIAS=bias is not None,
        BY_SAMPLE=positions >= BY_SAMPLE,
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=dot_precision(dtype),
        **options,
    )
    parts = [(bias, biases)] if splits == 1 else [(weight, weights), (bias, biases)]
    for whole, part in parts:
        if whole is not None:
            torch.sum(part, 0, out=whole)


@torch.library.custom_op("dpfast_kernels::clipped_weight_gradient", mutates_args=())
def clipped_weight_gradient(
    A: torch.Tensor, G: torch.Tensor, factors: torch.Tensor, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_i factor_i · G_iᵀA_i [p, d] and, where there is a ``bias``, Σ_i factor_i · Σ_t G_it [p] (else [0]), in float32.

    A [B, T, d], G [B, T, p], factors [B] in float32. In groups: A [B, groups, T, d], G [B, groups, T, p], and the
    results of the groups one after another, [groups * p, d] and [groups * p]. A sample whose factor is 0 is left out,
    whatever it holds; factors are not negative.
    """
    weight, bias_sum = _empty(A, G, bias)
    run(A, G, factors, weight, bias_sum if bias else None)
    return weight, bias_sum


def packed_clipped_weight_gradient(
    A: torch.Tensor, G: torch.Tensor, factors: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Σ_i factor_i · G_iᵀA_i [p, d] over the segments of rows A [1, R, d] and G [1, R, p], which are not copied."""
    weight = _empty(A, G, False)[0]
    run(A, G, factors, weight, None, segments=segments)
    return weight


@clipped_weight_gradient.register_fake
def _(A, G, factors, bias):
    return _empty(A, G, bias)


def _empty(A: torch.Tensor, G: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = G.shape[-1] * (G.shape[1] if G.dim() == 4 else 1)
    options = {"dtype": torch.float32, "device": A.device}
    return torch.empty((outputs, A.shape[-1]), **options), torch.empty(outputs if bias else 0, **options)


def _case(dtype: torch.dtype, B: int, T: int, d: int, p: int, wgmma: bool) -> Compile:
    def call():
        A, G = meta(B, T, d, dtype=dtype), meta(B, T, p, dtype=dtype)
        run(A, G, meta(B), *_empty(A, G, True))

    return Compile(f"clipped_weight_gradient {dtype} {B}x{T}x{d}x{p}", call, wgmma)


def _packed(dtype: torch.dtype, d: int, p: int, wgmma: bool) -> Compile:
    def call():
        A, G = meta(1, 32_768, d, dtype=dtype), meta(1, 32_768, p, dtype=dtype)
        packed_clipped_weight_gradient(A, G, meta(len(OF_A_CASE)), OF_A_CASE)

    return Compile(f"packed clipped_weight_gradient {dtype} {d}x{p}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 32, 1024, 1024, 4096, True),
    _case(torch.bfloat16, 32, 1024, 1024, 16, True),
    _case(torch.bfloat16, 32, 1024, 128, 768, True),
    _case(torch.float16, 32, 512, 64, 128, True),
    _case(torch.bfloat16, 512, 1, 1024, 4096, True),
    _case(torch.float16, 512, 1, 1024, 4096, False),
    _case(torch.float32, 32, 1024, 1024, 4096, False),
    _case(torch.bfloat16, 32, 1023, 1023, 4095, True),
    _case(torch.bfloat16, 512, 3, 1023, 4095, True),
    _case(torch.bfloat16, 1, 1, 1, 1, False),
    _packed(torch.bfloat16, 1024, 4096, True),
    _packed(torch.bfloat16, 1024, 16, True),
    _packed(torch.float32, 1024, 4096, False),
    _packed(torch.bfloat16, 1023, 4095, True),
]
