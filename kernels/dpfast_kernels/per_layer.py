"""Per-layer clipping of a linear layer: norms, factors, clipped sum and noise, in two launches.

The first makes the norms (``ghost_norm`` or ``gradient_norm``), the second all the rest: it computes each factor when
it needs it, adds up the samples' tiles and writes (sum + noise) · scale, once. A single launch would have to wait for
its whole grid in between, as a sample's factor depends on all tiles. That takes a cooperative launch, whose programs
must all fit on the device at once, about one a processor with tiles of this size; and each would still read A and G
twice. Where a layer has too few tiles for the device, samples are split over programs, and a third launch (one more for
a bias) adds the parts and the noise.
"""

import math
from dataclasses import asdict, replace

import torch
import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    TRITON_DTYPE,
    Compile,
    cdiv,
    chip,
    dot,
    dot_dtype,
    dot_precision,
    launch,
    meta,
    tile_at,
    vectorised,
)
from .ghost import ghost_norm
from .noise import noisy
from .sample_gradients import gradient_norm
from .weight_gradient import Config, configure


@triton.jit
def factor_of(norms, b, norms_r, norms_b, C, units, sum_units, T, BIAS: tl.constexpr):
    """min(1, C / n) of one sample, with n not below the norm of what is added to the sum:

        n = √(squared + 2⁻²⁴ (units · absolute + 8 · squared)) + 2⁻²⁴ sum_units · √(Σ_t ‖a_t‖² · Σ_t ‖g_t‖²)

    The first bound is on the rounding of the norm (8 units: of n, the factor and the last sums), the second on that of
    the sample's gradient, which is made again for the sum. A bias is one more input, which is 1. Factor 0 where n is
    not finite. What underflows is not bounded: C must be far above 1e-15.
    """
    norms += b * norms_b
    squared = tl.load(norms)
    absolute = tl.load(norms + norms_r)
    energy_A = tl.load(norms + 2 * norms_r)
    energy_G = tl.load(norms + 3 * norms_r)
    if BIAS:
        squared += tl.load(norms + 4 * norms_r)
        absolute += tl.load(norms + 5 * norms_r)
        energy_A += tl.cast(T, tl.float32)
    squared = tl.where(squared < 0.0, 0.0, squared)  # NaN stays
    squared += (units * absolute + 8.0 * squared) * 5.9604644775390625e-08
    n = tl.sqrt_rn(squared) + sum_units * 5.9604644775390625e-08 * (tl.sqrt_rn(energy_A) * tl.sqrt_rn(energy_G))
    factor = tl.where(n > C, tl.div_rn(C, n), 1.0)
    return tl.where(n < float("inf"), factor, 0.0)


