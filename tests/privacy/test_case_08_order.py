"""Case 8: forwards, backwards, evaluations and exceptions in any order leave nothing stale."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import (
    F64,
    assert_exact,
    assert_exact_or_refused,
    follow,
    make_private,
    mse,
    sums_of,
    token_loss,
)
from tests.oracle import Verdict, clipped_sum, per_sample_gradients
from tests.zoo import TinyGPT

C = 0.05


class Scale(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x):
        return x * self.weight


class Fussy(nn.Module):
    """Raises when told to, in its forward or in its backward; a leaf of its own between two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(4, 5), Scale(5), nn.Linear(5, 2)
        self.fail = None

    def forward(self, x):
        h = self.scale(torch.tanh(self.a(x)))
        if self.fail == "forward":
            raise KeyboardInterrupt("in the forward")
        if self.fail == "backward":
            h.register_hook(self.explode)
        return self.b(h)

    @staticmethod
    def explode(_):
        raise KeyboardInterrupt("in the backward")


class Bench:
    """A private model, and one question: is the next ordinary step exact?"""

    def __init__(self, make=Fussy, **kw):
        self.model = make().double()
        self.twin = copy.deepcopy(self.model)
        self.wrapped, self.optimizer, _ = make_private(self.model, max_grad_norm=C, **kw)

    @staticmethod
    def batch(n=4):
        return torch.randn(n, 4, dtype=F64), torch.randn(n, 2, dtype=F64)

    def assert_next_step_is_exact(self, n=4):
        x, y = self.batch(n)
        follow(self.twin, self.model).way = getattr(self.model, "way", None)
        verdict = Verdict(self.twin, (x,), y, mse, C)
        mse(self.wrapped(x), y).backward()
        verdict.check_norms(self.wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(self.model))
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("times", [1, 3])
def test_forwards_without_backward(times):
    bench = Bench()
    for _ in range(times):
        bench.wrapped(bench.batch()[0])
    bench.assert_next_step_is_exact()


def test_a_forward_that_is_abandoned_but_kept():
    """Its output is still alive, of another size, while the next batch is trained."""
    bench = Bench()
    kept = bench.wrapped(bench.batch(7)[0])
    bench.assert_next_step_is_exact()
    assert kept.requires_grad


@pytest.mark.parametrize("where", ["forward", "backward", "between"])
def test_an_exception(where):
    bench = Bench()
    x, y = bench.batch(6)
    bench.model.fail = where
    with pytest.raises(KeyboardInterrupt):
        loss = mse(bench.wrapped(x), y)
        if where == "between":
            raise KeyboardInterrupt
        loss.backward()
    bench.model.fail = None
    bench.optimizer.zero_grad()
    bench.assert_next_step_is_exact()


def test_an_exception_of_pytorchs():
    bench = Bench()
    with pytest.raises((RuntimeError, ValueError)):
        bench.wrapped(torch.randn(4, 9, dtype=F64))  # a wrong width
    bench.assert_next_step_is_exact()


@pytest.mark.parametrize("sizes", [(4, 4), (4, 7), (5, 1), (3, 0)], ids=str)
def test_two_backwards_before_a_step(sizes):
    """Both clipped on their own and added, as in Opacus' "hooks"."""
    bench = Bench()
    want = {n: torch.zeros_like(p) for n, p in bench.model.named_parameters()}
    for n in sizes:
        x, y = bench.batch(n)
        part = clipped_sum(per_sample_gradients(bench.twin, (x,), y, mse), C)
        want = {name: want[name] + part[name] for name in want}
        mse(bench.wrapped(x), y).backward()
        assert bench.wrapped.per_sample_gradient_norms.shape == (n,)
    for name, got in sums_of(bench.model).items():
        torch.testing.assert_close(got, want[name])
    bench.optimizer.step()
    bench.optimizer.zero_grad()
    bench.assert_next_step_is_exact()


def test_two_forwards_then_two_backwards():
    """Interleaved: each backward has its own batch's activations."""
    bench = Bench()
    batches = [bench.batch(4), bench.batch(3)]
    losses = [mse(bench.wrapped(x), y) for x, y in batches]
    parts = [clipped_sum(per_sample_gradients(bench.twin, (x,), y, mse), C) for x, y in batches]
    for loss in reversed(losses):
        loss.backward()
    for name, got in sums_of(bench.model).items():
        torch.testing.assert_close(got, parts[0][name] + parts[1][name])


def test_two_backwards_are_refused_under_poisson_sampling():
    """As in Opacus: the accountant counts one batch a step."""
    bench = Bench(poisson_sampling=True)
    x, y = bench.batch()
    mse(bench.wrapped(x), y).backward()
    with pytest.raises(ValueError, match="step"):
        mse(bench.wrapped(x), y).backward()


