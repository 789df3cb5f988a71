"""Convolutions' per-sample gradients and ghost norms: the compiled ops against a float64 gradient a sample."""

import pytest
import torch

from dpfast import ops as public
from dpfast import reference
from dpfast.reference import Geometry
from dpfast.reference.rounding import unit_roundoff
from tests.ops.samples import draw

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def case(x, weight, stride=1, padding=0, dilation=1, groups=1, rows=1, transposed=False, output_padding=0):
    """Shapes of input and weight, and the geometry; ``rows`` of the input are one sample."""
    n = len(x) - 2
    numbers = [(value,) * n if isinstance(value, int) else value for value in (stride, padding, dilation)]
    extra = (output_padding,) * n
    return x, weight, Geometry(*numbers, transposed, extra, groups), rows


CASES = {
    "1d": case((3, 4, 11), (5, 4, 3)),
    "2d": case((3, 4, 9, 7), (6, 4, 3, 3), padding=1),
    "3d": case((2, 3, 5, 4, 6), (7, 3, 2, 3, 2), stride=(1, 2, 1)),
    "stride": case((4, 3, 9, 10), (17, 3, 3, 2), stride=(2, 3), padding=(1, 0)),
    "dilation": case((2, 5, 11, 12), (4, 5, 3, 3), dilation=(2, 3), padding=2),
    "groups": case((3, 8, 6, 6), (12, 2, 3, 3), groups=4, padding=1),
    "depthwise": case((3, 6, 6, 5), (12, 1, 3, 3), groups=6),
    "padding beyond the kernel": case((2, 2, 3, 3), (3, 2, 2, 2), padding=4),
    "wide": case((2, 3, 5, 5), (133, 3, 3, 3), padding=1),
    "long": case((2, 2, 40, 37), (5, 2, 3, 3)),
    "one position": case((3, 2, 3, 3), (5, 2, 3, 3)),
    "pixels that no patch has": case((2, 3, 10, 10), (4, 3, 1, 1), stride=4),
    "several rows a sample": case((6, 3, 6, 5), (4, 3, 3, 3), rows=3, padding=1),
    "transposed": case((3, 4, 5, 4), (4, 6, 3, 3), stride=2, padding=1, transposed=True, output_padding=1),
    "transposed, output padding above stride": case(
        (3, 4, 5, 4), (4, 3, 2, 3), dilation=3, groups=2, transposed=True, output_padding=2
    ),
}
SHAPES = pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)


def sides(shapes, dtype):
    """x, G and the weight, of which only the shape counts; and the batch size."""
    size, weight, geometry, rows = shapes
    weight = torch.empty(weight, dtype=dtype)
    x = draw(dtype, *size)
    y = torch.convolution(x.double(), weight.double(), None, *geometry.arguments)
    return x, draw(dtype, *y.shape), weight, geometry, size[0] // rows


def oracle(x, G, weight, geometry, batch):
    """``[batch, *weight.shape]`` in float64, a sample at a time."""
    parts = zip(x.double().chunk(batch), G.double().chunk(batch), strict=True)
    return torch.stack([reference.convolution_weight_gradient(*part, weight.double(), geometry) for part in parts])


def squares(samples):
    return samples.double().flatten(1).square().sum(1)


@SHAPES
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_grad_samples(ops, shapes, dtype):
    arguments = sides(shapes, dtype)
    x, G, *rest = arguments
    samples, squared = public.convolution_grad_samples(*arguments)
    want, size = oracle(*arguments), oracle(x.abs(), G.abs(), *rest)
    assert samples.dtype == F32 and samples.shape == want.shape
    terms = G[0, 0].numel() * len(x) // len(want)
    assert ((samples - want).abs() <= (2 * terms**0.5 + 4) * unit_roundoff(F32) * size).all()
    torch.testing.assert_close(squared, squares(samples), rtol=1e-14, atol=0)  # of what is there, to the last bit


