"""A whole step as a CUDA graph: the noise of every replay is its own, and is the eager stream's to the bit."""

import copy
import warnings

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

import dpfast
from dpfast import native
from tests.helpers import BF16, engine_of, loader_of, make_private, mse
from tests.test_graphed import batch, private, small

pytestmark = pytest.mark.gpu

STEPS = 20  # of these 2, 4, 8 and 16 are looked at, and run as they are written
UPDATES = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.2, nesterov=False),
    "adam": lambda m: Adam(m.parameters(), lr=0.1),
    "amsgrad": lambda m: AdamW(m.parameters(), lr=0.1, amsgrad=True),
}


@pytest.fixture(autouse=True)
def on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not native.available("cuda"):
        pytest.skip(f"no CUDA library: {native.why_not('cuda')}")


def on_gpu(k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(part.cuda().to(dtype) for part in batch(k))


def nothing(model, x: Tensor, y: Tensor) -> Tensor:
    """A loss whose gradients are zeros: all that a step releases is noise, with no product that is rounded."""
    return 0 * (model(x) - y).square().sum()


def error(model, x: Tensor, y: Tensor) -> Tensor:
    return mse(model(x), y)


def eager(plain, twin, loss, *given: Tensor) -> None:
    plain.zero_grad()
    loss(twin, *given).backward()
    plain.step()


def pair(make, loss, dtype: torch.dtype = torch.float32, **options):
    """A private model with recorded steps, and its twin whose steps are not."""
    model = small().cuda().to(dtype)
    twin = copy.deepcopy(model)
    made = [private(each, 5, optimizer=make(each), **options) for each in (model, twin)]
    (model, optimizer), (twin, plain) = made
    return model, optimizer, dpfast.graphed(model, loss, optimizer), twin, plain


@pytest.mark.parametrize("name", UPDATES)
def test_noise_and_update_are_the_eager_ones_to_the_bit(name):
    model, optimizer, step, twin, plain = pair(UPDATES[name], nothing)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, plain)]
    seen: list[Tensor] = []
    for k in range(STEPS):
        step(*on_gpu(k))
        eager(plain, twin, nothing, *on_gpu(k))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad) and torch.equal(p, q)
        seen.append(torch.cat([p.grad.detach().flatten().cpu() for p in model.parameters()]))
        for scheduler in schedulers:
            scheduler.step()
    assert step.updates >= STEPS // 2 and step.recorded == 1
    assert len({tuple(x.tolist()) for x in seen}) == STEPS  # never the same noise
    assert optimizer.noise.step == plain.noise.step == STEPS
    assert optimizer.noise.key == plain.noise.key


@pytest.mark.parametrize("secure", [False, True])
def test_keys_and_steps_are_used_once(secure, monkeypatch):
    """What the graph is given: each key and step once. When it has run, it has none of them left."""
    from dpfast.optim import recorded_update

    given, made = [], recorded_update.ops.words_of

    def look(noise, rounding_key):
        given.append((noise.key, noise.step))
        return made(noise, rounding_key)

    monkeypatch.setattr(recorded_update.ops, "words_of", look)
    options = {"max_grad_norm": 0.05, "noise_multiplier": 1.0, "lr": 0.1, "data_loader": loader_of(5, shuffle=True)}
    model, optimizer, _ = make_private(small().cuda(), engine=engine_of(secure_mode=secure), **options)
    step = dpfast.graphed(model, error, optimizer)
    for k in range(STEPS):
        step(*on_gpu(k))
    assert len(given) == len(set(given)) == step.updates >= STEPS // 2
    (known,) = step.kinds.values()
    (graph,) = known.graphs.values()
    inside = dict(zip(graph.replay.__code__.co_freevars, graph.replay.__closure__, strict=True))
    held, raw = inside["held"].cell_contents, inside["graph"].cell_contents
    told = [x for x in held if x.dtype == torch.int64 and x.shape == (dpfast.ops.WORDS,)]
    assert len(told) == 1 and not told[0].any()
    before = [p.detach().clone() for p in model.parameters()]
    raw.replay()  # by hand, without a key: nothing is written
    torch.cuda.synchronize()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ["sgd", "amsgrad"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite(name, bad):
    """The graph writes nothing, and the step is made once, with the noise that was handed out for it."""
    model, optimizer, step, twin, plain = pair(UPDATES[name], error)
    for k in range(9):
        step(*on_gpu(k))
        eager(plain, twin, error, *on_gpu(k))
    x, y = on_gpu(100)
    x[2, 0, 0] = bad
    updates = step.updates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(x, y)
        eager(plain, twin, error, x, y)
        assert model.nonfinite_samples == twin.nonfinite_samples == 1
    assert step.updates == updates and optimizer.noise.step == plain.noise.step == 10
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    step(*on_gpu(101))
    assert step.updates == updates + 1


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
def test_parameters_of_16_bits(low_precision):
    options = {"low_precision": low_precision, "loss_reduction": "sum"}
    _, _, step, twin, plain = made = pair(UPDATES["adam"], nothing, BF16, **options)
    for k in range(STEPS):
        step(*on_gpu(k, BF16))
        eager(plain, twin, nothing, *on_gpu(k, BF16))
        assert all(map(torch.equal, made[0].parameters(), twin.parameters()))
    assert step.updates >= STEPS // 2


def test_a_step_that_was_not_prepared_is_not_captured():
    model, optimizer = private(small().cuda(), 5)
    for k in range(3):
        eager(optimizer, model, error, *on_gpu(k))
    optimizer.zero_grad()
    mse(model(on_gpu(4)[0]), on_gpu(4)[1]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="recorded by a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    assert all(map(torch.equal, before, model.parameters())) and optimizer.noise.step == 3
    optimizer.step()
    assert optimizer.noise.step == 4
