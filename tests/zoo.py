"""One small model for each layer family, for the questions that are asked of all of them alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import Tensor, nn

from tests import oracle
from tests.helpers import F64, mse, token_loss


class First(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer: nn.Module, same: int = 1):
        super().__init__()
        self.before, self.layer, self.same = nn.Linear(4, 4), layer, same

    def forward(self, x):
        return self.layer(*[torch.tanh(self.before(x))] * self.same)[0]


class Bag(nn.Module):
    def __init__(self, flat: bool):
        super().__init__()
        self.bag, self.flat = nn.EmbeddingBag(7, 4, mode="sum"), flat

    def forward(self, ids):
        if not self.flat:
            return self.bag(ids)
        return self.bag(ids.flatten(), torch.arange(len(ids)) * ids.shape[1])


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.pos = nn.Parameter(torch.randn(1, 6, 4))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return (torch.cat([self.cls.expand(len(x), -1, -1), self.lin(x)], 1) + self.pos).tanh() * self.scale


class TinyGPT(nn.Module):
    """Tied head, default position ids of shape [1, T] and keyword calls: GPT-2 in small."""

    def __init__(self, vocabulary=9, d=4, T=5, positions="row", tied=True):
        super().__init__()
        self.tok, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(T, d)
        self.norm, self.fc, self.out = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tok.weight
        self.positions = positions

    def forward(self, ids):
        pos = torch.arange(ids.shape[1])
        if self.positions == "row":
            pos = pos.unsqueeze(0)
        elif self.positions == "expanded":
            pos = pos.expand(len(ids), -1)
        elif self.positions == "late":  # looked up in 1-D, made [1, T, d] afterwards
            h = self.tok(ids) + self.wpe(pos).unsqueeze(0)
        if self.positions != "late":
            h = self.tok(ids) + self.wpe(pos)
        h = h + self.out(torch.tanh(self.fc(self.norm(input=h))))
        return self.head(h)


def vectors(*shape: int) -> Callable[[int], tuple]:
    return lambda n: (torch.randn(n, *shape, dtype=F64),)


def words(high: int, T: int) -> Callable[[int], tuple]:
    return lambda n: (torch.randint(high, (n, T)),)


def conv(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), layer)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple]]] = {
    "Linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), vectors(4)),
    "Linear on sequences": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        vectors(5, 4),
    ),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 3)), words(7, 5)),
    "EmbeddingBag": (lambda: nn.Sequential(Bag(flat=False), nn.Linear(4, 3)), words(7, 5)),
    "EmbeddingBag with offsets": (lambda: nn.Sequential(Bag(flat=True), nn.Linear(4, 3)), words(7, 5)),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 1)), vectors(4, 7)),
    "Conv2d": (lambda: conv(nn.Conv2d(4, 6, 3, groups=2, padding="same")), vectors(4, 5, 5)),
    "Conv2d circular": (
        lambda: conv(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
        vectors(4, 5, 5),
    ),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), vectors(2, 4, 4, 4)),
    "ConvTranspose2d": (lambda: conv(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), vectors(4, 3, 3)),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), vectors(5, 4)),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)), vectors(5, 4)),
    "GroupNorm": (lambda: conv(nn.GroupNorm(2, 4)), vectors(4, 5, 5)),
    "InstanceNorm2d": (lambda: conv(nn.InstanceNorm2d(4, affine=True)), vectors(4, 5, 5)),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), 3), vectors(5, 4)),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        vectors(5, 4),
    ),
    "DPMultiheadAttention": (lambda: First(DPMultiheadAttention(4, 2, batch_first=True), 3), vectors(5, 4)),
    "DPRNN": (lambda: First(DPRNN(4, 3, batch_first=True)), vectors(5, 4)),
    "DPGRU": (lambda: First(DPGRU(4, 3, batch_first=True, bidirectional=True)), vectors(5, 4)),
    "DPLSTM": (lambda: First(DPLSTM(4, 3, batch_first=True, num_layers=2)), vectors(5, 4)),
    "bare parameters": (Bare, vectors(5, 4)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), vectors(4)),
    "tied GPT": (TinyGPT, words(9, 5)),
}

every_layer = pytest.mark.parametrize("name", list(ZOO))


def specimen(name: str, B: int = 4, dtype: torch.dtype = F64) -> tuple[nn.Module, tuple, Tensor]:
    """``(model, inputs, target)``: the target is random and as large as the outputs, so norms differ."""
    make, draw = ZOO[name]
    model, inputs = make().to(dtype), oracle.cast(draw(max(B, 1)), dtype)
    with torch.no_grad():
        out = model(*inputs)
    target = torch.randint(out.shape[-1], out.shape[:-1]) if "GPT" in name else 2 * torch.randn_like(out)
    return model, *oracle.take((inputs, target), range(B))


def loss_of(name: str):
    return token_loss if "GPT" in name else mse
