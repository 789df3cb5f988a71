"""``noisy_grad_``: the compiled op against the reference, and against itself however the work is cut."""

import itertools
from dataclasses import replace

import pytest
import torch

from dpfast import ops
from dpfast.reference.noise import low_bits, standard_normal
from dpfast.reference.noisy_grad import noisy_grad_ as reference_noisy_grad_
from tests.ops.noisy import (
    BF16,
    BUILDS,
    F16,
    F32,
    F64,
    GRID,
    MODES,
    SIZES,
    arguments,
    assert_guards,
    guarded,
    new_key,
    new_noise,
    require,
    run,
    run_with,
    same,
    tensors,
    units,
)

DTYPES = [(F32, F32), (F64, F64), (F32, BF16), (F32, F16)]
each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize(("wide", "dtype"), DTYPES, ids=["f32", "f64", "bf16", "f16"])
# Within a tile and at its edges, where 32 bits count no more elements, no more quads, and at the very end
OFFSETS = (1, 127, 128, 2**32 - 500, 2**34 - 333, 2**35 - 1000)


@pytest.fixture(autouse=True)
def compiled():
    require("noisy_grad_")


def noisy(x, noise, dtype=None, parameter=3, offset=0):
    """Out of place, into poisoned and guarded memory; the input must stay."""
    grad, before = guarded(x.numel(), dtype or x.dtype), x.clone()
    ops.noisy_grad_([x], [grad], [parameter], noise, [offset])
    assert_guards(grad)
    assert same(x, before), "the sum was written to"
    return grad


def low(noise, parameter, start, n):
    """What float64's normals have below float32's."""
    return low_bits(noise.key, noise.step, parameter, start, start + n)


@each_mode
@each_dtype
@pytest.mark.parametrize("n", SIZES)
def test_against_the_reference(mode, wide, dtype, n):
    """To 2 units of the float32 normal, and nearly always to the bit."""
    noise, parameter, offset = new_noise(mode), int(torch.randint(1 << 32, ())), int(torch.randint(1000, ()))
    x = 3 * torch.randn(n, dtype=wide)
    want = torch.full((n,), torch.nan, dtype=dtype)
    filled = x + noise.std * low(noise, parameter, offset, n) if wide == F64 and mode == "fast" else x
    reference_noisy_grad_(filled, want, parameter, offset, noise.key, noise.step, noise.std, noise.grid, noise.scale)
    got = noisy(x, noise, dtype, parameter, offset)
    assert got.isfinite().all()
    drawn = (want.double() - x.double() * noise.scale).abs()
    # the noise to 2 of its units (and a step of the grid), then the roundings of the sum, the product and the result
    bound = 2 * units(F32, drawn) + noise.grid * noise.scale
    if wide == F32:
        bound = bound + 2 * units(F32, x * noise.scale, drawn, want) + (dtype != F32) * units(dtype, want)
    different = (got.double() - want.double()).abs()
    assert (different <= bound).all()
    if n > 10_000:
        assert (different > 0).double().mean() < 1e-3


@each_dtype
def test_the_equation(wide, dtype):
    """``(summed + std · z) · scale`` with the op's own z: one rounding for the sum, one for the product."""
    noise, n = new_noise("fast"), 1234
    z = torch.full((n,), torch.nan)
    torch.ops.dpfast.standard_normal(z, list(noise.key), noise.step, 9, 77, 0.0)
    assert abs(z.double().std() - 1) < 5 / (2 * n) ** 0.5
    x = 3 * torch.randn(n, dtype=wide)
    if wide == F64:
        want = (x + noise.std * low(noise, 9, 77, n) + noise.std * z.double()) * noise.scale
    else:
        std, scale = torch.tensor(noise.std), torch.tensor(noise.scale)
        want = ((x.double() + std.double() * z.double()).float() * scale).to(dtype)
    assert same(noisy(x, noise, dtype, 9, 77), want)


