"""Batches of users: who is drawn, with how many rows, in which physical batch and on which rank."""

import collections
import datetime
import uuid

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset

import dpfast
from dpfast.data.units import Units
from dpfast.data.user_batches import UserBatches
from tests.helpers import engine_of, make_private

ROWS = [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9, 10], [11, 12]]
OWNER = {row: unit for unit, rows in enumerate(ROWS) for row in rows}


def batches(most=3, copies=1, rate=0.5, **kw):
    return UserBatches(Units(ROWS, most, copies), 4, seed=kw.pop("seed", 5), sample_rate=rate, **kw)


def test_each_user_is_drawn_as_often_and_whole():
    found, drawn = batches(), collections.Counter()
    for step in range(2000):
        batch = found.logical_batch(step)
        counts = collections.Counter(OWNER[row] for row in batch)
        assert all(count == min(3, len(ROWS[unit])) for unit, count in counts.items())
        assert len({*batch}) == len(batch)
        drawn.update({*counts})
    assert all(abs(drawn[unit] - 1000) < 5 * 500**0.5 for unit in range(len(ROWS)))


def test_rows_of_a_user_are_drawn_anew_and_alike():
    rows = collections.Counter(row for step in range(3000) for row in batches(most=2, rate=1.0).logical_batch(step))
    assert all(abs(rows[row] - 1200) < 6 * (3000 * 0.4 * 0.6) ** 0.5 for row in ROWS[3])
    assert all(rows[row] == 3000 for row in (*ROWS[0], *ROWS[1], *ROWS[4]))


def test_which_rows_a_user_has_does_not_depend_on_others():
    fewer = UserBatches(Units([[0], [1], [2], ROWS[3]], 2), 4, seed=5, sample_rate=1.0)
    for step in range(5):
        theirs = [row for row in fewer.logical_batch(step) if row in ROWS[3]]
        assert theirs == [row for row in batches(most=2, rate=1.0).logical_batch(step) if row in ROWS[3]]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_users_and_physical_batches_hold_whole_ones(world, copies):
    ranks = [batches(copies=copies, rank=rank, world_size=world) for rank in range(world)]
    for step in range(30):
        whole, size = ranks[0].logical_batch(step), 3 * copies
        parts = [rank.physical_batches(step, size) for rank in ranks]
        assert len({len(each) for each in parts}) == 1 <= len(parts[0])
        owners = [{OWNER[row] for row in part} for each in parts for part in each]
        assert sum(map(len, owners)) == len({OWNER[row] for row in whole})  # nobody is in two
        assert sorted(row for each in parts for part in each for row in part) == sorted(whole)
        assert all(len(part) <= size for each in parts for part in each)
        assert all(part[k : k + copies] == [part[k]] * copies for each in parts for part in each for k in (0,) if part)


def test_iteration_and_resuming():
    found = batches()
    assert [*found] == [found.logical_batch(step) for step in range(4)]
    again = batches()
    again.step = 2
    assert [*again] == [found.logical_batch(step) for step in (2, 3)]


def test_everything_counts_users():
    model, data = nn.Linear(3, 1), TensorDataset(torch.randn(12, 3))
    ids = [0] * 5 + [1] * 3 + [2, 3, 4, 5]
    engine = engine_of("prv")
    _, optimizer, loader = make_private(
        model,
        engine=engine,
        poisson_sampling=True,
        noise_multiplier=1.0,
        data_loader=DataLoader(data, batch_size=2),
        units=torch.tensor(ids),
        rows_per_unit=4,
    )
    assert (len(loader), loader.sample_rate, optimizer.expected_batch_size) == (3, 1 / 3, 2)
    optimizer.expect_no_samples()
    optimizer.step()
    assert engine.accountant.history == [(1.0, 1 / 3, 1)]


def test_the_noise_multiplier_for_users():
    reads = []

    class Notes(Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, k):
            reads.append(k)
            return {"x": torch.ones(3), "user": f"u{k % 3}"}

    def collate(samples):
        return torch.stack([sample["x"] for sample in samples])

    model, engine = nn.Linear(3, 1), engine_of("rdp")
    options = dict(module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0)
    options |= dict(target_epsilon=2.0, target_delta=1e-5, epochs=3, units="user", rows_per_unit=9)
    _, optimizer, loader = engine.make_private_with_epsilon(
        data_loader=DataLoader(Notes(), batch_size=1, collate_fn=collate), **options
    )
    assert len(loader) == 3 and collections.Counter(reads)[8] <= 4  # ids are read once, the rest are trials of collate
    for _ in range(9):
        optimizer.expect_no_samples()
        optimizer.step()
        optimizer.zero_grad()
    assert 1.5 < engine.get_epsilon(1e-5) <= 2.0


