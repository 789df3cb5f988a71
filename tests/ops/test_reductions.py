"""Norms and sums of per-sample gradients: the compiled ops against float64 and against the plain-PyTorch ones."""

import math

import pytest
import torch

from dpfast import reference
from dpfast.reference import reductions
from dpfast.reference.rounding import compute_dtype, unit_roundoff
from tests.ops.samples import draw

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

DTYPES = [F32, F64, BF16, F16]
# What a sum over many rows may lose: 8 rows in registers, 16 of these in cache, and what surrounds them, in units.
DEPTH = 28


def within(got, want, size, units):
    """``|got - want| ≤ units · u · size``, elementwise, in float64."""
    u = unit_roundoff(got.dtype)
    error = (got.double() - want).abs()
    assert (error <= units * u * size).all(), f"off by {(error / (u * size)).max()} units"


def samples_of(dtype):
    """Tensors ``[B, *]`` of awkward sizes, by B."""
    return {
        0: [draw(dtype, 0, 5), draw(dtype, 0)],
        1: [draw(dtype, 1, 3), draw(dtype, 1, 0), draw(dtype, 1, 200_003)],
        5: [draw(dtype, 5), draw(dtype, 5, 1), draw(dtype, 5, 7), draw(dtype, 5, 3, 11)],
        12: [draw(dtype, 12, n) for n in (15, 16, 17, 31, 32, 33, 1000, 8193)],
        300: [draw(dtype, 300, 2, 2, 5), draw(dtype, 300, 515)],
    }


def square_sums(samples):
    return torch.stack([tensor.unsqueeze(1).flatten(1).double().square().sum(1) for tensor in samples])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", samples_of(F32))
def test_squared_norms(ops, dtype, batch):
    samples = samples_of(dtype)[batch]
    got = ops.squared_norms(samples)
    assert got.dtype == F64 and got.shape == (len(samples), batch)
    # squares of narrow numbers are exact; for float64 the error is that of the squares
    torch.testing.assert_close(got, square_sums(samples), rtol=1e-14, atol=0)
    torch.testing.assert_close(got, reductions.squared_norms(samples), rtol=1e-14, atol=0)
    for tensor, row in zip(samples, got, strict=True):  # as the one that is used without a library
        squared, bound = reference.squared_norm(tensor)
        assert ((row - squared).abs() <= bound).all()


def test_squared_norms_of_float64_are_summed_without_loss(ops):
    """A million squares: a plain sum would be hundreds of units off."""
    x = 1 + torch.rand(2, 1_000_003, dtype=F64)
    got = ops.squared_norms([x])[0]
    want = [math.fsum(row.square().tolist()) for row in x]
    assert all(abs(g - w) <= 4 * unit_roundoff(F64) * w for g, w in zip(got.tolist(), want, strict=True))


@pytest.mark.parametrize(
    "dtype, value", [(F32, 1e30), (F32, 3e38), (F32, 1e-30), (F32, 1e-44), (BF16, 1e30), (F16, 6e-8)]
)
@pytest.mark.parametrize("n", [1, 40, 70_000])
def test_squares_neither_overflow_nor_underflow(ops, dtype, value, n):
    x = torch.full((2, n), value).to(dtype)
    exact = n * x[0, 0].double().square()
    assert exact > 0 and exact.isfinite()
    torch.testing.assert_close(ops.squared_norms([x]), exact.expand(1, 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 40, 70_000])
