"""A loop that is left in the middle of a logical batch, and batches that are added up: no sample counts twice."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import BatchMemoryManager, PrivacyEngine, wrap_data_loader
from dpfast.data.sampling import PoissonBatches

C, N, B, MOST = 1e-3, 24, 12, 5


def data():
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(N, 5, generator=g), torch.randint(0, 3, (N,), generator=g))


def private(loader=None, **kw):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    return PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data(), batch_size=B) if loader is None else loader,
        **dict(noise_multiplier=0.0, max_grad_norm=C, loss_reduction="sum", poisson_sampling=False) | kw,
    )


def train(batch, model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1], reduction="sum").backward()
    optimizer.step()


def summed(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_itself(x, y):
    """What a step on these samples alone releases: every sample's gradient is far over C."""
    torch.manual_seed(0)
    G = (nn.Linear(5, 3)(x).softmax(1) - F.one_hot(y, 3)).detach()
    G = G * C / (G.norm(dim=1) * (1 + x.square().sum(1)).sqrt()).unsqueeze(1)
    return torch.cat([(G.T @ x).flatten(), G.sum(0)])


def first_release(batches, model, optimizer):
    """Trains until a step is released, and says whether it is that of the samples that were given."""
    given = []
    for batch in batches:
        given.append(batch)
        train(batch, model, optimizer)
        if not optimizer._is_last_step_skipped:
            break
    x, y = (torch.cat(parts) for parts in zip(*given, strict=True))
    torch.testing.assert_close(summed(model), by_itself(x, y), rtol=1e-4, atol=1e-7)
    return len(given)


class LeftError(Exception):
    pass


def broken_off(physical, *parts, trained):
    for k, batch in enumerate(physical):
        if not trained:
            break
        train(batch, *parts)
        if k + 1 == trained:
            break


def broken_off_at_the_next(physical, *parts, trained):
    for k, batch in enumerate(physical):
        if k == trained:
            break
        train(batch, *parts)


def raised(physical, *parts, trained):
    with pytest.raises(LeftError):
        for k, batch in enumerate(physical):
            if k == trained:
                parts[0](batch[0])
                raise LeftError
            train(batch, *parts)


def returned_from_a_generator(physical, *parts, trained):
    def stream():
        for k, batch in enumerate(physical):
            if k == trained:
                return
            yield batch

    for batch in stream():
        train(batch, *parts)


def sliced(physical, *parts, trained):
    for batch in itertools.islice(physical, trained):
        train(batch, *parts)


def asked_by_hand(physical, *parts, trained):
    batches = iter(physical)
    for _ in range(trained):
        train(next(batches), *parts)
    HELD.append(batches)


def the_first_alone(physical, *parts, trained):
    batch = next(iter(physical))
    if trained:
        train(batch, *parts)


HELD = []  # iterators that nobody deletes
WAYS = [
    broken_off,
    broken_off_at_the_next,
    raised,
    returned_from_a_generator,
    sliced,
    asked_by_hand,
    the_first_alone,
]


THEN = ["again", "plain", "plain outside", "another manager", "another loader"]
CASES = [(False, 2, way, then) for way in WAYS for then in THEN]
# The other kinds of batches and the loops that have not trained yet: one side of the table each.
for kind in ((True, 1), (False, 0)):
    CASES += [(*kind, way, "again") for way in WAYS]
    CASES += [(*kind, broken_off, then) for then in THEN[1:]]


@pytest.mark.parametrize(("poisson", "trained", "way", "then"), CASES, ids=lambda k: getattr(k, "__name__", str(k)))
def test_a_loop_that_is_left(poisson, trained, way, then):
    """What comes next releases its own samples and no others."""
    HELD.clear()
    model, optimizer, loader = private(poisson_sampling=poisson)
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer)
    with manager as physical:
        way(physical, model, optimizer, trained=trained)
        if then == "again":
            assert first_release(physical, model, optimizer) > 1
        elif then == "plain":
            assert first_release(loader, model, optimizer) == 1
        elif then == "another manager":
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as other:
                assert first_release(other, model, optimizer) > 1
        elif then == "another loader":
            _, optimizer, other = private_again(model, optimizer, poisson)
            assert first_release(other, model, optimizer) == 1
    if then == "plain outside":
        assert first_release(loader, model, optimizer) == 1


