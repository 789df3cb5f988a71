"""Clearing drops the batch, and a step without a backward is refused."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dpfast import BatchMemoryManager
from tests.helpers import engine_of, sse, sums_of
from tests.privacy.once import B, batch, check, private

# ---------------------------------------------------------------- clearing drops the batch


CLEARS = {
    "module.zero_grad": lambda wrapped, optimizer: wrapped.zero_grad(),
    "del_grad_sample": lambda wrapped, optimizer: wrapped.del_grad_sample(),
    "set_grad_sample_to_none": lambda wrapped, optimizer: wrapped.set_grad_sample_to_none(),
    "optimizer.zero_grad": lambda wrapped, optimizer: optimizer.zero_grad(),
}


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("how", CLEARS)
def test_a_bad_batch_is_dropped(how, poisson, wrap_model):
    if how == "module.zero_grad" and not wrap_model:
        how = "set_grad_sample_to_none"  # the hooks object has no zero_grad
    model, twin, wrapped, optimizer, _ = private(poisson_sampling=poisson, wrap_model=wrap_model)
    bad, good = batch(), batch()
    sse(model(bad[0]), bad[1]).backward()
    CLEARS[how](wrapped, optimizer)
    assert not any(s.any() for s in sums_of(model).values())
    sse(model(good[0]), good[1]).backward()
    check(model, twin, good)
    optimizer.step()
    assert optimizer.accumulated_iterations == 1


def test_clearing_the_model_after_a_step_drops_nothing():
    """The idiom ``model.zero_grad()`` after ``step()``: physical batches that were stepped with stay."""
    model, twin, wrapped, optimizer, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as physical:
        for k, (x, y) in enumerate(itertools.islice(physical, 2)):
            sse(wrapped(x), y).backward()
            if k:
                check(model, twin, next(iter(DataLoader(loader.dataset, batch_size=B))))
            optimizer.step()
            wrapped.zero_grad()


# ---------------------------------------------------------------- a step without a backward


def test_a_step_without_a_backward():
    """Refused before anything is used up; after a backward, the step is whole."""
    engine = engine_of()
    model, _, wrapped, optimizer, _ = private(engine=engine, noise_multiplier=1.0)
    x, y = batch()

    def refused():
        values = [p.detach().clone() for p in model.parameters()]
        step, history = optimizer.noise.step, list(engine.accountant.history)
        with pytest.raises(ValueError, match="no backward pass of the private model"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), values, strict=True))
        assert (optimizer.noise.step, engine.accountant.history) == (step, history)

    refused()
    sse(wrapped(x), y)
    refused()
    with torch.no_grad():
        wrapped(x)
    refused()
    sse(wrapped(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    refused()


def test_a_step_after_the_hooks_were_removed():
    model, _, wrapped, optimizer, _ = private(wrap_model=False)
    x, y = batch()
    wrapped.cleanup()
    sse(model(x), y).backward()
    with pytest.raises(ValueError, match="with its hooks in place"):
        optimizer.step()


@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("backward", [True, False])
def test_empty_poisson_batches_are_steps(backward, physical):
    """With a backward through the model or without; accounted each."""
    engine = engine_of()
    loader = DataLoader(TensorDataset(*batch(8)), batch_size=1)
    _, _, wrapped, optimizer, loader = private(
        loader=loader, engine=engine, noise_multiplier=1.0, poisson_sampling=True, lr=0.01
    )
    empty = 0

    def run(batches):
        nonlocal empty
        for x, y in batches:
            optimizer.zero_grad()
            empty += not len(x)
            if len(x) or backward:
                sse(wrapped(x), y).backward()
            optimizer.step()

    for _ in range(3):
        if physical is None:
            run(loader)
        else:
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as batches:
                run(batches)
    assert empty and sum(steps for _, _, steps in engine.accountant.history) == 24


@pytest.mark.parametrize("skip", [1, 2])
def test_a_physical_batch_without_a_backward(skip):
    """Refused in the middle of a logical batch too."""
    _, _, wrapped, optimizer, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as physical:
        for k, (x, y) in enumerate(physical):
            loss = sse(wrapped(x), y)
            if k == skip:
                with pytest.raises(ValueError, match="no backward pass"):
                    optimizer.step()
                loss.backward()
                optimizer.step()
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
