"""1-D and 2-D convolutions: linear layers over their patches, which are read where they are (implicit im2col) and not
unfolded. A 1-D one has images of one line. There is no kernel for 3-D ones: PyTorch's operators unfold their patches.

``x [R, C, H, W]`` and ``G [R, p, OH, OW]``, samples first, R/B rows a sample. A transposed convolution is the adjoint
of one with the same weight: there ``x`` and ``G`` change places. Padding is with zeros, as much of it as is read.

A tile's columns are places in the kernel, and channels within each: a row of the tile is read from few pixels. With the
channels last in memory these are unbroken, and come by asynchronous loads of 16 bytes; so both sides are copied into
that layout where they have multiples of 16 channels and another one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

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
    vectorised,
    wide,
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


def configure(p: int, d: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """Tiles of at most 64 × 128, or 128 × 128 on a large chip, where both sides come in vectors; else of 64 × 32, as
    addresses need many registers. Of those that are large enough, the one for which programs together read the least.
    """
    if INTERPRETED:
        return Config(16, 16, 16, 4, 1)
    narrow = dtype != torch.float32
    block_p = max(16, min(128 if vectorised and narrow and chip.large else 64, pow2(p)))
    if not vectorised or not narrow:
        return Config(block_p, max(16, min(32, pow2(d))), 32, 8 if not narrow else 4, 1)
    choices = [size for size in (16, 32, 64, 128) if size <= max(16, pow2(d))]
    block_d = min(choices, key=lambda size: cdiv(d, size) * (block_p + size))
    return Config(block_p, block_d, 64, 8 if block_p * block_d >= 64 * 64 else 4, 3)


def channels_last(X: torch.Tensor, groups: int) -> torch.Tensor:
    """``X [R, C, *, *]`` with a group's channels unbroken in memory, if they can be loaded 16 bytes at a time then."""
    if X.shape[1] // groups % 16 or X.stride(1) == 1:
        return X
    return X.contiguous(memory_format=torch.channels_last)


