"""What a case of the kernels' suite is, the sizes, and the products: each op beside torch's own.

The bytes of a case are each input read once and each output written once; a ghost norm counts as B·T²(p + d) flops.
Products have the same inputs in each call, be they in the cache or not; what is bound by memory has sets of buffers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.measure import why_not
from dpfast import ops, reference

TOLERANCE = 1e-3  # of the relative error: sums are made in float32, of inputs that float64 holds exactly
UNTIMED = "not timed: another call's failure ended all of them"
NORM, WEIGHT, MEMORY = 0.60, 1 / 1.10, 0.80  # targets on a GPU, as shares of the rate of a set's first case
# Bytes that are used before a buffer's turn comes again: four times an L3 of 32 MiB, twice the L2 of an H100.
BEYOND_CACHE = 128 << 20
FEWEST_SETS, MOST_SETS = 3, 8  # of buffers: small sizes are for seeing that everything runs


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    dtype: torch.dtype
    flops: float  # of one call of a matrix product, about: sets the batch size
    lengths: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]  # d, p
    memory: tuple[int, int, int, int]  # B, T, d, rows of the embedding
    image: tuple[int, int, int]  # B, channels, side
    elements: int  # of the noise's tensor; an update has a quarter
    plans: tuple[tuple[int, int, int, int], ...]  # B, T, d, p


SIZES = {
    "cuda": Sizes(
        dtype=torch.bfloat16,
        flops=6e11,  # 1 ms at 600 TFLOP/s
        lengths=(512, 1024, 2048),
        weights=((1024, 1024), (1024, 4096), (4096, 4096), (8192, 8192)),
        memory=(128, 1024, 1024, 50304),
        image=(512, 128, 32),
        elements=1 << 27,
        plans=(
            (16, 1024, 1024, 1024),
            (16, 1024, 1024, 4096),
            (16, 1024, 4096, 1024),
            (8, 1024, 2048, 8192),
            (16, 1024, 1024, 50304),
            (16, 1024, 2048, 16),
            (16, 1024, 16, 2048),
            (4, 2048, 4096, 4096),
            (2, 8192, 1024, 1024),
            (64, 256, 1024, 1024),
            (128, 64, 1024, 1024),
            (512, 1, 1024, 4096),
        ),
    ),
    "cpu": Sizes(
        dtype=torch.float32,
        flops=1e9,
        lengths=(64, 256),
        weights=((256, 256), (512, 2048)),
        memory=(64, 128, 1024, 8192),
        image=(32, 32, 32),
        elements=1 << 24,
        plans=((16, 64, 256, 256), (16, 128, 512, 2048), (4, 512, 512, 512), (16, 64, 512, 16), (256, 1, 784, 2048)),
    ),
}
SMALL = Sizes(
    dtype=torch.float32,
    flops=2e6,
    lengths=(16,),
    weights=((16, 24),),
    memory=(4, 16, 16, 50),
    image=(2, 3, 8),
    elements=1 << 14,
    plans=((4, 16, 16, 16), (8, 1, 16, 16)),
)


@dataclass
class Case:
    """One call, and the flops and bytes that it stands for."""

    name: str
    flops: float
    bytes: float
    call: Callable[[], Any]
    check: Callable[[], float] | None = None  # calls the op and gives its error beside float64; None: torch's own op
    target: float | None = None  # the least share of the first case's rate
    tolerance: float = TOLERANCE


@dataclass
class CaseSet:
    """Cases that take turns, measured against the first of them; made when it is their time."""

    title: str
    by: str  # what their rates are compared in: "flops" or "bytes"
    dtype: torch.dtype  # of the roofline that they are under
    make: Callable[[], list[Case]]


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run here; then all of their ops are registered."""
    if device.type not in ops.TRITON_DEVICES or ops.why_no_triton() is not None:
        return False
    import dpfast_kernels

    for module in pkgutil.iter_modules(dpfast_kernels.__path__):
        importlib.import_module(f"dpfast_kernels.{module.name}")
    return True


