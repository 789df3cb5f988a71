"""Ghost norms of the samples of packed rows, in square tiles: ‖G_nᵀA_n‖² where A_n and G_n are some positions of a row.

A program has one pair of tiles of one sample: there is none for pairs of positions of different samples.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    TRITON_DTYPE,
    Chip,
    Compile,
    chip,
    dot_dtype,
    dot_precision,
    launch,
    meta,
    vectorised,
    wide,
)
from .ghost import Config, by_input, filled, square
from .ghost_tiles import in_registers, one_of, tile_pair
from .segments import OF_A_CASE, Segments, sample_at


def configure(segments: Segments, inputs: int, dtype: torch.dtype, vectorised: bool, chip: Chip) -> Config:
    """Tiles of the least work, as many are mostly empty where samples are short; small tiles do a product slower."""
    if INTERPRETED:
        return square(16, dtype, vectorised)
    slow = dtype == torch.float32 or not vectorised
    speeds = {16: 0.25, 32: 0.5, 64: 1.0} if slow else {16: 0.2, 32: 0.4, 64: 0.8, 128: 1.0}
    block = min(speeds, key=lambda block: sum(segments.pairs(block)) * block**2 / speeds[block])
    while block > 32 and 2 * inputs * sum(segments.pairs(block)) < chip.processors:
        block //= 2
    return square(block, dtype, vectorised)


@triton.jit(do_not_specialize=["layers"])  # of a loop of 1, Triton 3.6 makes products that wait for each other
def packed_ghost_kernel(
    As,  # tuple: [R, d]
    Gs,  # tuple: [R, p], for each input those of its layers
    partials,  # [layers, 4, slots]
    bounds,  # [N, 2]
    owners,  # of each slot its sample
    firsts,  # of which each sample has those from here on
    layers,  # of each input
    slots,  # of one layer: pairs of tiles of all samples
    d,
    p,
    a_t,
    a_d,
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
    n = tl.load(owners + slot).to(tl.int64)
    pair = slot - tl.load(firsts + n)
    _, first, length = sample_at(bounds, n, slot < slots, 0)
    row, column = tile_pair(pair, tl.cdiv(length, BLOCK_T))
    A = one_of(As, which, INPUTS, ALIGNED) + first * a_t
    out = partials + wide(which * layers) * 4 * slots + slot
    in_registers(
        *(A, Gs, out, which * layers, layers, first, length, d, p, wide(slots), row, column),
        *(a_t, a_d, g_t, g_t, g_p, LAYERS, ALIGNED, DTYPE, PRECISION, BLOCK_T, BLOCK_K),
    )


def packed_ghost_norms(
    As: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor], segments: Segments, config: Config | None = None
) -> torch.Tensor:
    """``ghost_norms`` of the samples of rows A [1, R, d] and G [1, R, p], which are not copied: float64 [n, 4, N]."""
    sums, order = [], []
    for inputs in by_input(As, Gs):
        layers = [k for some in inputs for k in some]
        A, G = As[layers[0]], Gs[layers[0]]
        dtype = dot_dtype(A, G)
        chosen = config or configure(segments, len(inputs), dtype, vectorised(A, G), chip(A.device))
        owners, firsts = segments.owners(chosen.BLOCK_T, A.device)
        partials = torch.empty((len(layers), 4, len(owners)), dtype=torch.float32, device=A.device)
        sides = filled([As[some[0]] for some in inputs]), filled([Gs[k] for k in layers])
        tables = segments.places(A.device), owners, firsts, len(inputs[0]), len(owners)
        options = asdict(chosen)
        del options["BLOCK_S"]
        launch(
            packed_ghost_kernel,
            (len(inputs) * len(owners),),
            *(*sides, partials, *tables, A.shape[2], G.shape[2], *A.stride()[1:], *G.stride()[1:]),
            device=A.device,
            INPUTS=len(sides[0]),
            LAYERS=len(sides[1]),
            ALIGNED=not any(X.data_ptr() % 16 for X in (A, G)),
            DTYPE=TRITON_DTYPE[dtype],
            PRECISION=dot_precision(dtype),
            **options,
        )
        sums += _added_up(partials, firsts).unbind()
        order += layers
    return torch.stack([sums[order.index(k)] for k in range(len(order))])


def _added_up(partials: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor:
    """``[layers, 4, N]`` in float64 of ``[layers, 4, slots]``, always in the same order."""
    if partials.is_meta:
        return partials.new_empty(len(partials), 4, len(firsts) - 1)
    by_slot = partials.flatten(0, 1).T.double()
    sums = torch.segment_reduce(by_slot, "sum", offsets=firsts.long(), axis=0, unsafe=True, initial=0)
    return sums.T.unflatten(0, (-1, 4))


def _case(dtype: torch.dtype, d: int, p: int, wgmma: bool) -> Compile:
    def call():
        A, G = meta(1, 32_768, d, dtype=dtype), meta(1, 32_768, p, dtype=dtype)
        packed_ghost_norms([A], [G], OF_A_CASE)

    return Compile(f"packed ghost_norm {dtype} {d}x{p}", call, wgmma)


COMPILES = [
    _case(torch.bfloat16, 1024, 4096, True),
    _case(torch.float32, 1024, 4096, False),
    _case(torch.bfloat16, 1023, 4095, True),
]
