"""Shapes that the static suite predicts: each a call of a kernel on tensors without memory, what it is worth and, where
that differs, what it multiplies; and the reach of each kernel, the most that its form is to have.

Shares are of the tensor cores' peak where a kernel multiplies on them, of the memory's where it only moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.predicted import MACHINES

Options = Mapping[str, int]
BF16 = torch.bfloat16
H100 = MACHINES[90]
FEW_SUMS = "a thread reads 8 numbers for 16 products of its 4 × 4 sums"


@dataclass(frozen=True)
class Shape:
    """One call. The launch that counts is the first that is of ``kernel``.

    ``flops`` are what the call is worth (None: it only moves ``bytes``); ``multiplied`` what its programs multiply, by
    its options, whole tiles included; ``kept`` how many tiles a program works on and the bytes of the L2 cache that
    they take besides (None: one, and none).
    """

    call: Callable[[], object]
    kernel: str
    reach: float
    flops: float | None = None
    bytes: float = 0.0
    multiplied: Callable[[Options], float] | None = None
    kept: Callable[[Options], tuple[int, float]] | None = None
    remark: str = ""

    def compiled(self) -> Any:
        from dpfast_kernels.common import Compile

        return Compile(self.kernel, self.call)


def up(size: int, block: int) -> int:
    """The size in whole blocks."""
    return -(-size // block) * block


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _op(module: str, name: str, *arguments: Any) -> Callable[[], object]:
    """An op of the kernels, run on tensors without memory."""

    def call() -> object:
        import importlib

        return getattr(importlib.import_module(f"dpfast_kernels.{module}"), name)._init_fn(*arguments)

    return call


def _sides(B: int, T: int, d: int, p: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return _meta(B, T, d, dtype=dtype), _meta(B, T, p, dtype=dtype)


def ghost(B: int, T: int, d: int, p: int, dtype: torch.dtype = BF16, inputs: int = 1, layers: int = 1) -> Shape:
    """Of ``inputs`` that go to so many ``layers`` each, in one launch."""

    def pairs_of(options: Options) -> int:
        blocks = up(T, options["BLOCK_S"]) // options["BLOCK_S"]
        return inputs * B * blocks * (blocks + 1) // 2 * (options["BLOCK_S"] // options["BLOCK_T"])

    def kept(options: Options) -> tuple[int, float]:
        rows, columns = options["BLOCK_T"], options["BLOCK_S"]
        if rows == columns:
            return 1, 0.0
        tile, diagonal = 4 * rows * columns, inputs * B * up(T, columns) // rows * 4 * rows * rows
        programs = min(pairs_of(options), H100.processors)
        return up(pairs_of(options), programs) // programs, pairs_of(options) * (1 + layers) * tile + layers * diagonal

    def multiplied(options: Options) -> float:
        turns, _ = kept(options)
        pairs = pairs_of(options) if turns == 1 else turns * min(pairs_of(options), H100.processors)
        depth = up(d, options["BLOCK_K"]) + layers * up(p, options["BLOCK_K"])
        return 2 * pairs * options["BLOCK_T"] * options["BLOCK_S"] * depth

    As = [_meta(B, T, d, dtype=dtype) for _ in range(inputs)] * layers
    call = _op("ghost", "ghost_norms", As, [_meta(B, T, p, dtype=dtype) for _ in As])
    flops = inputs * B * T**2 * (d + layers * p)
    remark = "what there is to do is too little for tiles of 128 × 256, and squares read more bytes a flop"
    if dtype == torch.float32:
        remark = f"{FEW_SUMS}, and registers hold two tiles, no larger ones"
    return Shape(call, "ghost_kernel", 0.65, flops, multiplied=multiplied, kept=kept, remark=remark)


def _tiles(B: int, T: int, d: int, p: int, options: Options) -> float:
    return 2 * B * up(T, options["BLOCK_T"]) * up(d, options["BLOCK_D"]) * up(p, options["BLOCK_P"])


def norm_gemm(B: int, T: int, d: int, p: int, dtype: torch.dtype = BF16) -> Shape:
    call = _op("sample_gradients", "gradient_norm", *_sides(B, T, d, p, dtype))
    return Shape(call, "gradient_kernel", 0.65, 2 * B * T * d * p, multiplied=partial(_tiles, B, T, d, p))


def instantiated(B: int, T: int, d: int, p: int) -> Shape:
    call = _op("sample_gradients", "sample_gradients", *_sides(B, T, d, p, BF16), torch.float32)
    if min(d, p) <= 64:  # of an adapter: it is the memory that decides
        return Shape(call, "gradient_kernel", 0.80, bytes=2 * B * T * (d + p) + 4 * B * p * d)
    return Shape(call, "gradient_kernel", 0.65, 2 * B * T * d * p, multiplied=partial(_tiles, B, T, d, p))


def weight_gradient(B: int, T: int, d: int, p: int, dtype: torch.dtype = BF16) -> Shape:
    factors = _meta(B, dtype=torch.float32)
    call = _op("weight_gradient", "clipped_weight_gradient", *_sides(B, T, d, p, dtype), factors, False)

    def multiplied(options: Options) -> float:
        if T >= 32:
            return _tiles(B, T, d, p, options)
        return 2 * _tiles(1, B * T, d, p, options)  # rows are multiplied as a sum of two bfloat16

    return Shape(call, "weight_gradient_kernel", 0.65, 2 * B * T * d * p, multiplied=multiplied)


def per_layer(p: int, d: int) -> Shape:
    """Noise on a layer's sum, in its place; its norms and its sum are those of other rows."""

    def call() -> object:
        from dpfast_kernels.per_layer import finish

        return finish(_meta(p, d, dtype=torch.float32), _meta(3, dtype=torch.int64), 3, 1.5, 0.5)

    return Shape(call, "finish_kernel", 0.80, bytes=8 * p * d, remark="an element's noise takes many instructions")


