"""What the bench trains: models at the sizes of each device, random data, fixed seeds, and the targets.

A workload comes in variants, because stock Opacus cannot train every model as it is written. "plain" is the model
that a user would write. The others change as little as a peer needs; the bench tries them in order and says in its
table which one a peer was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.architectures import (
    BERT,
    GPT,
    GroupNormCNN,
    Llama,
    ResNet,
    ViT,
    transformers_gpt2_lora,
    transformers_llama,
)

SEED = 20240229
FULL = {"cpu": torch.float32, "cuda": torch.bfloat16}

# variant -> what was changed, in words for a table. (Opacus' ghost also fails on a non-contiguous expanded view.)
VARIANTS = {
    "plain": "as written",
    "expanded": "position ids copied out to [B,T]",
    "untied": "head untied, position ids copied out to [B,T]",
    "pooled": "no class token, position ids copied out to [B,T]",
}
# variant -> the one whose mathematics and non-private cost it shares: what it is checked against and divided by
BASE_VARIANT = {"plain": "plain", "expanded": "plain", "untied": "untied", "pooled": "pooled"}


def sequence_loss(criterion: nn.Module, logits: Tensor, targets: Tensor, *, ghost: bool = False) -> Tensor:
    """The mean over the batch of each sample's loss.

    For [B,T,V] logits it is the mean over all tokens, which is the same thing as every sample has T of them. Opacus'
    ghost criterion must be told the shape before flattening, or it takes each token for a sample.
    """
    if logits.dim() == 2:
        return criterion(logits, targets)
    extra = {"shape": logits.shape} if ghost else {}
    return criterion(logits.flatten(0, 1), targets.flatten(), **extra)


@dataclass(frozen=True, eq=False)
class Workload:
    """One row group of the table: what to build, on what data, and the ratios that the project set itself."""

    name: str
    title: str
    batch_size: int
    build: Callable[[str], nn.Module]
    inputs: Callable[[int], Tensor]
    classes: int
    tokens: int = 0  # of a sample, each with a target of its own; 0: a sample has one target
    dtype: torch.dtype = torch.float32
    targets: Mapping[str, float] = field(default_factory=dict)  # dpfast's "time" and "memory", over non-private
    variants: tuple[str, ...] = ("plain",)
    by_default: bool = True  # measured when no workload is named
    compiled: bool = False  # compiled methods are measured as well when no method is named
    largest_batch: bool = False  # the largest batch that fits is looked for
    inner: bool = False  # its inputs stand for another layer's output: they get a gradient

    @property
    def check_size(self) -> int:
        """Different samples in the correctness check: enough for clipping to matter, few for a float64 oracle."""
        return max(2, min(4, self.batch_size // 2))

    def model(self, variant: str = "plain", device: torch.device | str = "cpu") -> nn.Module:
        """A fresh model with the same random weights on every call."""
        if variant not in self.variants:
            raise ValueError(f"{self.name} has the variants {', '.join(self.variants)}; got {variant!r}")
        torch.manual_seed(SEED)
        with torch.device(device):
            return self.build(variant).to(self.dtype)

    def batch(self, size: int | None = None, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Random inputs and targets, the same on every call with the same size."""
        torch.manual_seed(SEED + 1)
        size = self.batch_size if size is None else size
        x = self.inputs(size).to(device)
        y = torch.randint(self.classes, (size, self.tokens) if self.tokens else (size,)).to(device)
        return x.to(self.dtype) if x.is_floating_point() else x, y

    def backward(self, variant: str, device: torch.device | str) -> None:
        """Forward and backward of a step without privacy."""
        model, (x, y) = self.model(variant, device), self.batch(device=device)
        x.requires_grad_(self.inner and x.is_floating_point())
        sequence_loss(nn.CrossEntropyLoss(), model(x), y).backward()