@cache
def box_of(rows: int, height: int, width: int, positions: int) -> tuple[int, int, int]:
    """A box of so many positions of a sample's ``rows`` images. Its sides are powers of 2, and the fewest cover all."""
    boxes = []
    for w in (1 << k for k in range(positions.bit_length())):
        for h in (1 << k for k in range((positions // w).bit_length())):
            images = positions // (w * h)
            boxes.append((cdiv(rows, images) * cdiv(height, h) * cdiv(width, w), -w, -h, (images, h, w)))
    return min(boxes)[-1]


@triton.jit
def sample_tile(
    x,
    G,
    row,  # the sample's first, int64
    rows,  # of a sample
    start,
    end,  # of its steps, each over a box of output positions: WIDTH of each of HEIGHT lines of each of IMAGES rows
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
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Σ over positions of G[row, output, position] · x[row, input, position · stride - padding + place · dilation]."""
    # What is the same in every step: a position's place in the box, and how far it is from the box' first.
    k = tl.arange(0, IMAGES * HEIGHT * WIDTH)
    image = k // (HEIGHT * WIDTH)
    line = k // WIDTH % HEIGHT
    column = k % WIDTH
    g_from = image * wide(g_n) + line * wide(g_h) + column * wide(g_w)
    g_from = outputs[:, None] * wide(g_c) + g_from[None, :]
    x_from = image * wide(x_n) + line * STRIDE[0] * wide(x_h) + column * STRIDE[1] * wide(x_w)
    place = inputs * wide(x_c) + i * DILATION[0] * wide(x_h) + j * DILATION[1] * wide(x_w)
    x_from = x_from[:, None] + place[None, :]
    down = line[:, None] * STRIDE[0] + tl.where(inputs_there, i * DILATION[0], 1 << 29)[None, :]  # or out of all images
    across = column[:, None] * STRIDE[1] + (j * DILATION[1])[None, :]
    lines = tl.cdiv(OH, HEIGHT)
    columns = tl.cdiv(OW, WIDTH)
    n = tl.cast(start // (lines * columns) * IMAGES, tl.int32)
    oh = tl.cast(start // columns % lines * HEIGHT, tl.int32)
    ow = tl.cast(start % columns * WIDTH, tl.int32)
    sums = tl.zeros((outputs.shape[0], inputs.shape[0]), dtype=tl.float32)
    for _ in range(start, end):
        there = (n + image < rows) & (oh + line < OH) & (ow + column < OW)
        # [BLOCK_P, positions]
        g_at = G + (row + n) * g_n + oh * wide(g_h) + ow * wide(g_w)
        g = tl.load(g_at + g_from, mask=outputs_there[:, None] & there[None, :], other=0.0).to(DTYPE)
        # [positions, BLOCK_D]; as unsigned numbers, negative ones are too large as well
        h = oh * STRIDE[0] - PADDING[0]
        w = ow * STRIDE[1] - PADDING[1]
        x_at = x + (row + n) * x_n + h * wide(x_h) + w * wide(x_w)
        inside = ((h + down).to(tl.uint32, bitcast=True) < H) & ((w + across).to(tl.uint32, bitcast=True) < W)
        a = tl.load(x_at + x_from, mask=inside & there[:, None], other=0.0).to(DTYPE)
        sums = dot(g, a, sums, PRECISION)
        ow += WIDTH
        oh = tl.where(ow < OW, oh, oh + HEIGHT)
        ow = tl.where(ow < OW, ow, 0)
        n = tl.where(oh < OH, n, n + IMAGES)
        oh = tl.where(oh < OH, oh, 0)
    return sums


@triton.jit
def places(
    index,
    tiles_p,
    tiles_d,
    p,
    KERNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What one tile of the weight [groups · p, CHANNELS · kernel] works on: see ``sample_tile``. Its columns go through
    the channels of one place in the kernel after the other; ``column`` is where each is in the weight.
    """
    tile_d = index % tiles_d
    tile_p = index // tiles_d % tiles_p
    group = index // (tiles_d * tiles_p)
    row = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    ordered = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    place = ordered // CHANNELS
    channel = ordered % CHANNELS
    area: tl.constexpr = KERNEL[0] * KERNEL[1]
    column = channel * area + place
    i = place // KERNEL[1]
    j = place % KERNEL[1]
    return group * p + row, group * CHANNELS + channel, column, i, j, row < p, ordered < CHANNELS * area


@triton.jit
def sample_gradients_kernel(
    x,
    G,
    samples,  # [slices, B, groups · p, d]
    squares,  # [B, tiles], written where there is one slice
    B,
    rows,  # of a sample
    steps,  # of a sample
    slices,
    length,  # steps of a slice
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
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STORE: tl.constexpr,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # g_n = G_nᵀ patches(x_n): one tile, over one slice of the positions, and its squares
    index = tl.program_id(0)
    tile = index % tiles
    n = (index // tiles // slices).to(tl.int64)
    piece = index // tiles % slices
    outputs, inputs, column, i, j, some_p, some_d = places(
        tile, tiles_p, tiles_d, p, KERNEL, CHANNELS, BLOCK_P, BLOCK_D
    )
    end = tl.minimum((piece + 1) * length, steps)
    # [BLOCK_P, BLOCK_D]
    sums = sample_tile(
        *(x, G, n * rows, rows, piece * length, end, outputs, inputs, i, j, some_p, some_d, H, W, OH, OW),
        *(x_n, x_c, x_h, x_w, g_n, g_c, g_h, g_w),
        *(STRIDE, PADDING, DILATION, DTYPE, PRECISION, IMAGES, HEIGHT, WIDTH),
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
    steps,  # of a sample
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
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Σ_n factor_n · G_nᵀ patches(x_n): one tile, over one slice of the samples, without those of factor 0
    index = tl.program_id(0)
    piece = (index // tiles).to(tl.int64)
    outputs, inputs, column, i, j, some_p, some_d = places(
        index % tiles, tiles_p, tiles_d, p, KERNEL, CHANNELS, BLOCK_P, BLOCK_D
    )
    # [BLOCK_P, BLOCK_D]
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for n in range(piece * share, tl.minimum((piece + 1) * share, B)):
        factor = tl.load(factors + n * f_b)
        end = tl.where(factor != 0.0, steps, 0)
        sums = sample_tile(
            *(x, G, n * rows, rows, 0, end, outputs, inputs, i, j, some_p, some_d, H, W, OH, OW),
            *(x_n, x_c, x_h, x_w, g_n, g_c, g_h, g_w),
            *(STRIDE, PADDING, DILATION, DTYPE, PRECISION, IMAGES, HEIGHT, WIDTH),
        )
        total += factor * sums
    out = (piece * channels + outputs)[:, None] * d + column[None, :]
    tl.store(totals + out, total, mask=some_p[:, None] & some_d[None, :])


class Plan:
    """What both launches need of the shapes."""

    def __init__(self, x, G, kernel, stride, padding, dilation, groups, rows, config):
        x, G = self.sides = channels_last(x, groups), channels_last(G, groups)
        channels = x.shape[1] // groups
        self.p, self.d = G.shape[1] // groups, channels * kernel[0] * kernel[1]
        dtype = dot_dtype(x, G)
        self.config = config or configure(self.p, self.d, dtype, vectorised(x, G), chip(G.device))
        images, height, width = box = box_of(rows, *G.shape[2:], self.config.BLOCK_K)
        self.steps = cdiv(rows, images) * cdiv(G.shape[2], height) * cdiv(G.shape[3], width)
        tiles_p, tiles_d = cdiv(self.p, self.config.BLOCK_P), cdiv(self.d, self.config.BLOCK_D)
        self.tiles = groups * tiles_p * tiles_d
        sizes = (self.tiles, tiles_p, tiles_d, self.p, self.d, G.shape[1], *x.shape[2:], *G.shape[2:])
        self.arguments = (*sizes, *x.stride(), *G.stride())
        self.options = {
            "KERNEL": tuple(kernel),
            "CHANNELS": channels,
            **dict(zip(("IMAGES", "HEIGHT", "WIDTH"), box, strict=True)),
            "STRIDE": tuple(stride),
            "PADDING": tuple(padding),
            "DILATION": tuple(dilation),
            "DTYPE": TRITON_DTYPE[dtype],
            "PRECISION": dot_precision(dtype),
            "device": G.device,
            **{name: size for name, size in asdict(self.config).items() if name != "BLOCK_K"},
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
    slices = slices_of(plan.steps, batch * plan.tiles, 1)
    length = cdiv(plan.steps, slices)
    stored = store or slices > 1
    new = {"dtype": torch.float32, "device": G.device}
    samples = torch.empty((slices, batch if stored else 0, G.shape[1] * plan.d), **new)
    squares = torch.empty((batch, plan.tiles), **new)
    arguments = (*plan.sides, samples, squares, batch, rows, plan.steps, slices, length, *plan.arguments)
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
    arguments = (*plan.sides, factors, totals, B, rows, plan.steps, share, *plan.arguments, factors.stride(0))
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
    _case(torch.bfloat16, 256, 128, 128, 16, wgmma=True),
    _case(torch.float32, 128, 64, 64, 32),
    _case(torch.bfloat16, 64, 64, 64, 16, groups=64),
    _case(torch.bfloat16, 128, 64, 64, 31),
    _case(torch.float16, 1024, 3, 64, 224),
]
