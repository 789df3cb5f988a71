"""Thousands of samples whose gradients all point one way: what a float32 sum of them is rounded by."""

import pytest
import torch

from dpfast.capture.forms import Convolved, EmbeddingRows, Factored, Instantiated, OuterProduct
from dpfast.clipping.thresholds import Clipping
from dpfast.ops import Geometry
from tests.helpers import BF16, F32

UNLUCKY = 1.0000036954811478  # added up again and again, it is rounded the same way for long
GEOMETRY = Geometry((1,), (0,), (1,), False, (0,), 1)
FORMS = {
    "one position": lambda make: OuterProduct(make(16), make(8), 8),
    "positions": lambda make: Factored(make(1, 3, 16), make(1, 3, 8), 8),
    "groups": lambda make: Factored(make(2, 1, 8), make(2, 1, 8), 16),
    "convolution": lambda make: Convolved(make(3, 6), make(4, 4), torch.zeros(4, 3, 3), GEOMETRY, make.batch),
    "embedding": lambda make: EmbeddingRows(torch.tensor([[0, 1, 0]]).expand(make.batch, 3), make(3, 8), 3),
    "written out": lambda make: Instantiated(make(150)),
}


class Same:
    """``batch`` times the same tensor: constants, or drawn from a seed."""

    def __init__(self, batch: int, value: float | None, dtype: torch.dtype):
        self.batch, self.value, self.dtype, self.drawn = batch, value, dtype, torch.Generator().manual_seed(7)

    def __call__(self, *shape: int) -> torch.Tensor:
        if self.value is None:
            one = 16 * torch.randn(*shape, generator=self.drawn)
        else:
            one = torch.full(shape, 16 * self.value)
        return one.to(self.dtype).expand(self.batch, *shape).contiguous()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("value", [None, UNLUCKY, 0.1], ids=["random", "unlucky", "0.1"])
@pytest.mark.parametrize("name", FORMS)
def test_one_of_them_moves_the_sum_by_C_and_its_last_digit(name, value, dtype):
    for many in (1000, 4096):
        sums = []
        for batch in (many, many - 1):
            form = FORMS[name](Same(batch, value, dtype))
            (factors,), _ = Clipping.flat(1.0).factors(*(x.unsqueeze(0) for x in form.squared_norm()), 1.0)
            sums.append(form.clipped_sum(factors.float()).double())
        moved = (sums[0] - sums[1]).norm().item()
        assert 0.99 <= moved <= 1 + many * 2.0**-22, f"{many} samples: {moved} C"
