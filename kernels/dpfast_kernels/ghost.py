"""Ghost norms: ‖G_nᵀA_n‖² from A_n A_nᵀ and G_n G_nᵀ, in tiles of both, and no gradient formed.

Many layers are one launch, whose last programs leave processors idle once and not once a layer. A program has one pair
of tiles of one sample of one input: it forms the tile of A Aᵀ and keeps it for all layers that the input goes to, such
as query, key and value, or gate and up, whose tiles of G Gᵀ it forms one after the other.

A square tile of A Aᵀ is kept in registers. That leaves half of them for G Gᵀ, and a product of 128 × 128 waits for the
L2 cache. Where there is enough to do, tiles are of 128 × 256, which need three quarters of the bytes, and that of A Aᵀ
is kept in memory: one tile a processor, each of which goes through several pairs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .common import (
    INTERPRETED,
    TRITON_DTYPE,
    Chip,
    Compile,
    cdiv,
    chip,
    dot_dtype,
    dot_precision,
    launch,
    meta,
    next_power_of_2,
    vectorised,
)
from .ghost_tiles import ghost_kernel, pairs_of

MOST = 4 if INTERPRETED else 8
"""Layers of one launch, unless more have one input: a few waves of programs leave little idle in the last one."""


@dataclass(frozen=True)
class Config:
    BLOCK_T: int
    BLOCK_S: int  # BLOCK_T, or twice as many
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def tiles(self, T: int) -> int:
        """Those of a sample: each two rows of tiles cover one of squares of BLOCK_S."""
        return pairs_of(T, self.BLOCK_S) * (self.BLOCK_S // self.BLOCK_T)


SQUARE, WIDE = Config(128, 128, 64, 8, 4), Config(128, 256, 64, 8, 3)


def configure(N: int, T: int, d: int, p: int, layers: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """Tiles of 128 × 128 or 128 × 256, or smaller ones where those would leave half of the processors without work;
    ``N`` samples of all inputs together, which go to so many ``layers`` each.
    """
    if INTERPRETED:
        return square(16, dtype, vectorised)
    slow = dtype == torch.float32 or not vectorised
    block = max(16, min(64 if slow else 128, next_power_of_2(T)))
    while block > 32 and 2 * N * pairs_of(T, block) < chip.processors:
        block //= 2
    if block == 128 and chip.large:
        return min((SQUARE, WIDE), key=lambda config: cache_bytes(config, N, T, d, p, layers, chip))
    return square(block, dtype, vectorised)


def square(block: int, dtype: torch.dtype, vectorised: bool) -> Config:
    """With tiles of block × block."""
    if INTERPRETED:
        return Config(block, block, 16, 4, 1)
    warps = {16: 2, 32: 4}.get(block, 8)
    if dtype == torch.float32 or not vectorised:
        return Config(block, block, 16 if dtype == torch.float32 else 32, warps, 3)
    return Config(block, block, 64 if block > 16 else 128, warps, 4)


def cache_bytes(config: Config, N: int, T: int, d: int, p: int, layers: int, chip: Chip) -> int:
    """What the processor with the most tiles moves from and to the L2 cache, which limits both forms."""
    rows, columns = config.BLOCK_T, config.BLOCK_S
    tile = 2 * (rows + columns) * (d + layers * p)
    if columns > rows:
        tile += 4 * rows * columns * (1 + layers)
    return cdiv(N * config.tiles(T), chip.processors) * tile


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


def run(As: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor], config: Config | None = None) -> torch.Tensor:
    """``ghost_norms``, with another configuration where one is given."""
    N, T, _ = As[0].shape
    sums, order = [], []
    for inputs in by_input(As, Gs):
        layers = [k for some in inputs for k in some]
        A, G = As[layers[0]], Gs[layers[0]]
        dtype = dot_dtype(A, G)
        d, p, each, gpu = A.shape[2], G.shape[2], len(inputs[0]), chip(A.device)
        chosen = config or configure(N * len(inputs), T, d, p, each, dtype, vectorised(A, G), gpu)
        rows, columns = chosen.BLOCK_T, chosen.BLOCK_S
        pairs = chosen.tiles(T)
        programs = all_pairs = len(inputs) * N * pairs
        partials = torch.empty((len(layers), 4, N, pairs), dtype=torch.float32, device=A.device)
        kept = None
        if columns > rows:
            programs = min(all_pairs, gpu.processors)
            kept = partials.new_empty((programs, columns + rows, rows))
        sides = filled([As[some[0]] for some in inputs]), filled([Gs[k] for k in layers])
        sizes = N, T, d, p, pairs, cdiv(T, columns), all_pairs
        launch(
            ghost_kernel,
            (programs,),
            *(*sides, partials, kept, each, *sizes, *A.stride(), *G.stride()),
            device=A.device,
            INPUTS=len(sides[0]),
            LAYERS=len(sides[1]),
            ALIGNED=not any(X.data_ptr() % 16 for X in (A, G)),
            DTYPE=TRITON_DTYPE[dtype],
            PRECISION=dot_precision(dtype),
            **asdict(chosen),
        )
        sums += partials.sum(3).unbind()  # always in the same order
        order += layers
    return torch.stack([sums[order.index(k)] for k in range(len(order))])


def filled(Xs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One of few numbers of tensors; those that fill up are never picked."""
    return (*Xs, *[Xs[-1]] * (next_power_of_2(len(Xs)) - len(Xs)))


