"""The ops that are bound by memory, Triton's and the compiled ones, beside a copy: for the kernels' suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from bench.suites.kernel_cases import MEMORY, Case, CaseSet, Sizes, has_triton, relative_error, sets_of
from dpfast import ops, reference


def case_sets(sizes: Sizes, device: torch.device) -> list[CaseSet]:
    title = ", ".join(f"{name} {size}" for name, size in zip("BTd", sizes.memory, strict=False))
    return [CaseSet(f"memory, {title}", "bytes", sizes.dtype, partial(memory_cases, sizes, device))]


@dataclass
class _Op:
    """A memory-bound op: ``arguments`` for each set of buffers, and what Triton's must give for the first of them: all
    of its outputs, but those that are None are not compared. The compiled op gives ``native`` of them, or all.
    """

    flops: float
    bytes: float
    arguments: list[tuple[Any, ...]]
    want: Callable[[], Sequence[Tensor | None]]
    native: tuple[int, ...] | None = None
    by_sample: bool = True  # outputs have a row, or a number, for each sample


def memory_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """A copy, then each op of Triton's kernels and of the compiled library; ids are as frequent as words are.

    All of them together go from one set of buffers to the next: none finds in the cache what its neighbour has read.
    """
    (B, T, d, rows), dtype = sizes.memory, sizes.dtype
    ids = torch.multinomial(1 / torch.arange(1.0, rows + 1), B * T, replacement=True).view(B, T).to(device)
    factors = torch.rand(B, device=device)
    mean, rstd = torch.randn(B, T, device=device), torch.rand(B, T, device=device)
    groups = [torch.rand(B, 1, device=device) for _ in range(2)]
    n, size = B * (T * d // 2), B * T * d
    sets, turns = sets_of(4 * n), count()
    G, x = ([torch.randn(B, T, d, device=device, dtype=dtype) for _ in range(sets)] for _ in range(2))
    samples = [torch.randn(B, n // B, device=device) for _ in range(sets)]  # in float32, as large as G in bfloat16
    targets = [torch.empty_like(y) for y in samples]

    def copy() -> None:
        turn = next(turns) % sets
        targets[turn].copy_(samples[turn])

    def channel_sums() -> list[Tensor]:
        sums = reference.channel_sums(G[0].double(), x[0], *groups)
        return [out for one in sums for out in (one, one.square().sum(1))]

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
            by_sample=False,
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
            channel_sums,
            native=(0, 2),
        ),
        "embedding_squared_norm": _Op(
            3 * size,
            first + 8 * B * T,
            [(ids, g) for g in G],
            lambda: [reference.embedding_squared_norm(ids, G[0].double())[0], None],
        ),
        "embedding_sum": _Op(
            2 * size,
            first + 8 * B * T + 4 * rows * d,
            [(ids, g, factors, rows) for g in G],
            lambda: [embedding_sum()],
            by_sample=False,
        ),
    }
    libraries = {"Triton": torch.ops.dpfast_kernels} if has_triton(device) else {}
    cases = [Case("copy", 0, 8 * n, copy)]
    for name, one in found.items():
        native = {"native": torch.ops.dpfast} if ops.is_native(name, device) else {}
        for library, namespace in (libraries | native).items():
            outputs = one.native if library == "native" else None
            call = partial(_next_call, getattr(namespace, name), one.arguments, turns)
            check = partial(_error, getattr(namespace, name), one, outputs)
            cases.append(Case(f"{name} ({library})", one.flops, one.bytes, call, check, MEMORY))
    return cases


def _next_call(op: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], turns: Iterator[int]) -> Any:
    return op(*arguments[next(turns) % len(arguments)])


def _error(op: Callable[..., Any], one: _Op, outputs: tuple[int, ...] | None) -> float:
    got = op(*one.arguments[0])
    made = [got] if isinstance(got, Tensor) else list(got)
    want = one.want()
    pairs = zip(made, want if outputs is None else [want[k] for k in outputs], strict=True)
    compared = [(g, w) for g, w in pairs if w is not None]
    return relative_error([g for g, _ in compared], [w for _, w in compared], one.by_sample)
