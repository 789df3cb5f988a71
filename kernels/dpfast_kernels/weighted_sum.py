"""Sums over the samples and squared norms of per-sample gradients that were kept, many tensors a launch.

A launch gets the addresses of up to 32 tensors as its parameters, as tuples, and each program picks its own. A table
in device memory would have to be copied there from the host: from pageable memory that waits for the device and cannot
be captured in a CUDA graph, and a captured copy from pinned memory would be read again at each replay. Tensors are
grouped by what the code depends on: dtype, and whether rows are aligned. A model's gradients are one or two groups.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, Compile, cdiv, launch, meta, next_power_of_2

MOST = 4 if INTERPRETED else 32
"""Tensors of one launch."""
BLOCK = 64 if INTERPRETED else 4096
"""Elements that a program loads at a time."""
ROWS = 8 if INTERPRETED else 256
"""Samples that one program adds up: where there are more, their sums are added in a second launch."""
PIECE = 4 * BLOCK
"""Elements whose squares are added in float32, the rest in float64."""
CODE = tl.constexpr(2**40 + 2)
"""Numbers in a tuple are passed as 16 v + CODE. Triton compiles anew where a number is 1, a multiple of 16 or above
2³¹, in a tuple even if told not to: each model, and each batch size, would have kernels of its own."""


@triton.jit
def find(index, ends, COUNT: tl.constexpr):
    """Which of the tensors a program works on, and the first program that does; tensor k has those below ends[k]."""
    which = 0
    first = tl.zeros((), dtype=tl.int64)
    for k in tl.static_range(COUNT - 1):
        end = (ends[k] - CODE) >> 4
        past = index >= end
        which += past.to(tl.int32)
        first = tl.where(past, end, first)
    return which, first


@triton.jit
def pick(table, which, COUNT: tl.constexpr):
    """table[which], int64: a number as it was passed, or a pointer's address."""
    value = table[0].to(tl.int64)
    for k in tl.static_range(1, COUNT):
        value = tl.where(which == k, table[k].to(tl.int64), value)
    return value


@triton.jit
def pick_number(table, which, COUNT: tl.constexpr):
    return (pick(table, which, COUNT) - CODE) >> 4