def private_again(model, optimizer, poisson):
    return PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(data(), batch_size=8), noise_multiplier=0.0,
        max_grad_norm=C, loss_reduction="sum", poisson_sampling=poisson,
    )  # fmt: skip


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_load_ahead(persistent):
    """The optimizer hears of a physical batch when it is handed out, not when a worker begins with it."""
    loader = DataLoader(data(), batch_size=B, num_workers=1, persistent_workers=persistent)
    model, optimizer, loader = private(loader, poisson_sampling=True)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        for way, trained in ((broken_off, 1), (raised, 2)):
            way(physical, model, optimizer, trained=trained)
            assert first_release(physical, model, optimizer) > 1
    assert first_release(loader, model, optimizer) == 1


@pytest.mark.parametrize("split", [False, True])
def test_a_loader_that_is_let_go_ends_its_workers_at_once(split):
    """In a cycle with its iterator, its persistent workers wait for the collector, and it 5 s for each of them."""
    model, optimizer, loader = private(DataLoader(data(), batch_size=B, num_workers=1, persistent_workers=True))
    if split:
        loader = BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer).__enter__()
    for batch in loader:
        train(batch, model, optimizer)
    (worker,) = loader._iterator._workers
    gc.disable()
    try:
        del loader
        assert not worker.is_alive()
    finally:
        gc.enable()


