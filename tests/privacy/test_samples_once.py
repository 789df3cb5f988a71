"""What counts as a backward pass of a step, what does not, and a sample that would be in two of them."""

import copy
import gc
import itertools
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset, TensorDataset

from dpfast import BatchMemoryManager
from tests.helpers import F64, engine_of, follow, make_private, sse, sums_of
from tests.oracle import Verdict, clipped_sum, per_sample_gradients

B, D, C = 6, 4, 0.05
TWICE = "a second backward pass over samples"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        self.hidden = torch.tanh(self.norm(self.a(x)))
        return self.b(self.hidden)


class Heads(Net):
    def forward(self, x):
        out = super().forward(x)
        return self.hidden, out


def batch(n=B):
    return torch.randn(n, D, dtype=F64), torch.randn(n, 2, dtype=F64)


def private(model=None, loader=None, **kw):
    model = (Net() if model is None else model).double()
    twin = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(*batch(2 * B)), batch_size=B) if loader is None else loader
    options = dict(loss_reduction="sum", max_grad_norm=C, data_loader=loader) | kw
    wrapped, optimizer, loader = make_private(model, **options)
    return model, twin, wrapped, optimizer, loader


def expected(twin, *batches):
    parts = [clipped_sum(per_sample_gradients(twin, (x,), y, sse), C) for x, y in batches]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def check(model, twin, *batches):
    want = expected(twin, *batches)
    for name, got in sums_of(model).items():
        torch.testing.assert_close(got, want[name])


# ---------------------------------------------------------------- item 2: twice before a step


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


# ---------------------------------------------------------------- losses made of gradients alone


def penalty(wrapped, x):
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(wrapped(leaf).square().sum(), leaf, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("physical", [None, 1])
def test_a_loss_of_gradients_is_a_backward_of_the_same_samples(physical):
    loader = DataLoader(TensorDataset(*batch(4)), batch_size=physical or B)
    _, _, wrapped, optimizer, loader = private(loader=loader, max_physical_batch_size=physical)
    x, y = next(iter(loader))
    for first, second in itertools.product((True, False), repeat=2):
        (penalty(wrapped, x) if first else sse(wrapped(x), y)).backward()
        with pytest.raises(ValueError, match=TWICE):
            (penalty(wrapped, x) if second else sse(wrapped(x), y)).backward()
        optimizer.zero_grad()


def test_a_loss_of_gradients_of_different_samples():
    _, _, wrapped, _, loader = private()
    x, _ = next(iter(loader))
    with pytest.raises(ValueError, match="one backward pass of two forwards"):
        (penalty(wrapped, x[:3]) + penalty(wrapped, x[3:])).backward()
    with pytest.raises(ValueError, match="one backward pass of two forwards"):
        (penalty(wrapped, x[:3]) + wrapped(x[3:]).sum()).backward()


# ---------------------------------------------------------------- item 3: clearing drops the batch


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


# ---------------------------------------------------------------- item 4: torch.autograd.grad is no backward


def of_inputs(wrapped, model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(sse(wrapped(x), y), x)


def of_activations(wrapped, model, x, y):
    loss = sse(wrapped(x), y)
    return torch.autograd.grad(loss, model.hidden)


def of_the_output(wrapped, model, x, y):
    out = wrapped(x)
    return torch.autograd.grad(sse(out, y), out)


def of_what_is_not_used(wrapped, model, x, y):
    other = torch.zeros(2, dtype=F64, requires_grad=True)
    x = x.clone().requires_grad_()
    return torch.autograd.grad(sse(wrapped(x), y), [x, other], allow_unused=True)


def with_inputs_named(wrapped, model, x, y):
    x = x.clone().requires_grad_()
    sse(wrapped(x), y).backward(inputs=[x])
    return (x.grad,)


def in_a_loop_without_gradients(wrapped, model, x, y):
    with torch.no_grad():
        for _ in range(2):
            with torch.enable_grad():
                (g,) = of_inputs(wrapped, model, x, y)
    return (g,)


def of_an_empty_batch(wrapped, model, x, y):
    return of_inputs(wrapped, model, x[:0], y[:0])


GRADS = [
    of_inputs,
    of_activations,
    of_the_output,
    of_what_is_not_used,
    with_inputs_named,
    in_a_loop_without_gradients,
    of_an_empty_batch,
]


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("take", GRADS, ids=lambda take: take.__name__)
def test_gradients_of_other_things(take, poisson):
    """No backward of the step: neither its sums nor its divisor change, and it takes none's place."""
    model, twin, wrapped, optimizer, _ = private(poisson_sampling=poisson, loss_reduction="mean")
    x, y = batch()

    def mean(out, y):
        return sse(out, y) / len(out)

    for _ in range(3):
        assert all(g is None or g.isfinite().all() for g in take(wrapped, model, x, y))
    with pytest.raises(ValueError, match="no backward pass"):
        if take is not of_an_empty_batch:
            optimizer.step()
        else:
            raise ValueError("no backward pass: an empty batch needs none")
    optimizer.zero_grad()
    mean(wrapped(x), y).backward()
    norms = wrapped.per_sample_gradient_norms.clone()
    take(wrapped, model, *batch())
    assert torch.equal(norms, wrapped.per_sample_gradient_norms)
    check(model, twin, (x, y))
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected(twin, (x, y))[name] / B)


def test_gradient_first_and_backward_of_the_same_forward():
    """As for a penalty or a saliency map: the one backward counts once."""
    model, twin, wrapped, optimizer, _ = private()
    x, y = batch()
    leaf = x.clone().requires_grad_()
    loss = sse(wrapped(leaf), y)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    loss.backward()
    check(model, twin, (x, y))
    optimizer.step()


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_training(steps, poisson):
    """FGSM and PGD: exact on the samples as they were attacked."""
    model, twin, wrapped, optimizer, loader = private(poisson_sampling=poisson)
    for x, y in loader:
        attacked = x.clone()
        for _ in range(steps):
            attacked.requires_grad_()
            (g,) = torch.autograd.grad(sse(wrapped(attacked), y), attacked)
            attacked = (attacked + 0.01 * g.sign()).detach()
        optimizer.zero_grad()
        sse(wrapped(attacked), y).backward()
        if len(x):
            check(model, follow(twin, model), (attacked, y))
        optimizer.step()


def test_gradients_of_frozen_layers():
    """Nothing of what the pass runs through is trained."""
    model = Net()
    model.a.requires_grad_(False)
    _, _, wrapped, optimizer, _ = private(model)
    x = batch()[0].requires_grad_()
    torch.autograd.grad(wrapped(x).sum(), x)
    with pytest.raises(ValueError, match="no backward pass"):
        optimizer.step()


class Skips(Net):
    """Leaves its parameters out where it is told to."""

    skips = False

    def forward(self, x):
        return x[:, :2] if self.skips else super().forward(x)


def test_a_backward_that_reaches_no_parameter_is_one():
    model, _, wrapped, optimizer, _ = private(Skips())
    x, y = batch()
    sse(wrapped(x), y).backward()
    optimizer.zero_grad()
    model.skips = True
    wrapped((x + 1000).requires_grad_()).sum().backward()
    optimizer.step()
    assert not any(p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------- item 5: a step without a backward


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


# ---------------------------------------------------------------- item 8: several rows of a sample


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
