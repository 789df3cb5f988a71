"""Which samples a backward pass is over: parts of a batch, and rows on their way through loops of all kinds."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dpfast import BatchMemoryManager
from tests.helpers import F64, make_private, sse
from tests.oracle import Verdict
from tests.privacy.once import TWICE, B, C, D, Net, batch, check, private

# ---------------------------------------------------------------- parts of a batch, one after the other


PARTS = {
    "the same half": lambda x: [x[:3].clone(), x[:3].clone()],
    "a row, again and again": lambda x: [x[:1] + 0.01 * k for k in range(B)],
    "halves that overlap": lambda x: [x[:4].clone(), x[3:].clone()],
    "changed halves": lambda x: [2 * x[:3], 2 * x[3:]],
    "a half and all": lambda x: [x[:3], x + 1],
    "doubled halves": lambda x: [torch.cat([x[:3], x[:3] + 1]), torch.cat([x[:3], x[:3] - 1])],
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_that_may_have_samples_in_common(parts, stepped):
    """Whatever was done to them, and in a later step over the same batch too."""
    _, _, wrapped, optimizer, loader = private()
    x, _ = next(iter(loader))
    if stepped:
        wrapped(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match=TWICE):
        for part in PARTS[parts](x):
            wrapped(part).square().sum().backward()


DISJOINT = {
    "slices": lambda x: x.split(2),
    "every other": lambda x: (x[::2], x[1::2]),
    "copies": lambda x: [part.clone() for part in x.split(2)],
    "picked": lambda x: (x[[5, 0]], x[[1, 4]], x[2:4]),
    "slices of a copy": lambda x: x.clone().split(4),
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("parts", DISJOINT)
def test_parts_that_have_none_in_common(parts, stepped):
    """Exact: each is clipped on its own."""
    model, twin, wrapped, optimizer, loader = private()
    x, y = next(iter(loader))
    if stepped:
        sse(wrapped(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.arange(B)[:, None] * torch.ones(1, D, dtype=torch.long)
    for part, of in zip(DISJOINT[parts](x), DISJOINT[parts](rows), strict=True):
        sse(wrapped(part), y[of[:, 0]]).backward()
    check(model, twin, (x, y))


# ---------------------------------------------------------------- whose rows these are, in loops of all kinds


def earlier_batch(m, loader):
    (a, _), (b, _) = loader
    for x in (b, a, a.clone()):
        m(x).sum().backward()


def a_view_of_an_earlier_batch(m, loader):
    batches = iter(loader)
    (a, _), (b, _) = next(batches), next(batches)
    (m(b.clone()).sum() + m(2 * a).sum()).backward()


def two_passes_joined(m, loader):
    for (a, _), (b, _) in zip(loader, loader, strict=True):
        m(torch.cat([a, b])).sum().backward()


def a_row_repeated(m, loader):
    m(next(iter(loader))[0][[0, 0, 1]]).sum().backward()


def a_row_expanded(m, loader):
    m(next(iter(loader))[0][:1].expand(3, -1)).sum().backward()


def a_subset_of_the_same_data(m, loader):
    other = DataLoader(Subset(loader.dataset, range(2, 8)), batch_size=B)
    _, _, other = make_private(m, data_loader=other, max_grad_norm=C, loss_reduction="sum")
    for each in (loader, other):
        m(next(iter(each))[0]).sum().backward()


class Recomputed(torch.autograd.Function):
    """A checkpoint that is none of torch's."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run, ctx.x = run, x
        return run(x)

    @staticmethod
    def backward(ctx, G):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            torch.autograd.backward(ctx.run(x), G)
        return None, x.grad


def another_checkpoint(m, loader):
    x = next(iter(loader))[0]
    for _ in range(2):
        Recomputed.apply(m, (2 * x).requires_grad_()).sum().backward()


def another_checkpoint_of_halves(m, loader):
    parts = [(2 * part).requires_grad_() for part in next(iter(loader))[0].chunk(2)]
    sum(Recomputed.apply(m, part).sum() for part in parts).backward()


def temporaries_by_hand(m, loader):
    x = torch.randn(8, D, dtype=F64)
    for rows in ([0, 1, 2], [2, 3, 4]):
        m(x[rows]).sum().backward()


