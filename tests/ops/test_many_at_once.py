"""Ops on many small layers in one call: the same as one call a layer, and as the plain-PyTorch definition."""

import pytest
import torch

from dpfast import ops as chosen
from dpfast.reference.rounding import drift, unit_roundoff
from tests.ops.samples import draw

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
U = unit_roundoff(F32)
SIZES = [(1, 1, 1), (1, 32, 3), (1, 5, 40), (3, 17, 16), (16, 32, 32), (7, 70, 9), (300, 4, 5), (0, 3, 4)]  # T, d, p


def sides(batch):
    given = [(draw(F32, batch, T, d), draw(F32, batch, T, p)) for T, d, p in SIZES]
    A, G = zip(*given, strict=True)
    return [*A], [*G]


@pytest.mark.parametrize("own", [False, True], ids=["the same factors for all", "factors of each"])
@pytest.mark.parametrize("batch", [0, 1, 3, 40])
def test_weighted_products(ops, batch, own):
    A, G = sides(batch)
    factors = torch.rand(len(A), batch) if own else torch.rand(batch)
    found = ops.weighted_products(A, G, factors)
    for k, (a, g, got) in enumerate(zip(A, G, found, strict=True)):
        row = (factors[k] if own else factors).double()
        each = torch.bmm(g.double().mT, a.double())  # [B, p, d]
        size = torch.bmm(g.double().abs().mT, a.double().abs())
        want, most = ((row[:, None, None] * x).sum(0) for x in (each, size))
        assert got.dtype == F32 and got.shape == want.shape
        assert ((got.double() - want).abs() <= (drift(max(1, batch * a.shape[1])) + 1) * U * most).all()
        assert torch.equal(got, ops.weighted_products([a], [g], row.float())[0])  # whatever else is in the call


def test_products_of_one_position_need_no_dimension_for_it(ops):
    A, G = draw(F32, 6, 20), draw(F32, 6, 7)
    factors = torch.rand(6)
    flat = ops.weighted_products([A], [G], factors)[0]
    assert torch.equal(flat, ops.weighted_products([A[:, None]], [G[:, None]], factors)[0])
    assert torch.equal(flat, ops.weighted_products([A[:, None, None]], [G[:, None, None]], factors)[0])


def test_a_sample_of_factor_0_is_left_out(ops):
    A, G = sides(5)
    factors = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.25])
    for a, g in zip(A, G, strict=True):
        a[1], g[3] = torch.nan, torch.inf
    kept = [0, 2, 4]
    without = ops.weighted_products([a[kept] for a in A], [g[kept] for g in G], factors[kept])
    for got, want in zip(ops.weighted_products(A, G, factors), without, strict=True):
        assert torch.equal(got, want)
    assert not any(total.any() for total in ops.weighted_products(A, G, torch.zeros(5)))


def test_a_factor_is_never_rounded_up(ops):
    factors = torch.rand(1000, dtype=F64) * (1 + 2.0**-30)
    ones = torch.ones(1, 1)
    for factor in factors[:200]:
        assert ops.weighted_products([ones], [ones], factor[None])[0].double() <= factor


@pytest.mark.parametrize("batch", [0, 1, 6])
def test_product_samples(ops, batch):
    A, G = sides(batch)
    found, squared = ops.product_samples(A, G)
    assert squared.dtype == F64 and squared.shape == (len(A), batch)
    for a, g, got, norms in zip(A, G, found, squared, strict=True):
        want, size = torch.bmm(g.double().mT, a.double()), torch.bmm(g.double().abs().mT, a.double().abs())
        assert got.dtype == F32 and got.shape == want.shape
        assert ((got.double() - want).abs() <= drift(max(1, a.shape[1])) * U * size).all()
        torch.testing.assert_close(norms, got.double().square().sum((1, 2)), rtol=1e-13, atol=0)


def test_samples_that_are_not_finite_stay_their_own(ops):
    A, G = sides(3)
    A[4][1, 2, 3], G[5][2, 0, 0] = torch.nan, torch.inf
    found, squared = ops.product_samples(A, G)
    assert squared[4, 1].isnan() and not squared[5, 2].isfinite()
    squared[4, 1], squared[5, 2] = 0, 0
    assert squared.isfinite().all()
    assert found[4][[0, 2]].isfinite().all() and found[5][:2].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_sums_over_positions_are_those_of_each(ops, dtype):
    G = [draw(dtype, 5, T, d) for T, d in ((1, 3), (16, 32), (300, 17), (0, 4))]
    samples, squared = ops.all_position_sums(G)
    for g, got, norms in zip(G, samples, squared, strict=True):
        for one, other in zip((got, norms), ops.sum_positions(g), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_sums_of_normalisation_layers_are_those_of_each(ops, dtype, centred):
    shapes = ((1, 3), (16, 32), (40, 1030))
    G, x = ([draw(dtype, 5, T, d) for T, d in shapes] for _ in range(2))
    mean = [torch.randn(5, T) if centred else torch.empty(0) for T, _ in shapes]
    rstd = [torch.rand(5, T) for T, _ in shapes]
    weights, biases, squared = ops.all_normalised_sums(G, x, mean, rstd)
    for k, layer in enumerate(zip(G, x, mean, rstd, strict=True)):
        weight, weight_squared, bias, bias_squared = ops.normalised_sums(*layer)
        assert torch.equal(weights[k], weight) and torch.equal(biases[k], bias)
        assert torch.equal(squared[k], weight_squared) and torch.equal(squared[len(G) + k], bias_squared)


def test_the_chooser_takes_the_same_layers_without_a_library(monkeypatch):
    G, x = ([draw(F32, 5, T, 8) for T in (3, 4)] for _ in range(2))
    layers = [(g, values, None, torch.rand(5, g.shape[1])) for g, values in zip(G, x, strict=True)]
    given = chosen.all_position_sums(G), chosen.all_normalised_sums(layers)
    monkeypatch.setattr("dpfast.ops.reductions.is_native", lambda *_: False)
    for one, other in zip(given, (chosen.all_position_sums(G), chosen.all_normalised_sums(layers)), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close([*mine], [*theirs], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("weighted_products", ([torch.zeros(2, 3)], [torch.zeros(3, 3)], torch.zeros(2)), r"G\[0\] must be \[B, \*"),
        ("weighted_products", ([torch.zeros(2, 4, 3)], [torch.zeros(2, 5, 3)], torch.zeros(2)), "the same positions"),
        ("weighted_products", ([torch.zeros(2, 3)], [torch.zeros(2, 3).double()], torch.zeros(2)), "must be float32"),
        (
            "weighted_products",
            ([torch.zeros(2, 3)], [torch.zeros(2, 3)], torch.zeros(3)),
            "factors must have the shape",
        ),
        ("weighted_products", ([], [], torch.zeros(3)), "lists of one length, not 0 and 0"),
        ("product_samples", ([torch.zeros(2, 3)], [torch.zeros(2, 3)] * 2), "lists of one length, not 1 and 2"),
        ("product_samples", ([torch.zeros(3, 2).mT], [torch.zeros(2, 3)]), r"A\[0\] must be contiguous"),
        ("all_position_sums", ([torch.zeros(2, 3)],), r"G must be \[B, T, d\]"),
        ("all_position_sums", ([torch.zeros(2, 3, 1), torch.zeros(3, 3, 1)],), r"samples\[1\] must be \[B, \*\]"),
        ("all_normalised_sums", ([torch.zeros(2, 3, 1)], [], [], []), "lists of one length"),
    ],
)
def test_arguments_are_checked_by_name(ops, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*arguments)
