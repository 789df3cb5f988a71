"""Embedding rows: the compiled ops against the plain-PyTorch ones, and the certified norm against the true one."""

import pytest
import torch

from dpfast import reference
from dpfast.reference.rounding import compute_dtype, unit_roundoff

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
SHAPES = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (4, 7, 5), (3, 64, 16), (2, 300, 33), (5, 40, 1100)]


def ids_of(kind, B, T):
    if kind == "equal":
        return torch.full((B, T), 3)
    if kind == "distinct":
        return torch.rand(B, T).argsort(1)
    return torch.randint(0, 5 if kind == "few" else max(T, 1), (B, T))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["equal", "distinct", "few", "random"])
def test_squared_norm(ops, dtype, shape, kind):
    B, T, _ = shape
    ids, G = ids_of(kind, B, T), torch.randn(shape).to(dtype)
    squared, bound = ops.embedding_squared_norm(ids, G)
    plain, plain_bound = reference.embedding_squared_norm(ids, G)
    assert squared.dtype == bound.dtype == F64
    u = unit_roundoff(dtype)
    if shape[1] and shape[2]:
        torch.testing.assert_close(squared, plain, rtol=40 * u, atol=1e-30)
        torch.testing.assert_close(bound, plain_bound, rtol=1e-3, atol=1e-30)
    else:
        assert squared.tolist() == [0.0] * B == bound.tolist()
    true = reference.embedding_grad_samples(ids, G.double(), max(T, 5)).square().sum((1, 2))
    assert ((squared - true).abs() <= bound).all()


def test_ids_are_whole_numbers_of_64_bits(ops):
    """Rows are told apart by all of their id: here all lower halves agree, and hashes are crowded."""
    ids = (torch.arange(200) * 2**32).view(2, 100)
    ids[1, 50:] = ids[1, :50]
    ids[0, 0], ids[0, 1] = 2**63 - 1, -(2**63)
    G = torch.randn(2, 100, 6)
    squared, _ = ops.embedding_squared_norm(ids, G)
    first, second = G.double()
    torch.testing.assert_close(squared[0], first.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(squared[1], (second[:50] + second[50:]).square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_sum_that_cancels(ops, dtype):
    """The rows of a segment cancel but for rounding: the bound must still cover what is left."""
    G = torch.randn(3, 50, 8).to(dtype)
    G = torch.cat([G, -G.flip(1)], 1)
    ids = torch.zeros(3, 100, dtype=torch.long)
    squared, bound = ops.embedding_squared_norm(ids, G)
    assert ((squared - G.double().sum(1).square().sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_that_is_not_finite(ops, dtype):
    ids, G = torch.randint(0, 4, (4, 9)), torch.randn(4, 9, 20).to(dtype)
    G[1, 3, 2], G[2, 0, 0] = torch.nan, torch.inf
    squared, bound = ops.embedding_squared_norm(ids, G)
    assert (squared + bound).isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["equal", "distinct", "few", "random"])
@pytest.mark.parametrize("factor_dtype", [F32, F64])
def test_sum(ops, dtype, shape, kind, factor_dtype):
    B, T, d = shape
    ids, G, rows = ids_of(kind, B, T), torch.randn(shape).to(dtype), max(T, 5) + 2
    factors = torch.rand(B, dtype=factor_dtype)
    factors[1::3] = 0
    if B > 1:
        G[1] = torch.nan  # left out, not multiplied
    got = ops.embedding_sum(ids, G, factors, rows)
    assert got.dtype == compute_dtype(dtype) and got.shape == (rows, d)
    kept = factors.nonzero().squeeze(1)
    samples = reference.embedding_grad_samples(ids[kept], G[kept].double(), rows)
    sizes = reference.embedding_grad_samples(ids[kept], G[kept].double().abs(), rows)
    weights = factors[kept].double().view(-1, 1, 1)
    error = (got.double() - (weights * samples).sum(0)).abs()
    assert (error <= 28 * unit_roundoff(dtype) * (weights * sizes).sum(0)).all()
    unused = torch.ones(rows, dtype=torch.bool)
    unused[ids[kept].flatten()] = False
    assert unused[-2:].all() and torch.equal(got[unused], torch.zeros_like(got[unused]))


def test_no_factor_is_rounded_up(ops):
    factors = torch.rand(500, dtype=F64)
    got = ops.embedding_sum(torch.arange(500).view(500, 1), torch.ones(500, 1, 1), factors, 500)
    assert (got.squeeze(1) <= factors).all()


def test_a_table_without_rows(ops):
    assert ops.embedding_sum(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 3), torch.ones(2), 0).shape == (
        0,
        3,
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("ids must be int64", {"ids": torch.zeros(2, 3, dtype=torch.int32)}),
        (r"ids must have the shape \[2, 3\]", {"ids": torch.zeros(2, 4, dtype=torch.long)}),
        ("ids must be contiguous", {"ids": torch.zeros(3, 2, dtype=torch.long).t()}),
        (r"G must be \[B, T, d\]", {"G": torch.zeros(2, 3)}),
        ("G must be contiguous", {"G": torch.zeros(2, 4, 3).transpose(1, 2)}),
        ("G must be float32", {"G": torch.zeros(2, 3, 4, dtype=torch.long)}),
        (r"factors must have the shape \[2\]", {"factors": torch.ones(3)}),
        ("factors must be float32 or float64", {"factors": torch.ones(2, dtype=torch.long)}),
        ("ids has 0, outside of a table of 0 rows", {"rows": 0}),
        ("ids has -1, outside", {"ids": torch.full((2, 3), -1)}),
        ("rows must not be negative", {"rows": -1}),
    ],
)
def test_arguments_are_checked_by_name(ops, name, change):
    arguments = dict(ids=torch.zeros(2, 3, dtype=torch.long), G=torch.zeros(2, 3, 4), factors=torch.ones(2), rows=1)
    arguments |= change
    with pytest.raises(RuntimeError, match=f"dpfast: {name}"):
        ops.embedding_sum(*arguments.values())
    if {"factors", "rows"}.isdisjoint(change) and "-1" not in name:
        with pytest.raises(RuntimeError, match=f"dpfast: {name}"):
            ops.embedding_squared_norm(arguments["ids"], arguments["G"])
