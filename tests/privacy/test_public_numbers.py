"""Sample rate, steps and divisor: sampler, accountant and update go by the same public numbers."""

import pytest
import torch
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dpfast.accounting.epsilon import noise_multiplier_for
from dpfast.data.sampling import PoissonBatches
from tests.helpers import engine_of, make_private

D = 3


def loader_of(n: int, batch: int, **kw) -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(n, D), torch.zeros(n)), batch_size=batch, **kw)


def parts(loader, poisson=True, **kw):
    engine = engine_of()
    model = nn.Linear(D, 1)
    options = dict(noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=poisson, lr=1.0) | kw
    return engine, *make_private(model, engine=engine, data_loader=loader, **options)


def rate_of(loader) -> float:
    return loader.batch_sampler.sample_rate


def accounted(engine, optimizer) -> float:
    """The rate at which a step is accounted."""
    optimizer.expect_no_samples()
    optimizer.step()
    ((_, rate, _),) = engine.accountant.history
    return rate


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("n", [1000, 999, 991, 903])
def test_data_sets_of_as_many_batches_cannot_be_told_apart(n, poisson):
    """The divisor is the loader's batch size, whatever N is: a step without samples is the same, bit for bit."""
    steps = []
    for size in (1000, n):
        torch.manual_seed(1)
        engine, model, optimizer, loader = parts(
            loader_of(size, 100), poisson, noise_generator=torch.Generator().manual_seed(2)
        )
        assert accounted(engine, optimizer) == 0.1 and len(loader) == 10
        assert optimizer.expected_batch_size == 100
        steps.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("n", [7, 93, 1001, 49 * 3, 6 * 3])
def test_an_epoch_has_the_loaders_number_of_batches(n):
    """Opacus takes int(1 / (1 / n)), which floats may make one less: 93 of these batches are 92."""
    plain = loader_of(n, 3)
    engine, _, optimizer, loader = parts(plain)
    assert len(loader) == len(list(loader)) == len(plain)
    assert rate_of(loader) == accounted(engine, optimizer) == 1 / len(plain)


@pytest.mark.parametrize("n", [50, 51, 400])
def test_numbers_that_are_given(n):
    """No number that anything goes by depends on N."""
    engine, _, optimizer, loader = parts(loader_of(n, 8), sample_rate=0.07, expected_batch_size=3.5)
    assert rate_of(loader) == accounted(engine, optimizer) == 0.07
    assert len(loader) == len(list(loader)) == 14  # round(1 / 0.07)
    assert optimizer.expected_batch_size == 3.5


def test_the_rate_is_sampled_and_divided_by():
    """Within 6 standard errors; the update is the sum over the expected batch size."""
    _, model, optimizer, loader = parts(
        loader_of(200, 10), sample_rate=0.25, expected_batch_size=40, noise_multiplier=0.0, loss_reduction="mean"
    )
    sizes = [len(x) for _ in range(10) for x, _ in loader]
    assert len(sizes) == 40
    assert abs(sum(sizes) - 40 * 50) <= 6 * (40 * 50 * 0.75) ** 0.5
    x = torch.ones(5, D)
    model(x).sum(1).mean().backward()
    sums = [p.summed_grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, total in zip(model.parameters(), sums, strict=True):
        torch.testing.assert_close(p.grad, total / 40)


def test_fixed_batches_at_a_rate_that_is_given():
    engine, _, optimizer, loader = parts(loader_of(50, 8), False, sample_rate=0.2)
    assert accounted(engine, optimizer) == 0.2 and len(loader) == 7 and optimizer.expected_batch_size == 8


@pytest.mark.parametrize("poisson", [True, False])
def test_a_private_loader_once_more(poisson):
    """A second make_private with the loader of the first goes by the same numbers, and a third."""
    _, model, optimizer, loader = parts(loader_of(50, 8), sample_rate=0.07, expected_batch_size=3)
    engine = engine_of()
    _, optimizer, again = make_private(
        model, engine=engine, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, poisson_sampling=poisson
    )
    assert again is loader and accounted(engine, optimizer) == 0.07 and optimizer.expected_batch_size == 3
    with pytest.raises(ValueError, match=r"data_loader is Poisson-sampled already, at 0\.07"):
        parts(loader, sample_rate=0.1)


@pytest.mark.parametrize("poisson", [True, False])
def test_poisson_batches_of_ones_own(poisson):
    batches = PoissonBatches(50, 6, seed=1)
    engine, _, optimizer, _ = parts(DataLoader(loader_of(50, 8).dataset, batch_sampler=batches), poisson)
    assert accounted(engine, optimizer) == 1 / 6 and optimizer.expected_batch_size == 8
    batches = PoissonBatches(50, 6, seed=1, sample_rate=0.3, indices=range(50, 100))
    engine, _, optimizer, got = parts(
        DataLoader(loader_of(100, 8).dataset, batch_sampler=batches), poisson, expected_batch_size=15
    )
    assert accounted(engine, optimizer) == 0.3 and optimizer.expected_batch_size == 15
    assert min(i for k in range(20) for i in batches.logical_batch(k)) >= 50 and len(got) == 6


def test_opacus_own_loader():
    """At its own rate, whatever its length."""
    plain = DPDataLoader(loader_of(93, 1).dataset, sample_rate=1 / 93)
    engine, _, optimizer, got = parts(plain)
    assert len(plain) == 92 and rate_of(got) == accounted(engine, optimizer) == 1 / 93


def test_a_distributed_samplers_batch_size_is_each_ranks():
    dataset = loader_of(48, 1).dataset
    sampler = DistributedSampler(dataset, num_replicas=3, rank=0)
    _, _, optimizer, _ = parts(DataLoader(dataset, batch_size=4, sampler=sampler), False)
    assert optimizer.expected_batch_size == 12


@pytest.mark.parametrize("numbers", [{}, {"sample_rate": 0.02, "expected_batch_size": 2}])
def test_the_epsilon_that_is_asked_for_is_that_of_the_rate_that_is_sampled(numbers):
    """93 batches, which Opacus makes 92, and a rate that is given."""
    engine, model, loader = engine_of(), nn.Linear(D, 1), loader_of(93, 1)
    _, optimizer, got = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        **numbers,
    )
    rate, steps = (0.02, 50) if numbers else (1 / 93, 93)
    assert len(got) == steps and rate_of(got) == rate
    sigma = noise_multiplier_for(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=rate, steps=2 * steps, accountant="rdp"
    )
    assert optimizer.noise_multiplier == sigma
    for _ in range(2 * len(got)):
        optimizer.zero_grad()
        optimizer.expect_no_samples()
        optimizer.step()
    assert engine.accountant.history == [(sigma, rate, 2 * steps)]
    assert 2.99 <= engine.get_epsilon(1e-5) <= 3.0


@pytest.mark.parametrize("name", ["sample_rate", "expected_batch_size"])
@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), "0.1", True])
def test_numbers_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        parts(loader_of(8, 2), **{name: value})


def test_a_rate_over_one():
    with pytest.raises(ValueError, match=r"sample_rate=1\.5"):
        parts(loader_of(8, 2), sample_rate=1.5)


def test_other_modes_do_not_have_them():
    with pytest.raises(ValueError, match="of the fused mode, not of 'hooks'"):
        parts(loader_of(8, 2), sample_rate=0.5, grad_sample_mode="hooks")
