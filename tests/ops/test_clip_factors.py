"""clip_factors: the compiled op against the plain-PyTorch one, and the guarantee factor · n ≤ C in exact arithmetic."""

import math
import random
from fractions import Fraction

import pytest
import torch

from dpfast.reference.clipping import LARGEST_FACTOR, ClippingFunction, clip_factors
from dpfast.reference.rounding import SAFETY_UNITS

F64 = torch.float64
FUNCTIONS = list(ClippingFunction)
BIG, TINY = 1.7976931348623157e308, 5e-324


@pytest.fixture
def op(ops):
    return ops.clip_factors


def doubles(*rows):
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("groups, batch", [(1, 1), (1, 257), (3, 64), (2, 0), (0, 5)])
@pytest.mark.parametrize("scale", [1.0, 64.0, 0.1])
def test_agrees_with_the_reference(op, function, groups, batch, scale):
    squared = torch.randn(groups, batch, dtype=F64).square() * 4
    bounds = squared * 1e-7
    thresholds = torch.rand(groups, dtype=F64) + 0.5
    factors, nonfinite = op(squared, bounds, thresholds, function, 0.3, scale)
    expected, count = clip_factors(squared, bounds, thresholds, function, 0.3, scale)
    assert factors.dtype == F64 and nonfinite.dtype == torch.int64 and nonfinite.shape == ()
    torch.testing.assert_close(factors, expected, rtol=4 * torch.finfo(F64).eps, atol=0)
    assert int(nonfinite) == int(count) == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_zero_norm(op, function):
    got = op(doubles([0.0]), doubles([0.0]), torch.tensor([2.0], dtype=F64), function, 0.5, 1.0)[0].item()
    want = {"ABADI": 1.0, "GLOBAL": 4.0, "AUTOMATIC": 4.0, "NORMALISED": 0.0, "PSAC": 2.0}[function.name]
    assert got == want == clip_factors(doubles([0.0]), doubles([0.0]), doubles(2.0), function, 0.5, 1.0)[0].item()


def test_nothing_is_moved_where_nothing_is_rounded(op):
    """n = C gives exactly 1 under abadi, and exactly C/Z at n = Z under global."""
    squared, none = doubles([4.0, 1.0, 16.0, 2.25]), doubles([0.0] * 4)
    assert op(squared, none, doubles(2.0), 0, 0.0, 1.0)[0].tolist() == [[1.0, 1.0, 0.5, 1.0]]
    assert op(squared, none, doubles(2.0), 1, 4.0, 1.0)[0].tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert op(squared, none, doubles(2.0), 1, 2.0, 2.0)[0].tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_samples_that_are_not_finite(op, function):
    """Factor 0 in every group, counted once; the others are as without them."""
    inf, nan = math.inf, math.nan
    squared = doubles([1.0, inf, nan, 2.0, -1.0, BIG, 3.0], [1.0, inf, 2.0, nan, 1.0, 1.0, 3.0])
    bounds = doubles([0.1, 0.0, 0.0, 0.0, 0.5, BIG, 0.0], [0.1, nan, 0.0, 0.0, 0.0, 0.0, 0.0])
    thresholds = doubles(1.0, 0.5)
    factors, nonfinite = op(squared, bounds, thresholds, function, 10.0, 2.0)
    expected, count = clip_factors(squared, bounds, thresholds, function, 10.0, 2.0)
    torch.testing.assert_close(factors, expected, rtol=1e-15, atol=0)
    assert int(nonfinite) == int(count) == 5
    assert (factors[:, 1:6] == 0).all() and factors[:, [0, 6]].min() > 0


def test_a_negative_squared_norm_with_a_larger_bound_counts(op):
    """A ghost norm can come out below 0; what is clipped by is the sum."""
    factors, nonfinite = op(doubles([-1.0]), doubles([5.0]), doubles(1.0), 0, 0.0, 1.0)
    assert factors.item() == 0.5 and int(nonfinite) == 0


def test_a_norm_that_overflows_is_not_finite(op):
    factors, nonfinite = op(doubles([1e300]), doubles([0.0]), doubles(1.0), 0, 0.0, 1e200)
    assert factors.item() == 0 and int(nonfinite) == 1


