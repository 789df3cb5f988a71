"""The models and data that the bench runs: built from configuration, random weights, fixed seeds.

A workload comes in variants, because stock Opacus cannot train every model as it is written. "plain" is the model
that a user would write. The others change as little as a peer needs; the bench tries them in order and says in its
table which one a peer was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 20240229

# variant -> what was changed, in words for a table. (Opacus' ghost also fails on a non-contiguous expanded view.)
VARIANTS = {
    "plain": "as written",
    "expanded": "position ids copied out to [B,T]",
    "untied": "head untied, position ids copied out to [B,T]",
}
# variant -> the one whose mathematics and non-private cost it shares: what it is checked against and divided by
BASE_VARIANT = {"plain": "plain", "expanded": "plain", "untied": "untied"}


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2's shape: the head is the token embedding, and position ids are [1,T] unless expanded."""

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        length: int,
        variant: str = "plain",
    ) -> None:
        super().__init__()
        self.expand_positions = variant != "plain"
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if variant != "untied":
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        if self.expand_positions:
            positions = positions.repeat(ids.shape[0], 1)
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GroupNormCNN(nn.Sequential):
    """3x3 convolutions, each with GroupNorm and ReLU; means over pool x pool parts; a linear classifier."""

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        groups: int,
        in_channels: int = 3,
        classes: int = 10,
        pool: int = 1,
    ) -> None:
        layers: list[nn.Module] = []
        for out_channels, stride in zip(channels, strides, strict=True):
            layers += [
                nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
                nn.GroupNorm(groups, out_channels),
                nn.ReLU(),
            ]
            in_channels = out_channels
        classifier = nn.Linear(in_channels * pool * pool, classes)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten(), classifier)


def sequence_loss(criterion: nn.Module, logits: Tensor, targets: Tensor, *, ghost: bool = False) -> Tensor:
    """The mean over the batch of each sample's loss.

    For [B,T,V] logits it is the mean over all tokens, which is the same thing as every sample has T of them. Opacus'
    ghost criterion must be told the shape before flattening, or it takes each token for a sample.
    """
    if logits.dim() == 2:
        return criterion(logits, targets)
    extra = {"shape": logits.shape} if ghost else {}
    return criterion(logits.flatten(0, 1), targets.flatten(), **extra)


@dataclass(frozen=True)
class Workload:
    """One row group of the table: what to build, on what data, and the ratios that the project set itself."""

    name: str
    title: str
    batch_size: int
    build: Callable[[str], nn.Module]
    inputs: Callable[[int], Tensor]
    classes: int
    target_time: float
    target_memory: float | None = None
    variants: tuple[str, ...] = ("plain",)

    @property
    def check_size(self) -> int:
        """Samples in the correctness check: enough for clipping to matter, few enough for a float64 oracle."""
        return min(4, self.batch_size // 2)

    def model(self, variant: str = "plain") -> nn.Module:
        """A fresh model with the same random weights on every call."""
        if variant not in self.variants:
            raise ValueError(f"{self.name} has the variants {', '.join(self.variants)}; got {variant!r}")
        torch.manual_seed(SEED)
        return self.build(variant)

    def batch(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Random inputs and targets, the same on every call with the same size."""
        torch.manual_seed(SEED + 1)
        x = self.inputs(self.batch_size if size is None else size)
        shape = x.shape if x.dtype == torch.long else x.shape[:1]
        return x, torch.randint(self.classes, shape)


def _mlp(variant: str) -> nn.Module:
    return nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def _cnn(variant: str) -> nn.Module:
    return GroupNormCNN(channels=(64, 64, 128, 128, 256), strides=(1, 2, 1, 2, 1), groups=16)


def _gpt(name: str, length: int, batch_size: int, target_time: float, target_memory: float | None) -> Workload:
    return Workload(
        name=name,
        title=f"GPT 4 layers, d 512, 8 heads, vocabulary 8192 (tied), T {length}, batch {batch_size}",
        batch_size=batch_size,
        build=lambda variant: GPT(vocabulary=8192, width=512, layers=4, heads=8, length=length, variant=variant),
        inputs=lambda n: torch.randint(8192, (n, length)),
        classes=8192,
        target_time=target_time,
        target_memory=target_memory,
        variants=("plain", "expanded", "untied"),
    )


class Logits(nn.Module):
    """A Transformers model as a function from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def _gpt2_lora(variant: str) -> nn.Module:
    """Adapters of rank 16 at every linear layer of the blocks; neither side is zero, so that both have gradients."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=128, n_embd=512, n_layer=6, n_head=8, **drops))
    targets = ["c_attn", "c_proj", "c_fc"]
    adapters = LoraConfig(r=16, lora_alpha=16, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False)
    return Logits(get_peft_model(model, adapters))


def _llama(variant: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return Logits(LlamaForCausalLM(LlamaConfig(vocab_size=8192, max_position_embeddings=256, **sizes, **heads)))


WORKLOADS: dict[str, Workload] = {
    work.name: work
    for work in (
        Workload(
            name="mlp",
            title="MLP 784-2048-2048-10, batch 256",
            batch_size=256,
            build=_mlp,
            inputs=lambda n: torch.randn(n, 784),
            classes=10,
            target_time=1.15,
            target_memory=1.6,
        ),
        _gpt("gpt128", 128, 16, target_time=1.15, target_memory=1.3),
        _gpt("gpt512", 512, 4, target_time=1.15, target_memory=None),
        Workload(
            name="cnn",
            title="CNN of five 3x3 convolutions with GroupNorm (channels 64 64 128 128 256, "
            "strides 1 2 1 2 1), 32x32, batch 64",
            batch_size=64,
            build=_cnn,
            inputs=lambda n: torch.randn(n, 3, 32, 32),
            classes=10,
            target_time=1.35,
        ),
        Workload(
            name="gpt2_lora",
            title="Transformers' GPT-2 with LoRA rank 16 (PEFT), 6 layers, d 512, vocabulary 8192, T 128, batch 16",
            batch_size=16,
            build=_gpt2_lora,
            inputs=lambda n: torch.randint(8192, (n, 128)),
            classes=8192,
            target_time=1.10,
        ),
        Workload(
            name="llama",
            title="Transformers' Llama, all parameters, 8 layers, d 512, 8 heads on 2, vocabulary 8192, T 256, batch 8",
            batch_size=8,
            build=_llama,
            inputs=lambda n: torch.randint(8192, (n, 256)),
            classes=8192,
            target_time=1.2,
            target_memory=1.2,
        ),
    )
}