def test_squares_that_are_not_finite(ops, dtype, n):
    x = torch.ones(4, n).to(dtype)
    x[0, n // 2], x[1, 0], x[2, n - 1] = torch.inf, -torch.inf, torch.nan
    got = ops.squared_norms([x])[0]
    assert got[0] == torch.inf and got[1] == torch.inf and got[2].isnan() and got[3] == n
    if dtype == F64:
        assert ops.squared_norms([x[3:] * 1e200]).item() == torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", samples_of(F32))
@pytest.mark.parametrize("factor_dtype", [F32, F64])
def test_weighted_sums(ops, dtype, batch, factor_dtype):
    samples = samples_of(dtype)[batch]
    factors = torch.rand(batch, dtype=factor_dtype)
    factors[::3] = 0
    got = ops.weighted_sums(samples, factors)
    for tensor, total, plain in zip(samples, got, reductions.weighted_sums(samples, factors), strict=True):
        assert total.dtype == plain.dtype == compute_dtype(dtype) and total.shape == tensor.shape[1:]
        terms = factors.double()[:, None] * tensor.double().reshape(batch, len(plain))
        within(total.flatten(), terms.sum(0), terms.abs().sum(0), DEPTH)
        within(plain, terms.sum(0), terms.abs().sum(0), DEPTH + batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_zero_leaves_the_sample_out(ops, dtype):
    """NaN and inf of such a sample are nowhere, and the others' sum is the same to the bit."""
    samples = [draw(dtype, 20, 3), draw(dtype, 20, 700)]
    factors = torch.rand(20)
    factors[[0, 7, 8, 19]] = 0
    for tensor in samples:
        tensor[0], tensor[7], tensor[8], tensor[19] = torch.nan, torch.inf, -torch.inf, 1
    kept = factors.nonzero().squeeze(1)
    got = ops.weighted_sums(samples, factors)
    alone = ops.weighted_sums([tensor[kept].contiguous() for tensor in samples], factors[kept])
    for total, other in zip(got, alone, strict=True):
        assert total.isfinite().all() and torch.equal(total, other)
    for total in ops.weighted_sums(samples, torch.zeros(20)):
        assert torch.equal(total, torch.zeros_like(total))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_factors_of_each_tensor(ops, dtype):
    samples = [draw(dtype, 6, 4), draw(dtype, 6, 9)]
    factors = torch.rand(2, 6)
    factors[0, 2] = factors[1, 3] = 0
    together = ops.weighted_sums(samples, factors)
    for k in range(2):
        assert torch.equal(together[k], ops.weighted_sums([samples[k]], factors[k])[0])


def test_factors_are_never_rounded_up(ops):
    factors = torch.rand(5000, dtype=F64) * torch.randn(5000, dtype=F64).mul(20).exp()
    for i in (slice(0, 1), slice(4999, 5000)):
        assert ops.weighted_sums([torch.ones(1, 1)], factors[i])[0].double() <= factors[i]
    each = ops.weighted_sums([torch.eye(5000)], factors)[0].double()
    assert (each <= factors).all() and (each >= factors * (1 - 2**-23)).all()
    assert torch.equal(ops.weighted_sums([torch.eye(5000, dtype=F64)], factors)[0], factors)


POSITIONS = [
    (0, 3, 4),
    (3, 0, 4),
    (3, 5, 0),
    (2, 1, 1),
    (3, 4, 7),
    (2, 5, 16),
    (2, 130, 17),
    (4, 9, 100),
    (2, 1030, 1500),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", POSITIONS)
def test_sum_positions(ops, dtype, shape):
    G = draw(dtype, *shape)
    samples, squared = ops.sum_positions(G)
    plain, plain_squared = reductions.sum_positions(G)
    assert samples.dtype == plain.dtype and samples.shape == plain.shape and squared.dtype == F64
    exact, size = G.double().sum(1), G.double().abs().sum(1)
    within(samples, exact, size, DEPTH)
    torch.testing.assert_close(squared, samples.double().square().sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(plain_squared, plain.double().square().sum(1), rtol=1e-14, atol=0)
    if G.numel() and dtype != F64:  # not worse than torch's own
        errors = [(side.double() - exact).abs().max() for side in (samples, plain)]
        assert errors[0] <= 2 * errors[1] + 2 * unit_roundoff(dtype) * size.max()


def test_a_hundred_thousand_positions(ops):
    """Equal terms are where roundings add up: a plain float32 sum would be off in the third digit."""
    G = torch.full((1, 100_003, 3), 0.1)
    samples, _ = ops.sum_positions(G)
    within(samples, G.double().sum(1), G.double().sum(1), 8)
    totals = ops.weighted_sums([G[0]], torch.ones(100_003))
    assert torch.equal(totals[0], samples[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", POSITIONS)
@pytest.mark.parametrize("centred", [True, False])
def test_normalised_sums(ops, dtype, shape, centred):
    G, x = draw(dtype, *shape), draw(dtype, *shape)
    mean, rstd = torch.randn(shape[:2]).to(dtype if centred else F32), torch.rand(shape[:2]).to(dtype)
    if not centred:
        mean = mean.new_empty(0)
    got = ops.normalised_sums(G, x, mean, rstd)
    plain = reductions.normalised_sums(G, x, mean, rstd)
    shift = mean.double().unsqueeze(2) if centred and mean.numel() else 0.0
    terms = G.double() * (x.double() - shift) * rstd.double().unsqueeze(2)
    size = (G.double() * (x.double().abs() + abs(shift)) * rstd.double().unsqueeze(2)).abs().sum(1)
    within(got[0], terms.sum(1), size, DEPTH + 2)
    within(got[2], G.double().sum(1), G.double().abs().sum(1), DEPTH)
    for k in (0, 2):
        assert got[k].dtype == plain[k].dtype and got[k].shape == plain[k].shape == (shape[0], shape[2])
        torch.testing.assert_close(got[k + 1], got[k].double().square().sum(1), rtol=1e-14, atol=0)
    if G.numel() and dtype != F64:  # not worse than torch's own
        errors = [(side[0].double() - terms.sum(1)).abs().max() for side in (got, plain)]
        assert errors[0] <= 2 * errors[1] + 2 * unit_roundoff(dtype) * size.max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_stays_in_its_sample(ops, dtype):
    G = draw(dtype, 3, 4, 40)
    G[1, 2, 5] = torch.nan
    samples, squared = ops.sum_positions(G)
    assert samples[1, 5].isnan() and squared[1].isnan()
    assert samples[[0, 2]].isfinite().all() and squared[[0, 2]].isfinite().all()


def twisted(*shape):
    return torch.zeros(shape).transpose(0, 1)


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("squared_norms", ([torch.zeros(2, 3), twisted(3, 2)],), r"samples\[1\] must be contiguous"),
        ("squared_norms", ([torch.zeros(2, 3), torch.zeros(3)],), r"samples\[1\] must be \[B, \*\]"),
        ("squared_norms", ([torch.tensor(1.0)],), r"samples\[0\] must be \[B, \*\]"),
        ("squared_norms", ([torch.zeros(2, dtype=torch.int64)],), r"samples\[0\] must be float32"),
        ("weighted_sums", ([torch.zeros(2, 3)], torch.zeros(3)), r"factors must have the shape \[2\], not \[3\]"),
        ("weighted_sums", ([torch.zeros(2, 3)], torch.zeros(2, 2)), r"factors must have the shape \[1, 2\]"),
        ("weighted_sums", ([torch.zeros(2, 3)], torch.zeros(2, dtype=BF16)), "factors must be float32 or float64"),
        ("weighted_sums", ([torch.zeros(2, 3)], torch.zeros(4)[::2]), "factors must be contiguous"),
        ("sum_positions", (torch.zeros(2, 3),), r"G must be \[B, T, d\], not \[2, 3\]"),
        ("sum_positions", (torch.zeros(2, 3, 4, dtype=torch.int32),), "G must be float32"),
        ("sum_positions", (torch.zeros(2, 3, 4).transpose(1, 2),), "G must be contiguous"),
        ("normalised_sums", (*[torch.zeros(2, 3, 4)] * 2, *[torch.zeros(2, 4)] * 2), "mean must have 6 elements"),
        (
            "normalised_sums",
            (*[torch.zeros(2, 3, 4)] * 2, torch.zeros(2, 3), torch.zeros(5)),
            "rstd must have 6 elements",
        ),
        (
            "normalised_sums",
            (torch.zeros(2, 3, 4), torch.zeros(2, 4, 3), *[torch.zeros(2, 3)] * 2),
            "x must have the sh",
        ),
        (
            "normalised_sums",
            (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=F64), *[torch.zeros(2, 3)] * 2),
            "x must have the dtype of G",
        ),
    ],
)
def test_arguments_are_checked_by_name(ops, op, arguments, message):
    with pytest.raises(RuntimeError, match=f"dpfast: {message}"):
        getattr(ops, op)(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, channels, groups, T", [(2, 6, 3, 1), (3, 4, 4, 31), (2, 8, 1, 1000), (0, 4, 2, 5)])
def test_channel_sums(ops, dtype, rows, channels, groups, T):
    G, x = draw(dtype, rows, channels, T), draw(dtype, rows, channels, T) + 3
    mean, rstd = torch.randn(rows, groups).to(compute_dtype(dtype)), torch.rand(rows, groups).to(compute_dtype(dtype))
    wide = [side.double().repeat_interleave(channels // groups, 1).unsqueeze(2) for side in (mean, rstd)]
    terms = G.double() * (x.double() - wide[0]) * wide[1]
    got = ops.channel_sums(G, x, mean, rstd)
    for total, each in zip(got, (terms, G.double()), strict=True):
        assert total.dtype == compute_dtype(dtype) and total.shape == (rows, channels)
        within(total, each.sum(2), each.abs().sum(2), 1 if dtype != F64 else 40)
    size = ((x.double().abs() + wide[0].abs()) * wide[1] * G.double().abs()).sum(2)  # the plain one may cancel
    within(reference.channel_sums(G, x, mean, rstd)[0], terms.sum(2), size, 4 * T**0.5 + 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 6)), "x must have the shape"),
        (dict(x=torch.zeros(2, 4, 5, dtype=F64)), "x must have the dtype of G"),
        (dict(mean=torch.zeros(2, 3)), r"mean must be \[R, groups\] with groups that divide C"),
        (dict(rstd=torch.zeros(2, 1)), "rstd must have the shape"),
    ],
)
def test_channel_sums_refused(ops, change, message):
    arguments = dict(G=torch.zeros(2, 4, 5), x=torch.zeros(2, 4, 5), mean=torch.zeros(2, 2), rstd=torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match=message):
        ops.channel_sums(**arguments | change)