def test_a_left_loop_of_poisson_batches_on_the_same_samples():
    """The batch that was begun is drawn again: its samples count once."""
    batches = PoissonBatches(N, 2, seed=1)
    model, optimizer, loader = private(DataLoader(data(), batch_sampler=batches))
    for leave_after in (1, None):
        batches.step = 0
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as physical:
            if leave_after:
                broken_off(physical, model, optimizer, trained=leave_after)
            else:
                first_release(physical, model, optimizer)
    x, y = data()[batches.logical_batch(0)]
    torch.testing.assert_close(summed(model), by_itself(x, y), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("poisson", [True, False])
def test_a_whole_run_in_parts_is_that_of_whole_batches(poisson):
    """No false alarm: enumerate, zip, iter and next to the end, and epochs in a row."""
    batches = PoissonBatches(N, 3, seed=1) if poisson else None
    loader = DataLoader(data(), batch_sampler=batches) if poisson else DataLoader(data(), batch_size=B)
    model, optimizer, loader = private(loader)
    rows = [data()[batches.logical_batch(k)] for k in range(12)] if poisson else 6 * [data()[:B], data()[B:]]
    expected, released = [by_itself(*batch) for batch in rows], []

    def run(given):
        for batch in given:
            train(batch, model, optimizer)
            if not optimizer._is_last_step_skipped:
                released.append(summed(model))

    def by_hand(physical):
        batches = iter(physical)
        while (batch := next(batches, None)) is not None:
            yield batch

    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        run(physical)
        run(batch for _, batch in enumerate(physical))
        run(by_hand(physical))
        run(batch for batch, _ in zip(physical, itertools.count(), strict=False))
    assert len(released) == (12 if poisson else 8)
    for got, want in zip(released, expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_physical_batches_by_their_indices():
    """Without the loader: the sampler's parts are told of as they are drawn."""
    model, optimizer, loader = private()
    steps = []
    optimizer.attach_step_hook(lambda o: steps.append(1))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        for k, indices in enumerate(physical.batch_sampler):
            train(data()[indices], model, optimizer)
            assert len(steps) == (k + 1) // 3
            if k == 3:
                break
        assert first_release((data()[indices] for indices in physical.batch_sampler), model, optimizer) == 3


def test_two_loops_at_once_are_refused():
    """It could not be told which physical batch a backward is of."""
    model, optimizer, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        with pytest.raises(ValueError, match="two loops over BatchMemoryManager's loader at once"):
            for _ in zip(physical, physical, strict=False):
                pass
        with pytest.raises(ValueError, match="which waits for its step, or of a whole batch"):
            for _ in physical:
                train(next(iter(loader)), model, optimizer)
        batches = iter(physical)
        train(next(batches), model, optimizer)
        assert first_release(physical, model, optimizer) > 1
        with pytest.raises(ValueError, match="cannot go on"):
            next(batches)


@pytest.mark.parametrize("when", ["before the step", "after it"])
def test_an_evaluation_in_the_middle_of_a_logical_batch(when):
    """No false alarm: it looks at the private loader's batches, and trains on none."""
    model, optimizer, loader = private()

    def evaluate():
        with torch.no_grad():
            for x, _ in loader:
                model(x)

    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        for k, (x, y) in enumerate(physical):
            if when == "before the step":
                evaluate()
            train((x, y), model, optimizer)
            if when == "after it":
                evaluate()
            if k == 2:
                break
    torch.testing.assert_close(summed(model), by_itself(*data()[:B]), rtol=1e-4, atol=1e-7)


def test_training_on_whole_batches_in_the_middle_of_a_logical_one():
    """It is dropped, and the loop that was in it cannot go on."""
    model, optimizer, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        batches = iter(physical)
        train(next(batches), model, optimizer)
        assert first_release(loader, model, optimizer) == 1
        with pytest.raises(ValueError, match="cannot go on"):
            next(batches)


def test_physical_batches_read_ahead_are_refused():
    """Which one a backward is of is not known; a loop that looks and trains nothing may."""
    model, optimizer, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        for x, _ in physical:
            with torch.no_grad():
                model(x)
        assert first_release(physical, model, optimizer) > 1
        held = list(physical)
        with pytest.raises(ValueError, match="cannot be told which physical batch"):
            train(held[0], model, optimizer)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=B, optimizer=optimizer) as physical:
        for batch in list(physical):  # whole batches cannot be confused
            assert first_release([batch], model, optimizer) == 1


@pytest.mark.parametrize("clear", ["optimizer", "model", "nothing"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_physical_batch_that_is_skipped_takes_its_logical_batch_along(bad, clear):
    """The others' samples depend on which ones it has: a part of the batch is no release."""
    model, optimizer, loader = private()
    steps = []
    optimizer.attach_step_hook(lambda o: steps.append(1))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        batches = iter(physical)
        with pytest.warns(RuntimeWarning, match="a physical batch was dropped"):
            for k in range(3):
                x, y = next(batches)
                loss = F.cross_entropy(model(x), y, reduction="sum")
                if k == bad:
                    if clear != "nothing":
                        loss.backward()
                        (optimizer if clear == "optimizer" else model).zero_grad()
                    continue
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert first_release(batches, model, optimizer) == 3
    assert steps == [1]


@pytest.mark.parametrize(
    ("again", "why"),
    [*((k, why) for k in range(3) for why in ("cleared", "a setting")), (2, "the accountant")],  # asked at the last one
)
def test_a_physical_batch_that_is_dropped_and_run_again_is_no_release(again, why):
    """Alone, it is a part of a batch; and the sums of the parts before it are gone."""
    model, optimizer, loader = private()
    steps = []
    optimizer.attach_step_hook(lambda o: steps.append(1))
    counts = optimizer.accounting

    def refused(batch):
        if why == "cleared":
            F.cross_entropy(model(batch[0]), batch[1], reduction="sum").backward()
            return
        if why == "a setting":
            optimizer.noise_multiplier = -1
        else:
            optimizer.accounting = lambda _: 1 / 0
        with pytest.raises((ValueError, ZeroDivisionError)):
            train(batch, model, optimizer)
        optimizer.noise_multiplier, optimizer.accounting = 0.0, counts

    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical:
        batches = iter(physical)
        for k in range(3):
            batch = next(batches)
            if k == again:
                with pytest.warns(RuntimeWarning, match="a physical batch was dropped"):
                    refused(batch)
                    optimizer.zero_grad()
            train(batch, model, optimizer)
        assert steps == []
        assert first_release(batches, model, optimizer) == 3
    assert steps == [1]


def test_a_physical_batch_without_its_own_step_is_refused():
    model, optimizer, loader = private()
    with (
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=MOST, optimizer=optimizer) as physical,
        pytest.raises(ValueError, match="call step\\(\\) for each of them"),
    ):
        for x, y in physical:
            F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_size_that_is_none(size):
    _, optimizer, loader = private()
    with pytest.raises(ValueError, match=f"max_physical_batch_size={size!r}"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer).__enter__()
    with pytest.raises(ValueError, match=f"max_batch_size={size!r}"):
        wrap_data_loader(data_loader=loader, max_batch_size=size, optimizer=optimizer)


def test_poisson_batches_are_not_added_up_whatever_make_private_is_told():
    """A sample may be in both: it would move the sum by 2C."""
    model, _, _ = private(DataLoader(data(), batch_sampler=PoissonBatches(N, 3, seed=1)))
    x, y = data()[:1]
    F.cross_entropy(model(x), y, reduction="sum").backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        F.cross_entropy(model(x), y, reduction="sum").backward()
