"""The noisy gradient of a linear layer clipped on its own, against float64, one sample at a time."""

import math

import pytest
import torch
from dpfast_kernels.noise import noise_stream
from dpfast_kernels.per_layer import per_layer_noisy_gradient

from dpfast.reference import noise as reference

KEY, STEP = (5, 6), 7
# B, T, d, p: ghost norms and norms of tiles, rows of whole quads and not, one position, no sample
SHAPES = [(3, 20, 36, 17), (4, 70, 5, 6), (5, 1, 19, 34), (1, 33, 40, 3), (0, 4, 6, 5)]


def inputs(B, T, d, p, dtype, device):
    A = torch.randn(B, T, d, device=device).to(dtype)
    return A, (torch.randn(B, T, p, device=device) * torch.logspace(-3, 1, B, device=device).view(B, 1, 1)).to(dtype)


def gradients(A, G):
    """Float64 ``[B, p, d + 1]``: the last column is the bias."""
    ones = torch.ones_like(A[:, :, :1])
    return torch.stack([g.double().T @ a.double() for a, g in zip(torch.cat([A, ones], 2), G, strict=True)])


def noise_of(parameter, *shape):
    return reference.standard_normal(KEY, STEP, parameter, 0, math.prod(shape)).view(shape).double()


def noisy_gradient(A, G, C, std=0.0, scale=1.0, bias=True):
    return per_layer_noisy_gradient(A, G, C, noise_stream(KEY, STEP, A.device), 3, 4, std, scale, bias)


def check(result, A, G, C, std, scale, bias=True):
    weight, bias_sum, factors = (side.cpu() for side in result)
    (B, T, d), p = A.shape, G.shape[2]
    assert weight.shape == (p, d) and bias_sum.shape == (p if bias else 0,) and factors.shape == (B,)
    g = gradients(A, G).cpu() if B else torch.zeros(0, p, d + 1, dtype=torch.float64)
    n = (g if bias else g[:, :, :d]).flatten(1).norm(dim=1)
    assert (factors * n <= C).all() and (factors <= 1).all()  # the guarantee
    assert torch.allclose(factors.double(), (C / n).clamp(max=1), rtol=1e-3)
    expected = torch.einsum("b,bpd->pd", factors.double(), g)
    ones = torch.cat([A, torch.ones_like(A[:, :, :1])], 2).double().abs().cpu()
    magnitude = torch.einsum("b,btp,btd->pd", factors.double(), G.double().abs().cpu(), ones)
    for got, columns, parameter in ((weight, slice(0, d), 3), (bias_sum[:, None], slice(d, d + 1), 4)):
        if got.numel():
            z = noise_of(parameter, p, got.shape[1])
            right = (expected[:, columns] + std * z) * scale
            bound = (T / 8 + B + 16) * 2**-24 * (magnitude[:, columns] + 2 * std * z.abs()) * scale
            assert ((got - right).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_noisy_gradient(shape, dtype, device):
    A, G = inputs(*shape, dtype, device)
    check(noisy_gradient(A, G, 2.0, 1.5, 0.125), A, G, 2.0, 1.5, 0.125)
    check(noisy_gradient(A, G, 2.0, 1.5, 0.125, bias=False), A, G, 2.0, 1.5, 0.125, bias=False)


def test_views(device):
    A, G = inputs(6, 20, 36, 34, torch.float32, device)
    A, G = A[::2, :, 3:].transpose(1, 2).contiguous().transpose(1, 2), G[::2, :, ::2]
    check(noisy_gradient(A, G, 1.0, 1.0), A, G, 1.0, 1.0, 1.0)


def test_cancelled_norm_is_not_trusted(device):
    """Positions that cancel: the ghost norm is mostly rounding, the factor is still on the safe side."""
    A, G = inputs(4, 40, 64, 48, torch.float32, device)
    A[:, 20:] = A[:, :20]
    G[:, 20:] = -G[:, :20] * (1 + 1e-4 * torch.rand_like(G[:, :20]))
    n = gradients(A, G)[:, :, :-1].flatten(1).norm(dim=1)
    C = n.min().item() / 2
    weight, _, factors = noisy_gradient(A, G, C, bias=False)
    assert (factors * n <= C).all() and (factors > 0).all()
    assert weight.isfinite().all()


def test_sample_that_is_not_finite_is_left_out(device):
    A, G = inputs(4, 25, 20, 10, torch.bfloat16, device)
    weight, bias, factors = noisy_gradient(A[[0, 2]], G[[0, 2]], 1.0)
    A[1, 3, 2], G[3, 24, 9] = torch.nan, torch.inf
    spoiled_weight, spoiled_bias, spoiled = noisy_gradient(A, G, 1.0)
    assert torch.equal(spoiled[[0, 2]], factors) and (spoiled[[1, 3]] == 0).all()
    assert torch.allclose(spoiled_weight, weight, rtol=1e-6, atol=1e-6)
    assert torch.allclose(spoiled_bias, bias, rtol=1e-6, atol=1e-6)


def test_leave_one_out(device):
    A, G = inputs(5, 20, 12, 9, torch.float32, device)
    weight, bias, _ = noisy_gradient(A, G, 0.75)
    for left in range(5):
        rest = [b for b in range(5) if b != left]
        other_weight, other_bias, _ = noisy_gradient(A[rest], G[rest], 0.75)
        moved = torch.cat([(weight - other_weight).flatten(), bias - other_bias]).double().norm()
        assert moved <= 0.75 * (1 + 1e-6)


def test_edges(device):
    A, G = inputs(3, 20, 12, 9, torch.float32, device)
    G[1] = 0
    weight, bias, factors = noisy_gradient(A, G, 0.0)
    assert factors.tolist() == [0, 1, 0] and (weight == 0).all() and (bias == 0).all()
    _, bias, factors = noisy_gradient(A[:, :0], G[:, :0], 1.0)
    assert (factors == 1).all() and (bias == 0).all()
    weight, bias, _ = noisy_gradient(A[:, :, :0], G, 1e6)
    assert weight.shape == (9, 0) and torch.allclose(bias, G.sum((0, 1)), atol=1e-4)


def test_op(device):
    A, G = inputs(2, 5, 6, 4, torch.float32, device)
    arguments = (A, G, 1.0, noise_stream(KEY, STEP, device), 3, 4, 1.0, 0.5)
    for bias in (True, False):
        torch.library.opcheck(per_layer_noisy_gradient, (*arguments, bias))