def convolution(B: int, channels: int, side: int, stored: bool, dtype: torch.dtype = BF16) -> Shape:
    x = _meta(B, channels, side, side, dtype=dtype)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    flops = 2 * B * side**2 * channels**2 * 9
    if stored:
        call, kernel = _op("convolution", "convolution_sample_gradients", x, x, *geometry, B, True), "sample_gradients"
    else:
        factors = _meta(B, dtype=torch.float32)
        call, kernel = _op("convolution", "convolution_clipped_gradient", x, x, factors, *geometry), "clipped_gradient"

    def multiplied(options: Options) -> float:
        return 2 * B * side**2 * up(channels, options["BLOCK_P"]) * up(9 * channels, options["BLOCK_D"])

    remark = f"{channels} channels make small tiles, and each place in the kernel reads the image again"
    if dtype == torch.float32:
        remark = "tiles are of 64 × 32, as the addresses of two images leave no registers for larger ones"
    return Shape(call, f"{kernel}_kernel", 0.50, flops, multiplied=multiplied, remark=remark)


def cross_term(B: int, T: int, d: int, V: int) -> Shape:
    def call() -> object:
        from dpfast_kernels.embedding_cross_term import cross_term_with

        return cross_term_with(_meta(B, T, dtype=torch.int64), _meta(B, T, d), _meta(B, T, d), _meta(B, T, V))

    remark = "tiles are of 64 × 64: of 128 × 128, what is gathered from G does not fit in an A100's registers"
    flops = 2 * B * T**2 * d
    return Shape(call, "cross_kernel", 0.48, flops, multiplied=lambda _: flops, remark=remark)


def normalised(B: int, T: int, d: int, dtype: torch.dtype = BF16) -> Shape:
    statistics = (_meta(B, T, dtype=torch.float32),) * 2
    G = _meta(B, T, d, dtype=dtype)
    call = _op("normalization", "normalised_sums", G, G, *statistics)
    return Shape(call, "sums_kernel", 0.80, bytes=2 * B * T * d * dtype.itemsize + 8 * B * d)


def positions(B: int, T: int, d: int) -> Shape:
    call = _op("normalization", "sum_positions", _meta(B, T, d))
    return Shape(call, "sums_kernel", 0.80, bytes=2 * B * T * d + 4 * B * d)


