"""Per-sample gradients G_nᵀA_n in tiles: squared and dropped for their norm, or stored, with the norm of the stored."""

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
    tile_at,
    vectorised,
    wide,
)
from .segments import OF_A_CASE, Segments, sample_at


@dataclass(frozen=True)
class Config:
    BLOCK_T: int
    BLOCK_P: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    GROUP: int = 8


def configure(N: int, T: int, d: int, p: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """The largest tiles, up to 128 × 256, that are not mostly empty and give half of the processors work; of float32 up
    to 128 × 128, for which a thread reads 16 numbers of shared memory for 64 products.
    """
    if INTERPRETED:
        return Config(16, 16, 32, 4, 1)
    if dtype == torch.float32:
        large = vectorised and min(d, p) > 64 and 2 * N * cdiv(p, 128) * cdiv(d, 128) >= chip.processors
        return Config(16, 128, 128, 8, 3) if large else Config(32, 64, 64, 8, 3)
    fast = chip.large and vectorised
    most = 128 * 256 if fast else 128 * 128 if chip.large or vectorised else 64 * 64  # elements of a tile
    block_t = max(16, min(64 if fast else 32, next_power_of_2(T)))
    for block_p, block_d in (128, 256), (128, 128), (64, 128), (128, 64):
        narrow = (p <= 64 and block_p > 64) or (d <= block_d // 2 and block_d > 64)
        idle = 2 * N * cdiv(p, block_p) * cdiv(d, block_d) < chip.processors
        if not narrow and not idle and block_p * block_d <= most:
            # one warpgroup for 64 rows: of two, Triton 3.6 leaves the second one's products waiting for each other
            return Config(block_t, block_p, block_d, 8 if block_p > 64 else 4, 3 if block_d == 256 else 4)
    return Config(block_t, 64, 64, 8, 4)


@triton.jit
def gradient_kernel(
    A,
    G,
    samples,  # [N, p, d] where STORE
    partials,  # [N, tiles]
    bounds,  # of packed rows, whose samples are segments
    N,
    T,
    d,
    p,
    tiles_p,
    tiles_d,
    a_n,
    a_t,
    a_d,
    g_n,
    g_t,
    g_p,
    STORE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    # gradient[n, i, j] = Σ_t G[n, t, i] A[n, t, j] in one tile (i, j) of one sample; Σ_{i,j} gradient²
    index = tl.program_id(0)
    tiles = tiles_p * tiles_d
    n = (index // tiles).to(tl.int64)
    tile = index % tiles
    row, column = tile_at(tile, tiles_p, tiles_d, GROUP)
    i = row * BLOCK_P + tl.arange(0, BLOCK_P)
    j = column * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    sample, first, length = sample_at(bounds, n, n < N, T)

    g_at = G + sample * g_n + (first + t)[None, :] * g_t + i.to(tl.int64)[:, None] * g_p
    a_at = A + sample * a_n + (first + t)[:, None] * a_t + j.to(tl.int64)[None, :] * a_d
    gradient = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, length, BLOCK_T):
        # [BLOCK_P, BLOCK_T]
        g = tl.load(g_at, mask=(t < length - start)[None, :] & (i < p)[:, None], other=0.0).to(DTYPE)
        # [BLOCK_T, BLOCK_D]
        a = tl.load(a_at, mask=(t < length - start)[:, None] & (j < d)[None, :], other=0.0).to(DTYPE)
        gradient = dot(g, a, gradient, PRECISION)
        g_at += BLOCK_T * wide(g_t)
        a_at += BLOCK_T * wide(a_t)

    if STORE:
        rounded = gradient.to(samples.dtype.element_ty)
        s_at = samples + (n * p + i)[:, None] * d + j[None, :]
        tl.store(s_at, rounded, mask=(i < p)[:, None] & (j < d)[None, :])
        gradient = rounded.to(tl.float32)
    tl.store(partials + n * tiles + tile, tl.sum(gradient * gradient))


@triton.jit
def energy_kernel(
    X,
    partials,  # [N, blocks]
    bounds,  # as of gradient_kernel
    N,
    T,
    d,
    blocks,
    x_n,
    x_t,
    x_d,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Σ x² over one block of columns of one sample
    index = tl.program_id(0)
    n = (index // blocks).to(tl.int64)
    columns = index % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    sample, first, length = sample_at(bounds, n, n < N, T)
    x_at = X + sample * x_n + (first + t)[:, None] * x_t + columns.to(tl.int64)[None, :] * x_d
    squares = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, length, BLOCK_T):
        # [BLOCK_T, BLOCK_D]
        x = tl.load(x_at, mask=(t < length - start)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)
        squares += x * x
        x_at += BLOCK_T * wide(x_t)
    tl.store(partials + index, tl.sum(squares))


def energies(X: torch.Tensor, segments: Segments | None = None) -> torch.Tensor:
    """``Σ_t ‖x_t‖²`` of X [N, T, d], or of the segments of rows X [1, R, d]: float32 [N].

    In a launch of its own, which reads X once and 16 bytes at a time. In that of the product, the programs of the first
    row and column of tiles would make these sums, with the registers and the layout of a product, and end last.
    """
    _, T, d = X.shape
    N, bounds = _samples_of(X, segments)
    block_t, block_d = (16, 32) if INTERPRETED else (32, 128)
    blocks = cdiv(d, block_d)
    partials = torch.empty((N, blocks), dtype=torch.float32, device=X.device)
    arguments = X, partials, bounds, N, T, d, blocks, *X.stride()
    launch(energy_kernel, (N * blocks,), *arguments, device=X.device, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4)
    return partials.sum(1)


def _samples_of(X: torch.Tensor, segments: Segments | None) -> tuple[int, torch.Tensor | None]:
    """How many there are, and their bounds in rows."""
    return (len(X), None) if segments is None else (len(segments), segments.places(X.device))


def run(
    A: torch.Tensor,
    G: torch.Tensor,
    samples: torch.Tensor | None,
    config: Config | None = None,
    segments: Segments | None = None,
) -> torch.Tensor:
    """``‖G_nᵀA_n‖²`` [N] in float32, of what was rounded where there are ``samples`` to fill."""
    _, T, d = A.shape
    p = G.shape[2]
    N, bounds = _samples_of(A, segments)
    dtype = dot_dtype(A, G)
    # Blocks of a quarter of a segment leave a tenth of their positions empty.
    positions = T if segments is None else segments.mean // 4 + 1
    config = config or configure(N, positions, d, p, dtype, vectorised(A, G), chip(A.device))
    tiles_p, tiles_d = cdiv(p, config.BLOCK_P), cdiv(d, config.BLOCK_D)
    partials = torch.empty((N, tiles_p * tiles_d), dtype=torch.float32, device=A.device)
    launch(
        gradient_kernel,
        (N * tiles_p * tiles_d,),
        *(A, G, samples, partials, bounds, N, T, d, p, tiles_p, tiles_d, *A.stride(), *G.stride()),
        device=A.device,
        STORE=samples is not None,
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=dot_precision(dtype),
        **asdict(config),
    )
    return partials.sum(1)  # always in the same order


@torch.library.custom_op("dpfast_kernels::gradient_norm", mutates_args=())
def gradient_norm(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """The rows of ``ghost_norm``, for A [N, T, d] and G [N, T, p], from tiles of G_nᵀA_n that are never stored. Sums of
    squares do not cancel: ``absolute`` is ``squared``.
    """
    return _norm(A, G, None)


def _norm(A: torch.Tensor, G: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    squared = run(A, G, None, segments=segments)
    return torch.stack([squared, squared, energies(A, segments), energies(G, segments)])


def packed_gradient_norm(A: torch.Tensor, G: torch.Tensor, segments: Segments) -> torch.Tensor:
    """``gradient_norm`` of the segments of rows A [1, R, d] and G [1, R, p], which are not copied."""
    return _norm(A, G, segments)


def packed_sample_gradients(
    A: torch.Tensor, G: torch.Tensor, dtype: torch.dtype, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sample_gradients`` of the same."""
    samples = A.new_empty((len(segments), G.shape[2], A.shape[2]), dtype=dtype)
    return samples, run(A, G, samples, segments=segments)


@gradient_norm.register_fake
def _(A, G):
    return A.new_empty((4, A.shape[0]), dtype=torch.float32)


@torch.library.custom_op("dpfast_kernels::sample_gradients", mutates_args=())
def sample_gradients(A: torch.Tensor, G: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """For A [N, T, d] and G [N, T, p]: G_nᵀA_n [N, p, d] rounded to ``dtype``, float32 or bfloat16, and ‖·‖² [N] of the
    rounded, in float32.
    """
    samples = _samples(A, G, dtype)
    return samples, run(A, G, samples)


@sample_gradients.register_fake
def _(A, G, dtype):
    return _samples(A, G, dtype), A.new_empty(A.shape[0], dtype=torch.float32)


def _samples(A: torch.Tensor, G: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return A.new_empty((A.shape[0], G.shape[2], A.shape[2]), dtype=dtype)


def _case(dtype: torch.dtype, N: int, T: int, d: int, p: int, stored: torch.dtype | None, wgmma: bool) -> Compile:
    def call():
        A, G = meta(N, T, d, dtype=dtype), meta(N, T, p, dtype=dtype)
        run(A, G, None if stored is None else _samples(A, G, stored))

    name = "gradient_norm" if stored is None else f"sample_gradients ({stored})"
    return Compile(f"{name} {dtype} {N}x{T}x{d}x{p}", call, wgmma)


def _packed(dtype: torch.dtype, d: int, p: int, wgmma: bool, stored: torch.dtype | None = None) -> Compile:
    def call():
        A, G = meta(1, 32_768, d, dtype=dtype), meta(1, 32_768, p, dtype=dtype)
        if stored is None:
            run(A, G, None, segments=OF_A_CASE)
        else:
            packed_sample_gradients(A, G, stored, OF_A_CASE)

    return Compile(f"packed {'gradient_norm' if stored is None else 'sample_gradients'} {dtype} {d}x{p}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 32, 1024, 1024, 4096, None, True),
    _case(torch.bfloat16, 32, 1024, 1024, 16, None, True),
    _case(torch.float32, 32, 1024, 1024, 4096, None, False),
    _case(torch.bfloat16, 32, 1023, 1023, 4095, None, True),
    _case(torch.bfloat16, 1, 1, 1, 1, None, False),
    _case(torch.bfloat16, 32, 1024, 1024, 4096, torch.bfloat16, True),
    _case(torch.float32, 32, 1024, 1024, 4096, torch.float32, False),
    _case(torch.bfloat16, 32, 1023, 1023, 4095, torch.float32, True),
    _case(torch.bfloat16, 32, 1024, 2048, 16, torch.float32, True),
    _case(torch.bfloat16, 32, 1024, 16, 2048, torch.float32, True),
    _packed(torch.bfloat16, 1024, 4096, True),
    _packed(torch.bfloat16, 1024, 16, True, torch.float32),
    _packed(torch.float32, 1024, 4096, False),
    _packed(torch.bfloat16, 1023, 4095, True, torch.float32),
    Compile("energies", lambda: energies(meta(32, 1024, 1024, dtype=torch.bfloat16))),
    Compile("packed energies", lambda: energies(meta(1, 32_768, 1024, dtype=torch.bfloat16), OF_A_CASE)),
    Compile("energies, odd", lambda: energies(meta(32, 1023, 1023))),
]
