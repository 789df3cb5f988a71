"""Linear layers: ``y = x Wᵀ + b``, on inputs of any number of dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from dpfast.capture.forms import Form, Instantiated, PositionSum, Waiting, form_of
from dpfast.capture.tap import Call, Tap
from dpfast.layers.base import Layer, by_sample, own, product_form, sum_rows

ALL = slice(0, None)


class Rows(NamedTuple):
    """The rows of weight and bias that one op uses: attention packs several projections into one parameter."""

    weight: slice = ALL
    bias: slice = ALL


WHOLE = Rows()


class Linear(Layer):
    """``g_i = G_iᵀ A_i`` for the weight, ``Σ_t g_t`` for the bias."""

    types: ClassVar[tuple[Any, ...]] = (nn.Linear, RNNLinear)
    least_dims = 2

    def is_by_last(self, spec: Any) -> bool:
        return True

    def run(self, module: nn.Linear, tap: Tap, input: Tensor) -> Tensor:
        return tap(input, own(module, "weight"), own(module, "bias"), spec=WHOLE)

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        weight, bias = params
        if call.spec is WHOLE:
            return F.linear(x, weight, bias)
        return F.linear(x, weight[call.spec.weight], None if bias is None else bias[call.spec.bias])

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        weight = params[0] if call.spec is WHOLE else params[0][call.spec.weight]
        if G.dtype is weight.dtype is x.dtype:
            return G @ weight
        return (G @ weight.to(G.dtype)).to(x.dtype)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        weight, bias = params
        rows, bias_rows = call.spec
        if 0 in needed:
            yield 0, call.planned(product_form(x, G, call.batch, weight.shape[0], rows.start))
        if 1 in needed:
            summed = sum_rows(G, call.batch)
            before = bias_rows.start
            rest = bias.shape[0] - before - G.shape[-1]
            if (before or rest) and call.tap.recorder.packed:
                summed = PositionSum(F.pad(by_sample(G, call.batch), (before, rest)))
            elif before or rest:  # zeros around it leave its norm as it is
                alone = form_of(summed)
                assert isinstance(alone, Instantiated)
                summed = Instantiated(F.pad(alone.samples, (before, rest)), squares=alone.squares)
            yield 1, summed


class TransposedLinear(Linear):
    """``y = x W + b`` with W ``[d, p]``, as Transformers' GPT-2 has it: ``g_i = A_iᵀ G_i``."""

    types: ClassVar[tuple[Any, ...]] = ("transformers.pytorch_utils.Conv1D",)

    def run(self, module: Any, tap: Tap, x: Tensor) -> Tensor:
        return tap(x, own(module, "weight"), own(module, "bias"))

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        weight, bias = params
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(bias))

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        return (G @ params[0].to(G.dtype).T).to(x.dtype)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        if 0 in needed:
            yield 0, call.planned(product_form(G, x, call.batch, len(params[0])))
        if 1 in needed:
            yield 1, sum_rows(G, call.batch)
