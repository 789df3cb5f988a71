"""2-D convolutions: linear layers over their patches, which are read where they are (implicit im2col), not unfolded.

``x [R, C, H, W]`` and ``G [R, p, OH, OW]``, samples first, R/B rows a sample. A transposed convolution is the adjoint
of one with the same weight: there ``x`` and ``G`` change places. Padding is with zeros, as much of it as is read.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    TRITON_DTYPE,
    Compile,
    cdiv,
    dot,
    dot_dtype,
    dot_precision,
    launch,
    meta,
    vectorised,
)
from .common import next_power_of_2 as pow2
from .normalization import join_slices, slices_of, total


@dataclass(frozen=True)
class Config:
    BLOCK_P: int
    BLOCK_D: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def configure(p: int, d: int, dtype: torch.dtype, vectorised: bool) -> Config:
    """Tiles of at most 64 × 64, for which 16-bit patches can be loaded ahead: their addresses need many registers."""
    if INTERPRETED:
        return Config(16, 16, 16, 4, 1)
    largest_d = 64 if vectorised and dtype != torch.float32 else 32
    block_p, block_d = max(16, min(64, pow2(p))), max(16, min(largest_d, pow2(d)))
    if block_p * block_d == 64 * 64:
        return Config(block_p, block_d, 64, 8, 3)
    return Config(block_p, block_d, 32, 8 if dtype == torch.float32 else 4, 1)


@triton.jit
def sample_tile(
    x,
    G,
    row,  # the sample's first, int64
    start,
    end,  # of its output positions, counted over its rows
    outputs,  # [BLOCK_P] channels of G
    inputs,  # [BLOCK_D] channels of x
    i,
    j,  # [BLOCK_D] places in the kernel
    outputs_there,
    inputs_there,
    H,
    W,
    OH,
    OW,
    x_n,
    x_c,
    x_h,
    x_w,
    g_n,
    g_c,
    g_h,
    g_w,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ over positions of G[row, output, position] · x[row, input, position · stride - padding + place · dilation]."""
    right = inputs.to(tl.int64) * x_c + i * DILATION[0] * x_h + j * DILATION[1] * x_w
    sums = tl.zeros((outputs.shape[0], inputs.shape[0]), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = k < end
        n = row + k // (OH * OW)
        oh = k // OW % OH
        ow = k % OW
        # [BLOCK_P, BLOCK_K]
        g_at = outputs.to(tl.int64)[:, None] * g_c + (n * g_n + oh * g_h + ow * g_w)[None, :]
        g = tl.load(G + g_at, mask=outputs_there[:, None] & there[None, :], other=0.0).to(DTYPE)
        # [BLOCK_K, BLOCK_D]
        h = oh * STRIDE[0] - PADDING[0]
        w = ow * STRIDE[1] - PADDING[1]
        x_at = (n * x_n + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w)[:, None] + right[None, :]
        h = h[:, None] + (i * DILATION[0])[None, :]
        w = w[:, None] + (j * DILATION[1])[None, :]
        image = (h >= 0) & (h < H) & (w >= 0) & (w < W) & there[:, None] & inputs_there[None, :]
        a = tl.load(x + x_at, mask=image, other=0.0).to(DTYPE)
        sums = dot(g, a, sums, PRECISION)
    return sums


@triton.jit
def places(index, tiles_p, tiles_d, p, d, KERNEL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """What one tile of the weight [groups · p, d] works on, d = channels of a group × kernel: see ``sample_tile``."""
    tile_d = index % tiles_d
    tile_p = index // tiles_d % tiles_p
    group = index // (tiles_d * tiles_p)
    row = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    area = KERNEL[0] * KERNEL[1]
    outputs = group * p + row
    inputs = group * (d // area) + column // area
    return outputs, inputs, column, column // KERNEL[1] % KERNEL[0], column % KERNEL[1], row < p, column < d


@triton.jit
def sample_gradients_kernel(
    x,
    G,
    samples,  # [slices, B, groups · p, d]
    squares,  # [B, tiles], written where there is one slice
    B,
    rows,  # of a sample
    slices,
    length,  # of a slice
    tiles,
    tiles_p,
    tiles_d,
    p,
    d,
    channels,  # groups · p
    H,
    W,
    OH,
    OW,
    x_n,
    x_c,
    x_h,
    x_w,
    g_n,
    g_c,
    g_h,
    g_w,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STORE: tl.constexpr,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # g_n = G_nᵀ patches(x_n): one tile, over one slice of the positions, and its squares
    index = tl.program_id(0)
    tile = index % tiles
    n = (index // tiles // slices).to(tl.int64)
    piece = index // tiles % slices
    outputs, inputs, column, i, j, some_p, some_d = places(tile, tiles_p, tiles_d, p, d, KERNEL, BLOCK_P, BLOCK_D)
    end = tl.minimum((piece + 1) * length, rows * OH * OW)
    # [BLOCK_P, BLOCK_D]
    sums = sample_tile(
        *(x, G, n * rows, piece * length, end, outputs, inputs, i, j, some_p, some_d, H, W, OH, OW),
        *(x_n, x_c, x_h, x_w, g_n, g_c, g_h, g_w, STRIDE, PADDING, DILATION, DTYPE, PRECISION, BLOCK_K),
    )
    there = some_p[:, None] & some_d[None, :]
    if STORE:
        out = ((piece * B + n) * channels + outputs)[:, None] * d + column[None, :]
        tl.store(samples + out, sums, mask=there)
    if WHOLE:
        tl.store(squares + n * tiles + tile, tl.sum(tl.where(there, sums * sums, 0.0)))


@triton.jit
def clipped_gradient_kernel(
    x,
    G,
    factors,  # [B]
    totals,  # [slices, groups · p, d]
    B,
    rows,  # of a sample
    share,  # samples of a slice
    tiles,
    tiles_p,
    tiles_d,
    p,
    d,
    channels,  # groups · p
    H,
    W,
    OH,
    OW,
    x_n,
    x_c,
    x_h,
    x_w,
    g_n,
    g_c,
    g_h,
    g_w,
    f_b,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Σ_n factor_n · G_nᵀ patches(x_n): one tile, over one slice of the samples, without those of factor 0
    index = tl.program_id(0)
    piece = (index // tiles).to(tl.int64)
    outputs, inputs, column, i, j, some_p, some_d = places(
        index % tiles, tiles_p, tiles_d, p, d, KERNEL, BLOCK_P, BLOCK_D
    )
    # [BLOCK_P, BLOCK_D]
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for n in range(piece * share, tl.minimum((piece + 1) * share, B)):
        factor = tl.load(factors + n * f_b)
        end = tl.where(factor != 0.0, rows * OH * OW, 0)
        sums = sample_tile(
            *(x, G, n * rows, 0, end, outputs, inputs, i, j, some_p, some_d, H, W, OH, OW),
            *(x_n, x_c, x_h, x_w, g_n, g_c, g_h, g_w, STRIDE, PADDING, DILATION, DTYPE, PRECISION, BLOCK_K),
        )
        total += factor * sums
    out = (piece * channels + outputs)[:, None] * d + column[None, :]
    tl.store(totals + out, total, mask=some_p[:, None] & some_d[None, :])


class Plan:
    """What both launches need of the shapes."""

    def __init__(self, x, G, kernel, stride, padding, dilation, groups, rows, config):
        self.p, self.d = G.shape[1] // groups, x.shape[1] // groups * kernel[0] * kernel[1]
        dtype = dot_dtype(x, G)
        self.config = config or configure(self.p, self.d, dtype, vectorised(x, G))
        self.positions = rows * G.shape[2] * G.shape[3]
        tiles_p, tiles_d = cdiv(self.p, self.config.BLOCK_P), cdiv(self.d, self.config.BLOCK_D)
        self.tiles = groups * tiles_p * tiles_d
        sizes = (self.tiles, tiles_p, tiles_d, self.p, self.d, G.shape[1], *x.shape[2:], *G.shape[2:])
        self.arguments = (*sizes, *x.stride(), *G.stride())
        self.options = {
            "KERNEL": tuple(kernel),
            "STRIDE": tuple(stride),
            "PADDING": tuple(padding),
            "DILATION": tuple(dilation),
            "DTYPE": TRITON_DTYPE[dtype],
            "PRECISION": dot_precision(dtype),
            "device": G.device,
            **asdict(self.config),
        }


@torch.library.custom_op("dpfast_kernels::convolution_sample_gradients", mutates_args=())
def convolution_sample_gradients(
    x: torch.Tensor,
    G: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    batch: int,
    store: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample gradients ``[B, p, C/groups, kh, kw]`` and their squared norms ``[B]``, float32.

    The norms are those of exactly what is written. Without ``store`` the gradients are dropped, tile by tile (few
    programs: cut over positions, and kept until they are joined), and the first result is ``[0, p, C/groups, kh, kw]``.
    """
    return sample_gradients_with(x, G, kernel, stride, padding, dilation, groups, batch, store)


def sample_gradients_with(
    x: torch.Tensor,
    G: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    batch: int,
    store: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(G) // max(batch, 1)
    plan = Plan(x, G, kernel, stride, padding, dilation, groups, rows, config)
    shape = (G.shape[1], x.shape[1] // groups, *kernel)
    slices = slices_of(plan.positions, batch * plan.tiles, plan.config.BLOCK_K)
    length = cdiv(cdiv(plan.positions, slices), plan.config.BLOCK_K) * plan.config.BLOCK_K
    stored = store or slices > 1
    new = {"dtype": torch.float32, "device": G.device}
    samples = torch.empty((slices, batch if stored else 0, G.shape[1] * plan.d), **new)
    squares = torch.empty((batch, plan.tiles), **new)
    arguments = (x, G, samples, squares, batch, rows, slices, length, *plan.arguments)
    grid = (batch * slices * plan.tiles,)
    launch(sample_gradients_kernel, grid, *arguments, **plan.options, STORE=stored, WHOLE=slices == 1)
    samples, squared = join_slices(samples) if slices > 1 else (samples[0], total(squares))
    return (samples if store else samples.new_empty((0, samples.shape[1]))).view(-1, *shape), squared


@torch.library.custom_op("dpfast_kernels::convolution_clipped_gradient", mutates_args=())
def convolution_clipped_gradient(
    x: torch.Tensor,
    G: torch.Tensor,
    factors: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """``Σ_i factor_i · g_i``: ``[p, C/groups, kh, kw]`` float32; ``factors [B]`` float32.

    A sample's tile is complete, in float32, before its factor multiplies it: nothing rounded is scaled. A sample whose
    factor is 0 is left out.
    """
    return clipped_gradient_with(x, G, factors, kernel, stride, padding, dilation, groups)


def clipped_gradient_with(
    x: torch.Tensor,
    G: torch.Tensor,
    factors: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    config: Config | None = None,
) -> torch.Tensor:
    B = len(factors)
    rows = len(G) // max(B, 1)
    plan = Plan(x, G, kernel, stride, padding, dilation, groups, rows, config)
    slices = slices_of(B, plan.tiles, 1)
    share = cdiv(B, slices)
    totals = torch.empty((slices, G.shape[1], x.shape[1] // groups, *kernel), dtype=torch.float32, device=G.device)
    arguments = (x, G, factors, totals, B, rows, share, *plan.arguments, factors.stride(0))
    launch(clipped_gradient_kernel, (slices * plan.tiles,), *arguments, **plan.options)
    return totals.sum(0)  # always in the same order


@convolution_sample_gradients.register_fake
def _(x, G, kernel, stride, padding, dilation, groups, batch, store):
    shape = (batch if store else 0, G.shape[1], x.shape[1] // groups, *kernel)
    return G.new_empty(shape, dtype=torch.float32), G.new_empty((batch,), dtype=torch.float32)


@convolution_clipped_gradient.register_fake
def _(x, G, factors, kernel, stride, padding, dilation, groups):
    return G.new_empty((G.shape[1], x.shape[1] // groups, *kernel), dtype=torch.float32)


def _case(dtype: torch.dtype, B: int, C: int, p: int, size: int, groups: int = 1, wgmma: bool = False) -> Compile:
    def call() -> None:
        x, G = meta(B, C, size, size, dtype=dtype), meta(B, p, size, size, dtype=dtype)
        geometry = (3, 3), (1, 1), (1, 1), (1, 1), groups
        sample_gradients_with(x, G, *geometry, B, True)
        clipped_gradient_with(x, G, meta(B), *geometry)

    return Compile(f"convolution {dtype} {B}x{C}x{size}x{size} to {p} in {groups}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 128, 64, 64, 32, wgmma=True),
    _case(torch.float32, 128, 64, 64, 32),
    _case(torch.bfloat16, 64, 64, 64, 16, groups=64),
    _case(torch.bfloat16, 128, 64, 64, 31),
    _case(torch.float16, 1024, 3, 64, 224),
]