LLAMA = {  # trained whole and with adapters
    "cpu": dict(width=512, layers=2, heads=8, key_heads=2, hidden=1376, vocabulary=4096, length=128),
    "cuda": dict(width=2048, layers=16, heads=32, key_heads=8, hidden=8192, vocabulary=32000, length=1024),
    "tiny": dict(width=16, layers=1, heads=4, key_heads=2, hidden=24, vocabulary=32, length=8),
}
# The sizes of a device, by name. "tiny" ones have the same layers; they show that everything runs.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "mlp": dict(width=2048, batch=64),
        "wrn16-4": dict(stem=16, widths=(64, 128, 256), blocks=2, groups=16, batch=8),
        "resnet18": dict(stem=64, widths=(64, 128, 256, 512), blocks=2, groups=32, batch=8),
        "vit-s": dict(width=384, layers=4, heads=6, patch=4, batch=8),
        "gpt2": dict(width=512, layers=2, heads=8, vocabulary=4096, length=128, batch=4, compiled=True),
        "gpt2-medium": dict(width=768, layers=2, heads=12, vocabulary=4096, length=128, batch=2),
        "bert-base": dict(width=512, layers=2, heads=8, vocabulary=4096, length=64, batch=8),
        "llama-1b": dict(**LLAMA["cpu"], batch=4),
        "llama-1b-lora": dict(**LLAMA["cpu"], batch=4, rank=16),
    },
    "cuda": {
        "mlp": dict(width=2048, batch=4096, compiled=True),
        "wrn16-4": dict(stem=16, widths=(64, 128, 256), blocks=2, groups=16, batch=256),
        "resnet18": dict(stem=64, widths=(64, 128, 256, 512), blocks=2, groups=32, batch=256),
        "vit-s": dict(width=384, layers=12, heads=6, patch=4, batch=256),
        "gpt2": dict(
            width=768, layers=12, heads=12, vocabulary=50304, length=1024, batch=16, compiled=True, largest=True
        ),
        "gpt2-medium": dict(
            width=1024,
            layers=24,
            heads=16,
            vocabulary=50304,
            length=1024,
            batch=16,
            targets={"time": 1.10, "memory": 1.15},
        ),
        "bert-base": dict(width=768, layers=12, heads=12, vocabulary=30522, length=512, batch=32),
        "llama-1b": dict(**LLAMA["cuda"], batch=4, targets={"time": 1.07, "memory": 1.10}),
        "llama-1b-lora": dict(**LLAMA["cuda"], batch=8, rank=16, targets={"time": 1.05}),
    },
    "tiny": {
        "mlp": dict(width=16, batch=4),
        "wrn16-4": dict(stem=4, widths=(4, 8, 8), blocks=1, groups=2, size=8, batch=4),
        "resnet18": dict(stem=4, widths=(4, 4, 8, 8), blocks=1, groups=2, size=8, batch=4),
        "vit-s": dict(width=16, layers=1, heads=2, patch=4, size=8, batch=4),
        "gpt2": dict(width=16, layers=1, heads=2, vocabulary=32, length=8, batch=4),
        "gpt2-medium": dict(width=16, layers=2, heads=2, vocabulary=32, length=8, batch=4),
        "bert-base": dict(width=16, layers=1, heads=2, vocabulary=32, length=8, batch=4),
        "llama-1b": dict(**LLAMA["tiny"], batch=4),
        "llama-1b-lora": dict(**LLAMA["tiny"], batch=4, rank=2),
    },
}


def workloads(device: str, small: bool = False) -> dict[str, Workload]:
    """Those that can be named on a device (``"cpu"``, ``"cuda"``), by name."""
    sizes = SIZES["tiny" if small else device]
    found = [_workload(name, FULL[device], **sizes[name]) for name in sizes]
    if device == "cpu" and not small:
        found += MORE_ON_CPU
    return {work.name: work for work in found}


