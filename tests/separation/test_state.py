"""What a forward leaves behind in the model: refused by name where it depends on the samples, unless it is public."""

import pytest
import torch
from torch import nn

from tests.helpers import F64, make_private, mse
from tests.privacy.judging import TIGHT, Private

B, D = 8, 4


class Keeping(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.a, self.b, self.keep = nn.Linear(D, D), nn.Linear(D, D), keep
        self.register_buffer("queue", torch.zeros(32, D))
        self.register_buffer("ema", torch.zeros(D), persistent=False)
        self.register_buffer("steps", torch.zeros(()))
        self.memory = []
        self.last = None

    def forward(self, x):
        out = self.keep(self, x)
        return self.b(self.a(x).tanh()) + (0 if out is None else out)


@torch.no_grad()
def queue(m, x):
    m.queue[: len(x)] = m.a(x)


@torch.no_grad()
def ema(m, x):
    m.ema.mul_(0.9).add_(0.1 * x.mean(0))


@torch.no_grad()
def ema_assigned(m, x):
    m.ema = 0.9 * m.ema + 0.1 * x.mean(0)


def initialised_from_data(m, x):
    m.b.bias.data.copy_(-x.mean(0))


def data_assigned(m, x):
    m.b.bias.data = -x.mean(0)


@torch.no_grad()
def largest(m, x):
    m.steps.copy_(torch.maximum(m.steps, x.abs().max()))


@torch.no_grad()
def counted(m, x):
    m.steps.add_((x > 0).sum())


class Inner(Keeping):
    """The same in a module below."""

    def __init__(self, keep):
        super().__init__(keep)
        self.below = Keeping(keep)

    def forward(self, x):
        return self.below(x)


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        (queue, "queue"),
        (ema, "ema"),
        (ema_assigned, "ema"),
        (initialised_from_data, "b.bias"),
        (data_assigned, "b.bias"),
        (largest, "steps"),
        (counted, "steps"),
    ],
)
@pytest.mark.parametrize("cls", [Keeping, Inner])
def test_refused_by_name(keep, name, cls):
    private = Private(cls(keep).double(), TIGHT)
    before = {k: v.clone() for k, v in private.model.state_dict().items()}
    x, y = torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64)
    with pytest.raises(RuntimeError, match=rf"{name}\b.*released without noise.*public_state") as refusal:
        private.backward((x,), y, mse)
    assert "physical batch of one" not in str(refusal.value)
    assert private.nothing_summed()
    assert all(torch.equal(v, before[k]) for k, v in private.model.state_dict().items())


@pytest.mark.parametrize("alone", [True, False], ids=["max_physical_batch_size=1", "a batch of one"])
@pytest.mark.parametrize(("keep", "name"), [(queue, "queue"), (ema, "ema"), (initialised_from_data, "b.bias")])
def test_refused_at_a_physical_batch_of_one_too(keep, name, alone):
    private = Private(Keeping(keep).double(), TIGHT, **({"max_physical_batch_size": 1} if alone else {}))
    with pytest.raises(RuntimeError, match=rf"{name}\b.*released without noise"):
        private.backward((torch.randn(1, D, dtype=F64),), torch.randn(1, D, dtype=F64), mse)


@pytest.mark.parametrize(("keep", "name"), [(queue, "queue"), (ema, "ema"), (counted, "steps")])
def test_declared_public(keep, name):
    private = Private(Keeping(keep).double(), TIGHT, public_state=[name])
    x, y = torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64)
    private.backward((x,), y, mse)
    assert private.model.get_buffer(name).any()


def test_what_other_samples_gradients_depend_on_is_refused_though_it_is_public():
    private = Private(Keeping(initialised_from_data).double(), TIGHT, public_state=["b.bias"])
    with pytest.raises(RuntimeError, match="meet"):
        private.backward((torch.randn(B, D, dtype=F64),), torch.randn(B, D, dtype=F64), mse)


def test_a_module_declared_public():
    private = Private(Inner(ema).double(), TIGHT, public_state=["below"])
    private.backward((torch.randn(B, D, dtype=F64),), torch.randn(B, D, dtype=F64), mse)
    assert private.model.below.ema.any()


@pytest.mark.parametrize("names", ["queue", ["queues"], ["a.b"]])
def test_public_state_is_checked(names):
    with pytest.raises(ValueError, match="public_state"):
        make_private(Keeping(ema), public_state=names)


