"""Which unit a row is of is known, or the backward pass is refused: never guessed."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dpfast
from tests.helpers import F64, mse, sums_of
from tests.oracle import Verdict
from tests.privacy.judging import Called
from tests.privacy.users import IDS, Users, everyone
from tests.zoo import specimen

UNKNOWN = "cannot be told which unit"


@pytest.fixture
def users():
    model, inputs, target = specimen("Linear", B=len(IDS))
    return Users(model, inputs, target, IDS, 0.1)


KNOWN = {
    "as it is": lambda x: x,
    "a copy": lambda x: x.clone(),
    "another dtype and back": lambda x: x.to(torch.complex128).real.contiguous(),
    "a view": lambda x: x.unsqueeze(1).flatten(0, 1),
    "a copy of another shape": lambda x: x.clone().view(len(x), 2, 2).flatten(1),
}
LOST = {
    "shuffled": lambda x: x[torch.arange(len(x)) - 1],
    "flipped": lambda x: x.flip(0),
    "sorted": lambda x: x[x[:, 0].argsort()],
    "normalised": lambda x: (x - 1) / 2,
    "noise on it": lambda x: x + torch.randn_like(x),
    "two of them exchanged": lambda x: x[[1, 0, *range(2, len(x))]],
    "from elsewhere": torch.randn_like,
    "twice": lambda x: torch.cat([x, x]),
    "one of them twice": lambda x: torch.cat([x[:1], x]),
    "one in place of another": lambda x: torch.cat([x[:1], x[:-1]]),
}


@pytest.mark.parametrize("change", KNOWN.values(), ids=KNOWN)
def test_rows_that_are_known(users, change):
    want = users.backward(mse)
    users.optimizer.zero_grad()
    *x, y = next(iter(users.loader))
    mse(users.wrapped(change(*x)), y).backward()
    torch.testing.assert_close(sums_of(users.model), want)


@pytest.mark.parametrize("change", LOST.values(), ids=LOST)
def test_rows_that_may_be_anybodys(users, change):
    *x, y = next(iter(users.loader))
    with pytest.raises(ValueError, match=UNKNOWN):
        users.wrapped(change(*x)).square().mean().backward()
    assert not any(s.any() for s in sums_of(users.model).values())
    users.optimizer.zero_grad()
    mse(users.wrapped(*x), y).backward()
    assert any(s.any() for s in sums_of(users.model).values())


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):  # [T, B, 3]
        return self.b(torch.tanh(self.a(x)).mean(0))


@pytest.mark.parametrize("change", [torch.Tensor.contiguous, lambda x: x, lambda x: x[:, [1, 0, 3, 2]]])
def test_a_batch_that_is_the_second_dimension(change):
    model, x, y = Sequences().double(), torch.randn(4, 6, 3, dtype=F64), torch.randn(4, 2, dtype=F64)
    private, _, loader = everyone(TensorDataset(x, y), [0, 1, 0, 1], model, 0.1, batch_first=False)
    x, y = next(iter(loader))
    if change(x.transpose(0, 1))[0, 0].equal(x[0, 0]):
        mse(private(change(x.transpose(0, 1))), y).backward()
        plain = Called(model, lambda model, x: model(x.transpose(0, 1)))
        Verdict(plain, (x,), y, mse, 0.1, units=[[0, 1], [2, 3]]).check_norms(private.per_sample_gradient_norms)
    else:
        with pytest.raises(ValueError, match=UNKNOWN):
            mse(private(change(x.transpose(0, 1))), y).backward()


@pytest.mark.parametrize("pad", [False, True])
def test_copies_of_physical_batches(users, pad):
    rows = 0
    with dpfast.BatchMemoryManager(
        data_loader=users.loader, max_physical_batch_size=4, optimizer=users.optimizer, pad=pad
    ) as parts:
        for x, y in parts:
            mse(users.wrapped(x.clone()), y).backward()
            rows += len(users.wrapped.per_sample_gradient_norms)
            users.optimizer.step()
            users.optimizer.zero_grad()
    assert rows == 4


def test_rows_that_are_all_alike_tell_no_order():
    model, inputs, target = specimen("Linear", B=4)
    users = Users(model, (torch.ones_like(inputs[0]),), target, [0, 0, 1, 1], 0.1)
    x, y = next(iter(users.loader))
    with pytest.raises(ValueError, match=UNKNOWN):
        mse(users.wrapped(x.clone()), y).backward()
    users.optimizer.zero_grad()
    mse(users.wrapped(x), y).backward()  # its memory tells


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, mask):
        return self.layer(x) * mask


@pytest.mark.parametrize("masks", ["few", "one for each row"])
def test_an_input_in_which_rows_are_alike_does_not_tell_the_order_of_another(masks):
    """A loop that normalises and shuffles rows within what a mask shows would give rows to other users."""
    mask = torch.arange(8.0).remainder(2 if masks == "few" else 8)[:, None] + 1
    users = Users(Masked(), (torch.randn(8, 4), mask), torch.randn(8, 2), IDS, 0.1)
    x, mask, y = next(iter(users.loader))
    if masks == "few":
        with pytest.raises(ValueError, match=UNKNOWN):
            mse(users.wrapped((x - 1) / 2, mask.clone()), y).backward()
        users.optimizer.zero_grad()
        x, mask, y = next(iter(users.loader))
        mse(users.wrapped(x.clone(), mask * 2), y).backward()  # all rows of x differ
    else:
        mse(users.wrapped((x - 1) / 2, mask.clone()), y).backward()
    assert len(users.wrapped.per_sample_gradient_norms) == 4


def test_a_part_of_a_batch_has_the_units_of_its_rows(users):
    x, y = next(iter(users.loader))
    mse(users.wrapped(x[2:5]), y[2:5]).backward()  # users of 1, 1, 2, 4 rows: two of one, one of another
    assert len(users.wrapped.per_sample_gradient_norms) == 2


def test_batches_of_another_loader(users):
    x, y = next(iter(DataLoader(users.loader.dataset, batch_size=len(IDS))))
    with pytest.raises(ValueError, match=UNKNOWN):
        mse(users.wrapped(x), y).backward()


def test_a_second_backward_in_one_step(users):
    x, y = next(iter(users.loader))
    mse(users.wrapped(x[:3]), y[:3]).backward()
    with pytest.raises(ValueError, match="grad accumulation"):
        mse(users.wrapped(x[3:]), y[3:]).backward()


def test_a_user_in_two_physical_batches_of_ones_own(users):
    """Parts that a loop makes by itself: another row of a user is no other user."""
    x, y = next(iter(users.loader))
    mse(users.wrapped(x[:5]), y[:5]).backward()
    users.optimizer.signal_skip_step(do_skip=True)
    users.optimizer.step()
    users.optimizer.zero_grad()
    with pytest.raises(ValueError, match="count twice"):
        mse(users.wrapped(x[5:]), y[5:]).backward()


def test_a_copy_of_the_model_does_not_go_back_to_rows(users):
    twin = copy.deepcopy(users.wrapped)
    x, y = next(iter(users.loader))
    with pytest.raises(ValueError, match=UNKNOWN):
        mse(twin(x), y).backward()


def test_opacus_own_memory_manager_would_split_users(users):
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    with (
        pytest.raises(ValueError, match=UNKNOWN),
        BatchMemoryManager(data_loader=users.loader, max_physical_batch_size=3, optimizer=users.optimizer) as parts,
    ):
        for x, y in parts:
            mse(users.wrapped(x), y).backward()


def by_length(samples):
    return default_collate(sorted(samples, key=lambda sample: float(sample[0][0])))


def reversed_rows(samples):
    return default_collate(samples[::-1])


def in_order(samples):
    return default_collate(samples)


def masked(samples):
    x, y = default_collate(samples)
    return x * (torch.rand_like(x) > 0.1), y


def as_columns(samples):
    x, y = default_collate(samples)
    return x.T, y


@pytest.mark.parametrize("collate", [by_length, in_order, masked, as_columns])
def test_what_collates_in_another_order_is_refused(collate):
    model, data = nn.Linear(4, 2), TensorDataset(torch.randn(9, 4), torch.randn(9, 2))
    loader = DataLoader(data, batch_size=2, collate_fn=collate)
    if collate is by_length:
        with pytest.raises(ValueError, match="collate_fn does not keep the order"):
            everyone(data, [0, 1, 2] * 3, model, 0.1, data_loader=loader)
        assert "forward" not in vars(model)
    else:
        everyone(data, [0, 1, 2] * 3, model, 0.1, data_loader=loader)


def test_as_many_positions_as_samples_are_no_other_order():
    """Masks that are the same for all samples look the same when samples come the other way round."""
    mask = torch.ones(16, 16).tril()[-1:].expand(16, 16) * torch.arange(16.0)
    dataset = TensorDataset(torch.randn(16, 4), mask, torch.randn(16, 2))

    def together(samples):
        return default_collate(samples)

    loader = DataLoader(dataset, batch_size=16, collate_fn=together)
    everyone(dataset, [k // 2 for k in range(16)], nn.Linear(4, 2), 0.1, data_loader=loader)