@torch.library.custom_op("dpfast_kernels::ghost_norm", mutates_args=())
def ghost_norm(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """For each sample of A [N, T, d] and G [N, T, p], rows of a float32 [4, N]:

    ========  ===========================  =====================================
    squared   Σ_{t,s} (a_t·a_s)(g_t·g_s)   ‖G_nᵀA_n‖², may come out negative
    absolute  Σ_{t,s} |a_t·a_s| |g_t·g_s|  how much of it may have cancelled
    energy_A  Σ_t ‖a_t‖²
    energy_G  Σ_t ‖g_t‖²
    ========  ===========================  =====================================

    A bias has no row, though ‖Σ_t g_t‖² is the sum of G Gᵀ: its per-sample gradient Σ_t g_t is written out for the
    clipped sum, and the kernel that writes it gives its norm as well.
    """
    return run([A], [G])[0]


@ghost_norm.register_fake
def _(A, G):
    return A.new_empty((4, A.shape[0]), dtype=torch.float32)


@torch.library.custom_op("dpfast_kernels::ghost_norms", mutates_args=())
def ghost_norms(As: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor]) -> torch.Tensor:
    """``ghost_norm`` of layers with A [N, T, d] and G [N, T, p] of one N and T each: float32 [len(As), 4, N].

    One launch for up to 8 layers that are alike in all but where they are in memory. Where that is the same for several
    A, ``A Aᵀ`` is formed once.
    """
    return run(As, Gs)


@ghost_norms.register_fake
def _(As, Gs):
    return As[0].new_empty((len(As), 4, As[0].shape[0]), dtype=torch.float32)


def _case(
    dtype: torch.dtype, N: int, T: int, d: int, p: int, wgmma: bool, layers: int = 1, config: Config | None = None
) -> Compile:
    def call():
        inputs = [meta(N, T, d, dtype=dtype) for _ in range(2 if layers > 1 else 1)]
        run(inputs * layers, [meta(N, T, p, dtype=dtype) for _ in inputs * layers], config)

    return Compile(f"ghost_norm {dtype} {N}x{T}x{d}x{p} {layers}{' square' if config else ''}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 8, 1024, 1024, 1024, True, layers=3),
    _case(torch.bfloat16, 8, 4096, 4096, 4096, True, layers=3),
    _case(torch.float16, 32, 1024, 1024, 4096, True),
    _case(torch.bfloat16, 32, 1024, 1024, 4096, True, config=SQUARE),
    _case(torch.bfloat16, 2, 512, 1024, 4096, True),
    _case(torch.bfloat16, 512, 16, 1024, 4096, False),
    _case(torch.float32, 32, 1024, 1024, 4096, False),
    _case(torch.bfloat16, 32, 1023, 1023, 4095, True),
    _case(torch.bfloat16, 1, 1, 1, 1, False),
]