@triton.jit(do_not_specialize=["weight_parameter", "bias_parameter"])
def per_layer_kernel(
    A,  # [B, T, d]
    G,  # [B, T, p]
    norms,  # [6, B], see ghost_norm
    factors,  # [B], written
    weights,  # [splits, p, d]
    biases,  # [splits, p] where BIAS
    stream,
    weight_parameter,
    bias_parameter,
    C,
    units,
    sum_units,
    std,
    scale,
    B,
    T,
    d,
    p,
    tiles_p,
    tiles_d,
    samples,  # of one split
    a_b,
    a_t,
    a_d,
    g_b,
    g_t,
    g_p,
    norms_r,
    norms_b,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # one split: with noise
    QUADS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    # weight = (Σ_b factor_b · G_bᵀA_b + std · z) · scale, one tile; bias the same of Σ_t G_bt, in programs of column 0
    index = tl.program_id(0)
    tiles = tiles_p * tiles_d
    row, column = tile_at(index % tiles, tiles_p, tiles_d, GROUP)
    split = (index // tiles).to(tl.int64)
    i = row * BLOCK_P + tl.arange(0, BLOCK_P)
    j = column * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.minimum(split * samples, B)
    last = tl.minimum(split * samples + samples, B)
    G_i = G + i.to(tl.int64)[:, None] * g_p
    A_j = A + j.to(tl.int64)[None, :] * a_d
    t = tl.arange(0, BLOCK_T)

    # [BLOCK_P, BLOCK_D]: a sample's tile is complete before its factor multiplies it; one loop over all samples
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    sample = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    b = first
    start = 0
    for _ in range(((last - first) * tl.cdiv(T, BLOCK_T)).to(tl.int32)):
        at = (start + t).to(tl.int64)
        # [BLOCK_P, BLOCK_T]
        g = tl.load(G_i + b * g_b + at[None, :] * g_t, mask=(i < p)[:, None] & (at < T)[None, :], other=0.0).to(DTYPE)
        # [BLOCK_T, BLOCK_D]
        a = tl.load(A_j + b * a_b + at[:, None] * a_t, mask=(at < T)[:, None] & (j < d)[None, :], other=0.0).to(DTYPE)
        sample = dot(g, a, sample, PRECISION)
        complete = start + BLOCK_T >= T
        if complete:
            factor = factor_of(norms, b, norms_r, norms_b, C, units, sum_units, T, BIAS)
            total = tl.where(factor != 0.0, total + factor * sample, total)
            sample = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
        start = tl.where(complete, 0, start + BLOCK_T)
        b += complete.to(tl.int64)

    if WHOLE:
        start_of_row = i.to(tl.int64) * d + column * BLOCK_D
        total = noisy(total, start_of_row, stream, weight_parameter, std, scale, QUADS)
    weight_at = weights + (split * p + i)[:, None] * d + j[None, :]
    tl.store(weight_at, total, mask=(i < p)[:, None] & (j < d)[None, :])

    if column == 0:
        bias = tl.zeros((BLOCK_P,), dtype=tl.float32)
        for b in range(first, last):
            factor = factor_of(norms, b, norms_r, norms_b, C, units, sum_units, T, BIAS)
            if row == 0:
                tl.store(factors + b, factor)
            if BIAS:
                # [BLOCK_P, BLOCK_T]
                sums = tl.zeros((BLOCK_P, BLOCK_T), dtype=tl.float32)
                for start in range(0, T, BLOCK_T):
                    at = (start + t).to(tl.int64)
                    there = (i < p)[:, None] & (at < T)[None, :]
                    sums += tl.load(G_i + b * g_b + at[None, :] * g_t, mask=there, other=0.0).to(tl.float32)
                bias = tl.where(factor != 0.0, bias + factor * tl.sum(sums, 1), bias)
        if BIAS:
            if WHOLE:
                start_of_tile = tl.full((1,), 0, tl.int64) + row * BLOCK_P
                bias = noisy(bias[None, :], start_of_tile, stream, bias_parameter, std, scale, True)
                bias = tl.reshape(bias, (BLOCK_P,))
            tl.store(biases + split * p + i, bias, mask=i < p)


@triton.jit(do_not_specialize=["parameter"])
def finish_kernel(
    parts,  # [splits, p, d]
    out,  # [p, d]
    stream,
    parameter,
    std,
    scale,
    splits,
    split,  # elements of one, p · d
    blocks,
    d,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out = (Σ_splits + std · z) · scale, one block of a row
    index = tl.program_id(0)
    row = (index // blocks).to(tl.int64)
    column = index % blocks * BLOCK
    j = column + tl.arange(0, BLOCK)
    parts += row * d + j
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        sums += tl.load(parts, mask=j < d, other=0.0)
        parts += split
    start = tl.full((1,), 0, tl.int64) + row * d + column
    sums = tl.reshape(noisy(sums[None, :], start, stream, parameter, std, scale, QUADS), (BLOCK,))
    tl.store(out + row * d + j, sums, mask=j < d)


def tiles_of(B: int, T: int, d: int, p: int, A: torch.Tensor, G: torch.Tensor) -> Config:
    """Those of the clipped sum: the noise is made when the sample's tile is no longer needed."""
    tiles = configure(B, 1, max(T, 32), d, p, dot_dtype(A, G), vectorised(A, G), chip(A.device))
    return replace(tiles, BLOCK_D=min(tiles.BLOCK_D, 128), num_warps=tiles.num_warps if INTERPRETED else 8)


def per_layer_with(
    A: torch.Tensor,
    G: torch.Tensor,
    norms: torch.Tensor,
    max_grad_norm: float,
    units: tuple[float, float],
    stream: torch.Tensor,
    parameters: tuple[int, int],
    std: float,
    scale: float,
    bias: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, d = A.shape
    p = G.shape[2]
    options = asdict(config or tiles_of(B, T, d, p, A, G))
    splits = options.pop("splits")
    tiles_p, tiles_d = cdiv(p, options["BLOCK_P"]), max(cdiv(d, options["BLOCK_D"]), 1)  # one has the bias where d = 0
    new = {"dtype": torch.float32, "device": A.device}
    factors = torch.empty(B, **new)
    weights = torch.empty((splits, p, d), **new)
    biases = torch.empty((splits, p if bias else 0), **new)
    launch(
        per_layer_kernel,
        (splits * tiles_p * tiles_d,),
        *(A, G, norms, factors, weights, biases, stream, *parameters, max_grad_norm, *units, std, scale),
        *(B, T, d, p, tiles_p, tiles_d, cdiv(B, splits), *A.stride(), *G.stride(), *norms.stride()),
        device=A.device,
        BIAS=bias,
        WHOLE=splits == 1,
        QUADS=d % 4 == 0,
        DTYPE=TRITON_DTYPE[dot_dtype(A, G)],
        PRECISION=dot_precision(dot_dtype(A, G)),
        **options,
    )
    if splits == 1:
        return weights[0], biases[0], factors
    weight = finish(weights, stream, parameters[0], std, scale)
    return weight, finish(biases[:, None], stream, parameters[1], std, scale)[0], factors


def finish(parts: torch.Tensor, stream: torch.Tensor, parameter: int, std: float, scale: float) -> torch.Tensor:
    splits, p, d = parts.shape
    block = 32 if INTERPRETED else 512
    blocks = cdiv(d, block)
    out = parts.new_empty((p, d))
    arguments = (parts, out, stream, parameter, std, scale, splits, p * d, blocks, d)
    options = {"QUADS": d % 4 == 0, "BLOCK": block, "num_warps": 4}
    launch(finish_kernel, (p * blocks,), *arguments, device=parts.device, **options)
    return out


@torch.library.custom_op("dpfast_kernels::per_layer_noisy_gradient", mutates_args=())
def per_layer_noisy_gradient(
    A: torch.Tensor,
    G: torch.Tensor,
    max_grad_norm: float,
    stream: torch.Tensor,
    weight_parameter: int,
    bias_parameter: int,
    std: float,
    scale: float,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The noisy gradient of a linear layer that is clipped on its own.

    Args:
        A, G: activations ``[B, T, d]`` and backprops ``[B, T, p]``.
        max_grad_norm: C of this layer.
        stream: see ``noise_stream``; ``weight_parameter`` and ``bias_parameter`` are the parameters' numbers in it.
        std: of the noise on the sums, noise multiplier · S, with S = √(Σ_r C_r²) over all layers, not this layer's C.
        scale: what the noisy sum is multiplied with, 1 / expected batch size.

    Returns:
        ``(Σ_i factor_i g_i + std · z) · scale`` of the weight ``[p, d]`` and of the bias ``[p]`` (``[0]`` without), and
        the factors ``[B]``: float32.

    No contribution ``factor_i g_i`` exceeds C: the factor is that of a bound on the norm, see ``factor_of``.

    ===============  ==================================================================
    norm 0           factor 1
    C = 0            factor 0, but 1 for a norm that is exactly 0: noise alone
    norm inf or NaN  factor 0: left out of weight and bias, whatever the sample holds
    B = 0            noise alone
    ===============  ==================================================================
    """
    T, d, p = A.shape[1], A.shape[2], G.shape[2]
    ghost = T * (p + d) <= 2 * p * d
    norms = (ghost_norm if ghost else gradient_norm)(A, G)
    # dot products of length n err by √n + n/32 units; a sum of squares, whose absolute is itself, by a few
    units, sum_units = (sum(math.sqrt(n) + n / 32 for n in sizes) + 8 for sizes in ((d, p) if ghost else (), (T,)))
    parameters = weight_parameter, bias_parameter
    return per_layer_with(A, G, norms, max_grad_norm, (units, sum_units), stream, parameters, std, scale, bias)


@per_layer_noisy_gradient.register_fake
def _(A, G, max_grad_norm, stream, weight_parameter, bias_parameter, std, scale, bias):
    B, p = A.shape[0], G.shape[2]
    return tuple(A.new_empty(shape, dtype=torch.float32) for shape in ((p, A.shape[2]), (p if bias else 0,), (B,)))


def _case(dtype: torch.dtype, B: int, T: int, d: int, p: int, wgmma: bool = False) -> Compile:
    def call() -> None:
        A, G = meta(B, T, d, dtype=dtype), meta(B, T, p, dtype=dtype)
        per_layer_with(A, G, meta(6, B), 1.0, (99.5, 50.5), meta(3, dtype=torch.int64), (3, 4), 1.5, 0.5, True)

    return Compile(f"per_layer {dtype} {B}x{T}x{d}x{p}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 32, 1024, 1024, 4096, True),
    _case(torch.bfloat16, 32, 512, 1023, 4095),
    _case(torch.float32, 32, 1024, 1024, 4096),
    _case(torch.float16, 32, 1024, 768, 16),
]
