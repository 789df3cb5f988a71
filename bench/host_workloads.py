"""Models of many tiny layers: their steps show what the host does (Python, small operators, waits for a device)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.architectures import GPT, LoRA
from bench.workloads import Workload

DEPTHS = {"full": (101, 50, 24, 16), "tiny": (3, 2, 1, 1)}  # of deepmlp, deeptok, gpt24 and lora16
WIDTH, LENGTH, CLASSES = 32, 16, 3
TEXT = dict(vocabulary=256, width=64, heads=4, length=32)
RANK = 16
# dpfast's step time and operators over non-private, and its waits
TARGETS: dict[str, dict[str, float]] = {
    "deepmlp": {"time": 1.8},
    "deeptok": {"time": 1.8},
    "mnist": {"time": 1.5},
    "gpt24": {"operators": 1.8},
    "lora16": {"operators": 1.4},
}


def workloads(device: str, small: bool = False) -> dict[str, Workload]:
    """All of them by name, the same on every device (``"cpu"``, ``"cuda"``), in float32."""
    linears, pairs, blocks, adapted = DEPTHS["tiny" if small else "full"]
    text = f"d {TEXT['width']}, {TEXT['heads']} heads, vocabulary {TEXT['vocabulary']}, T {TEXT['length']}, batch 8"
    ids: dict[str, Any] = dict(
        inputs=lambda n: torch.randint(TEXT["vocabulary"], (n, TEXT["length"])),
        classes=TEXT["vocabulary"],
        tokens=TEXT["length"],
    )
    found = (
        _work("deepmlp", f"{linears} linear layers of width {WIDTH}, batch 16", 16, partial(_mlp, linears), (WIDTH,)),
        _work(
            "deeptok",
            f"{pairs} times a linear layer and LayerNorm of width {WIDTH}, T {LENGTH}, batch 8",
            8,
            partial(_tokens, pairs),
            (LENGTH, WIDTH),
        ),
        _work("one", f"one linear layer, {WIDTH} to {CLASSES}, batch 16", 16, partial(_mlp, 1), (WIDTH,)),
        _work("mnist", "the CNN of Opacus' MNIST example, 28x28, batch 64", 64, _mnist, (1, 28, 28), classes=10),
        _work("gpt24", f"GPT of {blocks} blocks, {text}", 8, partial(_gpt, blocks), **ids),
        _work("lora16", f"LoRA of rank {RANK} on a GPT of {adapted} blocks, {text}", 8, partial(_lora, adapted), **ids),
    )
    targets: Mapping[str, Mapping[str, float]] = {} if small else TARGETS
    return {name: Workload(name, **rest, targets={**targets.get(name, {}), "waits": 0}) for name, rest in found}


def _work(
    name: str, title: str, batch: int, build: Callable[[], nn.Module], shape: tuple[int, ...] = (), **more: Any
) -> tuple[str, dict[str, Any]]:
    def inputs(n: int) -> Tensor:
        return torch.randn(n, *shape)

    shared: dict[str, Any] = dict(title=title, batch_size=batch, build=lambda variant: build())
    return name, dict(inputs=inputs, classes=CLASSES) | shared | more


def _mlp(linears: int) -> nn.Module:
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(linears - 1)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))


def _tokens(pairs: int) -> nn.Module:
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(pairs)]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(LENGTH * WIDTH, CLASSES))


def _mnist() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def _gpt(blocks: int) -> GPT:
    """Untied, so that every method trains the model as it is."""
    return GPT(**TEXT, layers=blocks, variant="untied")


def _lora(blocks: int) -> nn.Module:
    model = _gpt(blocks).requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LoRA(getattr(block, name), RANK))
    return model
