"""``BatchMemoryManager(pad=...)``: physical batches of one size or a few, whose padding contributes exactly nothing."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import BatchMemoryManager
from dpfast.data.physical_batches import padded
from tests.helpers import engine_of, mse, sse

N, D, ROWS = 40, 3, 6
NOISE = dict(noise_multiplier=1.0, max_grad_norm=0.5)


def private(rate=0.08, data=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2))
    data = data or TensorDataset(torch.randn(N, D), torch.randn(N, 2))
    given = NOISE | dict(sample_rate=rate, expected_batch_size=rate * len(data)) | options
    return engine_of().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
        data_loader=DataLoader(data, batch_size=4),
        noise_generator=torch.Generator().manual_seed(1),
        **given,
    )


def train(model, optimizer, loader, pad, change=lambda x, y: (x, y), loss=mse):
    """Shapes of all physical batches, and parameters after each step."""
    seen, values = [], []
    torch.manual_seed(3)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=ROWS, optimizer=optimizer, pad=pad) as physical:
        for x, y in physical:
            seen.append((*x.shape, *y.shape))
            x, y = change(x, y)
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return seen, values


@pytest.mark.parametrize("options", [{}, dict(clipping="per_layer"), dict(clipping_fn="automatic")], ids=str)
@pytest.mark.parametrize("rate", [0.02, 0.3])
@pytest.mark.parametrize("pad", [True, 4])
def test_padded_batches_train_as_others_do(pad, rate, options):
    (shapes, plain), (same, got) = (train(*private(rate, **options), pad=pad) for pad in (False, pad))
    wanted = {ROWS} if pad is True else {4, ROWS}  # the next multiple, and no more than a physical batch may have
    found = {rows for rows, *_ in same}
    assert set(same) == {(rows, D, rows, 2) for rows in found}
    assert found == wanted if rate > 0.1 else found <= wanted
    sizes = [shape[0] for shape in shapes]
    assert all(given[0] <= rows[0] for given, rows in zip(shapes, same, strict=True))
    assert len(sizes) == len(same) and min(sizes) < ROWS and (rate > 0.1 or 0 in sizes)
    for one, other in zip(plain, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_in_the_padding_does_not_matter():
    """The same bits, whatever the rows behind the samples are, NaN and infinite ones among them."""

    def filled(value):
        def change(x, y):
            x = x.clone()
            x[~x.any(1)] = value
            return x, y

        return change

    model, optimizer, loader = private()
    _, zeros = train(model, optimizer, loader, True)
    assert model.nonfinite_samples == 0
    for value in (1e3, torch.nan, torch.inf):
        model, optimizer, loader = private()
        _, other = train(model, optimizer, loader, True, filled(value))
        assert all(torch.equal(a, b) for a, b in zip(zeros, other, strict=True))
        assert model.nonfinite_samples == 0  # they are no samples that were lost


def test_one_sample_moves_the_sum_by_at_most_c():
    """Of a batch of all samples: with each of them, and with it left out and padding in its place."""
    data = TensorDataset(torch.randn(ROWS - 1, D) * 10, torch.randn(ROWS - 1, 2))

    def summed(data):
        model, optimizer, loader = private(1.0, data=data, expected_batch_size=4, loss_reduction="sum")
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=ROWS, optimizer=optimizer, pad=True
        ) as physical:
            x, y = next(iter(physical))
            assert len(x) == ROWS
            sse(model(x), y).backward()
        return torch.cat([p.summed_grad.flatten() for p in model.parameters()]).double()

    whole = summed(data)
    norms = []
    for k in range(len(data)):
        left = [i for i in range(len(data)) if i != k]
        norms.append((whole - summed(TensorDataset(*data[left]))).norm().item())
    assert max(norms) <= NOISE["max_grad_norm"] * (1 + 1e-6) and max(norms) > 0.9 * NOISE["max_grad_norm"]


def test_norms_and_counts_are_of_samples_alone():
    given = dict(target_unclipped_quantile=0.5, clipbound_learning_rate=0.5, unclipped_num_std=5.0)
    given |= dict(clipping="adaptive", max_clipbound=10.0, min_clipbound=0.01)
    found = []
    for pad in (False, True):
        model, optimizer, loader = private(0.1, **given)
        train(model, optimizer, loader, pad)
        found.append((optimizer.max_grad_norm, model.per_sample_gradient_norms))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and found[0][0] != 0.5
    assert len(found[0][1]) == len(found[1][1]) < ROWS


def test_rows_on_the_way_to_the_model():
    """Cast, moved and cut out of a larger tensor: still in the loader's order."""
    changes = [
        lambda x, y: (x.double().float(), y),
        lambda x, y: (x * 2 - 1, y),
        lambda x, y: (torch.cat([x, x])[:ROWS], y),
    ]
    for change in changes:
        _, values = train(*private(), pad=True, change=change)
        assert torch.stack(values).isfinite().all()


def test_parts_of_a_padded_batch_are_known():
    """The first rows alone: padding that is left away is no row of the backward."""
    (_, plain), (_, got) = (train(*private(0.05), pad=pad, change=lambda x, y: (x[:5], y[:5])) for pad in (False, True))
    for one, other in zip(plain, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_that_cannot_be_told_apart_are_refused():
    model, optimizer, loader = private(0.05)
    with pytest.raises(ValueError, match="pad: it cannot be told which rows"):
        train(model, optimizer, loader, True, lambda x, y: (x.repeat_interleave(2, 0), y.repeat_interleave(2, 0)))


Batch = namedtuple("Batch", ["x", "mask", "name"])


def test_every_tensor_of_a_batch_is_padded():
    x, mask = torch.ones(2, 3), torch.ones(2, dtype=torch.bool)
    for batch in ([x, mask, "a"], (x, mask, "a"), Batch(x, mask, "a"), {"x": x, "mask": mask, "name": "a"}):
        out = padded(batch, 2, 5)
        assert type(out) is type(batch)
        values = list(out.values()) if isinstance(out, dict) else list(out)
        assert values[0].shape == (5, 3) and values[0][:2].eq(1).all() and not values[0][2:].any()
        assert values[1].dtype == torch.bool and values[1].tolist() == [True, True, False, False, False]
        assert values[2] == "a"
    shared = torch.ones(7)
    assert padded([x, shared], 2, 5)[1] is shared
    assert padded([x], 2, 2)[0] is x
    assert padded([x[:0]], 0, 5)[0].shape == (5, 3)


def test_a_batch_without_such_tensors_is_refused():
    with pytest.raises(ValueError, match=r"pad: a batch of 2 samples has tensors of shapes \[\[3, 2\]\]"):
        padded([torch.ones(3, 2)], 2, 5)


def test_opacus_modes_have_no_padding():
    _, optimizer, loader = private(grad_sample_mode="hooks", sample_rate=None, expected_batch_size=None)
    with pytest.raises(ValueError, match="pad=-3: give True, False, or"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer, pad=-3)
    with pytest.raises(ValueError, match="pad=True: the fused mode has it"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer, pad=True).__enter__()


def test_nothing_is_compiled_twice():
    """A compiled model over padded Poisson batches: the shapes of the first are those of all."""
    compiled = []

    def backend(graph, examples):
        compiled.append([x.shape for x in examples if isinstance(x, torch.Tensor)])
        return graph.forward

    model, optimizer, loader = private(0.04)
    torch._dynamo.reset()
    _, values = train(torch.compile(model, backend=backend), optimizer, loader, True)
    first = len(compiled)
    _, more = train(torch.compile(model, backend=backend), optimizer, loader, True)
    assert 0 < first == len(compiled) and len(values) + len(more) > 20
