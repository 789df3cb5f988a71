"""A step counts each sample once: no second backward over it, no second forward that clips it as another one."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dpfast import BatchMemoryManager
from tests.helpers import F64, make_private, sse, sums_of
from tests.oracle import clipped_sum, per_sample_gradients
from tests.privacy.once import TWICE, B, C, D, Heads, batch, check, private

# ---------------------------------------------------------------- twice before a step


def two_backwards_of_one_forward(run, x, y):
    loss = sse(run(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


def two_forwards(run, x, y):
    for _ in range(2):
        sse(run(x), y).backward()


def a_copy(run, x, y):
    sse(run(x), y).backward()
    sse(run(x.clone()), y).backward()


def rows_in_common(run, x, y):
    sse(run(x[:4]), y[:4]).backward()
    sse(run(x[3:]), y[3:]).backward()


def one_row_again(run, x, y):
    for _ in range(2):
        sse(run(x[2:3]), y[2:3]).backward()


def two_losses_of_one_forward(run, x, y):
    out = run(x)
    sse(out[:, 0], y[:, 0]).backward(retain_graph=True)
    sse(out[:, 1], y[:, 1]).backward()


def checkpointed(run, x, y):
    x = x.clone().requires_grad_()
    loss = sse(checkpoint(run, x, use_reentrant=True), y)
    loss.backward(retain_graph=True)
    loss.backward()


def checkpointed_without_reentry(run, x, y):
    loss = sse(checkpoint(run, x, use_reentrant=False), y)
    loss.backward(retain_graph=True)
    loss.backward()


AGAIN = [
    two_backwards_of_one_forward,
    two_forwards,
    a_copy,
    rows_in_common,
    one_row_again,
    two_losses_of_one_forward,
    checkpointed,
    checkpointed_without_reentry,
]


@pytest.mark.parametrize("again", AGAIN, ids=lambda again: again.__name__)
def test_samples_that_would_count_twice(again):
    """Refused; what the first pass has summed stays, and after zero_grad the samples may come again."""
    model, twin, wrapped, optimizer, _ = private()
    x, y = batch()
    with pytest.raises(ValueError, match=TWICE):
        again(wrapped, x, y)
    before = sums_of(model)
    assert sum(s.square().sum() for s in before.values()).sqrt() <= B * C * (1 + 1e-6)
    optimizer.zero_grad()
    sse(wrapped(x), y).backward()
    check(model, twin, (x, y))


def test_two_outputs_with_a_backward_each():
    _, _, wrapped, _, _ = private(Heads())
    x, y = batch()
    hidden, out = wrapped(x)
    sse(out, y).backward(retain_graph=True)
    with pytest.raises(ValueError, match=TWICE):
        hidden.square().sum().backward()


@pytest.mark.parametrize("how", ["noise on it", "two epochs", "physical"])
def test_a_batch_of_the_loader_again(how):
    """The loader has given its samples once: other values of theirs are no other samples."""
    _, _, wrapped, optimizer, loader = private()
    with pytest.raises(ValueError, match=TWICE):
        if how == "noise on it":
            for x, y in loader:
                for _ in range(2):
                    sse(wrapped(x + torch.randn_like(x)), y).backward()
                optimizer.step()
        elif how == "two epochs":
            for _ in range(2):
                for x, y in loader:
                    sse(wrapped(x), y).backward()
        else:
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as physical:
                for x, y in physical:
                    sse(wrapped(x), y).backward()
                    sse(wrapped(x * 0.5), y).backward()


def test_other_samples_are_added_up():
    """No false alarm: micro-batches of a loader, pieces of one batch, equal rows, a buffer filled anew by hand."""
    model, twin, wrapped, optimizer, loader = private()
    for x, y in loader:
        peek = next(iter(loader))  # at the first batch
        wrapped(peek[0])
        sse(wrapped(x), y).backward()
    check(model, twin, *loader)
    optimizer.step()
    optimizer.zero_grad()
    for x, y in loader:
        for a, b in zip(x.split(2), y.split(2), strict=True):
            sse(wrapped(a), b).backward()
        check(model, twin, (x, y))
        optimizer.step()
        optimizer.zero_grad()
    model, twin, wrapped, optimizer, _ = private()
    (x, y), held = batch(2 * B), torch.zeros(B, D, dtype=F64)
    for rows in (slice(0, B), slice(B, None)):
        held.copy_(x[rows])
        sse(wrapped(held), y[rows]).backward()
    check(model, twin, (x, y))
    optimizer.zero_grad()
    x[:] = x[0]
    for size in (1, 2):  # equal rows may be of two samples
        optimizer.zero_grad()
        for a, b in zip(x.split(size)[:3], y.split(size)[:3], strict=True):
            sse(wrapped(a.clone()), b).backward()
        check(model, twin, (x[: 3 * size], y[: 3 * size]))


def test_batches_of_two_loaders_are_added_up():
    """Of two data sets; of one data set a sample would count twice."""
    data = TensorDataset(*batch(2 * B))
    model, twin, wrapped, optimizer, first = private(loader=DataLoader(data, batch_size=B))
    for other, same in ((TensorDataset(*batch(2 * B)), False), (data, True)):
        _, optimizer, second = make_private(
            wrapped, optimizer=optimizer, data_loader=DataLoader(other, batch_size=B), max_grad_norm=C,
            loss_reduction="sum",
        )  # fmt: skip
        optimizer.zero_grad()
        for loader in (first, second):
            x, y = next(iter(loader))
            if same and loader is second:
                with pytest.raises(ValueError, match=TWICE):
                    sse(wrapped(x), y).backward()
            else:
                sse(wrapped(x), y).backward()
        check(model, twin, (x, y)) if same else check(model, twin, (x, y), next(iter(first)))


# ---------------------------------------------------------------- several forwards in one backward


class Pair(nn.Module):
    """What a sample's two views contribute together."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, x2):
        return self.net(x), self.net(x2)


