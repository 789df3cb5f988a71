"""Whole steps as CUDA graphs, where there is no GPU: a list of operators on fixed memory stands for the graph.

It shows which memory a replay reads and writes, and what is left in it; tests/gpu shows it of a CUDA graph.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast import ops
from dpfast.capture.trees import tensors
from tests.helpers import BF16, mse
from tests.test_graphed import batch
from tests.test_graphed_update import LATER, UPDATES, assert_states_alike, in_16_bits, train, watch, whole

GRAPHS: list[Any] = []


class Graph:
    """What is replayed writes to the memory that it wrote to when it was captured."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        GRAPHS.append(self)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for before, again in zip(tensors([out]), tensors([func(*args, **kwargs)]), strict=True):
                    before.copy_(again)


class Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _: nullcontext()}
    for name, fake in {**fakes, "CUDAGraph": Graph, "graph": Capture}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("dpfast.recorded.is_captured", lambda x: True)
    GRAPHS.clear()


@pytest.mark.parametrize("name", UPDATES)
def test_updates_to_the_bit(name, monkeypatch):
    used = watch(monkeypatch)
    twins = whole(make=UPDATES[name])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.8) for each in (twins.optimizer, twins.plain)]
    for k in range(7):
        twins.backward(*batch(k))
        twins.update()
        for scheduler in schedulers:
            scheduler.step()
    assert twins.step.updates >= 4 and twins.step.recorded == len(GRAPHS) == 1
    keys = {words for words, _ in used}
    assert len(keys) == len(used) / (2 if name == "two groups" else 1) == twins.step.updates
    assert_states_alike(twins)


@pytest.mark.parametrize("low_precision", ["stochastic", "master"])
def test_parameters_of_16_bits_to_the_bit(low_precision):
    twins = in_16_bits(BF16, low_precision, UPDATES["momentum"])
    for k in range(6):
        twins.backward(*(x.to(BF16) for x in batch(k)))
        twins.update()
    assert twins.step.updates >= 2 and GRAPHS
    assert_states_alike(twins)


def test_no_key_is_left_in_the_graph_and_without_one_it_writes_nothing(monkeypatch):
    used = watch(monkeypatch)
    twins = whole(make=UPDATES["adam"])
    train(twins)
    (graph,) = GRAPHS
    held = [x for func, args, *_ in graph.calls for x in tensors([args]) if "noisy_step_in_graph_" in str(func)]
    words = [x for x in held if x.dtype == torch.int64 and x.shape == (ops.WORDS,)]
    assert words and not any(x.any() for x in words)
    before = [p.detach().clone() for p in twins.model.parameters()]
    steps = len(used)
    graph.replay()
    assert all(map(torch.equal, before, twins.model.parameters())) and len(used) == steps
    assert train(twins, 3, first=LATER) >= 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite(bad, monkeypatch):
    """The graph writes nothing; the step is made once, with noise that no sum has met."""
    used = watch(monkeypatch)
    twins = whole(make=UPDATES["adam"])
    train(twins, 9)
    x, y = batch(LATER)
    x[2, 0, 0] = bad
    updates, steps = twins.step.updates, len(used)
    with pytest.warns(RuntimeWarning, match="contributes exact zeros"):
        twins.step(x, y)
    twins.plain.zero_grad()
    mse(twins.twin(x), y).backward()
    twins.update()
    assert len(used) == steps + 1 and twins.step.updates == updates
    assert twins.optimizer.noise.step == twins.plain.noise.step == 10
    assert train(twins, 3, first=LATER + 1) >= 2
    assert len({words for words, _ in used}) == len(used)
    assert_states_alike(twins)


def test_physical_batches():
    """The sums of those before are copied into the graph; a replay of the last one does not change them."""
    twins = whole(make=UPDATES["momentum"])
    for k in range(10):
        for optimizer in (twins.optimizer, twins.plain):
            optimizer.signal_skip_step(do_skip=k % 2 == 0)
        twins.backward(*batch(k))
        if k % 2:
            twins.update()
        else:
            twins.plain.step()
            twins.plain.zero_grad()
    assert twins.step.updates >= 2 and twins.optimizer.noise.step == 5
    assert_states_alike(twins)
