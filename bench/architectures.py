"""The models that the bench builds, from configuration and with random weights, in plain modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A transformer block; LayerNorm before each part (GPT, ViT) or after it (BERT)."""

    def __init__(self, width: int, heads: int, causal: bool = True, norm_after: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.norm_after = heads, causal, norm_after
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_after:
            x = self.norm1(x + self._attention(x, mask))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self._attention(self.norm1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Positions(nn.Module):
    """A table of positions; ids are ``[1, T]``, which all samples share, unless copied out to ``[B, T]``, or given."""

    def __init__(self, length: int, width: int, expanded: bool) -> None:
        super().__init__()
        self.table, self.expanded = nn.Embedding(length, width), expanded

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        if ids is not None:
            return self.table(ids)
        ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return self.table(ids.repeat(x.shape[0], 1) if self.expanded else ids)


def within_segments(position_ids: Tensor | None) -> Tensor | None:
    """A causal mask ``[rows, 1, T, T]`` of packed rows ``[rows, T]``, in whose segments positions begin at 0."""
    if position_ids is None:
        return None
    numbers = (position_ids == 0).cumsum(1)
    return (numbers[:, :, None] == numbers[:, None, :]).tril().unsqueeze(1)


def small_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class GPT(nn.Module):
    """GPT-2's shape: the head is the token embedding unless the variant is "untied"."""

    def __init__(
        self, *, vocabulary: int, width: int, layers: int, heads: int, length: int, variant: str = "plain"
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = Positions(length, width, variant != "plain")
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        small_weights(self)
        if variant != "untied":
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x, mask = self.tokens(ids) + self.positions(ids, position_ids), within_segments(position_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class BERT(nn.Module):
    """BERT's shape as a classifier: LayerNorm after each part, and a pooled first token."""

    def __init__(
        self, *, vocabulary: int, width: int, layers: int, heads: int, length: int, classes: int, variant: str = "plain"
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = Positions(length, width, variant != "plain")
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False, norm_after=True) for _ in range(layers))
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        small_weights(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.pool(x[:, 0])))


class ViT(nn.Module):
    """A vision transformer; it reads its class token, or the mean of the patches in the variant "pooled"."""

    def __init__(
        self, *, size: int, patch: int, width: int, layers: int, heads: int, classes: int, variant: str = "plain"
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.classes = None if variant == "pooled" else nn.Parameter(torch.zeros(1, 1, width))
        self.positions = Positions((size // patch) ** 2 + 1, width, variant != "plain")
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        small_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        if self.classes is not None:
            x = torch.cat((self.classes.expand(len(x), -1, -1), x), 1)
        x = x + self.positions(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.classes is None else x[:, 0])


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm beside a shortcut; norm and ReLU come first in a wide ResNet."""

    def __init__(self, into: int, out: int, stride: int, groups: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.conv1 = nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, into if norm_first else out)
        self.norm2 = nn.GroupNorm(groups, out)
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(into, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
            return self.shortcut(x) + y
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


class ResNet(nn.Sequential):
    """For 32x32: stages of residual blocks, each but the first at half the resolution; GroupNorm everywhere."""

    def __init__(
        self, *, stem: int, widths: tuple[int, ...], blocks: int, groups: int, classes: int, norm_first: bool = False
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1, bias=False)]
        layers += [] if norm_first else [nn.GroupNorm(groups, stem), nn.ReLU()]
        into = stem
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(Residual(into, width, stride, groups, norm_first))
                into = width
        layers += [nn.GroupNorm(groups, into), nn.ReLU()] if norm_first else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes))


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


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank update."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(
            rank, base.out_features, bias=False
        )  # not 0, as it would be: every gradient is to be something

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LlamaBlock(nn.Module):
    """RMSNorm, grouped-query attention with rotary positions, SwiGLU; with a rank, adapters on its linear layers."""

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int, rank: int | None) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads

        def linear(d: int, p: int) -> nn.Module:
            layer = nn.Linear(d, p, bias=False)
            return layer if rank is None else LoRA(layer, rank)

        keys = width // heads * key_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.out = linear(width, width), linear(width, width)
        self.k, self.v = linear(width, keys), linear(width, keys)
        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        q = rotated(self.q(h).unflatten(2, (self.heads, -1)).transpose(1, 2), cos, sin)
        k = rotated(self.k(h).unflatten(2, (self.key_heads, -1)).transpose(1, 2), cos, sin)
        v = self.v(h).unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, heads, T, n]`` turned by ``cos``, ``sin`` ``[T, n / 2]`` or ``[B, 1, T, n / 2]``."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Llama(nn.Module):
    """Llama's shape; with a rank, adapters in its blocks and all else frozen."""

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        key_heads: int,
        hidden: int,
        length: int,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, key_heads, hidden, rank) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if rank is not None:
            for module in self.modules():
                if isinstance(module, nn.Embedding | nn.RMSNorm) or module is self.head:
                    module.requires_grad_(False)
        n = width // heads
        angles = torch.arange(length).outer(10_000 ** (-torch.arange(0, n, 2) / n))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x, mask = self.tokens(ids), within_segments(position_ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        if position_ids is not None:
            cos, sin = self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.head(self.norm(x))


class Logits(nn.Module):
    """A Transformers model as a function from ids to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def transformers_gpt2_lora(vocabulary: int, width: int, layers: int, heads: int, length: int, rank: int) -> nn.Module:
    """PEFT's adapters at every linear layer of the blocks; neither side is zero, so that both have gradients."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": vocabulary, "n_positions": length, "n_embd": width, "n_layer": layers, "n_head": heads}
    targets = ["c_attn", "c_proj", "c_fc"]
    adapters = LoraConfig(r=rank, lora_alpha=16, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False)
    return Logits(get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes, **drops)), adapters))


def transformers_llama(**sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Logits(LlamaForCausalLM(LlamaConfig(**sizes)))
