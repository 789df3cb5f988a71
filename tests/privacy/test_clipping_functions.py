"""Every clipping function: its formula, its sensitivity, its edges; in every style, under accumulation, with noise."""

import math
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn

import dpfast
from dpfast.clipping.functions import NAMED, clipping_function
from dpfast.clipping.thresholds import Clipping
from tests.helpers import F32, F64, SLACK, distance, engine_of, make_private, mse, sums_of
from tests.oracle import take

INF, NAN = math.inf, math.nan
OWN = dpfast.CustomClipping(lambda n: torch.where(n > 0, 1 - torch.exp(-n), 0.0) / n.clamp_min(1e-300), 1.0)

# function → (formula for n and C, factor at n = 0 for C)
FORMULAS = {
    dpfast.Abadi(): (lambda n, C: min(1, C / n), lambda C: 1),
    dpfast.Global(): (lambda n, C: float(n <= C), lambda C: 1),
    dpfast.Global(threshold=3.0): (lambda n, C: C / 3 * (n <= 3), lambda C: C / 3),
    dpfast.AutoS(): (lambda n, C: C / (n + 0.01), lambda C: C / 0.01),
    dpfast.AutoS(gamma=2.0): (lambda n, C: C / (n + 2), lambda C: C / 2),
    dpfast.AutoV(): (lambda n, C: C / n, lambda C: 0),
    dpfast.PSAC(): (lambda n, C: C / (n + 0.1 / (n + 0.1)), lambda C: C),
    OWN: (lambda n, C: (1 - math.exp(-n / C)) / (n / C), lambda C: 0),
}
FUNCTIONS = pytest.mark.parametrize("function", FORMULAS, ids=lambda f: type(f).__name__ + str(getattr(f, "gamma", "")))


def factors(function, norms, C):
    clipping = Clipping([C])
    clipping.function = function
    squared = torch.tensor([norms], dtype=F64).square()
    return clipping.factors(squared, torch.zeros_like(squared), 1.0)


@FUNCTIONS
@pytest.mark.parametrize("C", [0.1, 1.0, 7.0])
def test_the_formula(function, C):
    norms = [1e-6, 0.01, 0.0999, 0.5, 0.999, 1.001, 2.9, 3.1, 6.9, 7.1, 1e6]
    found, lost = factors(function, norms, C)
    want = torch.tensor([FORMULAS[function][0](n, C) for n in norms], dtype=F64)
    torch.testing.assert_close(found[0], want, rtol=1e-9, atol=1e-15)
    assert not lost.any()


@FUNCTIONS
@pytest.mark.parametrize("C", [1e-20, 0.1, 1.0, 1e20])
def test_the_sensitivity_holds_everywhere(function, C):
    norms = (C * torch.logspace(-12, 19, 5001, dtype=F64)).tolist()
    found, _ = factors(function, norms, C)
    products = found[0] * torch.tensor(norms, dtype=F64)
    assert (found >= 0).all() and (products <= C * (1 + 1e-12)).all()


@FUNCTIONS
def test_the_edges(function):
    found, lost = factors(function, [0.0, INF, NAN, 1e25, 1.0], 1.0)
    assert found[0, 0] == pytest.approx(FORMULAS[function][1](1.0))
    assert (found[0, 1:4] == 0).all() and lost.tolist() == [False, True, True, True, False]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def run(model, data, C, parts=1, **options):
    torch.manual_seed(1)
    wrapped, _, _ = make_private(model, max_grad_norm=C, loss_reduction="sum", **options)
    for x, y in zip(*(side.chunk(parts) for side in data), strict=True):
        if len(x):
            mse_sum(wrapped(x), y).backward()
    return wrapped, sums_of(model)


def mse_sum(output, target):
    return mse(output, target) * target.numel()


STYLES = {
    "flat": (dict(), 0.7),
    "per_layer": (dict(clipping="per_layer"), 0.7),
    "groups": (dict(clipping=["0", "2"]), 0.7),
    "list": (dict(clipping="per_layer"), [0.3, 0.1, 0.5]),
}


@FUNCTIONS
@pytest.mark.parametrize("style", STYLES)
def test_one_sample_left_out(function, style):
    options, C = STYLES[style]
    data = 3 * torch.randn(6, 5, dtype=F64), torch.randn(6, 3, dtype=F64)
    torch.manual_seed(3)
    model = net()
    with torch.no_grad():
        data[1][0] = model(data[0][:1])[0] + 0.01  # a small gradient, which no function drops
    whole = run(model, data, C, clipping_fn=function, **options)[1]
    bound = C if isinstance(C, float) else math.hypot(*C)
    moved = []
    for i in range(6):
        rest = take(data, [j for j in range(6) if j != i])
        torch.manual_seed(3)
        moved.append(distance(whole, run(net(), rest, C, clipping_fn=function, **options)[1]))
    assert 0 < max(moved) <= bound * SLACK


