"""The noise of the kernels is that of dpfast.reference.noise and of the native headers."""

import pytest
import torch
import triton
import triton.language as tl
from dpfast_kernels.common import INTERPRETED, OPTIONS
from dpfast_kernels.noise import noise_stream, noisy, standard_normal

from dpfast.reference import noise as reference
from tests.ops import vectors

KEY = (0x243F6A88, 0xFFFFFFFF)
# Before 3.9 the interpreter rounds an fma twice.
EXACT = not INTERPRETED or tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
PLACES = [(0, 0, 0, 3000), (7, 3, 1, 1030), (0xFFFFFFFF, 0x80000001, (1 << 34) - 6, 20), (1, 2, 5, 0), (1, 2, 3, 1)]


def assert_same(z, expected):
    if EXACT:
        assert torch.equal(z, expected)
    units = (z.view(torch.int32) - expected.view(torch.int32)).abs()
    assert (units <= 2).all()


def drawn(step, parameter, offset, n, device):
    out = torch.empty(n, device=device)
    standard_normal(out, noise_stream(KEY, step, device), parameter, offset)
    return out.cpu()


@pytest.mark.parametrize("place", PLACES)
def test_reference(place, device):
    step, parameter, offset, n = place
    assert_same(drawn(*place, device), reference.standard_normal(KEY, step, parameter, offset, offset + n))


def test_native(device):
    program = vectors.fastest()
    for step, parameter, offset, n in PLACES[:3]:
        start = offset // 128 * 128
        normals = program.normals([*KEY, *[0] * 6], step, parameter, start, start + 128 * (n // 128 + 2))
        expected = torch.from_numpy(normals.copy())[offset - start :][:n]
        assert_same(drawn(step, parameter, offset, n, device), expected)


def test_every_argument_counts(device):
    base = drawn(1, 2, 0, 64, device)
    for other in (drawn(2, 2, 0, 64, device), drawn(1, 3, 0, 64, device), drawn(1, 2, 1 << 34, 64, device)):
        assert not torch.isin(other, base).any()
    assert torch.equal(drawn(1, 2, 9, 55, device), base[9:])


def test_moments(device):
    z = drawn(0, 1, 0, 30_000, device).double()
    assert z.mean().abs() < 5 / 173
    assert (z.square().mean() - 1).abs() < 5 * 2**0.5 / 173


@triton.jit
def noisy_kernel(total, out, stream, offset, d, std, scale, QUADS: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    rows = tl.arange(0, P).to(tl.int64)
    places = rows[:, None] * d + tl.arange(0, D)[None, :]
    tile = tl.load(total + places)
    tl.store(out + places, noisy(tile, offset + rows * d, stream, 11, std, scale, QUADS))


@pytest.mark.parametrize("quads", [True, False])
def test_epilogue(quads, device):
    """A tile of a parameter whose rows are longer, or begin in the middle of a quad."""
    P, D, d, offset, std, scale = 4, 16, 16 if quads else 18, 40 if quads else 41, 1.5, 0.25
    total = torch.randn(P, d, device=device)
    out = torch.zeros_like(total)
    noisy_kernel[(1,)](total, out, noise_stream(KEY, 9, device), offset, d, std, scale, quads, P, D, **OPTIONS)
    z = reference.standard_normal(KEY, 9, 11, offset, offset + P * d).view(P, d)
    expected = ((total.cpu().double() + std * z.double()).float() * scale)[:, :D]  # the product is exact in float64
    assert torch.allclose(out[:, :D].cpu(), expected, rtol=2**-22, atol=2**-22)


def test_op(device):
    torch.library.opcheck(standard_normal, (torch.zeros(9, device=device), noise_stream(KEY, 1, device), 2, 3))
