"""The noise against published vectors, and the C++ headers against the reference, to the bit."""

import numpy as np
import pytest
import torch

from dpfast.reference.noise import (
    PIECE,
    SECURE_ELEMENTS,
    chacha20_block,
    philox4x32_10,
    secure_integers,
    standard_normal,
)
from tests.ops.vectors import BUILDS, program

# Digits of e: fixed, and chosen by nobody.
KEY = [0x2B7E1516, 0x28AED2A6, 0xABF71588, 0x09CF4F3C, 0x762E7160, 0xF38B4DA5, 0x6A784D90, 0x45190CFE]
ONES = 0xFFFFFFFF

# key, counter, words: Random123 1.09, tests/kat_vectors
PHILOX = [
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES, ONES), (ONES, ONES, ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]

# key, block counter, nonce, words: RFC 8439, 2.3.2 and A.1 (1 to 5)
CHACHA = [
    (
        [0x03020100 + 0x04040404 * i for i in range(8)],
        1,
        (0x09000000, 0x4A000000, 0),
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2",
    ),
    (
        [0] * 8,
        0,
        (0, 0, 0),
        "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b "
        "7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2",
    ),
    (
        [0] * 8,
        1,
        (0, 0, 0),
        "bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32 "
        "7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b",
    ),
    (
        [0] * 7 + [0x01000000],
        1,
        (0, 0, 0),
        "2452eb3a 9249f8ec 8d829d9b ddd4ceb1 e8252083 60818b01 f38422b8 5aaa49c9 "
        "bb00ca8e da3ba7b4 c4b592d1 fdf2732f 4436274e 2561b3c8 ebdd4aa6 a0136c00",
    ),
    (
        [0x0000FF00] + [0] * 7,
        2,
        (0, 0, 0),
        "fb4dd572 4bc42ef1 df922636 327f1394 a78dea8f 5e269039 a1bebbc1 caf09aae "
        "a25ab213 48a6b46c 1b9d9bcb 092c5be6 546ca624 1bec45d5 87f47473 96f0992e",
    ),
    (
        [0] * 8,
        0,
        (0, 0, 0x02000000),
        "374dc6c2 3736d58c b904e24a cd3f93ef 88228b1a 96a4dfb3 5b76ab72 c727ee54 "
        "0e0e978a f3145c95 1b748ea8 f786c297 99c28f5f 628314e8 398a19fa 6ded1b53",
    ),
]

# Within a quad, at the edges of a tile of 128 elements and of the reference's pieces, and where the number of a quad
# needs a second word (quad 2³² is element 2³⁴).
RANGES = [
    (0, 1),
    (5, 7),
    (127, 129),
    (128, 256),
    (3, 200_003),
    (PIECE - 3, PIECE + 130),
    (2**34 - 131, 2**34 + 131),
    (5 * 2**34 + 77, 5 * 2**34 + 1077),
    (2**60 + 1, 2**60 + 300),
]
SECURE_RANGES = [*RANGES[:-2], (63, 65), (SECURE_ELEMENTS - 130, SECURE_ELEMENTS)]
each_build = pytest.mark.parametrize("build", BUILDS)


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def units_apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many float32 numbers lie from x to y."""
    bits = [v.view(np.int32).astype(np.int64) for v in (x, y)]
    first, second = (np.where(b < 0, -(b & 0x7FFFFFFF), b) for b in bits)  # the order of the numbers
    return np.abs(first - second)


@pytest.mark.parametrize(("key", "counter", "words"), PHILOX)
def test_reference_philox_vectors(key, counter, words):
    assert philox4x32_10(torch.tensor(counter), key).tolist() == hexadecimal(words)


@each_build
@pytest.mark.parametrize(("key", "counter", "words"), PHILOX)
def test_native_philox_vectors(build, key, counter, words):
    """The first lane is the vector; the others, each with a counter of its own, are the reference's."""
    lanes = program(build).philox(key, counter)
    assert lanes[0] == hexadecimal(words)
    counters = torch.tensor([[(counter[0] + lane) & ONES, *counter[1:]] for lane in range(len(lanes))])
    assert lanes == philox4x32_10(counters, key).tolist()


@pytest.mark.parametrize(("key", "counter", "nonce", "words"), CHACHA)
def test_reference_chacha_vectors(key, counter, nonce, words):
    assert chacha20_block(key, torch.tensor([counter]), nonce).tolist() == [hexadecimal(words)]


@each_build
@pytest.mark.parametrize(("key", "counter", "nonce", "words"), CHACHA)
def test_native_chacha_vectors(build, key, counter, nonce, words):
    lanes = program(build).chacha(key, counter, nonce)
    assert lanes[0] == hexadecimal(words)
    assert lanes == chacha20_block(key, counter + torch.arange(len(lanes)), nonce).tolist()


@each_build
@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_normals(build, start, stop):
    """The builds agree to the bit; the reference, which rounds some multiply-adds twice, nearly always."""
    arguments = (KEY, 0xFFFFFFF0, 0x80000001, start, stop)
    z = program(build).normals(*arguments)
    np.testing.assert_array_equal(z.view(np.int32), program("scalar").normals(*arguments).view(np.int32))
    apart = units_apart(z, standard_normal(*arguments).numpy())
    assert apart.max() <= 2
    assert (apart > 0).mean() < 1e-3