@FUNCTIONS
def test_physical_batches_add_up(function):
    data = 3 * torch.randn(6, 5, dtype=F64), torch.randn(6, 3, dtype=F64)
    sums = []
    for parts in (1, 3):
        torch.manual_seed(3)
        sums.append(run(net(), data, 0.5, parts, clipping_fn=function)[1])
    assert distance(*sums) < 1e-12


def test_shares_of_one_number():
    """C/√M each: the sensitivity is C."""
    model = net()
    for options, groups in ((dict(clipping="per_layer"), 3), (dict(clipping=["0", "2"]), 2)):
        _, optimizer, _ = make_private(model, max_grad_norm=0.6, **options)
        assert optimizer.max_grad_norms == pytest.approx([0.6 / math.sqrt(groups)] * groups)
        assert optimizer.max_grad_norm == pytest.approx(0.6)
        model = net()


def test_dropping_is_not_losing():
    """Samples past Z are left out without a warning and without being counted; in their group alone."""
    model = net()
    x, y = torch.randn(4, 5, dtype=F64), torch.randn(4, 3, dtype=F64)
    x[1] *= 1e3
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        wrapped, sums = run(model, (x, y), 100.0, clipping_fn="global", clipping=["0", "2"])
    assert wrapped.nonfinite_samples == 0 and all(s.isfinite().all() for s in sums.values())
    x[2, 0] = NAN
    with pytest.warns(RuntimeWarning, match="1 of 4 samples"):
        wrapped, sums = run(net(), (x, y), 100.0, clipping_fn="global")
    assert wrapped.nonfinite_samples == 1 and all(s.isfinite().all() for s in sums.values())


@pytest.mark.parametrize("name", NAMED)
def test_names(name):
    assert clipping_function(name) == NAMED[name]()
    data = torch.randn(3, 5, dtype=F64), torch.randn(3, 3, dtype=F64)
    torch.manual_seed(3)
    first = run(net(), data, 0.5, clipping_fn=name)[1]
    torch.manual_seed(3)
    assert distance(first, run(net(), data, 0.5, clipping_fn=NAMED[name]())[1]) == 0


@pytest.mark.parametrize("given", ["sat", 3, None, lambda n: 1 / n])
def test_names_that_are_none(given):
    with pytest.raises(ValueError, match=r"clipping_fn=.*use one of abadi, global"):
        make_private(net(), clipping_fn=given)


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, "1", True, None])
def test_bad_numbers(value):
    for make in (lambda v: dpfast.AutoS(gamma=v), lambda v: dpfast.PSAC(r=v), lambda v: dpfast.CustomClipping(abs, v)):
        with pytest.raises(ValueError, match=r"=.*: give a positive finite number"):
            make(value)
    if value is not None:
        with pytest.raises(ValueError, match=r"threshold=.*: give a positive finite number"):
            dpfast.Global(value)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda n: torch.ones_like(n), r"sensitivity=2 is exceeded: at n="),
        (lambda n: torch.where(n < 1e8, 1 / (n + 1), 1.0), "is exceeded: at n=1"),
        (lambda n: -1 / (n + 1), "no negative factors"),
        (lambda n: n / 0, "is exceeded"),
        (lambda n: 1.0, "does not run under torch.vmap"),
        (lambda n: torch.stack([n, n]) * 0, "must return one factor"),
        (lambda n: n * 0 + torch.rand_like(n), "does not run under torch.vmap"),
    ],
)
def test_a_function_that_does_more_than_it_says(function, message):
    with pytest.raises(ValueError, match=message):
        dpfast.CustomClipping(function, sensitivity=2.0)


@pytest.mark.parametrize("coupled", [lambda n: 1 / n.max(), lambda n: 1 / n.median(), lambda n: 1 / n.mean()])
def test_a_function_sees_one_norm_alone(coupled):
    """The largest, or the median, of one norm is that norm: others' norms move nothing."""
    function = dpfast.CustomClipping(lambda n: torch.where(n > 0, coupled(n.clamp_min(1e-300)), 0.0), 1.0)
    alone, _ = factors(function, [2.0], 1.0)
    among, _ = factors(function, [2.0, 1e3, 1e-3], 1.0)
    assert alone[0, 0] == among[0, 0] == pytest.approx(0.5)


