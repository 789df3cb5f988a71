"""Counts of operators and of waits: what is one, what is none, and where it is."""

from types import SimpleNamespace

import pytest
import torch

from bench.dispatched import COUNTED, WARM_UP, Dispatched, count

CPU, META = torch.device("cpu"), torch.device("meta")
X = torch.arange(4.0)
MASK, IDS = X > 1, torch.tensor([0, 2])

WAITS = {
    "item": (lambda: X.sum().item(), "aten._local_scalar_dense"),
    "bool": (lambda: bool(MASK.any()), "aten._local_scalar_dense"),
    "float": (lambda: float(X[0]), "aten._local_scalar_dense"),
    "a tensor for a size": (lambda: torch.arange(X[1]), "aten._local_scalar_dense"),
    "tolist": (lambda: X.tolist(), "tolist"),
    "cpu": (lambda: X.cpu(), "cpu"),
    "nonzero": (lambda: X.nonzero(), "aten.nonzero"),
    "where": (lambda: torch.where(MASK), "aten.nonzero"),
    "a mask as an index": (lambda: X[MASK], "aten.index"),
    "what a mask is filled with": (lambda: X.clone().index_put((MASK,), X[2:]), "aten.index_put"),
    "masked_select": (lambda: X.masked_select(MASK), "aten.masked_select"),
    "unique": (lambda: X.unique(), "aten._unique2"),
    "bincount": (lambda: IDS.bincount(), "aten.bincount"),
    "repeat_interleave": (lambda: X[:2].repeat_interleave(IDS), "aten.repeat_interleave"),
    "equal": (lambda: torch.equal(X, X), "aten.equal"),
    "allclose": (lambda: torch.allclose(X, X), "aten.allclose"),
    "torch.tensor": (lambda: torch.tensor([1.0, 2.0]), "aten.lift_fresh"),
    "as_tensor": (lambda: torch.as_tensor([1.0]), "aten.lift_fresh"),
    "inv": (lambda: torch.linalg.inv(torch.eye(2)), "aten._linalg_check_errors"),
}
NO_WAITS = {
    "ids as an index": lambda: X[IDS],
    "ids that are filled": lambda: X.clone().index_put((IDS,), X[:2]),
    "one number for a mask": lambda: X.clone().index_put((MASK,), X[0]),
    "where of two": lambda: torch.where(MASK, X, 0.0),
    "masked_fill": lambda: X.masked_fill(MASK, 0.0),
    "repeat_interleave by a number": lambda: X.repeat_interleave(2),
    "a new dtype": lambda: X.to(torch.float64),
    "full": lambda: torch.full((2,), 3.0),
    "sort": lambda: X.sort(),
    "to the same device": lambda: X.to("cpu"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_named_with_its_place(name):
    call, operator = WAITS[name]
    with Dispatched(CPU) as seen:
        call()
    ((found, place),) = seen.waits
    assert found == operator and place.startswith("tests/bench/test_dispatched.py:")
    assert seen.waits_by_operator == {operator: 1}


@pytest.mark.parametrize("name", NO_WAITS)
def test_what_is_no_wait(name):
    with Dispatched(CPU) as seen:
        NO_WAITS[name]()
    assert not seen.waits


def test_waits_of_a_backward_are_seen():
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, G):
            return G * G.sum().item()

    x = torch.ones(3, requires_grad=True)
    with Dispatched(CPU) as seen:
        Asks.apply(x).sum().backward()
    assert seen.waits_by_operator == {"aten._local_scalar_dense": 1}


def test_on_another_device_only_its_own_tensors_are_waited_for():
    """As on a GPU; the meta device stands in for one."""
    x = torch.ones(4, device=META)
    with Dispatched(META) as seen:
        X.sum().item(), X.nonzero(), X.cpu(), X.tolist(), X.to(torch.float64), x.to(torch.float64), x + 1
        x.copy_(X, non_blocking=True), X.to(META, non_blocking=True)
    assert not seen.waits
    with Dispatched(META) as seen:
        X.to(META)
        x.copy_(X)
    assert seen.waits_by_operator == {"aten._to_copy": 1, "aten.copy_": 1}


def test_views_and_unwritten_memory_are_no_operators():
    with Dispatched(CPU) as seen:
        X.view(2, 2).t()[0].unsqueeze(0).expand(3, 2).detach().split(1)
        torch.empty(3), torch.empty_like(X), X.new_empty(2)
    assert not seen.operators
    with Dispatched(CPU) as seen:
        X[0].add_(0), X + X, X * 2, X.view(2, 2).contiguous().t().contiguous()
    assert seen.operators == {"aten.add_": 1, "aten.add": 1, "aten.mul": 1, "aten.clone": 1}


def test_a_step_is_counted_without_what_is_done_in_some_only():
    """Not what is made once, nor a check that comes in some steps."""
    for extra in ({1, 2, 3}, {1, 2, 4}, {1, 2, 5}, {2, 3, 4}, {2, 4, 5}):
        state = SimpleNamespace(steps=0)

        def step(state=state, extra=extra):
            state.steps += 1
            for _ in range(10 if state.steps in extra else 0):
                X.sum().item()
            X + 1

        seen = count(step, CPU)
        assert seen.operators == {"aten.add": 1} and not seen.waits
        assert state.steps == WARM_UP + COUNTED
