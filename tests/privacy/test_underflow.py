"""Within C where what is scaled, or a product of it, is a subnormal number: rounded coarsely, or flushed to zero."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from dpfast.amp import GradScaler
from dpfast.capture.forms import Convolved, EmbeddingRows, Factored, Instantiated, OuterProduct
from dpfast.clipping.thresholds import Clipping
from dpfast.ops import Geometry
from tests.helpers import BF16, F32, F64, SLACK, make_private, sums_of
from tests.privacy.judging import Private

SIDE, BACKPROP = 2.0**126, 1.01 * 2.0**-119  # the issue's own
GEOMETRY = Geometry((1,), (0,), (1,), False, (0,), 1)


@pytest.fixture(params=[False, True], ids=["subnormal", "flushed"])
def flushing(request):
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    yield request.param
    torch.set_flush_denormal(False)


def contribution(form, C: float) -> tuple[float, bool]:
    """Of the one sample, in units of C; and whether it was counted as lost."""
    squared, bound = form.squared_norm()
    (factors,), lost = Clipping.flat(C).factors(squared.unsqueeze(0), bound.unsqueeze(0), 1.0)
    if not factors.any():
        return 0.0, bool(lost)
    weights = factors.to(torch.float64 if form_dtype(form) == F64 else torch.float32)
    return form.clipped_sum(weights).double().norm().item() / C, bool(lost)


def form_dtype(form) -> torch.dtype:
    return form.samples.dtype if isinstance(form, Instantiated) else form.G.dtype


FORMS = {
    "one position": lambda a, g: OuterProduct(a((1, 40)), g((1, 30)), 30),
    "one position, wide": lambda a, g: OuterProduct(a((1, 30)), g((1, 40)), 40),
    "a number": lambda a, g: OuterProduct(a((1, 1)), g((1, 1)), 1),
    "groups": lambda a, g: Factored(a((1, 2, 1, 8)), g((1, 2, 1, 8)), 16),
    "positions": lambda a, g: Factored(a((1, 1, 3, 8)), g((1, 1, 3, 8)), 8),
    "convolution": lambda a, g: Convolved(a((1, 8, 6)), g((1, 4, 4)), torch.zeros(4, 8, 3), GEOMETRY, 1),
    "convolution, one position": lambda a, g: Convolved(a((1, 8, 3)), g((1, 4, 1)), torch.zeros(4, 8, 3), GEOMETRY, 1),
    "embedding": lambda a, g: EmbeddingRows(torch.tensor([[0, 1, 0]]), g((1, 3, 8)), 3),
    "written out": lambda a, g: Instantiated(g((1, 40))),
}


SIDES = [  # activations and backprops
    (SIDE, BACKPROP),
    (SIDE, 3 * 2.0**-149),
    (SIDE, 1.3 * 2.0**-126),
    (2.0**100, 1.7 * 2.0**-120),
    (1.0, 1.9 * 2.0**-140),
    (1.9 * 2.0**-120, 2.0**110),
    (3 * 2.0**-149, SIDE),
    (1.1 * 2.0**-70, 1.3 * 2.0**-62),
    (1.0, 1.0),
    (1e-3, 1e-6),
]


@pytest.mark.usefixtures("library", "flushing")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_every_form(name, dtype):
    """For sides from the largest to the smallest numbers, and C at which what is scaled is nearly nothing."""
    for side, backprop in SIDES:
        fill = [partial(torch.full, fill_value=value, dtype=dtype) for value in (side, backprop)]
        form = FORMS[name](*fill)
        squared, _ = form.squared_norm()
        norm = squared.sqrt().item()
        smallest = [2.0**-149 * side * size for size in (0.6, 0.9, 1.1, 1.6, 2.6, 40.0, 2.0**23)]
        fractions = [norm * part for part in (0.7, 0.3, 1e-3, 1e-9, 2.0**-31, 2.0**-50)]
        for C in (C for C in smallest + fractions if 0 < C < math.inf):
            moved, _ = contribution(form, C)
            assert moved <= SLACK, f"side {side}, backprop {backprop}, C {C}: {moved} C"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "layer, shape, C",
    [
        (nn.Conv1d(1000, 1000, 1, bias=False), (1000, 1), 6.02e-5),
        (nn.Conv1d(40, 40, 1, bias=False, groups=4), (40, 1), 4e-7),
        (nn.Conv2d(30, 40, 3, bias=False), (30, 3, 3), 2e-6),
        (nn.Linear(1, 1, bias=False), (1,), 6.2e-8),
        (nn.Linear(40, 30, bias=False), (40,), 2e-6),
    ],
    ids=["issue", "groups", "its whole input", "a number", "linear"],
)
def test_a_layer_whose_scaled_backprops_are_subnormal(layer, shape, C):
    for way in ("ghost", "instantiate"):
        private = Private(nn.Sequential(layer), C, loss_reduction="sum", plan={"0": way})
        (total,) = private.backward((torch.full((1, *shape), SIDE),), BACKPROP, lambda out, g: (out * g).sum()).values()
        moved = total.double().norm().item() / C
        assert moved <= SLACK
        assert moved > 0.999 or private.wrapped.nonfinite_samples == 1


@pytest.mark.usefixtures("library", "flushing")
@pytest.mark.parametrize("C", [1e-6, 1e-3, 1.0, 1e3])
def test_what_is_exact_is_not_lost(C):
    """Ordinary gradients, ten orders of magnitude above C and below: clipped to C, or left as they are."""
    for size in (1e-8, 1e-4, 1.0, 1e4):
        for form in (
            make(lambda s: torch.randn(s), lambda s, k=size: k * C * torch.randn(s)) for make in FORMS.values()
        ):
            squared, _ = form.squared_norm()
            expected = min(1.0, squared.sqrt().item() / C)
            moved, lost = contribution(form, C)
            assert not lost and abs(moved - expected) <= 2e-5 * expected


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**16, 2.0**60])
def test_a_loss_that_is_scaled(scale):
    """The scale is taken out of the sum: a weight that has it in would be too small for a bound, or left out."""
    found = []
    for loss_scale in (1.0, scale):
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 3), torch.randn(2, 4)
        wrapped, optimizer, _ = make_private(layer, size=2, max_grad_norm=1e-4, loss_reduction="sum")
        scaler = GradScaler(optimizer, loss_scale, device="cpu")
        scaler.scale((wrapped(x) ** 2).sum()).backward()
        found.append(torch.cat([s.flatten() for s in sums_of(wrapped).values()]))
    assert found[0].any() and torch.equal(*found)