@SHAPES
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_ghost_norms_are_within_their_bounds(ops, shapes, dtype):
    arguments = sides(shapes, dtype)
    squared, bound = public.convolution_squared_norm(*arguments)
    want = squares(oracle(*arguments))
    assert ((squared - want).abs() <= bound).all()
    assert (bound <= 2e-3 * want).all()


def test_equal_terms_do_not_drift_past_the_bound(ops):
    """In one long float32 sum every addition of an equal term would be rounded alike."""
    for value in 0.5 + torch.rand(40):
        x, G = value.expand(1, 160, 8, 8).clone(), value.expand(1, 300, 6, 6).clone()
        arguments = (x, G, torch.empty(300, 160, 3, 3), Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1), 1)
        squared, bound = public.convolution_squared_norm(*arguments)
        assert ((squared - squares(oracle(*arguments))).abs() <= bound).all()


def test_sums_that_cancel_are_bounded(ops):
    """Positions whose terms cancel to nothing: the float32 sum is noise, and the bound must say so."""
    x, G = torch.randn(4, 8, 6, 6), torch.randn(4, 16, 4, 4)
    G -= G.mean((2, 3), keepdim=True)
    x = x.mean((2, 3), keepdim=True).expand_as(x) * 1e3 + 1e-4 * x
    arguments = (x, G, torch.empty(16, 8, 3, 3), Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1), 4)
    squared, bound = public.convolution_squared_norm(*arguments)
    want = squares(oracle(*arguments))
    assert ((squared - want).abs() <= bound).all() and (squared + bound >= want).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_stays_in_its_sample(ops, value, side):
    arguments = sides(CASES["groups"], F32)
    clean = public.convolution_grad_samples(*arguments), public.convolution_squared_norm(*arguments)
    arguments[side][1, 3, 2, 2] = value
    (samples, squared), (ghost, bound) = (
        public.convolution_grad_samples(*arguments),
        public.convolution_squared_norm(*arguments),
    )
    assert not squared[1].isfinite() and not (ghost[1] + bound[1]).isfinite()
    for got, before in zip((samples, squared, ghost, bound), (*clean[0], *clean[1]), strict=True):
        assert torch.equal(got[[0, 2]], before[[0, 2]])


def test_strided_sides(ops):
    x, G, *rest = sides(CASES["2d"], F32)
    want = public.convolution_grad_samples(x, G, *rest)
    views = (side.transpose(2, 3).contiguous().transpose(2, 3) for side in (x, G))
    for got, plain in zip(public.convolution_grad_samples(*views, *rest), want, strict=True):
        assert torch.equal(got, plain)


def test_the_weighted_sum_reads_samples_as_they_lie(ops):
    samples, _ = public.convolution_grad_samples(*sides(CASES["groups"], F32))
    assert not samples.is_contiguous()
    factors = torch.rand(len(samples))
    assert torch.equal(public.weighted_sum(samples, factors), public.weighted_sum(samples.contiguous(), factors))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4, 4, 1, 5, 5, dtype=F64)), "x must be .* not float64"),
        (dict(x=torch.zeros(4, 4, 5, 5)), r"x must be \[rows, channels, \*\]"),
        (dict(G=torch.zeros(3, 6, 1, 3, 3)), "batch must divide the rows"),
        (dict(batch=3), "batch must divide the rows of x and G, got 3"),
        (dict(groups=3), "groups must divide the channels of x and G, got 3"),
        (dict(kernel=[3, 3]), "kernel must have three numbers"),
        (dict(kernel=[1, 0, 3]), "kernel must not have numbers below 1, got 0"),
        (dict(padding=[0, 0, -1]), "padding must not have numbers below 0, got -1"),
    ],
)
@pytest.mark.parametrize("op", ["convolution_grad_samples", "convolution_ghost"])
def test_refused(ops, op, change, message):
    arguments = dict(
        x=torch.zeros(4, 4, 1, 5, 5),
        G=torch.zeros(4, 6, 1, 3, 3),
        batch=4,
        groups=2,
        kernel=[1, 3, 3],
        stride=[1, 1, 1],
        padding=[0, 0, 0],
        dilation=[1, 1, 1],
    )
    getattr(ops, op)(**arguments)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments | change)