def _workload(
    name: str,
    dtype: torch.dtype,
    *,
    batch: int,
    targets: Mapping[str, float] | None = None,
    compiled: bool = False,
    largest: bool = False,
    size: int = 32,
    **sizes: Any,
) -> Workload:
    shared: dict[str, Any] = dict(name=name, dtype=dtype, batch_size=batch, targets=targets or {})
    shared |= dict(compiled=compiled, largest_batch=largest)
    if name == "mlp":
        width = sizes["width"]
        return Workload(
            title=f"MLP 784-{width}-{width}-10, batch {batch}",
            build=lambda variant: _mlp(width),
            inputs=lambda n: torch.randn(n, 784),
            classes=10,
            **shared,
        )
    if name in ("wrn16-4", "resnet18"):
        wide = name == "wrn16-4"
        kind = "WideResNet-16-4" if wide else "ResNet-18"
        return Workload(
            title=f"{kind} with GroupNorm, channels {sizes['widths']}, {size}x{size}, batch {batch}",
            build=lambda variant: ResNet(**sizes, classes=10, norm_first=wide),
            inputs=lambda n: torch.randn(n, 3, size, size),
            classes=10,
            **shared,
        )
    depth = f"{sizes['layers']} layers, d {sizes['width']}, {sizes['heads']} heads"
    if name == "vit-s":
        return Workload(
            title=f"ViT-S of {depth}, patches of {sizes['patch']}, {size}x{size}, batch {batch}",
            build=lambda variant: ViT(**sizes, size=size, classes=10, variant=variant),
            inputs=lambda n: torch.randn(n, 3, size, size),
            classes=10,
            variants=("plain", "expanded", "pooled"),
            **shared,
        )
    length, vocabulary = sizes["length"], sizes["vocabulary"]
    text = f"{depth}, vocabulary {vocabulary}, T {length}, batch {batch}"
    ids = partial(_ids, vocabulary, length)
    if name == "bert-base":
        return Workload(
            title=f"BERT classifier of {text}",
            build=lambda variant: BERT(**sizes, classes=2, variant=variant),
            inputs=ids,
            classes=2,
            variants=("plain", "expanded"),
            **shared,
        )
    shared |= dict(inputs=ids, classes=vocabulary, tokens=length)
    if name.startswith("gpt2"):
        kind = "GPT-2 medium" if name == "gpt2-medium" else "GPT-2 small"
        return Workload(
            title=f"{kind}, tied head, of {text}",
            build=lambda variant: GPT(**sizes, variant=variant),
            variants=("plain", "expanded", "untied"),
            **shared,
        )
    rank = sizes.get("rank")
    kind = "all parameters" if rank is None else f"LoRA of rank {rank}"
    return Workload(
        title=f"Llama, {kind}, of {depth} on {sizes['key_heads']}, vocabulary {vocabulary}, T {length}, batch {batch}",
        build=lambda variant: Llama(**sizes),
        **shared,
    )


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def _ids(vocabulary: int, length: int, n: int) -> Tensor:
    return torch.randint(vocabulary, (n, length))


def _gpt(length: int, batch_size: int, **targets: float) -> Workload:
    sizes = dict(vocabulary=8192, width=512, layers=4, heads=8, length=length)
    return Workload(
        name=f"gpt{length}",
        title=f"GPT 4 layers, d 512, 8 heads, vocabulary 8192 (tied), T {length}, batch {batch_size}",
        batch_size=batch_size,
        build=lambda variant: GPT(**sizes, variant=variant),
        inputs=partial(_ids, 8192, length),
        classes=8192,
        tokens=length,
        targets=targets,
        variants=("plain", "expanded", "untied"),
        by_default=False,
    )


# Larger ones, which have targets; minutes each.
MORE_ON_CPU = [
    Workload(
        name="mlp256",
        title="MLP 784-2048-2048-10, batch 256",
        batch_size=256,
        build=lambda variant: _mlp(2048),
        inputs=lambda n: torch.randn(n, 784),
        classes=10,
        targets={"time": 1.15, "memory": 1.6},
        by_default=False,
        largest_batch=True,
    ),
    _gpt(128, 16, time=1.15, memory=1.3),
    _gpt(512, 4, time=1.15),
    Workload(
        name="cnn",
        title="CNN of five 3x3 convolutions with GroupNorm (channels 64 64 128 128 256, strides 1 2 1 2 1), 32x32, "
        "batch 64",
        batch_size=64,
        build=lambda variant: GroupNormCNN(channels=(64, 64, 128, 128, 256), strides=(1, 2, 1, 2, 1), groups=16),
        inputs=lambda n: torch.randn(n, 3, 32, 32),
        classes=10,
        targets={"time": 1.35},
        by_default=False,
    ),
    Workload(
        name="gpt2_lora",
        title="Transformers' GPT-2 with LoRA rank 16 (PEFT), 6 layers, d 512, vocabulary 8192, T 128, batch 16",
        batch_size=16,
        build=lambda variant: transformers_gpt2_lora(8192, 512, 6, 8, 128, 16),
        inputs=partial(_ids, 8192, 128),
        classes=8192,
        tokens=128,
        targets={"time": 1.10},
        by_default=False,
    ),
    Workload(
        name="llama",
        title="Transformers' Llama, all parameters, 8 layers, d 512, 8 heads on 2, vocabulary 8192, T 256, batch 8",
        batch_size=8,
        build=lambda variant: transformers_llama(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=256,
        ),
        inputs=partial(_ids, 8192, 256),
        classes=8192,
        tokens=256,
        targets={"time": 1.2, "memory": 1.2},
        by_default=False,
    ),
]