@torch.no_grad()
def steps(m, x):
    m.steps += 1


@torch.no_grad()
def decayed(m, x):
    m.ema.mul_(0.9).add_(m.a.weight.detach().mean(0))


def observed(m, x):
    m.last = x.detach()


def listed(m, x):
    m.memory = [x.detach()]


@pytest.mark.parametrize("keep", [steps, decayed, observed, listed])
def test_what_depends_on_no_sample_or_is_never_read(keep):
    private = Private(Keeping(keep).double(), TIGHT)
    x, y = torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64)
    for _ in range(3):
        private.backward((x,), y, mse)
    if keep is steps:
        assert private.model.steps == 3


def from_the_last_forward(m, x):
    out = 0 if m.last is None else m.last.mean()
    m.last = x.detach()
    return out


def from_a_memory_bank(m, x):
    out = sum((old.mean() for old in m.memory), torch.zeros((), dtype=F64))
    m.memory = [*m.memory[-3:], x.detach()]
    return out * 0


@pytest.mark.parametrize("keep", [from_the_last_forward, from_a_memory_bank])
def test_what_the_next_forward_reads(keep):
    private = Private(Keeping(keep).double(), TIGHT)
    x, y = torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64)
    with pytest.raises(RuntimeError, match="an earlier forward has left"):
        private.backward((x,), y, mse)


def mean_of_the_last(m, x):
    out = m.number
    m.number = 0.9 * m.number + 0.1 * x.mean().item()
    return out


def how_many_of_the_last(m, x):
    out = m.number
    m.number = int((x > 0).sum())
    return 0.1 * out


def one_sample_of_the_last(m, x):
    out = m.number
    m.number = x[0, 0].item()
    return out


def read_as_a_list(m, x):
    out = m.number
    m.number = sum(x[:, 0].tolist())
    return out


def read_by_numpy(m, x):
    out = m.number
    m.number = float(x.detach().numpy().mean())
    return out


def a_flag_of_the_last(m, x):
    out = 1.0 if m.number else 2.0
    m.number = bool((x.mean() > 0).item())
    return out


@pytest.mark.parametrize(
    "keep",
    [mean_of_the_last, how_many_of_the_last, one_sample_of_the_last, read_as_a_list, read_by_numpy, a_flag_of_the_last],
)
def test_a_number_that_the_next_forward_computes_with(keep):
    """The looks at the samples put numbers back: what one has left is shown to the next forward nevertheless."""
    model = Keeping(keep).double()
    model.number = 0
    private = Private(model, TIGHT)
    x, y = torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64)
    with pytest.raises(RuntimeError, match=r"keeps a number of the samples in 'number'.*the next forward"):
        private.backward((x,), y, mse)
    assert private.nothing_summed() and private.model.number == 0


def test_such_a_number_of_a_lone_sample():
    model = Keeping(mean_of_the_last).double()
    model.number = 0
    private = Private(model, TIGHT)
    with pytest.raises(RuntimeError, match="keeps a number of the samples in 'number'"):
        private.backward((torch.randn(1, D, dtype=F64),), torch.randn(1, D, dtype=F64), mse)


def told(m, x):
    m.number = x.mean().item()


def told_as_a_list(m, x):
    m.number = max(x[:, 0].tolist())


def counter(m, x):
    m.number += 1
    return 0.1 * m.number


@pytest.mark.parametrize("keep", [told, told_as_a_list, counter])
def test_numbers_that_no_forward_computes_with_or_of_no_sample(keep):
    model = Keeping(keep).double()
    model.number = 0
    private = Private(model, TIGHT)
    for _ in range(3):
        x, y = torch.randn(B, D, dtype=F64), torch.randn(B, D, dtype=F64)
        private.backward((x,), y, mse)
    expected = {told: x.mean(), told_as_a_list: x[:, 0].max(), counter: 3}[keep]
    assert private.model.number == expected


def test_a_number_of_a_module_declared_public():
    model = nn.Sequential(Keeping(mean_of_the_last), nn.Linear(D, D)).double()
    model[0].number = 0
    private = Private(model, TIGHT, public_state=["0"])
    private.backward((torch.randn(B, D, dtype=F64),), torch.randn(B, D, dtype=F64), mse)
    assert private.model[0].number != 0