def weighted(B: int, n: int, layers: int, dtype: torch.dtype = torch.float32) -> Shape:
    def call() -> object:
        from dpfast_kernels.weighted_sum import sums_of

        return sums_of([_meta(B, n, dtype=dtype) for _ in range(layers)], _meta(layers, B, dtype=torch.float32))

    return Shape(call, "weighted_sums_kernel", 0.80, bytes=layers * (B * n * dtype.itemsize + 4 * n))


SHAPES: dict[str, Shape] = {
    "ghost, B 8, T 512, d 1024, p 4096": ghost(8, 512, 1024, 4096),
    "ghost, B 8, T 1024, d 1024, p 4096": ghost(8, 1024, 1024, 4096),
    "ghost, B 8, T 4096, d 4096, p 4096": ghost(8, 4096, 4096, 4096),
    "ghost, 8 layers, B 8, T 512, d 1024, p 4096": ghost(8, 512, 1024, 4096, inputs=8),
    "ghost, 8 layers, B 8, T 1024, d 1024, p 4096": ghost(8, 1024, 1024, 4096, inputs=8),
    "ghost, q, k and v of 2 inputs, B 8, T 1024, d 1024, p 1024": ghost(8, 1024, 1024, 1024, inputs=2, layers=3),
    "ghost, q, k and v of 2 inputs, B 8, T 4096, d 4096, p 4096": ghost(8, 4096, 4096, 4096, inputs=2, layers=3),
    "ghost, B 8, T 1024, d 1024, p 4096, float32": ghost(8, 1024, 1024, 4096, torch.float32),
    "norm-GEMM, B 8, T 1024, d 1024, p 4096": norm_gemm(8, 1024, 1024, 4096),
    "norm-GEMM, B 8, T 4096, d 4096, p 4096": norm_gemm(8, 4096, 4096, 4096),
    "norm-GEMM, B 8, T 1024, d 1024, p 4096, float32": norm_gemm(8, 1024, 1024, 4096, torch.float32),
    "instantiated, B 8, T 1024, d 4096, p 4096": instantiated(8, 1024, 4096, 4096),
    "instantiated LoRA, B 8, T 1024, d 2048, p 16": instantiated(8, 1024, 2048, 16),
    "instantiated LoRA, B 8, T 1024, d 16, p 2048": instantiated(8, 1024, 16, 2048),
    "weight gradient, B 8, T 1024, d 1024, p 4096": weight_gradient(8, 1024, 1024, 4096),
    "weight gradient, B 8, T 1024, d 4096, p 4096": weight_gradient(8, 1024, 4096, 4096),
    "weight gradient, B 512, T 1, d 1024, p 4096": weight_gradient(512, 1, 1024, 4096),
    "weight gradient, B 8, T 1024, d 1024, p 4096, float32": weight_gradient(8, 1024, 1024, 4096, torch.float32),
    "head: weight gradient, B 8, T 4096, d 2048, p 128256": weight_gradient(8, 4096, 2048, 128256),
    "per layer: noise, d 1024, p 4096": per_layer(4096, 1024),
    "3×3 convolution, samples, B 256, 64 channels, 32×32": convolution(256, 64, 32, True),
    "3×3 convolution, clipped sum, B 256, 64 channels, 32×32": convolution(256, 64, 32, False),
    "3×3 convolution, samples, B 256, 64 channels, 32×32, float32": convolution(256, 64, 32, True, torch.float32),
    "tied cross-term, B 8, T 1024, d 1024, V 50304": cross_term(8, 1024, 1024, 50304),
    "LayerNorm, B 8, T 1024, d 2048": normalised(8, 1024, 2048),
    "LayerNorm, B 8, T 1024, d 2048, float32": normalised(8, 1024, 2048, torch.float32),
    "positions, B 8, T 1024, d 4096": positions(8, 1024, 4096),
    "weighted sums of 32 LoRA layers, B 8": weighted(8, 16 * 2048, 32),
}
SMALL = ("instantiated LoRA, B 8, T 1024, d 16, p 2048",)