class Rows(Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, k):
        return {"x": torch.full((3,), float(k)), "user": self.ids[k]}


class Columns(Rows):
    column_names = ("x", "user")

    def __getitem__(self, k):
        return self.ids if k == "user" else super().__getitem__(k)


UUIDS = [uuid.UUID(int=k % 2) for k in range(4)]
SAME = {
    "texts": ["a", "b", "a", "b"],
    "numbers": [7, 8, 7.0, 8],
    "tensors": [torch.tensor(k % 2) for k in range(4)],
    "pairs": [(k % 2, "x") for k in range(4)],
    "pairs of tensors": [(torch.tensor(k % 2),) for k in range(4)],
    "other types": UUIDS,
    "days": [datetime.date(2026, 1, 1 + k % 2) for k in range(4)],
}


@pytest.mark.parametrize("ids", SAME.values(), ids=SAME)
@pytest.mark.parametrize("how", ["a list", "a key", "a column", "a subset", "a sampler"])
def test_ids_of_users(ids, how):
    data = {"a list": TensorDataset(torch.randn(4, 3)), "a column": Columns(ids)}.get(how, Rows(ids))
    units, sampler = (ids if how == "a list" else "user"), None
    if how == "a subset":
        data = Subset(data, [3, 0, 2])
    if how == "a sampler":
        sampler = SubsetRandomSampler([0, 2, 3])
    collate = None if how == "a list" else lambda samples: torch.stack([sample["x"] for sample in samples])
    loader = DataLoader(data, batch_size=1, sampler=sampler, collate_fn=collate)
    *_, private = make_private(nn.Linear(3, 1), data_loader=loader, poisson_sampling=True, units=units, rows_per_unit=4)
    want = {"a subset": [[0], [1, 2]], "a sampler": [[0, 2], [3]]}.get(how, [[0, 2], [1, 3]])
    assert private.batch_sampler.units.rows == want


@pytest.mark.parametrize("given", [None, "torch", "numpy"])
def test_ids_of_a_column_that_the_format_leaves_out(given):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": torch.randn(4, 3).tolist(), "user": [1, 2, 1, 2]})
    data.set_format(given, columns=None if given is None else ["x"])
    loader = DataLoader(data, batch_size=1)
    *_, private = make_private(
        nn.Linear(3, 1), data_loader=loader, poisson_sampling=True, units="user", rows_per_unit=4
    )
    assert private.batch_sampler.units.rows == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="has no such column; it has"):
        make_private(nn.Linear(3, 1), data_loader=loader, poisson_sampling=True, units="person", rows_per_unit=4)


class ByIdentity:
    pass


BAD = {
    "None": [0, 1, None, 1],
    "NaN": [0.0, 1.0, float("nan"), 1.0],
    "NaN of a tensor": torch.tensor([0.0, 1.0, float("nan"), 1.0]),
    "lists": [[0], [1], [0], [1]],
    "rows of a tensor": torch.zeros(4, 2),
    "several kinds": [7, "7", 7, "7"],
    "objects": [ByIdentity() for _ in range(4)],
    "None in a pair": [(0, None)] * 4,
    "too few": [0, 1, 0],
    "too many": [0, 1, 0, 1, 1],
    "a mapping": {0: 1, 1: 1, 2: 1, 3: 1},
    "a number": 4,
    "no such key": "user",
}
ARGUMENTS = {
    "rows_per_unit": dict(units=[0, 1, 0, 1], rows_per_unit=None),
    "rows_per_unit=0": dict(units=[0, 1, 0, 1], rows_per_unit=0),
    "rows_per_unit=True": dict(units=[0, 1, 0, 1], rows_per_unit=True),
    "rows_per_unit=3": dict(rows_per_unit=3),
    "augmentations=0": dict(augmentations=0),
    "augmentations=1.5": dict(augmentations=1.5),
    "poisson_sampling=False": dict(augmentations=2, poisson_sampling=False),
    "rand_on_empty": dict(augmentations=2, rand_on_empty=True),
    "max_physical_batch_size=1": dict(augmentations=2, max_physical_batch_size=1),
    "'hooks'": dict(augmentations=2, grad_sample_mode="hooks"),
    "of the fused mode, not of 'ew'": dict(units=[0, 1, 0, 1], rows_per_unit=1, grad_sample_mode="ew"),
}


