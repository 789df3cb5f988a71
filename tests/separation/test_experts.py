"""Mixtures of experts that gather the rows that each expert gets: exact, in layers."""

import pytest
import torch
from torch import nn

from tests.helpers import F64, mse
from tests.privacy.judging import TIGHT, Private, examine

B, T, D = 5, 4, 6


class Experts(nn.Module):
    """Each token goes to its best experts, whose layers see the tokens that they got."""

    def __init__(self, gather, tokens, most=2, experts=3):
        super().__init__()
        self.gather, self.tokens, self.most = gather, tokens, most
        self.router = nn.Linear(D, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D), nn.LayerNorm(D)) for _ in range(experts)
        )
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        shape = x.shape
        rows = x.reshape(-1, D) if self.tokens else x
        weights, chosen = self.router(rows).softmax(-1).topk(self.most, -1)
        out = torch.zeros_like(rows)
        for k, expert in enumerate(self.experts):
            out = self.gather(rows, out, weights, chosen == k, expert)
        return self.head(rows + out).reshape(*shape[:-1], 3)


def where(rows, out, weights, hit, expert):
    row, slot = torch.where(hit)
    if len(row) == 0:
        return out
    return out.index_add(0, row, expert(rows[row]) * weights[row, slot, None])


def masked(rows, out, weights, hit, expert):
    mask = hit.any(-1)
    mine = expert(rows[mask]) * (weights * hit).sum(-1)[mask][:, None]
    out = out.clone()
    out[mask] = out[mask] + mine
    return out


def selected(rows, out, weights, hit, expert):
    row = hit.any(-1).nonzero().squeeze(1)
    mine = expert(rows.index_select(0, row))
    return out + torch.zeros_like(out).index_copy(0, row, mine)


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "samples"])
@pytest.mark.parametrize("gather", [where, masked, selected])
def test_experts_that_gather_rows(gather, tokens):
    shape = (B, T, D) if tokens else (B, D)
    x = torch.randn(shape, dtype=F64)
    earlier = torch.randn(shape, dtype=F64)  # other rows go to other experts
    target = torch.randn(*shape[:-1], 3, dtype=F64)
    private = examine(Experts(gather, tokens), (x,), target, mse, before=((earlier,), target))
    assert not private.wrapped.runs_by_sample
    gaps = private.wrapped.separation.gaps  # the rows are followed; how many there are, Python may read
    assert all(gap.startswith("how many rows") for gap in gaps)


def test_an_expert_that_nobody_hits():
    model = Experts(masked, True, most=1, experts=4)
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -1e4]))
    examine(model, (torch.randn(B, T, D),), torch.randn(B, T, 3), mse)


class Capped(nn.Module):
    """Only as many rows of the batch as an expert takes: one sample's are pushed out by another's."""

    def __init__(self):
        super().__init__()
        self.router, self.expert, self.head = nn.Linear(D, 1), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x):
        best = self.router(x).squeeze(1).topk(2).indices
        return self.head(x.index_add(0, best, self.expert(x[best])))


def test_an_expert_that_chooses_among_samples_is_refused():
    private = Private(Capped().double(), TIGHT)
    with pytest.raises(RuntimeError, match="topk"):
        private.backward((torch.randn(B, D, dtype=F64),), torch.randn(B, 3, dtype=F64), mse)
    assert private.nothing_summed()
