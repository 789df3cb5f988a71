"""The ops that are bound by memory, Triton's and the compiled ones, beside a copy: for the kernels' suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bench.suites.kernel_cases import MEMORY, SETS, Case, CaseSet, Sizes, has_triton, relative_error
from dpfast import ops, reference


def case_sets(sizes: Sizes, device: torch.device) -> list[CaseSet]:
    title = ", ".join(f"{name} {size}" for name, size in zip("BTd", sizes.memory, strict=False))
    return [CaseSet(f"memory, {title}", "bytes", sizes.dtype, partial(memory_cases, sizes, device))]


@dataclass
class _Op:
    """A memory-bound op: ``arguments`` for each set of buffers, and what it must give for the first of them."""

    flops: float
    bytes: float
    arguments: list[tuple[Any, ...]]
    want: Callable[[], Sequence[Tensor]]
    triton_outputs: tuple[int, ...] | None = None  # those of Triton's kernel that are wanted; None: the first ones


def memory_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """A copy, then each op of Triton's kernels and of the compiled library; ids are as frequent as words are."""
    (B, T, d, rows), dtype = sizes.memory, sizes.dtype
    ids = torch.multinomial(1 / torch.arange(1.0, rows + 1), B * T, replacement=True).view(B, T).to(device)
    factors = torch.rand(B, device=device)
    mean, rstd = torch.randn(B, T, device=device), torch.rand(B, T, device=device)
    groups = [torch.rand(B, 1, device=device) for _ in range(2)]
    G, x = ([torch.randn(B, T, d, device=device, dtype=dtype) for _ in range(SETS)] for _ in range(2))
    samples = [torch.randn(B, T * d // 2, device=device) for _ in range(SETS)]  # in float32, as large as G in bfloat16
    copies = cycle([(y, torch.empty_like(y)) for y in samples])
    n, size = samples[0].numel(), G[0].numel()

    def copy() -> None:
        source, target = next(copies)
        target.copy_(source)

    def embedding_sum() -> Tensor:
        scaled = (G[0].double() * factors.double().view(-1, 1, 1)).flatten(0, 1)
        return torch.zeros(rows, d, dtype=torch.float64, device=device).index_add_(0, ids.flatten(), scaled)

    first, both = G[0].nbytes, 2 * G[0].nbytes
    found: dict[str, _Op] = {
        "weighted_sums": _Op(
            2 * n,
            4 * n + 4 * n // B,
            [([y], factors) for y in samples],
            lambda: [reference.weighted_sum(samples[0].double(), factors)],
        ),
        "squared_norms": _Op(
            2 * n, 4 * n, [([y],) for y in samples], lambda: reference.squared_norm(samples[0].double())[:1]
        ),
        "sum_positions": _Op(
            size, first + 4 * B * d, [(g,) for g in G], lambda: reference.sum_positions(G[0].double())
        ),
        "normalised_sums": _Op(
            5 * size,
            both + 8 * B * (T + d),
            [(*pair, mean, rstd) for pair in zip(G, x, strict=True)],
            lambda: reference.normalised_sums(G[0].double(), x[0], mean, rstd),
        ),
        "channel_sums": _Op(
            3 * size,
            both + 8 * B * (1 + T),
            [(*pair, *groups) for pair in zip(G, x, strict=True)],
            lambda: reference.channel_sums(G[0].double(), x[0], *groups),
            triton_outputs=(0, 2),
        ),
        "embedding_squared_norm": _Op(
            3 * size,
            first + 8 * B * T,
            [(ids, g) for g in G],
            lambda: reference.embedding_squared_norm(ids, G[0].double())[:1],
        ),
        "embedding_sum": _Op(
            2 * size,
            first + 8 * B * T + 4 * rows * d,
            [(ids, g, factors, rows) for g in G],
            lambda: [embedding_sum()],
        ),
    }
    libraries = {"Triton": torch.ops.dpfast_kernels} if has_triton(device) else {}
    cases = [Case("copy", 0, 8 * n, copy)]
    for name, one in found.items():
        native = {"native": torch.ops.dpfast} if ops.is_native(name, device) else {}
        for library, namespace in (libraries | native).items():
            outputs = one.triton_outputs if library == "Triton" else None
            call = partial(_next_call, getattr(namespace, name), cycle(one.arguments))
            check = partial(_error, getattr(namespace, name), one, outputs)
            cases.append(Case(f"{name} ({library})", one.flops, one.bytes, call, check, MEMORY))
    return cases


def _next_call(op: Callable[..., Any], arguments: Iterator[tuple[Any, ...]]) -> Any:
    return op(*next(arguments))


def _error(op: Callable[..., Any], one: _Op, outputs: tuple[int, ...] | None) -> float:
    got = op(*one.arguments[0])
    made = [got] if isinstance(got, Tensor) else list(got)
    return relative_error(made if outputs is None else [made[k] for k in outputs], one.want())
