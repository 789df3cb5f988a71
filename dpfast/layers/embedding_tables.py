"""Embedding tables: rows picked by ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.capture.forms import EmbeddingRows, Form
from dpfast.capture.running_pass import unseen
from dpfast.capture.tap import Call, Tap
from dpfast.layers.base import Layer, by_sample


class Embedding(Layer):
    """``g_i[v] = Σ_{t: id_t = v} G_t``; rows at ``padding_idx`` get no gradient, as in PyTorch."""

    types: ClassVar[tuple[Any, ...]] = (nn.Embedding,)

    def refusal(self, module: nn.Module) -> str | None:
        for option, value, why in (
            (
                "max_norm",
                None,
                "renormalises rows by what the batch looks up, outside of the privacy mechanism",
            ),
            (
                "scale_grad_by_freq",
                False,
                "scales gradients by counts over the whole batch, which couples samples",
            ),
            (
                "sparse",
                False,
                "makes sparse gradients, whose pattern tells which rows were used; noise is dense",
            ),
        ):
            if getattr(module, option) != value:
                return f"{option}={getattr(module, option)!r} {why}; set it to {value!r}"
        return None

    def exact_alone(self, module: Any) -> bool:
        return module.max_norm is None and not module.sparse

    def run(self, module: nn.Embedding, tap: Tap, input: Tensor) -> Tensor:
        return tap(input, module.weight, spec=module.padding_idx)

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        weight = params[0]
        return F.embedding(x, weight)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form]]:
        weight = params[0]
        ids, G = by_sample(x, call.batch, 0), by_sample(G, call.batch)
        if call.spec is not None:
            G = G.masked_fill((ids == call.spec).unsqueeze(-1), 0)
        yield 0, EmbeddingRows(ids, G, len(weight))


class EmbeddingBag(Embedding):
    """Bags as padded rows of ids: an embedding looks the table's rows up, the reduction is ordinary autograd."""

    types: ClassVar[tuple[Any, ...]] = (nn.EmbeddingBag,)

    def refusal(self, module: Any) -> str | None:
        if module.mode == "max":
            return "mode='max' has no per-sample path; use mode='sum' or 'mean'"
        return super().refusal(module)

    def run(
        self,
        module: Any,
        tap: Tap,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        if module.mode == "max":  # of a module that nothing has refused before
            raise ValueError(f"EmbeddingBag: {self.refusal(module)}")
        if per_sample_weights is not None and module.mode != "sum":
            raise ValueError(f"per_sample_weights needs mode='sum', not mode={module.mode!r} (as in PyTorch)")
        if input.dim() == 1:
            if offsets is None:
                raise ValueError("offsets must be given with a 1-D input to EmbeddingBag")
            input, inside, per_sample_weights = _pad_bags(
                input, offsets, per_sample_weights, module.include_last_offset
            )
        else:
            inside = torch.ones_like(input, dtype=torch.bool)
        if module.padding_idx is not None:
            inside = inside & (input != module.padding_idx)
        rows = tap(input, module.weight, spec=None)
        weights = inside.to(rows.dtype)
        if per_sample_weights is not None:
            weights = weights * per_sample_weights
        if module.mode == "mean":
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        return (rows * weights.unsqueeze(-1)).sum(1)


def _pad_bags(
    ids: Tensor, offsets: Tensor, weights: Tensor | None, include_last_offset: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bags of a flat list of ids as ``[bags, longest]``, with a mask of what is inside."""
    with unseen("the rows of an embedding bag with offsets"):  # they follow from all offsets; what is in them does not
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
        starts = offsets[:-1] if include_last_offset else offsets
        lengths = ends - starts
        longest = int(lengths.max()) if len(lengths) else 0
        place = torch.arange(longest, device=ids.device)
        inside = place < lengths.unsqueeze(1)
        index = (starts.unsqueeze(1) + place).clamp(max=max(len(ids) - 1, 0))
    if len(ids) == 0:
        return (
            ids.new_zeros(inside.shape),
            inside,
            None if weights is None else weights.new_zeros(inside.shape),
        )
    return ids[index] * inside, inside, None if weights is None else weights[index]
