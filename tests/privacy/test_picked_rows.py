"""Rows that are picked or ordered by the data, clean in the first batch and not in the next: refused by name."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import F64, make_private

B, T, D = 8, 3, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)


class Unpadded(Net):
    """Tokens picked by a mask ``[B, T]``, as many of each sample in a full batch."""

    def forward(self, x, mask):
        return self.b(torch.tanh(self.a(x[mask])))


class SortedOutsideOfTorch(Net):
    """Samples put in order by NumPy, which is the order that they are in at first."""

    def forward(self, x, mask):
        order = torch.as_tensor(np.argsort(-mask.sum(1).numpy(), kind="stable"))
        h = self.b(torch.tanh(self.a(x))[order])
        return h[torch.argsort(order)]


@pytest.mark.parametrize("kind", [Unpadded, SortedOutsideOfTorch])
def test_refused_or_by_sample(kind):
    model = kind().double()
    wrapped, _, _ = make_private(model, max_grad_norm=1.0)
    x, mask = torch.randn(B, T, D, dtype=F64), torch.ones(B, T, dtype=torch.bool)
    try:
        wrapped(x, mask)
    except RuntimeError as refusal:
        assert "orders or picks" in str(refusal)
    else:
        assert wrapped.runs_by_sample


def test_a_batch_is_not_a_batch_of_one_for_a_shared_input():
    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(D, 5, batch_first=True), nn.Linear(5, 1)

        def forward(self, x, position):
            return self.out(self.rnn(x + position)[0][:, -1])

    model = Scored().double()
    wrapped, _, _ = make_private(model, max_physical_batch_size=1)
    with pytest.raises(ValueError, match="batch of one"):
        wrapped(torch.randn(B, T, D, dtype=F64), torch.randn(1, T, D, dtype=F64))
    wrapped(torch.randn(1, T, D, dtype=F64), torch.randn(1, T, D, dtype=F64)).sum().backward()
