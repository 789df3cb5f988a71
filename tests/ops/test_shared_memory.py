"""Tensors that share memory until one of them is written to: no op that only reads them makes the copy."""

import pytest
import torch

from dpfast import ops
from tests.ops.samples import draw

B, T, D, P, ROWS = 3, 6, 5, 4, 7
F32 = torch.float32


def linear():
    return draw(F32, B, 1, T, D), draw(F32, B, 1, T, P)


def embedding():
    return torch.randint(0, ROWS, (B, T)), draw(F32, B, T, D)


READ = {
    "certified": (lambda: [draw(F32, B, D)], lambda x: ops.squared_norm(x)),
    "weighted_sum": (lambda: [draw(F32, B, D), torch.rand(B)], ops.weighted_sum),
    "one position": (lambda: [draw(F32, B, 1, 1, D), draw(F32, B, 1, 1, P)], ops.one_position_squared_norm),
    "ghost": (linear, ops.ghost_squared_norm),
    "instantiate": (linear, ops.grad_samples),
    # Factors are a step's own: nobody shares their memory.
    "clipped sum": (linear, lambda A, G: ops.clipped_weight_gradient(A, G, torch.rand(B))),
    "positions": (lambda: [draw(F32, B, T, D)], ops.sum_positions),
    "normalised": (
        lambda: [draw(F32, B, T, D), draw(F32, B, T, D), draw(F32, B, T), torch.rand(B, T)],
        ops.normalised_sums,
    ),
    "channels": (
        lambda: [draw(F32, B, D, T), draw(F32, B, D, T), draw(F32, B, 1), torch.rand(B, 1)],
        ops.channel_sums,
    ),
    "embedding norm": (embedding, ops.embedding_squared_norm),
    "embedding sum": (lambda: [*embedding(), torch.rand(B)], lambda *given: ops.embedding_sum(*given, ROWS)),
}


@pytest.mark.parametrize("name", READ)
def test_reading_makes_no_copy(name):
    make, op = READ[name]
    given = [torch._lazy_clone(x) for x in make()]
    twins = [torch._lazy_clone(x) for x in given]
    op(*given)
    assert all(torch._C._is_cow_tensor(x) for x in given)
    for x, twin in zip(given, twins, strict=True):
        assert torch._C._data_address(x) == torch._C._data_address(twin)
