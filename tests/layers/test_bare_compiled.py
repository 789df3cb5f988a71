"""Bare parameters in compiled models: a part of the graph, for blocks, checkpoints and branches too."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpfast.capture.graph_calls import INSIDE
from tests.helpers import F32
from tests.layers.test_bare_models import LATER, Branches, Vision, exact, stood_in
from tests.layers.test_bare_parameters import B, D, Everything, rows, targets
from tests.privacy.judging import TIGHT, Private

TRACED = ("expand", "repeat", "sub", "in place", "numbers")


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs were compiled in the test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled(graphs, vmaps):
    """What a compiler calls by other names is in one graph, and exact there, for batches of any size."""
    model = Everything(*TRACED).double()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, backend="aot_eager", dynamic=True)
    for batch in (B, B + 1):
        exact(model, private, rows(batch), targets(batch))
    assert graphs() == 1 and not vmaps


@pytest.mark.compiles
def test_a_part_of_the_graph(graphs, vmaps):
    """Inductor has the copies among its own operators, and hands their gradients over at the graph's end."""
    model = Linear()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, dynamic=False)
    with torch._inductor.config.patch("aot_inductor.debug_compile", True):  # less time in the C++ compiler
        for _ in range(3):
            exact(model, private, torch.randn(B, 4), targets(), F32)
    assert private.wrapped.clipped_sum.compiled == dict.fromkeys(("one", "two", "p"), INSIDE)
    assert graphs() == 1 and not vmaps


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.p = nn.Linear(4, D), nn.Linear(D, 2), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) + self.p)


def test_compiled_blocks_in_checkpoints(graphs, vmaps):
    """A block that is compiled finds the stand-ins too when a checkpoint computes it again."""
    model = Vision(lambda block, x: checkpoint(block, x, use_reentrant=False)).double()
    private = Private(model, TIGHT)
    private.model.blocks[0].compile(backend="aot_eager")
    for _ in range(2):
        exact(model, private, rows(), targets())
        assert not stood_in(private.model)
    assert graphs() == 1 and not vmaps


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:  # type: ignore[override]
        raise ZeroDivisionError


def test_a_compiled_backward_that_raises(graphs):
    """No stand-in is left, and the next batch is exact."""
    model = Vision().double()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, backend="aot_eager", dynamic=False)
    exact(model, private, rows(), targets())
    with pytest.raises(ZeroDivisionError):
        Failing.apply(private.wrapped(rows().double())).sum().backward()
    assert not stood_in(private.model)
    out = private.wrapped(rows().double())
    out.register_hook(lambda G: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    gc.collect()
    assert not stood_in(private.model)
    exact(model, private, rows(), targets())


@pytest.mark.parametrize("name", ["matmul", "one copy for all"])
def test_a_later_branch_of_a_compiled_model(name, graphs, vmaps):
    model = Branches(lambda x, p: x + p, LATER[name][0]).double()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, backend="aot_eager", dynamic=False)
    for now in (0, 1, 0, 1):
        private.model.now = model.now = now
        exact(model, private, rows(B, B), targets())
    assert vmaps