@each_build
@pytest.mark.parametrize(("start", "stop"), SECURE_RANGES)
@pytest.mark.parametrize("scale", [2.0**27, 1.37 * 2**24, 0.0])
def test_secure_integers(build, start, stop, scale):
    arguments = (KEY, 0xFFFFFFF0, 0x80000001, start, stop, scale)
    K = program(build).integers(*arguments)
    np.testing.assert_array_equal(K, program("scalar").integers(*arguments))
    apart = np.abs(K.astype(np.int64) - secure_integers(*arguments).numpy())
    assert (apart > 0).mean() < 1e-3
    # What one unit of the float32 before it is rounded to an integer makes (its fill is at most 2¹⁶).
    assert (apart <= 2 * np.spacing((np.abs(K.astype(np.float64)) + 2**16).astype(np.float32)) + 1).all()


@pytest.mark.parametrize("step", [0, 1])
def test_ranges_are_parts_of_one_stream(step):
    """An element's noise is its own, wherever the range starts."""
    whole = standard_normal(KEY, step, 2, 0, 1000)
    integers = secure_integers(KEY, step, 2, 0, 1000, 1e6)
    for start, stop in ((0, 0), (1, 2), (127, 300), (515, 1000)):
        assert torch.equal(standard_normal(KEY, step, 2, start, stop), whole[start:stop])
        assert torch.equal(secure_integers(KEY, step, 2, start, stop, 1e6), integers[start:stop])


def test_every_part_of_the_counter_counts():
    z = standard_normal(KEY, 1, 2, 0, 64)
    for other in (
        standard_normal([KEY[0] ^ 1, *KEY[1:]], 1, 2, 0, 64),
        standard_normal([KEY[0], KEY[1] ^ (1 << 31), *KEY[2:]], 1, 2, 0, 64),
        standard_normal(KEY, 2, 2, 0, 64),
        standard_normal(KEY, 1, 3, 0, 64),
        standard_normal(KEY, 2, 1, 0, 64),
        standard_normal(KEY, 1, 2, 2**34, 2**34 + 64),
        secure_integers(KEY, 1, 2, 0, 64, 2.0**20) / 2**20,
    ):
        assert not (z == other).any()


@each_build
def test_accuracy(build):
    """Radius and direction of random and of extreme words against float64."""
    random = np.random.Generator(np.random.PCG64(20)).integers(0, 2**32, (2, 400_000), dtype=np.uint32)
    small = random >> (np.arange(400_000, dtype=np.uint32) % 32)  # all sizes of w, at both ends, and of a
    edges = np.array([0, 1, 0xFFFF, 0x10000, 0x3FFFFFFF, 0x40000000, 0xB504F333, 0xB504F334, ONES - 1, ONES])
    w, a = np.concatenate(
        [random, small, [~small[0], small[1]], np.array(np.meshgrid(edges, edges)).reshape(2, -1)], axis=1
    ).astype(np.uint32)
    radius, x, y = program(build).polar(w, a)
    low = (a << np.uint32(16)) | (a >> np.uint32(16))
    # u and 1 - u to 2⁻⁵³ of their own size: the smaller one is what the logarithm is made of
    u, v = ((high.astype(np.float64) * 2.0**32 + rest + 0.5) * 2.0**-64 for high, rest in ((w, low), (~w, ~low)))
    exact = np.sqrt(-2 * np.where(u < 0.5, np.log(u), np.log1p(-np.minimum(v, 0.5))))
    assert np.abs(radius / exact - 1).max() < 2 * 2.0**-23  # two units at most, wherever in the binade
    phi = np.pi / 4 * ((a << np.uint32(2)).view(np.int32) + 2.0) * 2.0**-31
    c, s = np.where(a & 0x40000000, -1, 1) * np.cos(phi), np.sin(phi)
    swap = a >= 0x80000000
    for got, want in ((x, np.where(swap, s, c)), (y, np.where(swap, c, s))):
        assert np.abs(got - want).max() < 2.0**-23
        assert np.abs(got / want - 1).max() < 4 * 2.0**-23  # the sine of a small angle too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: standard_normal(KEY, 2**32, 0, 0, 1), "step is 4294967296"),
        (lambda: standard_normal(KEY, 0, -1, 0, 1), "parameter is -1"),
        (lambda: standard_normal(KEY, 0, 0, 2, 1), "elements from 2 to 1"),
        (lambda: standard_normal([1], 0, 0, 0, 1), "key must be 2 words"),
        (lambda: standard_normal([1, 2**32], 0, 0, 0, 1), "key must be 2 words"),
        (lambda: secure_integers(KEY[:7], 0, 0, 0, 1, 1.0), "key must be 8 words"),
        (lambda: secure_integers(KEY, 0, 0, 0, 1, 2.0**28), "scale is 268435456"),
        (lambda: secure_integers(KEY, 0, 0, 0, 1, float("nan")), "scale is nan"),
        (lambda: secure_integers(KEY, 0, 0, 0, SECURE_ELEMENTS + 1, 1.0), "within 0 to 2"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