def test_retain_graph():
    """The same graph twice would count its samples twice: refused, and the first pass stays as it was."""
    bench = Bench()
    x, y = bench.batch()
    once = clipped_sum(per_sample_gradients(bench.twin, (x,), y, mse), C)
    loss = mse(bench.wrapped(x), y)
    loss.backward(retain_graph=True)
    for name, got in sums_of(bench.model).items():
        torch.testing.assert_close(got, once[name])
    with pytest.raises(ValueError, match="a second backward pass over samples"):
        loss.backward()
    for name, got in sums_of(bench.model).items():
        torch.testing.assert_close(got, once[name])


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "eval"])
def test_evaluation_in_between(when, mode):
    bench = Bench()
    x, y = bench.batch()
    verdict = Verdict(bench.twin, (x,), y, mse, C)

    def evaluate():
        if mode == "eval":
            bench.wrapped.eval()
            bench.wrapped(bench.batch(9)[0])
            bench.wrapped.train()
        else:
            with getattr(torch, mode)():
                bench.wrapped(bench.batch(9)[0])

    if when == "before":
        evaluate()
    loss = mse(bench.wrapped(x), y)
    if when == "between":
        evaluate()
    loss.backward()
    if when == "after":
        evaluate()
    verdict.check_norms(bench.wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(bench.model))


def test_evaluation_has_ordinary_gradients_for_inputs():
    """A saliency map in ``eval()`` is no training gradient."""
    bench = Bench()
    x, _ = bench.batch()
    x.requires_grad_(True)
    bench.wrapped.eval()
    bench.wrapped(x).sum().backward()
    assert x.grad.isfinite().all()
    assert not any(s.any() for s in sums_of(bench.model).values())
    bench.wrapped.train()
    bench.optimizer.zero_grad()
    bench.assert_next_step_is_exact()


@pytest.mark.parametrize("how", ["autograd.grad", "backward(inputs=...)"])
def test_gradients_of_inputs_are_not_training_gradients(how):
    bench = Bench()
    x, y = bench.batch()
    verdict = Verdict(bench.twin, (x,), y, mse, C)
    probe = x.clone().requires_grad_(True)
    out = bench.wrapped(probe)
    if how == "autograd.grad":
        (got,) = torch.autograd.grad(mse(out, y), probe)
    else:
        mse(out, y).backward(inputs=[probe])
        got = probe.grad
    plain = x.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(mse(by_hand(bench.model, plain), y), plain)
    torch.testing.assert_close(got, want)
    assert not any(s.any() for s in sums_of(bench.model).values())
    mse(bench.wrapped(x), y).backward()
    verdict.check_norms(bench.wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums_of(bench.model))


def by_hand(model, x):
    """The same function by hand, through no layer of the private model."""
    h = torch.tanh(x @ model.a.weight.t() + model.a.bias) * model.scale.weight
    return h @ model.b.weight.t() + model.b.bias


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.way = "left"

    def forward(self, x):
        return self.out(torch.tanh(getattr(self, self.way)(x)))


def test_a_branch_not_used_this_time():
    bench = Bench(Branches)
    for way in ("left", "right", "left"):
        bench.model.way = way
        bench.assert_next_step_is_exact()


def test_a_branch_whose_result_is_dropped():
    """It ran forward but no gradient comes back."""

    class Dropped(Branches):
        def forward(self, x):
            self.right(x)
            return self.out(torch.tanh(self.left(x))) + self.right(x).detach()[:, :2]

    assert_exact(Dropped().double(), (torch.randn(4, 4, dtype=F64),), torch.randn(4, 2, dtype=F64), mse)


def test_a_branch_used_by_some_samples():
    """An expert that sees two of four samples: exact, or refused by name; never mixed up."""

    class Routed(Branches):
        def forward(self, x):
            picked = x[:, 0] > 0
            h = torch.tanh(self.left(x))
            h = h.index_put((picked.nonzero()[:, 0],), self.right(x[picked]), accumulate=True)
            return self.out(h)

    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 2, dtype=F64)
    x[:, 0] = torch.tensor([-1.0, 2.0, -0.5, 1.0])
    assert_exact_or_refused(Routed().double(), (x,), y, mse, "Routed")


def test_a_tied_model_in_two_interleaved_batches():
    model = TinyGPT().double()
    twin = copy.deepcopy(model)
    wrapped, _, _ = make_private(model, max_grad_norm=C)
    batches = [torch.randint(9, (n, 5)) for n in (4, 3)]
    losses = [token_loss(wrapped(ids), ids) for ids in batches]
    parts = [clipped_sum(per_sample_gradients(twin, (ids,), ids, token_loss), C) for ids in batches]
    for loss in losses:
        loss.backward()
    for name, got in sums_of(model).items():
        torch.testing.assert_close(got, parts[0][name] + parts[1][name])