def both_losses(outs, y):
    return sum(sse(out, y) for out in outs)


VIEWS = {
    "scaled": lambda x: 2 * x,
    "the same": lambda x: x,
    "a copy": lambda x: x.clone(),
    "attacked": lambda x: (x + 0.1 * x.sign()).detach().requires_grad_(),
    "rounded": lambda x: x.float().double(),
}


@pytest.mark.parametrize("source", ["loader", "physical", "hand"])
@pytest.mark.parametrize("view", VIEWS)
def test_two_views_of_the_same_samples_in_one_backward(view, source):
    """They are one gradient of each sample."""
    model, twin, wrapped, optimizer, loader = private(poisson_sampling=source == "physical")
    if source == "physical":
        memory = BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer)
        x, y = next(batch for batch in memory.__enter__() if len(batch[0]) > 1)
    else:
        x, y = next(iter(loader)) if source == "loader" else batch()
    other = VIEWS[view](x)
    (sse(wrapped(x), y) + sse(wrapped(other), y)).backward()
    want = clipped_sum(per_sample_gradients(Pair(twin), (x, other.detach()), y, both_losses), C)
    for name, got in sums_of(model).items():
        torch.testing.assert_close(got, want[f"net.{name}"])


def test_two_inputs_of_each_sample_in_one_backward():
    """As for chosen and rejected answers: the loader gives both, in one tensor or in two."""
    for pair in (torch.randn(2 * B, 2, D, dtype=F64), [torch.randn(2 * B, D, dtype=F64) for _ in range(2)]):
        parts = [pair] if isinstance(pair, torch.Tensor) else pair
        loader = DataLoader(TensorDataset(*parts, batch(2 * B)[1]), batch_size=B)
        model, twin, wrapped, _, loader = private(loader=loader)
        *x, y = next(iter(loader))
        first, second = (x[0][:, 0], x[0][:, 1]) if len(x) == 1 else x
        (sse(wrapped(first), y) + sse(wrapped(second), y)).backward()
        want = clipped_sum(per_sample_gradients(Pair(twin), (first, second), y, both_losses), C)
        for name, got in sums_of(model).items():
            torch.testing.assert_close(got, want[f"net.{name}"])


APART = {
    "halves": lambda x: x.chunk(2),
    "every other": lambda x: (x[::2], x[1::2]),
    "changed halves": lambda x: (2 * x[:3], x[3:] + 1),
    "halves of a copy": lambda x: x.clone().chunk(2),
    "in another order": lambda x: (x, x.roll(1, 0)),
    "picked": lambda x: (x[:3], x[[0, 2, 1]]),
    "one row moved": lambda x: (x, x[[0, 1, 2, 3, 5, 4]]),
    "one and the next": lambda x: (x[:5], x[1:]),
}


SOURCES = [(parts, source) for parts in APART for source in ("loader", "poisson", "hand")]
SOURCES.remove(("changed halves", "hand"))  # from elsewhere, with nothing in common: taken for views of one sample each


@pytest.mark.parametrize(("parts", "source"), SOURCES)
def test_different_samples_in_one_backward(parts, source):
    """Row k of both would be clipped as one sample: refused, and nothing of them is summed."""
    if source == "poisson":
        loader = DataLoader(TensorDataset(*batch(B)), batch_size=B)
        model, _, wrapped, _, loader = private(loader=loader, poisson_sampling=True, sample_rate=1.0)
    else:
        model, _, wrapped, _, loader = private()
    x, _ = batch() if source == "hand" else next(iter(loader))
    with pytest.raises(ValueError, match="one backward pass of two forwards"):
        sum(wrapped(part).square().sum() for part in APART[parts](x)).backward()
    assert not any(s.any() for s in sums_of(model).values())


def test_two_batches_of_the_loader_in_one_backward():
    _, _, wrapped, _, loader = private()
    (x, y), (x2, y2) = loader
    with pytest.raises(ValueError, match="one backward pass of two forwards"):
        (sse(wrapped(2 * x), y) + sse(wrapped(2 * x2), y2)).backward()