def test_a_function_that_behaves_on_the_grid_alone():
    """It is cut to C/n wherever it asks for more."""
    grid = torch.cat([torch.zeros(1).double(), torch.logspace(-9, 9, 3601, dtype=F64)])
    sly = dpfast.CustomClipping(lambda n: torch.where(torch.isin(n, grid), 0.0, 1e6), 1.0)
    norms = [0.123, 5.4321, 1e4 + 0.5]
    found, _ = factors(sly, norms, 1.0)
    assert (found[0] * torch.tensor(norms, dtype=F64) <= 1).all() and (found > 0).all()


class TestAdaptive:
    OPTIONS: ClassVar = dict(
        clipping="adaptive",
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.3,
        max_clipbound=100.0,
        min_clipbound=0.01,
        unclipped_num_std=2.0,
    )

    def trained(self, steps, noise_multiplier=0.0, C=0.1, engine=None, **kw):
        torch.manual_seed(0)
        model = nn.Linear(5, 1, bias=False).to(F32)
        x = torch.randn(64, 5) * torch.logspace(-1, 1, 64)[:, None]
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1]), batch_size=64)
        options = self.OPTIONS | kw
        wrapped, optimizer, loader = make_private(
            model, data_loader=loader, max_grad_norm=C, noise_multiplier=noise_multiplier, engine=engine, **options
        )
        for _ in range(steps):
            optimizer.zero_grad()
            wrapped(x).sum(1).mean().backward()
            optimizer.step()
        return wrapped, optimizer

    def test_it_finds_the_quantile(self):
        wrapped, optimizer = self.trained(120)
        norms = wrapped.per_sample_gradient_norms
        assert optimizer.max_grad_norm == pytest.approx(norms.median().item(), rel=0.15)

    def test_one_step_by_hand(self):
        wrapped, optimizer = self.trained(1)
        unclipped = (wrapped.per_sample_gradient_norms <= 0.1).double().mean().item()
        assert optimizer.max_grad_norm == pytest.approx(0.1 * math.exp(-0.3 * (unclipped - 0.5)), rel=1e-6)

    def test_it_stays_within_its_bounds(self):
        assert self.trained(60, max_clipbound=0.2)[1].max_grad_norm == 0.2
        assert self.trained(60, C=99.0, min_clipbound=90.0)[1].max_grad_norm == 90.0

    def test_the_count_is_noisy_and_part_of_the_budget(self):
        """The accountant is told z; sums get more noise than that, as their share of it."""
        engine = engine_of()
        seen = []
        _, optimizer = self.trained(0, noise_multiplier=1.5, engine=engine)
        following, make = optimizer.noise.next, optimizer.noise.beside
        optimizer.noise.next = lambda *a: seen.append(a[0]) or following(*a)
        optimizer.noise.beside = lambda *a: seen.append(a[1]) or make(*a)
        optimizer.expect_no_samples()
        optimizer.step()
        assert seen == [pytest.approx((1.5**-2 - 4.0**-2) ** -0.5), 4.0]
        assert 1 / seen[0] ** 2 + 1 / seen[1] ** 2 == pytest.approx(1 / 1.5**2)
        assert [entry[0] for entry in engine.accountant.history] == [1.5]
        noiseless = 0.1 * math.exp(-0.3 * (0.0 - 0.5))  # an empty batch: a centred count of 0 is a fraction of a half
        assert optimizer.max_grad_norm != pytest.approx(noiseless) and optimizer.max_grad_norm != 0.1

    def test_a_resumed_run_goes_on_with_its_threshold(self, tmp_path):
        engine = engine_of()
        wrapped, optimizer = self.trained(3, noise_multiplier=1.0, engine=engine)
        engine.save_checkpoint(path=tmp_path / "c.pt", module=wrapped, optimizer=optimizer)
        again = engine_of()
        fresh, other = self.trained(0, noise_multiplier=1.0, engine=again)
        again.load_checkpoint(path=tmp_path / "c.pt", module=fresh, optimizer=other)
        assert other.max_grad_norm == optimizer.max_grad_norm != 0.1

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(target_unclipped_quantile=1.5), "target_unclipped_quantile=1.5: give a fraction"),
            (dict(clipbound_learning_rate=-1), "clipbound_learning_rate=-1: give a finite number"),
            (dict(unclipped_num_std=NAN), "unclipped_num_std=nan"),
            (dict(min_clipbound=200.0), "min_clipbound=200.0, max_clipbound=100.0"),
            (dict(unclipped_num_std=0.7, noise_multiplier=1.5), "must be more than half of the noise multiplier"),
        ],
    )
    def test_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            make_private(net(), **self.OPTIONS | change)

    def test_an_argument_that_is_missing(self):
        options = {k: v for k, v in self.OPTIONS.items() if k != "max_clipbound"}
        with pytest.raises(ValueError, match="clipping='adaptive' needs max_clipbound"):
            make_private(net(), **options)