@pytest.mark.parametrize("function", [ClippingFunction.AUTOMATIC, ClippingFunction.NORMALISED])
def test_no_factor_overflows_in_float32(op, function):
    for squared in (TINY, 1e-300, 1e-200):
        got = op(doubles([squared]), doubles([0.0]), doubles(1.0), function, TINY, 1.0)[0].item()
        assert got == LARGEST_FACTOR
        assert math.isfinite(torch.tensor(got * 1e6, dtype=torch.float32).item())


def number(chosen: random.Random) -> float:
    """Any double that is not negative: extremes, powers of two and their neighbours, and everything between."""
    kind = chosen.randrange(5)
    if kind == 0:
        return chosen.choice([0.0, TINY, 2.2250738585072014e-308, 1e-160, 1.0, BIG])
    exponent = chosen.randint(-1074, 1022) if kind < 3 else chosen.randint(-4, 4)
    value = math.ldexp(chosen.random() + 1 if kind % 2 else 1.0, exponent)
    return chosen.choice([value, math.nextafter(value, 0.0), math.nextafter(value, BIG)])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_guarantee_in_exact_arithmetic(op, function):
    """factor² · (squared + bound) · scale² ≤ C² as fractions, for any double whatsoever."""
    chosen = random.Random(int(function))
    kept = 0
    for _ in range(3000):
        squared, bound, C, shape, scale = (number(chosen) for _ in range(5))
        if chosen.random() < 0.5:  # C near to the norm, where rounding decides
            C = math.sqrt(squared) * scale
            C = chosen.choice([C, math.nextafter(C, 0.0), math.nextafter(C, BIG)])
        if not (C <= BIG and scale > 0 and shape > 0):
            continue
        factors, nonfinite = op(doubles([squared]), doubles([bound]), doubles(C), function, shape, scale)
        factor = factors.item()
        assert 0 <= factor <= LARGEST_FACTOR
        if int(nonfinite):
            assert factor == 0
            continue
        kept += 1
        n2 = (Fraction(squared) + Fraction(bound)) * Fraction(scale) ** 2
        assert Fraction(factor) ** 2 * n2 <= Fraction(C) ** 2, (squared, bound, C, shape, scale, factor)
    assert kept > 1000


def test_the_reference_holds_the_guarantee_with_the_bound_that_every_norm_has():
    """Its roundings are far below the SAFETY_UNITS of float32, and below those of float64 too."""
    chosen = random.Random(0)
    for _ in range(2000):
        squared = math.ldexp(chosen.random() + 1, chosen.randint(-20, 20))
        C = math.sqrt(squared) * chosen.choice([0.3, 0.9999999, 1.0, 1.5])
        bound = SAFETY_UNITS * torch.finfo(F64).eps / 2 * squared
        factor = clip_factors(doubles([squared]), doubles([bound]), doubles(C), 0, 0.0, 1.0)[0].item()
        assert Fraction(factor) ** 2 * Fraction(squared) <= Fraction(C) ** 2


@pytest.mark.parametrize(
    "name, change",
    [
        ("squared", {"squared": torch.zeros(3, dtype=F64)}),
        ("squared", {"squared": torch.zeros(1, 3)}),
        ("squared", {"squared": torch.zeros(3, 1, dtype=F64).t()[:, ::2]}),
        ("bounds", {"bounds": torch.zeros(1, 2, dtype=F64)}),
        ("bounds", {"bounds": torch.zeros(1, 3)}),
        ("thresholds", {"thresholds": torch.ones(2, dtype=F64)}),
        ("thresholds", {"thresholds": torch.tensor([math.nan], dtype=F64)}),
        ("thresholds", {"thresholds": torch.tensor([-1.0], dtype=F64)}),
        ("function", {"function": 5}),
        ("function", {"function": -1}),
        ("shape", {"function": 2, "shape": 0.0}),
        ("shape", {"function": 1, "shape": math.inf}),
        ("shape", {"function": 4, "shape": math.nan}),
        ("scale", {"scale": 0.0}),
        ("scale", {"scale": math.nan}),
    ],
)
def test_arguments_are_checked_by_name(op, name, change):
    arguments = dict(
        squared=torch.zeros(1, 3, dtype=F64),
        bounds=torch.zeros(1, 3, dtype=F64),
        thresholds=torch.ones(1, dtype=F64),
        function=0,
        shape=1.0,
        scale=1.0,
    )
    with pytest.raises(RuntimeError, match=f"dpfast: {name}"):
        op(*(arguments | change).values())
