"""What a physical batch of one cannot make exact stays refused with ``max_physical_batch_size=1``."""

import pytest
from torch import nn

from tests.helpers import assert_refused, make_private


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(5, 3, max_norm=1.0),
        nn.Embedding(5, 3, sparse=True),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    ],
    ids=["max_norm", "sparse", "running statistics"],
)
def test_unsafe_at_any_batch_size(layer):
    assert_refused(nn.Sequential(layer), type(layer).__name__, max_physical_batch_size=1)


def test_unserved_but_exact_alone():
    make_private(nn.Sequential(nn.EmbeddingBag(5, 3, mode="max")), max_physical_batch_size=1)