def test_float64_hides_the_low_bits():
    """A float64 normal is a float32 one and noise in the bits below it, evenly: no bit of a sum comes out as it is."""
    noise, n = new_noise("fast", std=1.0, scale=1.0), 4000
    z = noisy(torch.zeros(n, dtype=F64), noise)
    assert (z != z.float().double()).double().mean() > 0.99
    filled = (z - z.float().double()) / units(F32, z)
    assert abs(filled.mean()) < 0.05 and 0.2 < filled.std() < 0.4, "not even over the float32's unit"
    narrow = noisy(torch.zeros(n), noise).double()
    assert 0 < (z - narrow).abs().max() <= 2.0**-21
    assert same(z, narrow + low(noise, 3, 0, n))


@each_mode
@pytest.mark.parametrize("dtype", [F32, F64])
def test_in_place_is_out_of_place(mode, dtype):
    noise, x = new_noise(mode), torch.randn(3001, dtype=dtype)
    want = noisy(x, noise)
    ops.noisy_grad_([x], [x], [3], noise)
    assert same(x, want)


@each_mode
@each_dtype
@pytest.mark.parametrize("start", [0, *OFFSETS])
def test_shards_are_the_whole(mode, wide, dtype, start):
    """However a tensor is cut, and wherever it lies in its parameter: bit for bit."""
    noise, x = new_noise(mode), torch.randn(1000, dtype=wide)
    whole = noisy(x, noise, dtype, offset=start)
    cuts = sorted({0, 1000, *torch.randint(1000, (9,)).tolist()})
    pieces = [noisy(x[low:high].clone(), noise, dtype, offset=start + low) for low, high in itertools.pairwise(cuts)]
    assert same(torch.cat(pieces), whole)


@each_mode
@pytest.mark.parametrize("offset", [0, *OFFSETS])
def test_an_offset_is_a_place_in_the_stream(mode, offset):
    """The reference's own normals of these elements, and not those of the start."""
    noise, x = new_noise(mode, scale=1.0), torch.zeros(1000)
    got, want = noisy(x, noise, offset=offset), torch.empty(1000)
    reference_noisy_grad_(x, want, 3, offset, noise.key, noise.step, noise.std, noise.grid, 1.0)
    assert (got - want).abs().max() < 1e-5
    assert offset == 0 or not same(got, noisy(x, noise))
    if mode == "fast":
        z = standard_normal(noise.key, noise.step, 3, offset, offset + 1000)
        assert (got / noise.std - z).abs().max() < 1e-5


@each_mode
@pytest.mark.parametrize("threads", [1, 2])
def test_a_list_is_its_tensors_one_by_one(mode, threads):
    """Of all sizes and dtypes, on one thread or two."""
    noise = new_noise(mode)
    sums = [torch.randn(n, dtype=wide) for wide, _ in DTYPES for n in SIZES]
    dtypes = [dtype for _, dtype in DTYPES for _ in SIZES]
    grads = [guarded(len(x), dtype, shift=k % 5) for k, (x, dtype) in enumerate(zip(sums, dtypes, strict=True))]
    places, offsets = torch.randperm(len(sums)).tolist(), torch.randint(1 << 33, (len(sums),)).tolist()
    torch.set_num_threads(threads)
    try:
        ops.noisy_grad_(sums, grads, places, noise, offsets)
    finally:
        torch.set_num_threads(1)
    for grad, *one in zip(grads, sums, dtypes, places, offsets, strict=True):
        x, dtype, place, offset = one
        assert_guards(grad)
        assert same(grad, noisy(x, noise, dtype, place, offset))


@pytest.mark.parametrize("isa", BUILDS)
def test_instruction_sets(isa, tmp_path):
    """Every build gives the bits that this process gets, in all modes, also where the secure mode is beyond 32 bits."""
    calls = []
    for mode in (*MODES, "none"):
        noise = new_noise(mode) if mode != "none" else new_noise(std=0.0)
        for wide, dtype in DTYPES:
            sums = [torch.randn(n, dtype=wide) * size for n in SIZES[1:-1] for size in (1, 1e4)]
            sums += [torch.tensor([torch.nan, 1, torch.inf, -torch.inf, 2], dtype=wide)]
            grads = [torch.full_like(x, torch.nan, dtype=dtype) for x in sums]
            places = list(range(len(sums))), torch.randint(1 << 33, (len(sums),)).tolist()
            calls.append(("noisy_grad_", (sums, grads, *places, *arguments(noise))))
    done = run_with(isa, calls, tmp_path)
    run(calls)
    assert same(tensors(done), tensors(calls))


