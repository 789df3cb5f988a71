"""nn.EmbeddingBag: sum and mean, 1-D ids with offsets and 2-D ids, repeated ids, weights; what is refused."""

import pytest
import torch
from torch import nn

from tests.helpers import F32, F64, assert_refused, check_layer


class Bags(nn.Module):
    """``ids [B, n]`` and how many of each row count: 1-D ids with offsets, or 2-D ids."""

    def __init__(self, flat: bool, weighted: str = "no", **kw):
        super().__init__()
        self.flat, self.weighted = flat, weighted
        self.bag = nn.EmbeddingBag(13, 5, **kw)
        self.weigh = nn.Linear(1, 1) if weighted == "learnt" else None
        self.out = nn.Linear(5, 3)

    def forward(self, ids, counts, weights):
        if self.weighted == "learnt":
            weights = self.weigh(weights.unsqueeze(-1)).squeeze(-1)
        if not self.flat:
            bags = self.bag(ids, per_sample_weights=None if self.weighted == "no" else weights)
        else:
            ends = counts.cumsum(0)
            offsets = ends - counts
            if self.bag.include_last_offset:
                offsets = torch.cat([ends.new_zeros(1), ends])
            # row by row: a mask over the batch picks rows by the data, which no check of one batch can trust
            flat, weighed = (
                torch.cat([row[:n] for row, n in zip(x, counts.tolist(), strict=True)] or [x[:0, 0]])
                for x in (ids, weights)
            )
            bags = self.bag(flat, offsets, None if self.weighted == "no" else weighed)
        return self.out(torch.tanh(bags))


def batch(vocabulary=13, B=5, n=6):
    counts = torch.randint(1, n + 1, (B,))
    return torch.randint(vocabulary, (B, n)), counts, torch.rand(B, n) + 0.5


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("flat", [True, False], ids=["offsets", "2d"])
def test_exact(flat, mode, dtype):
    check_layer(Bags(flat, mode=mode), batch(), dtype)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("flat", [True, False], ids=["offsets", "2d"])
def test_repeated_indices(flat, mode):
    """Two words in bags of six: each row is hit several times by the same sample."""
    check_layer(Bags(flat, mode=mode), batch(vocabulary=2), F64)


@pytest.mark.parametrize("weighted", ["given", "learnt"])
@pytest.mark.parametrize("flat", [True, False], ids=["offsets", "2d"])
def test_per_sample_weights(flat, weighted):
    """Also where the weights come from a layer, which then needs their gradient."""
    check_layer(Bags(flat, weighted, mode="sum"), batch(vocabulary=4), F64)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_empty_bags(mode):
    ids, counts, weights = batch()
    counts[[0, 3]] = 0
    check_layer(Bags(True, mode=mode), (ids, counts, weights), F64)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_include_last_offset(mode):
    check_layer(Bags(True, mode=mode, include_last_offset=True), batch(), F64)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("flat", [True, False], ids=["offsets", "2d"])
def test_padding_idx(flat, mode):
    """Padding is neither added up nor counted in the mean."""
    ids, counts, weights = batch(vocabulary=3)
    ids[1] = 2
    check_layer(Bags(flat, mode=mode, padding_idx=2), (ids, counts, weights), F64)


def test_one_bag_each_of_one_id():
    ids = torch.randint(13, (4, 1))
    check_layer(Bags(True, mode="mean"), (ids, torch.ones(4, dtype=torch.long), torch.rand(4, 1)), F64)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_norm", 1.5), ("scale_grad_by_freq", True), ("sparse", True), ("mode", "max")],
)
def test_refused_by_name(option, value):
    assert_refused(Bags(True, **{option: value}), "bag", option, str(value))
