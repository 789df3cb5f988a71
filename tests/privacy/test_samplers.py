"""Which samples batches are made of: what a loader's sampler means under Poisson sampling and without, or a refusal."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dpfast import BatchMemoryManager
from tests import snapshot
from tests.helpers import engine_of, make_private, mse

N, D = 20, 3
HALF = list(range(1, N, 2))


def data(n: int = N) -> TensorDataset:
    return TensorDataset(torch.arange(n, dtype=torch.float32).unsqueeze(1).expand(n, D).clone(), torch.zeros(n, 2))


class Own(Sampler):
    """A user's own sampler: these indices, in a random order."""

    def __init__(self, indices):
        self.indices = list(indices)

    def __iter__(self):
        return iter([self.indices[k] for k in torch.randperm(len(self.indices)).tolist()])

    def __len__(self):
        return len(self.indices)


class OwnBatches(Own):
    """A user's own batch sampler."""

    batch_size = 4

    def __iter__(self):
        order = list(super().__iter__())
        return iter([order[k : k + 4] for k in range(0, len(order), 4)])

    def __len__(self):
        return -(-len(self.indices) // 4)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())

    def __len__(self):
        return N


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from data()


class Texts(Dataset):
    """Rows with strings, numbers and tensors."""

    def __len__(self):
        return N

    def __getitem__(self, k):
        return {"x": torch.full((D,), float(k)), "text": f"row {k}", "k": k, "more": ("a", torch.zeros(2, 3))}


def seen(loader, epochs: int = 8) -> list[int]:
    """Numbers of the rows that come."""
    return [int(row) for _ in range(epochs) for x, *_ in loader for row in x[:, 0]]


def private(loader, poisson=True, **kw):
    return make_private(nn.Linear(D, 2), data_loader=loader, poisson_sampling=poisson, **kw)


def loader_with(sampler, dataset=None, **kw) -> DataLoader:
    return DataLoader(data() if dataset is None else dataset, batch_size=4, sampler=sampler, **kw)


SUBSETS = {
    "SubsetRandomSampler": lambda: loader_with(SubsetRandomSampler(HALF)),
    "a tensor of indices": lambda: loader_with(SubsetRandomSampler(torch.tensor(HALF))),
    "a list": lambda: loader_with(HALF),
    "a sampler of one's own": lambda: loader_with(Own(HALF)),
    "a BatchSampler": lambda: DataLoader(data(), batch_sampler=BatchSampler(SubsetRandomSampler(HALF), 4, False)),
    "batches of one's own": lambda: DataLoader(data(), batch_sampler=OwnBatches(HALF)),
    "a list of batches": lambda: DataLoader(data(), batch_sampler=[HALF[k : k + 4] for k in range(0, 10, 4)]),
    "drop_last": lambda: loader_with(SubsetRandomSampler(HALF), drop_last=True),
    "Subset": lambda: DataLoader(Subset(data(), HALF), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("kind", SUBSETS)
def test_poisson_batches_are_drawn_from_the_subset(kind):
    """All of it, at one rate, and nothing outside of it; with BatchMemoryManager too."""
    loader = SUBSETS[kind]()
    extra = {"expected_batch_size": 4} if kind == "a list of batches" else {}
    _, optimizer, got = private(loader, **extra)
    rows = seen(got, 20)
    assert set(rows) == set(HALF)
    steps = len(loader)
    assert len(got) == steps and len(list(got)) == steps
    assert optimizer.expected_batch_size == 4
    assert abs(len(rows) - 200) <= 6 * 200**0.5  # 20 epochs of 10 samples
    with BatchMemoryManager(data_loader=got, max_physical_batch_size=2, optimizer=optimizer) as physical:
        assert set(seen(physical, 2)) <= set(HALF)


def test_a_subset_that_a_worker_loads():
    _, _, got = private(loader_with(SubsetRandomSampler(HALF), num_workers=1))
    assert set(seen(got, 3)) <= set(HALF)


WHOLE = {
    "in order": lambda: DataLoader(data(), batch_size=4),
    "shuffled": lambda: DataLoader(data(), batch_size=4, shuffle=True),
    "with replacement": lambda: loader_with(RandomSampler(data(), replacement=True)),
    "a sampler of one's own": lambda: loader_with(Own(range(N))),
    "drop_last": lambda: DataLoader(data(), batch_size=3, drop_last=True),
    "SequentialSampler": lambda: loader_with(SequentialSampler(range(N))),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_poisson_batches_are_drawn_from_all(kind):
    _, _, got = private(WHOLE[kind]())
    assert isinstance(got, DPDataLoader)
    assert set(seen(got, 20)) == set(range(N))


WEIGHTS, SUM = torch.ones(N), {"loss_reduction": "sum"}
REFUSED_WITH_FIXED_BATCHES = {
    "weighted": (lambda: loader_with(WeightedRandomSampler(WEIGHTS, N)), "WeightedRandomSampler draws with"),
    "with replacement": (lambda: loader_with(RandomSampler(data(), replacement=True)), "RandomSampler draws with"),
    "longer": (lambda: loader_with(RandomSampler(data(), num_samples=N + 1)), "draws 21 of 20 samples"),
    "in a BatchSampler": (
        lambda: DataLoader(data(), batch_sampler=BatchSampler(WeightedRandomSampler(WEIGHTS, N), 4, False)),
        "WeightedRandomSampler draws with",
    ),
    "a subset with a sample twice": (lambda: loader_with(SubsetRandomSampler([1, 2, 1])), "more than once"),
    "a list with a sample twice": (lambda: loader_with([1, 2, 1]), "more than once"),
    "a list from the end": (lambda: loader_with([N - 1, -1]), "gives -1, and its data set has samples 0 to 19"),
    "a subset beyond the end": (lambda: loader_with(SubsetRandomSampler([0, N])), "gives 20"),
}
REFUSED_UNDER_POISSON_SAMPLING = {
    "weighted": (lambda: loader_with(WeightedRandomSampler(WEIGHTS, N)), "leave the sampler out"),
    "weighted without replacement": (
        lambda: loader_with(WeightedRandomSampler(WEIGHTS, 7, replacement=False)),
        "leave the sampler out",
    ),
    "a part of a permutation": (lambda: loader_with(RandomSampler(data(), num_samples=8)), "draws 8 of 20 samples"),
    "longer": (lambda: loader_with(RandomSampler(data(), num_samples=50)), "draws 50 of 20 samples"),
    "of a larger data set": (lambda: loader_with(SequentialSampler(range(N + 5))), "longer"),
    "own, longer": (lambda: loader_with(Own([*range(N), 3])), "longer than its data set of 20"),
    "own, a sample twice": (lambda: loader_with(Own([1, 2, 1])), "more than once"),
    "outside": (lambda: loader_with(SubsetRandomSampler([0, N])), "gives 20, and its data set has samples 0 to 19"),
    "from the end": (lambda: loader_with([0, -1]), "gives -1"),
    "empty subset": (lambda: loader_with(SubsetRandomSampler([])), "data_loader has no batches"),
    "empty subset, own": (lambda: loader_with(Own([])), "data_loader has no batches"),
    "empty data set": (lambda: DataLoader(data(0), batch_size=4), "data_loader has no batches"),
    "IterableDataset": (lambda: DataLoader(Stream(), batch_size=4), "Stream is an IterableDataset"),
    "without batches": (lambda: DataLoader(data(), batch_size=None), "batch_size=None"),
    "batches of no known size": (lambda: DataLoader(data(), batch_sampler=[[0, 1], [2]]), "expected_batch_size="),
    "rows that are objects": (
        lambda: DataLoader(data(), batch_size=4, collate_fn=lambda rows: object()),
        "collate_fn returned a object",
    ),
    "rows that cannot be one": (
        lambda: DataLoader(data(), batch_size=4, collate_fn=lambda rows: torch.stack([rows[0][0], rows[1][0]])),
        "a batch of one sample could not be made",
    ),
}


@pytest.mark.parametrize("poisson", [True, False])
def test_refused_by_name_before_anything_starts(poisson):
    for kind, (make, words) in (REFUSED_UNDER_POISSON_SAMPLING if poisson else REFUSED_WITH_FIXED_BATCHES).items():
        model, engine, loader = nn.Linear(D, 2), engine_of(), make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = snapshot.of_model(model), snapshot.of_optimizer(optimizer), snapshot.of_loader(loader)
        with pytest.raises(ValueError, match="data_loader") as refusal:
            make_private(model, optimizer=optimizer, engine=engine, data_loader=loader, poisson_sampling=poisson)
        assert words in str(refusal.value), kind
        after = snapshot.of_model(model), snapshot.of_optimizer(optimizer), snapshot.of_loader(loader)
        assert after == before and engine.dataset is None, kind


class Repeats(Own):
    def __iter__(self):
        return iter(2 * self.indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fixed_batch_that_holds_a_sample_twice(workers):
    """Of a sampler that nothing is known of: refused when the batch is drawn."""
    _, _, got = private(loader_with(Repeats([1, 2, 3]), num_workers=workers), poisson=False)
    with pytest.raises(ValueError, match="into a batch more than once"):
        list(got)
    _, optimizer, got = private(loader_with(Repeats([1, 2, 3])), poisson=False)
    with (
        BatchMemoryManager(data_loader=got, max_physical_batch_size=2, optimizer=optimizer) as physical,
        pytest.raises(ValueError, match="into a batch more than once"),
    ):
        list(physical)
    _, _, got = private(DataLoader(data(), batch_sampler=[[0, 1], [5, 5]]), poisson=False, loss_reduction="sum")
    assert len(next(iter(got))[0]) == 2
    with pytest.raises(ValueError, match="into a batch more than once"):
        list(got)


class Wraps(Dataset):
    """Takes any number for a sample."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return data()[index % N]


Named = dict[int, tuple]  # numbers of its own for its samples


@pytest.mark.parametrize("as_array", [list, np.array])
@pytest.mark.parametrize("indices", [[7, -1], [3, N + 3]], ids=str)
def test_a_sample_under_two_numbers(indices, as_array):
    """One place in a batch is the other's: refused when the batch is drawn."""
    _, optimizer, got = private(DataLoader(Wraps(), batch_sampler=[as_array(indices)]), poisson=False, **SUM)
    with pytest.raises(ValueError, match="and its data set has samples 0 to 19"):
        list(got)
    with (
        BatchMemoryManager(data_loader=got, max_physical_batch_size=1, optimizer=optimizer) as physical,
        pytest.raises(ValueError, match="and its data set has samples 0 to 19"),
    ):
        list(physical)
    named = Named({-k: (torch.zeros(D), torch.zeros(2)) for k in range(1, 3)})
    _, _, got = private(DataLoader(named, batch_sampler=[[-1, -2]]), poisson=False, **SUM)
    assert len(list(got)) == 1


class Lax(Dataset):
    """Takes anything for a sample's index, and does not say how many there are."""

    def __getitem__(self, index):
        return data()[int(index) % N]


@pytest.mark.parametrize("indices", [[0, "0"], [0, 0.2], [0.0, 1.0], [0, -N]], ids=str)
def test_a_sample_under_several_kinds_of_index(indices):
    _, _, got = private(DataLoader(Lax(), batch_sampler=[indices]), poisson=False, **SUM)
    with pytest.raises(ValueError, match="data_loader: its sampler gives"):
        list(got)


class Slow(Wraps):
    """The first batch comes last, if it may."""

    def __getitem__(self, index):
        if index < 4:
            time.sleep(0.2)
        return torch.full((D,), float(index)), torch.zeros(2)


def test_batches_come_in_the_order_in_which_they_are_drawn(caplog):
    """They are known by it, whatever ``in_order`` says."""
    loader = DataLoader(Slow(), batch_size=4, num_workers=2, in_order=False)
    _, _, got = private(loader, poisson=False)
    assert "in_order=False is not kept" in caplog.text and not loader.in_order
    assert [int(x[0, 0]) for x, _ in got] == [*range(0, N, 4)]


FIXED = (
    WHOLE
    | SUBSETS
    | {
        "weighted without replacement": lambda: loader_with(WeightedRandomSampler(WEIGHTS, 7, replacement=False)),
        "stream": lambda: DataLoader(Stream(), batch_size=4),
    }
)


@pytest.mark.parametrize("kind", [kind for kind in FIXED if kind != "with replacement"])
def test_fixed_batches_are_the_loaders(kind):
    """No false alarm: whatever draws no sample twice into a batch; the loader itself is left as it was."""
    loader = FIXED[kind]()
    assert len(loader) > 1
    before = snapshot.of_loader(loader)
    extra = {"loss_reduction": "sum"} if kind == "a list of batches" else {}
    model, optimizer, got = private(loader, poisson=False, **extra)
    assert isinstance(got, type(loader)) and got.dataset is loader.dataset and len(got) == len(loader)
    assert snapshot.of_loader(loader) == before
    rows = 0
    for x, y in got:
        rows += len(x)
        mse(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rows == sum(len(x) for x, _ in loader)


def test_a_stream_without_a_length():
    """Fixed batches at a rate that is given; refused without."""
    with pytest.raises(ValueError, match="give sample_rate="):
        private(DataLoader(Endless(), batch_size=4), poisson=False)
    engine = engine_of()
    model, optimizer, got = private(
        DataLoader(Endless(), batch_size=4), poisson=False, sample_rate=0.1, engine=engine, noise_multiplier=1.0
    )
    x, y = next(iter(got))
    mse(model(x), y).backward()
    optimizer.step()
    assert engine.accountant.history == [(1.0, 0.1, 1)] and optimizer.expected_batch_size == 4


class LoaderOfOnesOwn(DataLoader):
    """Batches that it makes itself, twice as many."""

    def described(self):
        return f"{len(self)} batches"

    def __iter__(self):
        for _ in range(2):
            for rows in self.batch_sampler:
                yield self.collate_fn([self.dataset[k] for k in rows])


def test_a_loader_class_of_ones_own_with_fixed_batches():
    model, optimizer, got = private(LoaderOfOnesOwn(data(), batch_size=4), poisson=False)
    assert isinstance(got, LoaderOfOnesOwn) and got.described() == "5 batches"
    for x, y in got:
        mse(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen(got, 1) == 2 * list(range(N))


# ---------------------------------------------------------------- batches without samples


@dataclass
class Row:
    x: torch.Tensor
    name: str


def collated_rows(rows):
    return Row(torch.stack([row["x"] for row in rows]), [row["text"] for row in rows])


def ragged(rows):
    return {
        "flat": torch.cat([row["x"] for row in rows]),
        "ids": np.array([row["k"] for row in rows]),
        "count": len(rows),
        "time first": torch.stack([row["x"] for row in rows], 1),
        "tensors": tuple(row["x"] for row in rows),
        "none": None,
    }


def rows_of(dataset, **kw):
    """A batch without samples of a loader whose first batch is one."""
    _, _, got = private(DataLoader(dataset, batch_size=1, **kw.pop("loader", {})), **kw)
    return got.collate_fn([])


def test_rows_with_strings():
    none = rows_of(Texts())
    assert none["x"].shape == (0, D) and none["x"].dtype == torch.float32
    assert (none["text"], none["k"].tolist(), none["k"].dtype) == ([], [], torch.int64)
    assert none["more"][0] in ([], ()) and none["more"][1].shape == (0, 2, 3)
    named = rows_of(Texts(), loader={"collate_fn": collated_rows})
    assert isinstance(named, Row) and named.x.shape == (0, D) and named.name == []


def test_whatever_dimension_the_batch_has():
    none = rows_of(Texts(), loader={"collate_fn": ragged})
    assert none["flat"].shape == (0,) and none["ids"].shape == (0,) and none["count"] == 0
    assert none["time first"].shape == (D, 0) and none["tensors"] == () and none["none"] is None


def test_a_random_row_in_place_of_none():
    one = rows_of(Texts(), rand_on_empty=True)
    assert one["x"].shape == (1, D) and set(one["x"].flatten().tolist()) <= {0.0, 1.0}
    assert one["text"] == [""] and one["k"].shape == (1,)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_rows_with_strings(workers):
    model, optimizer, got = private(DataLoader(Texts(), batch_size=1, num_workers=workers), noise_multiplier=1.0)
    sizes = []
    for rows in got:
        sizes.append(len(rows["x"]))
        assert len(rows["text"]) == sizes[-1]
        model(rows["x"]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 in sizes and len(sizes) == N


@pytest.mark.parametrize("given", [3, "seed", np.random.default_rng(1)], ids=repr)
def test_a_noise_generator_that_is_none(given):
    with pytest.raises(ValueError, match=r"noise_generator=.*give a torch.Generator"):
        make_private(nn.Linear(2, 2), noise_generator=given)
