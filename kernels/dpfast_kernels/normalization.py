"""Small parameters: per-sample gradients that are sums over positions, [B, d], written with their squared norms."""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, Compile, cdiv, launch, meta, next_power_of_2

ENOUGH = 16 if INTERPRETED else 1024
"""Programs that fill a large GPU. Sums are cut by sizes alone, so that their order is the same on every device."""


@dataclass(frozen=True)
class Config:
    BLOCK_T: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def configure(T: int, d: int, by_channel: bool, dtype: torch.dtype) -> Config:
    """Tiles of at most 4096 elements, long on the axis that is contiguous: d, or T in a layout by channel. Two of
    float32, beside their sums, are more than the registers of four warps hold.
    """
    if INTERPRETED:
        return Config(8, 16, 4, 1)
    longest = 512 if by_channel else 32
    block_t = min(longest, next_power_of_2(max(T, 1)))
    return Config(block_t, min(1024, 4096 // block_t, next_power_of_2(max(d, 1))), 8 if dtype.itemsize > 2 else 4, 2)


def slices_of(T: int, programs: int, block: int) -> int:
    """In how many slices to cut T, each at least 4 blocks long, where there are too few programs."""
    return max(1, min(cdiv(T, 4 * block), ENOUGH // max(programs, 1)))


@triton.jit
def sums_kernel(
    G,
    x,
    mean,
    rstd,
    weight,  # [slices, B, d]
    bias,  # [slices, B, d]
    squares,  # [2, B, blocks], written where there is one slice
    B,
    T,
    d,
    blocks,
    slices,
    length,  # of a slice
    channels,  # that share a mean
    g_n,
    g_t,
    g_d,
    x_n,
    x_t,
    x_d,
    m_n,
    m_t,
    r_n,
    r_t,
    NORMALISED: tl.constexpr,
    CENTRED: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # bias = Σ_t g_t, weight = Σ_t g_t ∘ (x_t - mean) · rstd, over one slice of T and one block of columns of one
    # sample; mean and rstd are those of the position, or of the channel's group
    index = tl.program_id(0)
    piece = index % slices
    block = index // slices % blocks
    n = (index // slices // blocks).to(tl.int64)
    columns = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside = columns < d

    G += n * g_n + columns[None, :] * g_d
    x += n * x_n + columns[None, :] * x_d
    mean += n * m_n
    rstd += n * r_n
    if NORMALISED and BY_CHANNEL:
        group = columns // channels
        scale = tl.load(rstd + group * r_t, mask=inside, other=0.0).to(tl.float32)[None, :]
        centre = tl.load(mean + group * m_t, mask=inside, other=0.0).to(tl.float32)[None, :]

    # [BLOCK_T, BLOCK_D]
    w = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    b = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    end = tl.minimum((piece + 1) * length, T)
    for start in range(piece * length, end, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        there = (t < end)[:, None] & inside[None, :]
        g = tl.load(G + t[:, None] * g_t, mask=there, other=0.0).to(tl.float32)
        b += g
        if NORMALISED:
            centred = tl.load(x + t[:, None] * x_t, mask=there, other=0.0).to(tl.float32)
            if not BY_CHANNEL:
                scale = tl.load(rstd + t * r_t, mask=t < end, other=0.0).to(tl.float32)[:, None]
                if CENTRED:
                    centre = tl.load(mean + t * m_t, mask=t < end, other=0.0).to(tl.float32)[:, None]
            if CENTRED:
                centred -= centre
            w += g * (centred * scale)

    out = (piece * B + n) * d + columns
    sums = tl.sum(b, axis=0)
    tl.store(bias + out, sums, mask=inside)
    if WHOLE:
        tl.store(squares + (B + n) * blocks + block, tl.sum(tl.where(inside, sums * sums, 0.0)))
    if NORMALISED:
        sums = tl.sum(w, axis=0)
        tl.store(weight + out, sums, mask=inside)
        if WHOLE:
            tl.store(squares + n * blocks + block, tl.sum(tl.where(inside, sums * sums, 0.0)))


@triton.jit
def join_kernel(
    partials,  # [slices, B, n]
    out,  # [B, n]
    squares,  # [B, blocks]
    n,
    slices,
    slice,  # elements of one, B · n
    blocks,
    BLOCK: tl.constexpr,
):
    # Σ_slices, and its squares over one block
    index = tl.program_id(0)
    block = index % blocks
    sample = (index // blocks).to(tl.int64)
    columns = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = columns < n
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    partials += sample * n + columns
    for _ in range(slices):
        sums += tl.load(partials, mask=inside, other=0.0)
        partials += slice
    tl.store(out + sample * n + columns, sums, mask=inside)
    tl.store(squares + index, tl.sum(tl.where(inside, sums * sums, 0.0)))


def join_slices(partials: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ over the slices of float32 ``[slices, B, n]``: ``[B, n]``, and its squared norms ``[B]``."""
    slices, B, n = partials.shape
    block = 16 if INTERPRETED else min(1024, next_power_of_2(max(n, 1)))
    blocks = cdiv(n, block)
    out, squares = partials.new_empty((B, n)), partials.new_empty((B, blocks))
    arguments = (partials, out, squares, n, slices, B * n, blocks)
    launch(join_kernel, (B * blocks,), *arguments, device=partials.device, BLOCK=block, num_warps=4)
    return out, total(squares)


def total(squares: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, through float64, always in the same order."""
    return squares.sum(-1, dtype=torch.float64).float()


def sums_with(
    G: torch.Tensor,
    x: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    by_channel: bool = False,
    config: Config | None = None,
) -> list[torch.Tensor]:
    """``[weight, its squared norms, bias, its squared norms]`` of ``G [B, T, d]``; the latter two only without x."""
    B, T, d = G.shape
    config = config or configure(T, d, by_channel, G.dtype)
    kinds = 1 if x is None else 2
    blocks = cdiv(d, config.BLOCK_D)
    slices = slices_of(T, B * blocks, config.BLOCK_T)
    length = cdiv(cdiv(T, slices), config.BLOCK_T) * config.BLOCK_T
    new = {"dtype": torch.float32, "device": G.device}
    sums = [torch.empty((slices, B, d), **new) for _ in range(kinds)]
    squares = torch.empty((2, B, blocks), **new)
    normalised = (side if side is not None else G for side in (x, mean, rstd))
    strides = [G.stride(), (0, 0, 0), (0, 0), (0, 0)]
    for k, side in enumerate((x, mean, rstd), start=1):
        if side is not None:
            strides[k] = side.stride()
    launch(
        sums_kernel,
        (B * blocks * slices,),
        *(G, *normalised, sums[0], sums[-1], squares, B, T, d, blocks, slices, length),
        d // max(rstd.shape[1], 1) if by_channel else 1,
        *(stride for row in strides for stride in row),
        device=G.device,
        NORMALISED=x is not None,
        CENTRED=mean is not None,
        BY_CHANNEL=by_channel,
        WHOLE=slices == 1,
        **asdict(config),
    )
    if slices > 1:
        return [result for partials in sums for result in join_slices(partials)]
    return [result for k, whole in enumerate(sums) for result in (whole[0], total(squares[2 - kinds + k]))]


@torch.library.custom_op("dpfast_kernels::sum_positions", mutates_args=())
def sum_positions(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``Σ_t g_t`` of ``G [B, T, d]``: ``[B, d]`` and its squared norms ``[B]``, float32."""
    samples, squared = sums_with(G)
    return samples, squared


@torch.library.custom_op("dpfast_kernels::normalised_sums", mutates_args=())
def normalised_sums(
    G: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-sample gradients of LayerNorm and RMSNorm, G and x read once.

    Args:
        G, x: backprops and input ``[B, T, d]``.
        mean, rstd: ``[B, T]``; no mean for RMSNorm.

    Returns:
        ``Σ_t g_t ∘ (x_t - mean_t) · rstd_t`` ``[B, d]``, its squared norms ``[B]``, ``Σ_t g_t`` ``[B, d]``, its squared
        norms ``[B]``: float32, the norms those of exactly what is written.
    """
    weight, weight_squared, bias, bias_squared = sums_with(G, x, mean, rstd)
    return weight, weight_squared, bias, bias_squared


@torch.library.custom_op("dpfast_kernels::channel_sums", mutates_args=())
def channel_sums(
    G: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of GroupNorm: ``G, x [B, C, L]``, ``mean, rstd [B, groups]``, results ``[B, C]`` and ``[B]``."""
    sides = G.transpose(1, 2), x.transpose(1, 2)
    weight, weight_squared, bias, bias_squared = sums_with(*sides, mean, rstd, by_channel=True)
    return weight, weight_squared, bias, bias_squared


def _results(G: torch.Tensor, count: int, d: int) -> tuple[torch.Tensor, ...]:
    shapes = [(G.shape[0], d), (G.shape[0],)] * count
    return tuple(G.new_empty(shape, dtype=torch.float32) for shape in shapes)


@sum_positions.register_fake
def _(G):
    return _results(G, 1, G.shape[2])


@normalised_sums.register_fake
def _(G, x, mean, rstd):
    return _results(G, 2, G.shape[2])


@channel_sums.register_fake
def _(G, x, mean, rstd):
    return _results(G, 2, G.shape[1])


def _case(name: str, dtype: torch.dtype, B: int, T: int, d: int) -> Compile:
    def call() -> None:
        G = meta(B, T, d, dtype=dtype)
        if name == "channel_sums":
            sums_with(G, G, meta(B, 8), meta(B, 8), by_channel=True)
        elif name == "sum_positions":
            sums_with(G)
        else:
            sums_with(G, G, meta(B, T) if name == "LayerNorm" else None, meta(B, T))

    return Compile(f"{name} {dtype} {B}x{T}x{d}", call)


COMPILES = [
    _case("LayerNorm", torch.bfloat16, 32, 1024, 1024),
    _case("LayerNorm", torch.float32, 2, 4096, 1024),
    _case("RMSNorm", torch.float16, 8, 512, 4096),
    _case("channel_sums", torch.bfloat16, 32, 1024, 64),
    _case("channel_sums", torch.float32, 32, 1024, 64),
    _case("sum_positions", torch.bfloat16, 32, 1024, 4096),
    _case("sum_positions", torch.float32, 4096, 1, 50),
]
