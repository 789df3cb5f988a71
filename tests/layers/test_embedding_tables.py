"""nn.Embedding: repeated ids, padding_idx, position tables; what is refused."""

import pytest
import torch
from torch import nn

from tests.helpers import BF16, F32, F64, assert_exact, assert_refused, check_layer, mse


class Lookup(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.emb = nn.Embedding(11, 5, **kw)
        self.out = nn.Linear(5, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.emb(ids)))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("shape", [(5,), (4, 1), (4, 9), (3, 2, 5), (2, 3, 2, 2)], ids=str)
def test_exact_on_every_shape(shape, dtype):
    check_layer(Lookup(), (torch.randint(11, shape),), dtype)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("padding_idx", [0, 7, -1])
def test_padding_rows_get_no_gradient(padding_idx, dtype):
    model = Lookup(padding_idx=padding_idx).to(dtype)
    ids = torch.randint(11, (4, 9))
    ids[0, :] = model.emb.padding_idx  # a sample of padding alone
    ids[1, ::2] = model.emb.padding_idx
    check_layer(model, (ids,), dtype)
    run = assert_exact(model, (ids,), torch.randn(4, 9, 3).to(dtype), mse)
    assert not run.sums["emb.weight"][padding_idx].any()


@pytest.mark.parametrize("T", [1, 2, 50])
def test_the_same_id_throughout(T):
    check_layer(Lookup(), (torch.full((3, T), 4),), F64)


def test_ids_of_other_integer_types_and_strides():
    model = Lookup()
    for ids in (
        torch.randint(11, (4, 6), dtype=torch.int32),
        torch.randint(11, (6, 4)).t(),
        torch.randint(11, (4, 12))[:, ::2],
        torch.randint(11, (4, 1)).expand(4, 6),
    ):
        check_layer(model, (ids,), F64)


def test_a_large_table_of_which_little_is_used():
    model = nn.Sequential(nn.Embedding(5000, 3), nn.Linear(3, 2))
    check_layer(model, (torch.randint(5000, (4, 7)),), F32)


def test_sequence_first():
    check_layer(Lookup(), (torch.randint(11, (9, 4)),), F64, batch_first=False)


def test_frozen_table():
    model = Lookup()
    model.emb.weight.requires_grad_(False)
    check_layer(model, (torch.randint(11, (4, 6)),), F64)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_norm", 1.5), ("scale_grad_by_freq", True), ("sparse", True)],
)
def test_refused_by_name(option, value):
    """Each of these makes a sample's gradient depend on the others, or rewrites the table in the forward."""
    assert_refused(Lookup(**{option: value}), "emb", option, str(value))