@pytest.mark.parametrize("name", [*BAD, *ARGUMENTS])
def test_what_is_refused_before_anything_changes(name):
    model = nn.Linear(3, 1)
    options = ARGUMENTS[name] if name in ARGUMENTS else dict(units=BAD[name], rows_per_unit=2)
    data = DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2)
    with pytest.raises(ValueError, match="units" if name in BAD else name):
        make_private(model, **dict(data_loader=data, poisson_sampling=True) | options)
    assert "forward" not in vars(model) and not any(vars(p) for p in model.parameters())


def test_a_private_loader_keeps_its_units():
    options = dict(poisson_sampling=True, data_loader=DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2))
    *_, loader = make_private(nn.Linear(3, 1), units=[0, 1, 0, 1], rows_per_unit=2, **options)
    with pytest.raises(ValueError, match="Poisson-sampled already"):
        make_private(nn.Linear(3, 1), augmentations=2, poisson_sampling=True, data_loader=loader)
    model, optimizer, again = make_private(nn.Linear(3, 1), poisson_sampling=True, data_loader=loader)
    assert model.clipped_sum.by_unit and again.batch_sampler is loader.batch_sampler
    assert optimizer.expected_batch_size == 2


def test_a_user_that_no_physical_batch_takes():
    ids = [0, 0, 0, 1]
    options = dict(poisson_sampling=True, data_loader=DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2))
    _, optimizer, loader = make_private(nn.Linear(3, 1), units=ids, rows_per_unit=8, augmentations=2, **options)
    too_small = dpfast.BatchMemoryManager(data_loader=loader, max_physical_batch_size=5, optimizer=optimizer)
    with pytest.raises(ValueError, match="max_physical_batch_size=5: a unit has 6 rows in a batch"):
        too_small.__enter__()
    with pytest.raises(ValueError, match="max_batch_size=5"):
        dpfast.wrap_data_loader(data_loader=loader, max_batch_size=5, optimizer=optimizer)
    with dpfast.BatchMemoryManager(data_loader=loader, max_physical_batch_size=6, optimizer=optimizer) as parts:
        assert len(parts) >= 1


def test_steps_of_users_and_steps_of_rows_have_no_epsilon_together(tmp_path):
    """An ε that adds both up would be said of a user, and hold for a row."""
    engine, data = engine_of(), DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2)
    users = dict(poisson_sampling=True, data_loader=data, units=[0, 0, 1, 1, 2, 2, 3, 3], rows_per_unit=2)

    def step(engine, **kw):
        model = nn.Linear(2, 1)
        private, optimizer, loader = make_private(model, engine=engine, noise_multiplier=1.0, **kw)
        (x,) = next(iter(loader))
        private(x).square().mean().backward()
        optimizer.step()
        return private, optimizer

    private, optimizer = step(engine, **users)
    assert str(engine.unit) == "one user (by a list of ids), at most 2 rows of each in a step"
    step(engine, **users | dict(rows_per_unit=1))  # another cap, and still users
    before = [*engine.accountant.history]
    with pytest.raises(
        ValueError, match="for one row, and this engine has accounted for steps whose ε is for one user"
    ):
        step(engine, data_loader=data)
    assert engine.accountant.history == before
    engine.save_checkpoint(path=tmp_path / "users.pt", module=private, optimizer=optimizer)
    other = engine_of()
    private, optimizer = step(other, data_loader=data)
    weights = [p.detach().clone() for p in private.parameters()]
    with pytest.raises(ValueError, match=r"ε is for one user .* and this engine's for one row"):
        other.load_checkpoint(path=tmp_path / "users.pt", module=private, optimizer=optimizer)
    assert all(map(torch.equal, weights, private.parameters())) and len(other.accountant) == 1
    same = engine_of()
    same.load_checkpoint(path=tmp_path / "users.pt", module=private, optimizer=optimizer)
    assert same.unit.column == "" and len(same.accountant) == len(engine.accountant)
