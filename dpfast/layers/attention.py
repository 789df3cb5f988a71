"""Attention: ``nn.MultiheadAttention`` itself, and the appended rows of Opacus' own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from opacus.layers.dp_multihead_attention import DPMultiheadAttention, SequenceBias
from torch import Tensor, nn

from dpfast.capture.forms import Form, Instantiated
from dpfast.capture.tap import Call, Tap
from dpfast.layers.base import Layer, by_sample
from dpfast.layers.linear import Linear, Rows


class AppendedRow(Layer):
    """A learned row ``[E]`` after the T rows of every sample; ``g_i`` is what flows back into sample i's copy."""

    types: ClassVar[tuple[Any, ...]] = (SequenceBias,)
    least_dims = 3

    def run(self, module: SequenceBias, tap: Tap, x: Tensor) -> Tensor:
        dim = 1 if module.batch_first else 0
        rows = append_row(tap, x if module.batch_first else x.transpose(0, 1), module.bias)
        return rows if dim == 1 else rows.transpose(0, 1)

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        row = params[0]
        return row.reshape(-1).repeat(*x.shape[:-2], 1, 1)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form]]:
        row = params[0]
        yield 0, Instantiated(by_sample(G, call.batch).sum(1).view(call.batch, *row.shape))


def append_row(tap: Tap, x: Tensor, row: Tensor) -> Tensor:
    """``x [B, T, E]`` with ``row`` after each sample's T rows."""
    own = replace(tap, layer=AppendedRow(), batch_dim=0)
    return torch.cat([x, own(x.detach(), row)], 1)  # x only says how many samples there are


class MultiheadAttention(Layer):
    """``nn.MultiheadAttention``: its packed projections as linear ops on slices of one parameter.

    The forward is written out here because PyTorch's own mixes the batch into the sequence before it projects.
    """

    types: ClassVar[tuple[Any, ...]] = (nn.MultiheadAttention,)
    least_dims = 3

    def run(
        self,
        module: nn.MultiheadAttention,
        tap: Tap,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        single, to_first = query.dim() == 2, not module.batch_first and query.dim() == 3
        inputs = {
            id(x): x.unsqueeze(0) if single else x.transpose(0, 1) if to_first else x for x in (query, key, value)
        }
        q, k, v = _project(module, tap, *(inputs[id(x)] for x in (query, key, value)))
        if module.bias_k is not None and module.bias_v is not None:
            k, v = append_row(tap, k, module.bias_k), append_row(tap, v, module.bias_v)
        if module.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added = int(module.bias_k is not None) + int(module.add_zero_attn)
        q, k, v = (x.unflatten(2, (module.num_heads, module.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = _merged_mask(attn_mask, key_padding_mask, q, added)
        dropout = module.dropout if module.training else 0.0
        if need_weights:
            scores = (q / math.sqrt(module.head_dim)) @ k.transpose(2, 3)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
        else:
            weights, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = module.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out.transpose(0, 1) if to_first else out), weights


class OpacusAttention(Layer):
    """Opacus' ``DPMultiheadAttention``: its linear layers are tapped; its own forward cannot reshape an empty batch."""

    types: ClassVar[tuple[Any, ...]] = (DPMultiheadAttention,)

    def run(self, module: Any, tap: Tap, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.numel():
            return type(module).forward(module, query, key, value, *args, **kwargs)
        sequence = 1 if module.batch_first else 0
        source = key.shape[sequence] + int(module.add_bias_kv) + int(module.add_zero_attn)
        need_weights = kwargs.get("need_weights", args[1] if len(args) > 1 else True)
        weights = query.new_zeros(0, query.shape[sequence], source) if need_weights else None
        return module.out_proj(module.qlinear(query)), weights


def _project(module: Any, tap: Tap, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections, ``[B, T, E]`` each; inputs that are one tensor share one op."""
    project = replace(tap, layer=Linear(), batch_dim=0)
    E, bias = module.embed_dim, module.in_proj_bias
    thirds = [slice(i * E, (i + 1) * E) for i in range(3)]
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        sources = (query, key, value)
        q, k, v = (
            project(x, weight, bias, spec=Rows(bias=third))
            for x, weight, third in zip(sources, weights, thirds, strict=True)
        )
        return q, k, v
    packed = module.in_proj_weight
    if query is key and key is value:
        q, k, v = project(query, packed, bias, spec=Rows()).chunk(3, -1)
        return q, k, v
    q, k, v = (
        project(x, packed, bias, spec=Rows(rows, rows)) for x, rows in zip((query, key, value), thirds, strict=True)
    )
    return q, k, v


def _merged_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, added: int) -> Tensor | None:
    """Both masks as one additive mask that broadcasts to ``[B, heads, T, S]``; appended rows are never masked."""
    merged = None
    if attn_mask is not None:
        mask = attn_mask.unflatten(0, (q.shape[0], q.shape[1])) if attn_mask.dim() == 3 else attn_mask
        merged = F.pad(_additive(mask, q.dtype), (0, added))
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        mask = F.pad(_additive(padding, q.dtype), (0, added)).unsqueeze(1).unsqueeze(1)
        merged = mask if merged is None else merged + mask
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask.to(dtype)
