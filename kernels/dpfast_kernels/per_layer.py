"""Per-layer clipping of a linear layer: norms, factors, clipped sum and noise, one after the other and no wait between.

Norms are those of ``ghost_norm`` or ``gradient_norm``, the sum is that of ``weight_gradient``, and the last launch adds
noise: (sum + std · z) · scale. Noise made by the program of a tile, with the tile in its registers, leaves room for
half a tile: 255 registers for 128 × 128. What a launch of its own reads and writes is a few per cent of a layer's time.

Benchmarks compare dpfast with this way of clipping, and dpfast itself trains by others. So C, the noise's std and the
scale are numbers, which a captured launch would keep: nothing moves them while such a benchmark trains. Key and step,
which no two launches may share, are in device memory.
"""

import math

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, Compile, cdiv, launch, meta
from .ghost import ghost_norm
from .noise import noisy
from .normalization import sum_positions
from .sample_gradients import gradient_norm
from .weight_gradient import SCALING_UNITS, Config, run


@triton.jit
def factors_kernel(
    norms,  # [4, B], see ghost_norm
    bias_squares,  # [B] where BIAS
    factors,  # [B]
    C,
    units,
    sum_units,
    scaling_units,
    B,
    T,
    norms_r,
    norms_b,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """min(1, C / n) of each sample, with n not below the norm of what is added to the sum:

        n = (√(squared + 2⁻²⁴ (units · absolute + 8 · squared)) + 2⁻²⁴ sum_units · √(Σ_t ‖a_t‖² · Σ_t ‖g_t‖²))
            · (1 + 2⁻²⁴ scaling_units)

    The first bound is on the rounding of the norm (8 units: of n, the factor and the last sums), the second on that of
    the sample's gradient, which is made for the sum and, but for ghost norms, for the norm as well; the third on that
    of ratios of factors: see ``weight_gradient``. A bias is one more input, which is 1. Factor 0 where n is not finite.
    What underflows is not bounded: C must be far above 1e-15.
    """
    b = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    norms += b * norms_b
    squared = tl.load(norms, mask=b < B, other=0.0)
    absolute = tl.load(norms + norms_r, mask=b < B, other=0.0)
    energy_A = tl.load(norms + 2 * norms_r, mask=b < B, other=0.0)
    energy_G = tl.load(norms + 3 * norms_r, mask=b < B, other=0.0)
    if BIAS:
        bias_squared = tl.load(bias_squares + b, mask=b < B, other=0.0)
        squared += bias_squared
        absolute += bias_squared
        energy_A += tl.cast(T, tl.float32)
    squared = tl.where(squared < 0.0, 0.0, squared)  # NaN stays
    squared += (units * absolute + 8.0 * squared) * 5.9604644775390625e-08
    n = tl.sqrt_rn(squared) + sum_units * 5.9604644775390625e-08 * (tl.sqrt_rn(energy_A) * tl.sqrt_rn(energy_G))
    n += n * (scaling_units * 5.9604644775390625e-08)
    factor = tl.where(n > C, tl.div_rn(tl.zeros((BLOCK,), dtype=tl.float32) + C, n), 1.0)
    tl.store(factors + b, tl.where(n < float("inf"), factor, 0.0), mask=b < B)


@triton.jit(do_not_specialize=["parameter"])
def finish_kernel(
    sums,  # [p, d], which becomes the result
    stream,
    parameter,
    std,
    scale,
    blocks,
    d,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # (sum + std · z) · scale, one block of a row
    index = tl.program_id(0)
    row = (index // blocks).to(tl.int64)
    column = index % blocks * BLOCK
    j = column + tl.arange(0, BLOCK)
    at = sums + row * d + j
    start = tl.full((1,), 0, tl.int64) + row * d + column
    summed = tl.load(at, mask=j < d, other=0.0)
    tl.store(at, tl.reshape(noisy(summed[None, :], start, stream, parameter, std, scale, QUADS), (BLOCK,)), mask=j < d)


def factors_of(
    norms: torch.Tensor, bias_squares: torch.Tensor | None, T: int, C: float, units: tuple[float, float]
) -> torch.Tensor:
    """Factors [B] from the norms [4, B] of samples of T positions, and those of their bias, if any, which are a tensor
    without gaps; ``units`` are those of ``factors_kernel``.
    """
    B = norms.shape[1]
    factors = torch.empty(B, dtype=torch.float32, device=norms.device)
    block = 16 if INTERPRETED else 128
    arguments = norms, bias_squares, factors, C, *units, SCALING_UNITS, B, T, *norms.stride()
    options = {"BIAS": bias_squares is not None, "BLOCK": block, "num_warps": 4}
    launch(factors_kernel, (cdiv(B, block),), *arguments, device=norms.device, **options)
    return factors


def clipped_sum(
    A: torch.Tensor, G: torch.Tensor, factors: torch.Tensor, bias: bool, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``clipped_weight_gradient``, but with nothing rounded that is scaled, however few positions there are."""
    sizes = (G.shape[2], A.shape[2]), (G.shape[2] if bias else 0,)
    weight, bias_sum = (torch.empty(size, dtype=torch.float32, device=A.device) for size in sizes)
    run(A, G, factors, weight, bias_sum if bias else None, config, by_sample=True)
    return weight, bias_sum


def finish(sums: torch.Tensor, stream: torch.Tensor, parameter: int, std: float, scale: float) -> torch.Tensor:
    """``sums`` [p, d], with noise added and scaled in their place."""
    p, d = sums.shape
    block = 32 if INTERPRETED else 512
    blocks = cdiv(d, block)
    arguments = (sums, stream, parameter, std, scale, blocks, d)
    options = {"QUADS": d % 4 == 0, "BLOCK": block, "num_warps": 4}
    launch(finish_kernel, (p * blocks,), *arguments, device=sums.device, **options)
    return sums


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

    No contribution ``factor_i g_i`` exceeds C: the factor is that of a bound on the norm, see ``factors_kernel``.

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
    bias_squares = sum_positions(G)[1] if bias else None
    factors = factors_of(norms, bias_squares, T, max_grad_norm, (units, 2 * sum_units))
    weight, bias_sum = clipped_sum(A, G, factors, bias)
    bias_gradient = finish(bias_sum[None], stream, bias_parameter, std, scale)[0]
    return finish(weight, stream, weight_parameter, std, scale), bias_gradient, factors


@per_layer_noisy_gradient.register_fake
def _(A, G, max_grad_norm, stream, weight_parameter, bias_parameter, std, scale, bias):
    B, p = A.shape[0], G.shape[2]
    return tuple(A.new_empty(shape, dtype=torch.float32) for shape in ((p, A.shape[2]), (p if bias else 0,), (B,)))


COMPILES = [
    Compile("factors of a layer", lambda: factors_of(meta(4, 32), meta(32), 1024, 1.0, (99.5, 101.0))),
    Compile("noise", lambda: finish(meta(4096, 1024), meta(3, dtype=torch.int64), 3, 1.5, 0.5)),
    Compile("noise, odd", lambda: finish(meta(4095, 1023), meta(3, dtype=torch.int64), 3, 1.5, 0.5)),
    Compile("one position", lambda: clipped_sum(meta(32, 1, 1024), meta(32, 1, 4096), meta(32), True)),
]
