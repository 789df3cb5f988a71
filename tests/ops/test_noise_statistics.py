"""Is the noise a standard normal, each draw apart from the others? Of 10⁷ draws of both modes.

Every test compares a p-value with ``LEVEL``, so a right generator fails one of n tests with probability n · LEVEL; the
keys are fixed, so it fails always or never. Statistics of slightly wrong draws show that the tests can fail.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from tests.ops.vectors import fastest

LEVEL = 1e-4
DRAWS = 10_000_000
SHORT = 2_000_000  # draws of every further stream
# Digits of π: fixed, and chosen by nobody.
KEY = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89]
SCALE = 1.37 * 2**24  # secure mode: steps of the grid in a standard deviation, as in dpfast/noise/stream.py
MODES = ("fast", "secure")


def draw(mode, start=0, draws=SHORT, key=KEY, step=7, parameter=3):
    """Float64 ``[draws]``."""
    place = (key, step, parameter, start, start + draws)
    if mode == "fast":
        return fastest().normals(*place).astype(np.float64)
    return fastest().integers(*place, SCALE) / np.float64(np.float32(SCALE))


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def z(mode):
    return draw(mode, draws=DRAWS)


@pytest.fixture(scope="module")
def ordered(z):
    return np.sort(z)


def kolmogorov_smirnov(ordered):
    """p-value of the largest distance between the draws' distribution function and the normal one."""
    n, F = len(ordered), special.ndtr(ordered)
    index = np.arange(n)
    return stats.kstwo.sf(max((F - index / n).max(), ((index + 1) / n - F).max()), n)


def anderson_darling(ordered):
    """p-value of the distance with weights that make the tails count as much as the middle."""
    n = len(ordered)
    weights = 2.0 * np.arange(n) + 1
    return anderson_darling_tail(-n - weights @ (special.log_ndtr(ordered) + special.log_ndtr(-ordered[::-1])) / n)


def anderson_darling_tail(A):
    """The chance of a larger statistic, many draws: Marsaglia and Marsaglia, J. Stat. Softw. 9(2), 2004."""
    small, large = (
        (2.00012, 0.247105, -0.0649821, 0.0347962, -0.011672, 0.00168691),
        (1.0776, -2.30695, 0.43424, -0.082433, 0.008056, -0.0003146),
    )
    if A < 2:
        return 1 - math.exp(-1.2337141 / A) / math.sqrt(A) * np.polyval(small[::-1], A)
    return -math.expm1(-math.exp(np.polyval(large[::-1], A)))


def moment_p_values(z):
    """Two-sided, for the powers 1 to 6: E z²ᵏ = (2k - 1)!!, so a mean of zᵏ has variance (E z²ᵏ - (E zᵏ)²) / n."""
    even = {k: math.prod(range(1, k, 2)) for k in range(2, 13, 2)}
    power, out = np.ones_like(z), []
    for k in range(1, 7):
        power = power * z
        mean = even.get(k, 0)
        out.append(normal_p_value((power.mean() - mean) / math.sqrt((even[2 * k] - mean**2) / len(z))))
    return out


def normal_p_value(deviation):
    return math.erfc(abs(deviation) / math.sqrt(2))


def tail_p_values(z):
    """Two-sided, of the counts past 4, 5 and 6 standard deviations, below and above."""
    out = []
    for limit, sign in itertools.product((4, 5, 6), (-1, 1)):
        count, expected = np.count_nonzero(sign * z > limit), len(z) * special.ndtr(-limit)
        p = 2 * min(stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected))
        out.append(min(p, 1.0))
    return out


def correlation_p_values(x, y):
    """Two-sided, of x with y, of their squares, and of either with the other's square; means are known."""
    a, b = x**2 - 1, y**2 - 1  # variance 2
    products = (x @ y, a @ b / 2, x @ b / math.sqrt(2), a @ y / math.sqrt(2))
    return [normal_p_value(product / math.sqrt(len(x))) for product in products]


def test_distribution(ordered):
    assert kolmogorov_smirnov(ordered) > LEVEL
    assert anderson_darling(ordered) > LEVEL


def test_moments(z):
    assert min(moment_p_values(z)) > normal_p_value(5)


def test_tails(z):
    assert min(tail_p_values(z)) > LEVEL


@pytest.mark.parametrize("lag", [*range(1, 9), 16, 64, 128])
def test_neighbours(z, lag):
    assert min(correlation_p_values(z[:-lag], z[lag:])) > LEVEL


def test_streams(mode, z):
    """Streams that differ in one argument: pairs of neighbouring steps, of parameters, of keys, and of far shards."""
    near = z[:SHORT]
    others = {
        "next step": draw(mode, step=8),
        "next parameter": draw(mode, parameter=4),
        "step and parameter exchanged": draw(mode, step=3, parameter=7),
        "key, lowest bit": draw(mode, key=[KEY[0] ^ 1, *KEY[1:]]),
        "key, highest bit": draw(mode, key=[KEY[0], KEY[1] ^ 1 << 31, *KEY[2:]]),
        "next shard": draw(mode, start=SHORT),
        "far shard": draw(mode, start=2**34),
    }
    for name, other in others.items():
        assert min(correlation_p_values(near, other)) > LEVEL, name


