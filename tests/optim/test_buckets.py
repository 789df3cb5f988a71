"""Ranks hand the update over in buckets: each has its tensors looked at, until they are others."""

import pytest
import torch
from torch import nn

from dpfast import ops
from dpfast.noise.parts import StepNoise
from dpfast.ops import update
from dpfast.optim.fused_update import noisy_step, why_not_fused
from tests.ops.noisy import require


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_every_bucket_is_checked_until_nothing_changes(make, monkeypatch):
    require("noisy_sgd_")
    looked = []
    monkeypatch.setattr(update, "check_overlap", lambda lists: looked.append(len(lists["params"])))
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = make(model.parameters(), lr=0.1)
    params = list(model.parameters())
    index = {p: k for k, p in enumerate(params)}

    def step():
        looked.clear()
        assert why_not_fused(optimizer) is None
        for bucket in (params[:1], params[1:]):
            noise = StepNoise([ops.Noise((0,) * ops.KEY_WORDS, 0, 0.0)])
            noisy_step(optimizer, {p: torch.zeros_like(p) for p in bucket}, index, noise)
        return list(looked)

    assert step() == [1, 3]
    while first := step():  # states were made, which are looked at too
        assert first == [1, 3]
    params[0].data = params[0].data.clone()
    assert step() == [1, 3]
