"""Single layers as workloads: one of each kind, and a linear layer whose sizes grow one at a time.

A layer's outputs are taken for logits, and its inputs get a gradient, as they would inside of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import FULL, Workload

# Of every kind: B, T, d; what a convolution sees is B, C = d / 8, and an image of T pixels.
SIZES = {"cpu": (16, 64, 512), "cuda": (64, 1024, 1024), "tiny": (4, 4, 32)}
VOCABULARY = {"cpu": 4096, "cuda": 50304, "tiny": 32}


@dataclass(frozen=True)
class Sweep:
    """A linear layer at ``values`` of one of its sizes, all others as in ``fixed`` (B, T, d, p)."""

    grows: str
    values: tuple[int, ...]
    fixed: dict[str, int]

    @property
    def title(self) -> str:
        return "linear layer, " + ", ".join(f"{name} {size}" for name, size in self.fixed.items())


def _powers(first: int, last: int, factor: int = 4) -> tuple[int, ...]:
    found = [first]
    while found[-1] * factor < last:
        found.append(found[-1] * factor)
    return (*found, last)


SWEEPS = {
    "cpu": (
        Sweep("T", _powers(64, 8192, 2), {"B": 2, "d": 128, "p": 128}),
        Sweep("B", _powers(1, 4096), {"T": 16, "d": 128, "p": 128}),
        Sweep("d", _powers(32, 2048), {"B": 8, "T": 64, "p": 256}),
        Sweep("p", _powers(32, 8192), {"B": 8, "T": 64, "d": 256}),
    ),
    "cuda": (
        Sweep("T", _powers(64, 8192, 2), {"B": 16, "d": 2048, "p": 2048}),
        Sweep("B", _powers(1, 4096), {"T": 64, "d": 1024, "p": 1024}),
        Sweep("d", _powers(64, 16384), {"B": 16, "T": 512, "p": 2048}),
        Sweep("p", _powers(64, 65536), {"B": 16, "T": 512, "d": 2048}),
    ),
    "tiny": (Sweep("T", (2, 4), {"B": 2, "d": 8, "p": 8}), Sweep("B", (1, 2), {"T": 2, "d": 8, "p": 8})),
}


class Attention(nn.Module):
    """Self-attention by torch's own module."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Image(nn.Module):
    """A layer on images, averaged over the positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(2).mean(2)


def layers(device: str, small: bool = False) -> dict[str, Workload]:
    """One of each kind, by name."""
    key = "tiny" if small else device
    (B, T, d), vocabulary = SIZES[key], VOCABULARY[key]
    side, channels = round(T**0.5), d // 8
    groups = min(8, channels)
    sequence, image = partial(_randn, (T, d)), partial(_randn, (channels, side, side))
    kinds: Sequence[tuple[str, Callable[[], nn.Module], Callable[[int], Tensor], int, int]] = (
        ("linear", lambda: nn.Linear(d, d), sequence, d, T),
        ("linear, one position", lambda: nn.Linear(d, d), partial(_randn, (d,)), d, 0),
        ("linear, thin", lambda: nn.Linear(d, 8), sequence, 8, T),
        ("embedding", lambda: nn.Embedding(vocabulary, d), partial(_ids, vocabulary, T), d, T),
        ("LayerNorm", lambda: nn.LayerNorm(d), sequence, d, T),
        ("RMSNorm", lambda: nn.RMSNorm(d), sequence, d, T),
        ("attention", lambda: Attention(d, max(1, d // 64)), sequence, d, T),
        ("convolution", lambda: Image(nn.Conv2d(channels, channels, 3, padding=1)), image, channels, 0),
        ("GroupNorm", lambda: Image(nn.GroupNorm(groups, channels)), image, channels, 0),
    )
    sizes = f"B {B}, T {T}, d {d}"
    return {
        name: _workload(name, f"{name}, {sizes}", B, build, inputs, classes, tokens, FULL[device])
        for name, build, inputs, classes, tokens in kinds
    }


def sweeps(device: str, small: bool = False) -> tuple[Sweep, ...]:
    return SWEEPS["tiny" if small else device]


def points(sweep: Sweep, device: str) -> dict[int, Workload]:
    """The workload at each value."""
    found = {}
    for value in sweep.values:
        sizes = {**sweep.fixed, sweep.grows: value}
        B, T, d, p = (sizes[name] for name in "BTdp")
        title = "linear layer, " + ", ".join(f"{name} {size}" for name, size in sizes.items())
        name = f"{sweep.grows} {value}"
        found[value] = _workload(name, title, B, partial(nn.Linear, d, p), partial(_randn, (T, d)), p, T, FULL[device])
    return found


def _workload(
    name: str,
    title: str,
    batch_size: int,
    build: Callable[[], nn.Module],
    inputs: Callable[[int], Tensor],
    classes: int,
    tokens: int,
    dtype: torch.dtype,
) -> Workload:
    shared: dict[str, Any] = dict(classes=classes, tokens=tokens, dtype=dtype, inner=True)
    return Workload(name, title, batch_size, lambda variant: build(), inputs, **shared)


def _randn(shape: tuple[int, ...], n: int) -> Tensor:
    return torch.randn(n, *shape)


def _ids(vocabulary: int, length: int, n: int) -> Tensor:
    return torch.randint(vocabulary, (n, length))