@pytest.mark.parametrize("mode", MODES)
def test_small_key_step_and_parameter(mode):
    """The weakest words there are: a key of zeros, steps and parameters 0 and 1, few elements each."""
    parts = [draw(mode, 0, 1000, [0] * 8, step, parameter) for step in range(16) for parameter in range(16)]
    together = np.concatenate(parts)
    assert min(kolmogorov_smirnov(np.sort(together)), *moment_p_values(together)) > LEVEL
    sums = np.sort([part.sum() / math.sqrt(1000) for part in parts])  # of a normal: normal
    assert kolmogorov_smirnov(sums) > LEVEL
    assert stats.kstest([part @ part for part in parts], "chi2", (1000,)).pvalue > LEVEL


def test_the_fill_is_two_uniform_words():
    """Of the secure mode's integers: K without z, and the low 16 bits of K, which are uniform whatever z is."""
    fill = fastest().integers(KEY, 7, 3, 0, SHORT, 0.0).astype(np.int64)
    K = fastest().integers(KEY, 7, 3, 0, SHORT, SCALE).astype(np.int64)
    counts = np.bincount((fill + 2**16) >> 12, minlength=32)
    # of a and b from 0 to 2¹⁶ - 1 there are 1 + min(s, 2¹⁷ - 2 - s) with a + b = s
    s = np.arange(2**17)
    ways = np.maximum(1 + np.minimum(s, 2**17 - 2 - s), 0).reshape(32, -1).sum(1)
    assert stats.chisquare(counts, ways * (SHORT / 2**32)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(K & 0xFFFF, minlength=2**16)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(K & 0xFF, minlength=2**8)).pvalue > LEVEL
    scaled_fill = (fill + 1) / math.sqrt((2**32 - 1) / 6)  # mean 0, variance 1
    alone = (K - fill) / SCALE  # z
    assert normal_p_value(scaled_fill @ alone / math.sqrt(SHORT)) > LEVEL
    assert normal_p_value(scaled_fill[1:] @ scaled_fill[:-1] / math.sqrt(SHORT - 1)) > LEVEL


def test_the_farthest_tail_is_reached():
    """Radii past 6.6 have w = 0; every axis, either sign, goes past 8."""
    octants = np.arange(4, dtype=np.uint32) << 30
    radius, x, y = fastest().polar(np.zeros(4, np.uint32), octants)
    assert (radius > 8).all() and (radius <= 9.5).all()
    points = radius * x, radius * y
    assert max(p.max() for p in points) > 8 and min(p.min() for p in points) < -8
    assert min(np.abs(points).max(0)) > 8
    assert len({(np.abs(px) > np.abs(py), px + py > 0) for px, py in zip(*points, strict=True)}) == 4
    radius, *_ = fastest().polar(np.array([2**32 - 1], np.uint32), np.array([2**32 - 1], np.uint32))
    assert 0 < radius[0] < 1e-9  # the nearest to 0, and never 0 or NaN


@pytest.mark.parametrize("w", [0, 1, 5])
def test_given_a_far_radius_radius_and_direction_are_uniform_and_apart(w):
    """A draw has a w so small once in 2³² pairs: given w, u = exp(-radius²/2) and the angle come from a alone."""
    a = np.random.Generator(np.random.PCG64(11)).integers(0, 2**32, SHORT, dtype=np.uint32)
    radius, x, y = fastest().polar(np.full(SHORT, w, np.uint32), a).astype(np.float64)
    u = np.exp(-(radius**2) / 2) * 2.0**32 - w
    angle = (np.arctan2(y, x) / (2 * np.pi)) % 1.0
    # In 64 cells: float32 radii near 6.6 are no nearer to each other than 2⁻¹⁸ of u.
    cells = (np.clip(u, 0, 1 - 1e-12) * 64).astype(int), (angle * 64).astype(int)
    for cell in cells:
        assert stats.chisquare(np.bincount(cell, minlength=64)).pvalue > LEVEL
    joint = np.bincount(cells[0] * 64 + cells[1], minlength=64 * 64)
    assert stats.chisquare(joint).pvalue > LEVEL


def test_wrong_draws_are_found():
    """The controls: a scale or a mean that is off by 0.002, sums of uniforms, a cut tail, draws used again."""
    for A, p in ((1.9330, 0.1), (2.4924, 0.05), (3.8781, 0.01)):  # known quantiles
        assert abs(anderson_darling_tail(A) / p - 1) < 0.01
    z = draw("fast", draws=DRAWS)
    ordered = np.sort(z)
    assert anderson_darling(ordered * 1.002) < LEVEL
    assert min(moment_p_values(z * 1.002)) < normal_p_value(5)
    assert kolmogorov_smirnov(ordered + 0.002) < LEVEL
    uniform = special.ndtr(z[: 12 * (DRAWS // 12)])
    sums = np.sort(uniform.reshape(12, -1).sum(0) - 6)  # variance 1
    assert max(kolmogorov_smirnov(sums), anderson_darling(sums)) < LEVEL
    assert min(moment_p_values(sums)) < LEVEL
    assert min(tail_p_values(np.clip(z, -4, 4))) < LEVEL
    assert min(correlation_p_values(z[:SHORT], -0.99 * z[:SHORT] + 0.141 * z[-SHORT:])) < LEVEL
    # the same sizes with other signs: only the squares tell
    plain, squares, *_ = correlation_p_values(z[:SHORT], np.sign(z[-SHORT:]) * z[:SHORT])
    assert plain > LEVEL > squares