def test_every_part_of_the_noise_counts():
    """Another key, step or parameter is other noise, at every element; in the secure mode each word of the key."""
    for mode, words in (("fast", 2), ("secure", 8)):
        noise, x = new_noise(mode, step=7), torch.zeros(300)
        others = [noisy(x, noise, parameter=4), noisy(x, replace(noise, step=8))]
        for word in range(8):
            key = [k ^ (1 << 31) * (word == i) for i, k in enumerate(noise.key)]
            changed = noisy(x, replace(noise, key=tuple(key)))
            assert same(changed, noisy(x, noise)) == (word >= words)
            others += [changed] if word < words else []
        for other in others:
            assert (other == noisy(x, noise)).sum() <= 1


@each_dtype
@each_mode
def test_std_zero_only_scales(mode, wide, dtype):
    x = torch.randn(777, dtype=wide)
    noise = new_noise(mode, std=0.0)
    scale = noise.scale if wide == F64 else torch.tensor(noise.scale)
    assert same(noisy(x, noise, dtype), (x * scale).to(dtype))


@each_mode
@each_dtype
def test_what_is_not_finite_stays_alone(mode, wide, dtype):
    """Its own element is NaN or infinite, all others have the bits that they have without it."""
    noise, x = new_noise(mode), torch.randn(1000, dtype=wide)
    want, at = noisy(x, noise, dtype), [0, 127, 128, 500, 640, 999]
    x[at] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 2, dtype=wide)
    got = noisy(x, noise, dtype)
    torch.testing.assert_close(got[at], x[at].to(dtype), rtol=0, atol=0, equal_nan=True)
    rest = [k for k in range(1000) if k not in at]
    assert same(got[rest], want[rest])


@pytest.mark.parametrize("size", [1.0, 2.0**6, 2.0**8, 1e5, 1e8])
def test_secure_noise_is_added_to_whole_steps(size):
    """Exactly: whole multiples of the grid, and two inputs are as far apart as their roundings. |x| < 2⁵³ steps.

    2⁶ and 2⁸ are about 2³⁰ and 2³² steps of the grid, where 32 bits end.
    """
    noise = new_noise("secure", scale=1.0)
    assert noise.grid == GRID
    n = 5003
    for dtype in (F64, F32):
        if dtype == F32:  # its integers end at 2²⁴: a coarse grid, the same arithmetic
            noise = ops.Noise(tuple(new_key()), 1, 1.0, 2.0**-16, 1.0)
            size = min(size, 64.0)
        x, y = ((torch.rand(n, dtype=dtype) - 0.5) * size for _ in range(2))
        x[:9] = (torch.arange(9) - 4).to(dtype) * noise.grid / 2  # halves: to the even
        x[9] = 0
        drawn = noisy(torch.zeros(n, dtype=dtype), noise) / noise.grid
        assert drawn.abs().max() > 1e4
        for t in (x, y):
            steps = noisy(t, noise) / noise.grid
            assert torch.equal(steps, steps.round()), "not a whole number of steps"
            assert torch.equal(steps - drawn, (t / noise.grid).round())
        moved = (noisy(x, noise) - noisy(y, noise)) / noise.grid
        assert torch.equal(moved, (x / noise.grid).round() - (y / noise.grid).round())


def test_secure_noise_beside_large_values():
    """A value far beyond 2³⁰ steps takes its vector another way: the neighbours' bits stay, and it gets its noise."""
    noise, x = new_noise("secure", scale=1.0), torch.randn(256)
    want, wide = noisy(x, noise), noisy(torch.zeros(256, dtype=F64), noise)
    at = [3, 130, 255]
    x[at] = torch.tensor([100.3, -1e5, 3e12])
    got = noisy(x, noise)
    exact = ((x.double() / GRID).round() * GRID + wide)[at]
    assert same(got[at], exact.float())
    rest = [k for k in range(256) if k not in at]
    assert same(got[rest], want[rest])