@triton.jit
def rows_of(samples, sizes, which, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the elements of one tensor, and how many a sample has."""
    # as a distance from the first tensor: what is known of a distance's alignment outlives the addition
    bytes = samples[0].dtype.element_ty.primitive_bitwidth // 8
    distance = (pick(samples, which, COUNT) - samples[0].to(tl.int64)) // bytes
    n = pick_number(sizes, which, COUNT)
    if ALIGNED:
        distance = tl.multiple_of(distance, 16)
        n = tl.multiple_of(n, 16)
    return samples[0] + distance, n


@triton.jit(do_not_specialize=["B", "slices"])
def weighted_sums_kernel(
    samples,  # tuple: [B, n]
    outs,  # tuple: [slices, n]
    sizes,  # tuple: n
    ends,  # tuple: programs of this tensor and those before it
    numbers,  # tuple: row of factors
    factors,  # [len, B]
    B,
    slices,
    f_k,
    f_b,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Σ_i factor_i · g_i over one slice of the samples and one block of elements; without samples of factor 0
    index = tl.program_id(0)
    which, first = find(index, ends, COUNT)
    x, n = rows_of(samples, sizes, which, COUNT, ALIGNED)
    out, _ = rows_of(outs, sizes, which, COUNT, ALIGNED)
    factors += pick_number(numbers, which, COUNT) * f_k
    piece = (index - first) % slices
    columns = ((index - first) // slices).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n

    # [BLOCK_B, BLOCK_N]
    sums = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    end = tl.minimum((piece + 1) * ROWS, B)
    for start in range(piece * ROWS, end, BLOCK_B):
        i = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        factor = tl.load(factors + i * f_b, mask=i < end, other=0.0)
        kept = (factor != 0.0)[:, None] & inside[None, :]
        g = tl.load(x + i[:, None] * n + columns[None, :], mask=kept, other=0.0).to(tl.float32)
        sums += factor[:, None] * g
    tl.store(out + piece * n + columns, tl.sum(sums, axis=0), mask=inside)


@triton.jit
def squares_kernel(
    samples,  # tuple: [B, n]
    sizes,  # tuple: n
    ends,  # tuple: programs of this tensor and those before it
    partials,  # [programs]
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    # Σ_k g_ik² over one piece of one sample of one tensor
    index = tl.program_id(0)
    which, first = find(index, ends, COUNT)
    x, n = rows_of(samples, sizes, which, COUNT, ALIGNED)
    pieces = tl.cdiv(n, PIECE)
    i = (index - first) // pieces
    start = (index - first) % pieces * PIECE
    x += i * n
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in tl.static_range(PIECE // BLOCK):
        columns = start + block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(x + columns, mask=columns < n, other=0.0).to(tl.float32)
        sums += g * g
    tl.store(partials + index, tl.sum(sums))


@triton.jit(do_not_specialize=["B"])
def finish_squares_kernel(
    sizes,  # tuple: n
    ends,  # tuple: programs of squares_kernel
    numbers,  # tuple: row of squared
    partials,
    squared,  # [len, B]
    B,
    COUNT: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Σ over the pieces of one sample of one tensor, in float64
    index = tl.program_id(0)
    which = index // B
    i = index % B
    n = pick_number(sizes, which, COUNT)
    pieces = tl.cdiv(n, PIECE)
    begin = pick_number(ends, which, COUNT) - (B - i) * pieces
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, pieces, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + begin + k, mask=k < pieces, other=0.0).to(tl.float64)
    tl.store(squared + pick_number(numbers, which, COUNT) * B + i, tl.sum(sums).to(tl.float32))


class Group:
    """Tensors ``[B, n]`` of one launch: one dtype, none empty, and either all rows aligned or taken as if none were."""

    def __init__(self, rows: Sequence[torch.Tensor], numbers: list[int], aligned: bool):
        self.count = next_power_of_2(len(numbers))  # one of few; the entries that fill up are never found
        self.rows = self.tensors([rows[k] for k in numbers])
        self.numbers = numbers
        self.widths = [rows[k].shape[1] for k in numbers]
        self.sizes = self.table(self.widths)
        self.options = {"COUNT": self.count, "ALIGNED": aligned}

    def tensors(self, values: Sequence) -> tuple:
        return (*values, *[values[-1]] * (self.count - len(values)))

    def table(self, numbers: Iterable[int]) -> tuple[int, ...]:
        return self.tensors([16 * number + CODE.value for number in numbers])


def grouped(rows: Sequence[torch.Tensor]) -> Iterator[Group]:
    """Tensors that share a launch."""
    groups: dict[tuple[torch.dtype, bool], list[int]] = {}
    for k, x in enumerate(rows):
        if x.numel():
            groups.setdefault((x.dtype, x.shape[1] % 16 == 0 and x.data_ptr() % 64 == 0), []).append(k)
    for (_, aligned), members in groups.items():
        for start in range(0, len(members), MOST):
            yield Group(rows, members[start : start + MOST], aligned)


def as_rows(samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``[B, *]`` as contiguous ``[B, n]``."""
    return [x.contiguous().view(x.shape[0], math.prod(x.shape[1:])) for x in samples]


@torch.library.custom_op("dpfast_kernels::weighted_sums", mutates_args=())
def weighted_sums(samples: Sequence[torch.Tensor], factors: torch.Tensor) -> list[torch.Tensor]:
    """``Σ_i factor_i · g_i`` of several tensors ``[B, *]``: float32 ``[*]`` each.

    ``factors`` ``[B]``, or ``[len(samples), B]``. A sample whose factor is 0 is left out, not multiplied: its NaN or
    inf is nowhere in the sum. One launch for up to 32 tensors of a dtype with aligned rows, one for 32 others; a second
    where there are more than 256 samples.
    """
    shapes = [x.shape[1:] for x in samples]
    sums = sums_of(as_rows(samples), factors.float().expand(len(samples), -1))
    return [x.view(shape) for x, shape in zip(sums, shapes, strict=True)]


def sums_of(rows: list[torch.Tensor], factors: torch.Tensor) -> list[torch.Tensor]:
    B = factors.shape[1]
    slices = max(1, cdiv(B, ROWS))
    block_b = min(8, next_power_of_2(max(B, 1)))
    block_n = BLOCK // block_b
    new = {"dtype": torch.float32, "device": factors.device}
    # without samples every sum is 0
    out = [torch.empty((slices, x.shape[1]), **new) if B else torch.zeros((1, x.shape[1]), **new) for x in rows]
    for group in grouped(rows):
        ends = list(accumulate(cdiv(n, block_n) * slices for n in group.widths))
        outs = group.tensors([out[k] for k in group.numbers])
        tables = group.rows, outs, group.sizes, group.table(ends), group.table(group.numbers)
        launch(
            weighted_sums_kernel,
            (ends[-1],),
            *(*tables, factors, B, slices, *factors.stride()),
            device=factors.device,
            BLOCK_B=block_b,
            BLOCK_N=block_n,
            ROWS=ROWS,
            num_warps=4,
            **group.options,
        )
    if slices == 1:
        return [x[0] for x in out]
    return sums_of(out, torch.ones((1, slices), **new).expand(len(rows), -1))


@torch.library.custom_op("dpfast_kernels::squared_norms", mutates_args=())
def squared_norms(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """``‖g_i‖²`` of several tensors ``[B, *]``: float32 ``[len(samples), B]``. Two launches a group of tensors."""
    rows = as_rows(samples)
    B = rows[0].shape[0]
    squared = rows[0].new_zeros((len(rows), B), dtype=torch.float32)
    for group in grouped(rows):
        ends = list(accumulate(B * cdiv(n, PIECE) for n in group.widths))
        partials = squared.new_empty(ends[-1])
        options = {"device": squared.device, "num_warps": 4, "PIECE": PIECE}
        tables = group.sizes, group.table(ends)
        launch(squares_kernel, (ends[-1],), group.rows, *tables, partials, **options, **group.options, BLOCK=BLOCK)
        arguments = (*tables, group.table(group.numbers), partials, squared, B)
        grid = (len(group.numbers) * B,)
        launch(finish_squares_kernel, grid, *arguments, **options, COUNT=group.count, BLOCK=min(BLOCK, 1024))
    return squared


@weighted_sums.register_fake
def _(samples, factors):
    return [x.new_empty(x.shape[1:], dtype=torch.float32) for x in samples]


@squared_norms.register_fake
def _(samples):
    return samples[0].new_empty((len(samples), samples[0].shape[0]), dtype=torch.float32)


def _case(name: str, dtype: torch.dtype, B: int, *sizes: int) -> Compile:
    def call() -> None:
        rows = [meta(B, n, dtype=dtype) for n in sizes]
        if name == "squared_norms":
            squared_norms._init_fn(rows)
        else:
            sums_of(rows, meta(len(rows), B))

    return Compile(f"{name} {dtype} {B}x{sizes[0]} {len(sizes)}", call)


COMPILES = [
    _case("weighted_sums", torch.bfloat16, 32, *[1024 * 1024] * 30),
    _case("weighted_sums", torch.float32, 32, 1024 * 1024, 1024),
    _case("weighted_sums", torch.float32, 600, 50),
    _case("squared_norms", torch.bfloat16, 32, *[1024 * 1024] * 30),
    _case("squared_norms", torch.float32, 32, 50),
]