def case_sets(sizes: Sizes, device: torch.device) -> list[CaseSet]:
    """Of the products; :mod:`memory_cases` and :mod:`noise_cases` have the rest."""
    products = {"ghost norm": ghost_cases, "norm-GEMM": gradient_cases, "clipped weight gradient": weight_cases}
    if not has_triton(device):
        del products["norm-GEMM"]
    shapes = [(T, d, p) for d, p in sizes.weights for T in sizes.lengths]
    batch, channels, side = sizes.image
    return [
        CaseSet(
            f"3×3 convolution, B {batch}, {channels} channels, {side}×{side}",
            "flops",
            sizes.dtype,
            partial(convolution_cases, sizes, device),
        ),
        *(
            CaseSet(f"{name}, T {T}, d {d}, p {p}", "flops", sizes.dtype, partial(make, T, d, p, sizes, device))
            for name, make in products.items()
            for T, d, p in shapes
        ),
    ]


def sets_of(nbytes: int) -> int:
    """How many buffers of so many bytes take turns: one that was just used may still be in the cache."""
    return min(MOST_SETS, max(FEWEST_SETS, -(-BEYOND_CACHE // nbytes)))


def wrong(check: Callable[[], float], tolerance: float = TOLERANCE) -> str | None:
    """Why what is checked gets no figure: it fails, or its error is too large."""
    errors: list[float] = []
    reason = why_not(lambda: errors.append(check()))
    if reason is None and not errors[0] <= tolerance:
        reason = f"wrong: relative error {errors[0]:.1e}"
    return reason


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor], by_sample: bool = False) -> float:
    """The largest over the tensors, or over the samples of each, along its first dimension; NaN where something is NaN.

    Raises:
        ValueError: there are more of the ones than of the others.
    """
    errors = []
    for g, w in zip(got, want, strict=True):
        rows = (len(w) if by_sample else 1, -1)
        g, w = g.double().reshape(rows), w.double().reshape(rows)
        errors.append((g - w).norm(dim=1) / w.norm(dim=1))
    return torch.cat(errors).max().item()


def gradients(A: Tensor, G: Tensor) -> Iterator[Tensor]:
    """``g_i = G_iᵀ A_i`` in float64, one after the other: all at once would not fit."""
    return (g.double().T @ a.double() for a, g in zip(A, G, strict=True))


# ---------------------------------------------------------------- matrix products


def sides(flops_of_a_sample: float, T: int, d: int, p: int, sizes: Sizes, device: torch.device) -> list[Tensor]:
    """``A [B, T, d]`` and ``G [B, T, p]``, with an even B that makes a call long enough to be timed."""
    B = 2 * max(1, round(sizes.flops / flops_of_a_sample / 2))
    return [torch.randn(B, T, n, device=device, dtype=sizes.dtype) for n in (d, p)]


def norms_error(squared: Tensor, A: Tensor, G: Tensor) -> float:
    """The largest error of a sample's squared norm."""
    want = torch.stack([torch.linalg.vector_norm(g).square() for g in gradients(A, G)])
    return relative_error([squared], [want], by_sample=True)


def ghost_cases(T: int, d: int, p: int, sizes: Sizes, device: torch.device) -> list[Case]:
    A, G = sides(T**2 * (d + p), T, d, p, sizes, device)
    B, triton = len(A), has_triton(device)

    def grams() -> None:
        """Whole ones, of half of the samples: the same flops."""
        for side in (A[: B // 2], G[: B // 2]):
            torch.bmm(side, side.mT)

    def ghost() -> Tensor:
        if triton:
            return torch.ops.dpfast_kernels.ghost_norm(A, G)[0]
        return ops.ghost_squared_norm(A.unsqueeze(1), G.unsqueeze(1))[0]

    work, read = B * T**2 * (d + p), A.nbytes + G.nbytes
    return [
        Case("torch.bmm: A Aᵀ and G Gᵀ", work, read // 2 + B * T**2 * A.itemsize, grams),
        Case("ghost norm", work, read + 8 * B, ghost, lambda: norms_error(ghost(), A, G), NORM),
    ]


def gradient_cases(T: int, d: int, p: int, sizes: Sizes, device: torch.device) -> list[Case]:
    A, G = sides(2 * T * d * p, T, d, p, sizes, device)
    B = len(A)

    def tiles() -> Tensor:
        return torch.ops.dpfast_kernels.gradient_norm(A, G)[0]

    work, read = 2 * B * T * d * p, A.nbytes + G.nbytes
    return [
        Case("torch.bmm: Gᵀ A", work, read + B * p * d * A.itemsize, lambda: torch.bmm(G.mT, A)),
        Case("norm-GEMM", work, read + 8 * B, tiles, lambda: norms_error(tiles(), A, G), NORM),
    ]


def weight_cases(T: int, d: int, p: int, sizes: Sizes, device: torch.device) -> list[Case]:
    A, G = sides(2 * T * d * p, T, d, p, sizes, device)
    factors, triton = torch.rand(len(A), device=device), has_triton(device)
    rows_a, rows_g = A.flatten(0, 1), G.flatten(0, 1)
    work, read = 2 * len(A) * T * d * p, A.nbytes + G.nbytes

    def clipped() -> Tensor:
        if triton:
            return torch.ops.dpfast_kernels.clipped_weight_gradient(A, G, factors, False)[0]
        return ops.clipped_weight_gradient(A.unsqueeze(1), G.unsqueeze(1), factors)

    def error() -> float:
        want = torch.zeros(p, d, dtype=torch.float64, device=device)
        for g, factor in zip(gradients(A, G), factors.tolist(), strict=True):
            want.add_(g, alpha=factor)
        return relative_error([clipped()], [want])

    def wide() -> Tensor:
        return torch.mm(rows_g.T, rows_a, out_dtype=torch.float32)

    cases = [Case("torch.mm: Gᵀ A", work, read + p * d * A.itemsize, lambda: torch.mm(rows_g.T, rows_a))]
    if device.type == "cuda" and A.itemsize < 4:
        cases.append(Case("torch.mm, float32 out", work, read + 4 * p * d, wide))
    return [*cases, Case("clipped weight gradient", work, read + 4 * p * d, clipped, error, WEIGHT)]


def convolution_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    B, C, side = sizes.image
    x, G = (torch.randn(B, C, side, side, device=device, dtype=sizes.dtype) for _ in range(2))
    weight = torch.empty(C, C, 3, 3, device=device, dtype=sizes.dtype)
    geometry = reference.Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    factors = torch.rand(B, device=device)
    work, read = 2 * B * side**2 * C * weight[0].numel(), x.nbytes + G.nbytes

    def theirs() -> Any:
        return torch.ops.aten.convolution_backward(G, x, weight, None, *geometry.arguments, [False, True, False])

    def samples() -> tuple[Tensor, Tensor | None]:
        return ops.convolution_grad_samples(x, G, weight, geometry, B)

    def clipped() -> Tensor:
        return ops.convolution_clipped_gradient(x, G, weight, geometry, factors)

    def wanted() -> Tensor:
        parts = zip(x.double().split(1), G.double().split(1), strict=True)
        return torch.stack([reference.convolution_weight_gradient(*one, weight.double(), geometry) for one in parts])

    def samples_error() -> float:
        got, squares = samples()
        want = wanted()
        made = [got] if squares is None else [got, squares]
        return relative_error(made, [want, want.flatten(1).square().sum(1)][: len(made)], by_sample=True)

    def clipped_error() -> float:
        return relative_error([clipped()], [torch.tensordot(factors.double(), wanted(), 1)])

    n = weight.numel()
    return [
        Case("torch: the convolution's weight gradient", work, read + weight.nbytes, theirs),
        Case("convolution_grad_samples", work, read + 4 * B * n, samples, samples_error),
        Case("convolution_clipped_gradient", work, read + 4 * n, clipped, clipped_error),
    ]
