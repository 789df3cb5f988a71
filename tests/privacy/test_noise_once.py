"""One key and step never meet two batches: not in a copy, a fork, a worker, another engine, a recorded step."""

import copy
import multiprocessing
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from dpfast.noise.stream import NoiseStream
from dpfast.optim.copies import accountant_of
from tests.helpers import engine_of
from tests.ops.noisy import same
from tests.privacy.test_noise_stream import B, D, each_mode, net, noise_of, private

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda s: pickle.loads(pickle.dumps(s))}


def drawn(stream: NoiseStream, steps: int = 2) -> list[tuple]:
    return [(noise.key, noise.step) for noise in (stream.next(1.0, 1.0, 9, 1.0) for _ in range(steps))]


@pytest.mark.parametrize("begun", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("source", ["system", "generator", "secure"])
@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_stream_has_a_key_of_its_own(copied, source, begun):
    generator = torch.Generator().manual_seed(5) if source == "generator" else None
    stream = NoiseStream(generator, secure=source == "secure")
    seen = drawn(stream) if begun else []
    stream.rounding_key()
    others = [COPIES[copied](stream) for _ in range(2)]
    others.append(COPIES[copied](others[0]))
    for one in (stream, *others):
        seen += drawn(one)
    keys = [{key for key, _ in drawn(one)} for one in (stream, *others)]
    assert len({*seen}) == len(seen) and not set.intersection(*keys)
    assert len({one.rounding_key() for one in (stream, *others)}) == 4
    assert all(one.secure == stream.secure for one in others)


def in_child(stream, pipe) -> None:
    pipe.send(drawn(stream))


@pytest.mark.parametrize("begun", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("source", ["system", "generator", "secure"])
def test_a_forked_process_has_a_key_of_its_own(source, begun):
    """And so has its own child; the parent's noise is what it would have been."""
    generator = torch.Generator().manual_seed(5) if source == "generator" else None
    stream, twin = (NoiseStream(copy.deepcopy(generator), secure=source == "secure") for _ in range(2))
    seen = drawn(stream) if begun else []
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        mine, theirs = context.Pipe()
        child = context.Process(target=in_child, args=(stream, theirs))
        child.start()
        assert mine.poll(30)
        seen += mine.recv()
        child.join()
    seen += drawn(stream)
    assert len({*seen}) == len(seen)
    if source == "generator":
        assert drawn(twin, 4 if begun else 2)[-2:] == seen[-2:]


def grandchild(optimizer) -> bytes:
    """Of a fork of a fork, made by ``os.fork``: the noise of an empty batch."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        if not os.fork():
            optimizer.expect_no_samples()
            optimizer.step()
            os.write(write, optimizer.param_groups[0]["params"][0].grad.numpy().tobytes())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with open(read, "rb") as file:
        return file.read()


def test_a_step_in_a_forked_process():
    """The optimizer's own: same noise on the batches of two processes would lay their difference bare."""
    model, _, optimizer, _ = parts = private()
    noise_of(parts)
    found = [grandchild(optimizer) for _ in range(2)]
    optimizer.expect_no_samples()
    optimizer.step()
    found.append(next(model.parameters()).grad.numpy().tobytes())
    assert len({*found}) == 3 and all(found)


def test_forks_of_one_process_number():
    """A number that the system gives out again is told apart."""
    stream = NoiseStream()
    (first, _), (second, _) = drawn(stream)
    assert first == second
    stream._process = (os.getpid(), -1)
    ((third, step),) = drawn(stream, 1)
    assert third != first and step == 0


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copied_optimizer_has_a_key_of_its_own(copied):
    """With its model: it clips, accounts and adds noise as the original does; half a logical batch stays behind."""
    model, wrapped, optimizer, _ = private()
    noise_of((model, wrapped, optimizer, None))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the original's step
    wrapped(torch.randn(B, D)).sum().backward()
    held = [p.summed_grad.clone() for p in model.parameters()]
    twin, other = COPIES[copied]((wrapped, optimizer))
    assert all(getattr(p, "summed_grad", None) is None for p in twin.parameters())
    assert all(torch.equal(p.summed_grad, was) for p, was in zip(model.parameters(), held, strict=True))
    history = accountant_of(other.accounting).history
    assert (history is accountant_of(optimizer.accounting).history) == (copied == "deepcopy")
    before, steps = [p.detach().clone() for p in model.parameters()], sum(steps for *_, steps in history)
    with pytest.raises(ValueError, match="no backward pass"):
        other.step()
    twin(torch.randn(B, D)).sum().backward()
    other.step()
    assert sum(steps for *_, steps in accountant_of(other.accounting).history) == steps + 1
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert other.noise.key != optimizer.noise.key and other.noise.generator is None
    assert other.original_optimizer.param_groups[0]["params"][0] is next(twin.parameters())


def test_a_copied_optimizer_without_its_model():
    """No forward of the original reaches it, so that it has nothing to release."""
    _, wrapped, optimizer, _ = private()
    alone = copy.deepcopy(optimizer)
    wrapped(torch.randn(B, D)).sum().backward()
    with pytest.raises(ValueError, match="no backward pass"):
        alone.step()
    optimizer.step()
    assert not any(p is q for p, q in zip(alone.params, optimizer.params, strict=True))
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(optimizer)


def test_two_engines_in_one_process():
    """From one model and one optimizer, one after the other and side by side, and from one generator."""
    generator, seen = torch.Generator().manual_seed(1), []
    for kw in ({}, {}, dict(noise_generator=generator), dict(noise_generator=generator)):
        torch.manual_seed(0)
        parts = private(net(), **kw)
        seen.append(noise_of(parts))
        model, wrapped, optimizer, loader = parts
        again = private(wrapped, optimizer=optimizer.original_optimizer, data_loader=loader, **kw)
        seen.append(noise_of((model, *again[1:])))
    for k, one in enumerate(seen):
        assert not any(same(one, other) for other in seen[:k])


def test_a_step_that_is_set_back_meets_no_batch_again():
    """Nothing but the stream counts its steps."""
    stream = NoiseStream()
    seen = drawn(stream, 3)
    stream.step = 1
    seen += drawn(stream, 3)
    assert len({*seen}) == len(seen)


@each_mode
def test_a_step_is_not_recorded(monkeypatch, secure):
    """A CUDA graph, a trace: it would replay the noise of one step. Refused before anything is used up."""
    model, wrapped, optimizer, _ = private(secure=secure)

    def step(x):
        optimizer.step()
        return x + model[0].weight.sum()

    F.cross_entropy(wrapped(torch.randn(B, D)), torch.randint(3, (B,))).backward()
    before = [p.detach().clone() for p in model.parameters()], [p.summed_grad.clone() for p in model.parameters()]
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"CUDA graph.*outside"):
                optimizer.step()
        with pytest.raises(RuntimeError, match="CUDA graph"):
            optimizer.noise.next(1.0, 1.0, 1, 1.0)
    with pytest.raises(RuntimeError, match="make_fx"):
        make_fx(step)(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"jit\.trace"):
        torch.jit.trace(step, torch.ones(1), check_trace=False)
    assert same([p.detach() for p in model.parameters()], before[0])
    assert same([p.summed_grad for p in model.parameters()], before[1])
    assert optimizer.noise.step == 0 and optimizer.noise.key is None
    optimizer.step()
    assert optimizer.noise.step == 1


@pytest.mark.parametrize("compiled", ["step", "loop body"])
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_compiled_step_is_the_step_as_it_is(kind, noise_multiplier, compiled):
    """Its noise, update and accounting, where ``optimizer.step`` is compiled, or a function that calls it."""
    found = []
    for what in (None, compiled):
        torch.manual_seed(1)
        engine = engine_of()
        model = net()
        _, wrapped, optimizer, _ = private(
            model,
            engine=engine,
            optimizer=kind(model.parameters(), lr=0.1),
            noise_multiplier=noise_multiplier,
            noise_generator=torch.Generator().manual_seed(5),
        )
        step = torch.compile(optimizer.step, backend="eager") if what == "step" else optimizer.step
        x = torch.ones(B, D)

        def body(optimizer=optimizer, wrapped=wrapped, step=step, x=x):
            optimizer.zero_grad()
            wrapped(x).sum().backward()
            step()

        if what == "loop body":
            body = torch.compile(body, backend="eager")
        for _ in range(3):
            body()
        found.append([p.detach().clone() for p in model.parameters()])
        assert sum(steps for *_, steps in engine.accountant.history) == 3
    assert same(*found)
