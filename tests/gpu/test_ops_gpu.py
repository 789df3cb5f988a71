"""Every op of the CUDA library on a GPU, against the CPU library. The cases are those of tests/ops/cuda_cases.py, which
the emulator runs too, and what only a GPU can show: large tensors, streams, graphs, nothing that waits.
"""

from contextlib import contextmanager

import pytest
import torch

from dpfast import native
from tests.ops import cuda_cases as cases

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "bf16", "f16", "f64"])
each_mode = pytest.mark.parametrize("mode", cases.MODES)


@pytest.fixture(scope="module")
def side():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not native.available("cuda"):
        pytest.skip(f"no CUDA library: {native.why_not('cuda')}")
    cases.cpu()

    @contextmanager
    def capturing():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph.replay

    return cases.Side(torch.ops.dpfast, "cuda", capturing)


@each_dtype
@each_mode
def test_noisy_grad(side, dtype, mode):
    cases.noisy_grad(side, dtype, mode)


@each_dtype
@each_mode
def test_noisy_grad_of_large_tensors(side, dtype, mode):
    """Pieces of full size, which have a loop of their own; and a shard whose quads are not aligned."""
    cases.noisy_grad(side, dtype, mode, [(30_000_017, 0, 0), (5_000_001, 12, 0), (3_000_000, 3, 1)])


def test_many_tensors(side):
    cases.many_tensors(side)


@pytest.mark.parametrize(("mode", "offset"), [("fast", 0), ("fast", 2**34 - 3), ("secure", 0), ("secure", 131)])
def test_standard_normal(side, mode, offset):
    """To the bit, of 20 million numbers: logarithm, square root, sine and cosine are those of the CPU."""
    cases.standard_normal(side, mode, 20_000_001, offset)


@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=["f32", "bf16", "f16"])
@each_mode
@pytest.mark.parametrize(("rule", "rounding", "extras"), cases.UPDATES)
def test_update(side, dtype, mode, rule, rounding, extras):
    cases.update(side, dtype, mode, rule, rounding, extras)


@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=["f32", "bf16", "f16"])
@each_mode
@pytest.mark.parametrize("name", cases.RULES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_updates_in_a_graph(side, dtype, mode, name, rounding):
    cases.updates_in_a_graph(side, dtype, mode, name, rounding)


def test_keys_are_not_captured(side):
    cases.captured_keys(side)


@pytest.mark.parametrize("function", range(5))
def test_clip_factors(side, function):
    cases.clip_factors(side, function)


@pytest.mark.parametrize("batch", [0, 1, 7, 60, 300])
def test_squared_norms(side, batch):
    cases.squared_norms(side, batch)


@pytest.mark.parametrize("batch", [0, 1, 7, 60, 300])
@pytest.mark.parametrize(("dtype", "shared"), [(cases.F32, True), (cases.F64, False)])
def test_weighted_sums(side, batch, dtype, shared):
    cases.weighted_sums(side, batch, dtype, shared)


@each_dtype
@pytest.mark.parametrize("shape", [*cases.SHAPES, (32, 512, 768), (4, 2049, 1000)])
def test_positions(side, dtype, shape):
    cases.positions(side, dtype, shape)


@each_dtype
@pytest.mark.parametrize("table", [*cases.TABLES, (32, 512, 256, 5000), (8, 2048, 64, 3)])
def test_embedding(side, dtype, table):
    cases.embedding(side, dtype, table)


def test_refusals(side):
    cases.refusals(side)
    on_gpu, on_cpu = torch.ones(8, device="cuda"), torch.ones(8)
    with pytest.raises(RuntimeError, match="on one CUDA device"):
        side.ops.noisy_grad_([on_gpu], [on_cpu], [0], [0], cases.KEY, 1, 1.0, 0.0, 1.0)


def every_op(side, x, half, ids, factors, out):
    """All ops once, on tensors that are there; what they make is kept in ``out``."""
    ops, noise = side.ops, ([0], [0], cases.KEY, 1, 1.3, 0.0, 0.1)
    ops.noisy_grad_([x], [out], *noise)
    ops.noisy_sgd_([x], [], [half], [], [], *noise, 0.1, 0.0, 0.0, 0.0, False, False, False, 1, [1, 2])
    ops.standard_normal(out, cases.KEY, 1, 0, 0, 0.0)
    squared = ops.squared_norms([x])
    made = [*ops.clip_factors(squared, squared, torch.ones_like(squared[:, 0]), 0, 1.0, 1.0), squared]
    made += ops.weighted_sums([x, half], factors)
    made += ops.sum_positions(x)
    made += ops.normalised_sums(x, x, x[..., 0].contiguous(), x[..., 0].contiguous())
    made += ops.embedding_squared_norm(ids, x)
    made.append(ops.embedding_sum(ids, x, factors, 50))
    return [*made, out.clone(), half.clone()]


@pytest.fixture
def tensors(side):
    x = torch.randn(16, 128, 256, device="cuda")
    ids = torch.randint(50, (16, 128), device="cuda")
    return x, x.half(), ids, torch.rand(16, device="cuda"), torch.empty_like(x)


def test_nothing_waits_for_the_gpu(side, tensors):
    every_op(side, *tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(side, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_run_on_the_current_stream(side, tensors):
    """Behind 100 ms of other work there; on the default stream they would read what is not made yet."""
    want = every_op(side, *(x.clone() for x in tensors))
    mine, ready = [torch.zeros_like(x) for x in tensors], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(ready):
        torch.cuda._sleep(200_000_000)
        for x, source in zip(mine, tensors, strict=True):
            x.copy_(source)
        got = every_op(side, *mine)
    ready.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_runs_give_the_same_bits(side, tensors):
    first, *others = [every_op(side, *(x.clone() for x in tensors)) for _ in range(5)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