LOOPS = [
    earlier_batch,
    a_view_of_an_earlier_batch,
    two_passes_joined,
    a_row_repeated,
    a_row_expanded,
    a_subset_of_the_same_data,
    another_checkpoint,
    another_checkpoint_of_halves,
    temporaries_by_hand,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops_in_which_a_sample_would_count_twice(loop):
    _, _, wrapped, _, loader = private()
    with pytest.raises(ValueError, match=f"{TWICE}|one backward pass of two forwards|in one forward more than once"):
        loop(wrapped, loader)


@pytest.mark.parametrize("poisson", [True, False])
def test_an_earlier_physical_batch(poisson):
    """In place of the one that the loop has given."""
    _, _, wrapped, optimizer, loader = private(poisson_sampling=poisson, sample_rate=0.9, expected_batch_size=B)
    first, refused = None, pytest.raises(ValueError, match="an earlier batch than the physical batch|" + TWICE)
    with refused, BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as physical:
        for x, _ in physical:
            first = x if first is None else first
            wrapped(first).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


class Distribution(nn.Module):
    """What it returns is no tensor."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(D, 1)

    def forward(self, x):
        return torch.distributions.Normal(self.net(x), 1.0)


def test_two_samples_of_a_model_that_returns_no_tensors():
    _, _, wrapped, _, loader = private(Distribution(), max_physical_batch_size=1)
    x, _ = next(iter(loader))
    with pytest.raises(ValueError, match="one backward pass of two forwards"):
        sum(wrapped(x[k : k + 1]).mean.sum() for k in range(2)).backward()


def fetched_and_moved(m, loader):
    batches = iter(loader)
    for x, _ in [next(batches), next(batches)]:
        m(x.clone()).square().sum().backward()


def changed_after_a_peek(m, loader):
    next(iter(loader))
    for x, _ in loader:
        m(x + 1).square().sum().backward()


def changed_and_cut(m, loader):
    for part in (2 * next(iter(loader))[0]).split(2):
        m(part).square().sum().backward()


def twice_the_same_after_a_peek(m, loader):
    batches = iter(loader)
    next(batches)
    x = next(batches)[0] + 1
    (m(x) + m(x)).square().sum().backward()


def many_in_a_list(m, loader):
    for x, _ in list(loader):
        m(x).square().sum().backward()


def a_view_with_values_of_others(m, loader):
    x = next(iter(loader))[0]
    x[:] = (x > 0).double()
    (m(x) + m(1 - x)).square().sum().backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "loop",
    [fetched_and_moved, changed_after_a_peek, changed_and_cut, twice_the_same_after_a_peek, many_in_a_list,
     a_view_with_values_of_others],
    ids=lambda loop: loop.__name__,
)  # fmt: skip
def test_loops_in_which_each_sample_counts_once(loop):
    many = loop is many_in_a_list
    data = DataLoader(TensorDataset(*batch(12 if many else 2 * B)), batch_size=1 if many else B, shuffle=True)
    _, _, wrapped, _, loader = private(loader=data)
    loop(wrapped, loader)


@pytest.mark.parametrize("poisson", [True, False])
def test_a_batch_in_several_steps(poisson):
    """Each step is accounted for as of a batch of its own: under Poisson sampling another one is warned of, once."""
    _, _, wrapped, optimizer, loader = private(poisson_sampling=poisson, sample_rate=0.9, expected_batch_size=B)

    def step(x, y):
        sse(wrapped(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in loader:
            step(x, y)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(x, y)
        assert [("drawn anew" in str(each.message)) for each in seen] == [True] * (poisson and not _)


def test_nothing_of_a_batch_is_kept():
    """Neither after a gradient of something else, nor after the step."""
    _, _, wrapped, optimizer, loader = private(nn.Linear(D, 2))
    for x, y in loader:
        optimizer.zero_grad()
        leaf = (2 * x).requires_grad_()
        torch.autograd.grad(sse(wrapped(leaf), y), leaf, retain_graph=True)
        held = weakref.ref(leaf)
        del leaf
        gc.collect()
        assert held() is None
        sse(wrapped(x), y).backward()
        optimizer.step()
    held = weakref.ref(x)
    del x
    gc.collect()
    assert held() is None


# ---------------------------------------------------------------- several rows of a sample


@pytest.mark.parametrize("poisson", [True, False])
def test_rows_made_outside_of_the_model(poisson):
    """Two views of a sample in one batch are clipped as two: warned of once."""
    _, _, wrapped, optimizer, loader = private(poisson_sampling=poisson)
    with pytest.warns(RuntimeWarning, match="so that a sample counts 2 times") as seen:
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                sse(wrapped(torch.cat([x, x + 0.1])), torch.cat([y, y])).backward()
                optimizer.step()
    assert len(seen) == 1


def test_rows_made_by_the_collate_function():
    def several(samples):
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return x.repeat_interleave(3, 0), y.repeat_interleave(3, 0)

    loader = DataLoader(TensorDataset(*batch(2 * B)), batch_size=B, collate_fn=several)
    _, _, wrapped, _, loader = private(loader=loader)
    x, y = next(iter(loader))
    with pytest.warns(RuntimeWarning, match="gave 6 samples and the model saw 18 rows"):
        sse(wrapped(x), y).backward()


@pytest.mark.filterwarnings("error")
def test_rows_that_are_samples():
    """No false alarm: two batches of the loader in one forward, a part of one, tokens, views made inside."""

    class Views(Net):
        def forward(self, x):
            a, b = super().forward(torch.cat([x, -x])).chunk(2)
            return a + b

    _, _, wrapped, optimizer, loader = private()
    (x, y), (x2, y2) = loader
    sse(wrapped(torch.cat([x, x2])), torch.cat([y, y2])).backward()
    optimizer.step()
    optimizer.zero_grad()
    for x, y in loader:
        sse(wrapped(x[:3]), y[:3]).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = DataLoader(TensorDataset(torch.randn(4, 2, D, dtype=F64), torch.randn(4, 2, 2, dtype=F64)), batch_size=2)
    _, twin, wrapped, _, loader = private(loader=tokens)
    for x, y in loader:
        F.mse_loss(wrapped(x), y, reduction="sum").backward()
        Verdict(twin, (x,), y, sse, C).check_norms(wrapped.per_sample_gradient_norms)
