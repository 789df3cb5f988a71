"""Whole training loops: the same weights as Opacus, physical batches, loaders, and a batch of one for any model."""

import copy

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from tests.helpers import F64, engine_of, follow, make_private, mse, run_fused, sse, sums_of
from tests.oracle import Verdict

LR = 0.005


def net() -> nn.Module:
    conv = nn.Conv2d(1, 3, 3, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)).double()


def dataset(n: int = 24) -> TensorDataset:
    return TensorDataset(torch.randn(n, 1, 4, 4, dtype=F64), torch.randn(n, 2, dtype=F64))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "groups": lambda p: torch.optim.SGD([{"params": list(p)[:2]}, {"params": list(p)[2:], "lr": LR / 10}], lr=LR),
}


def parts(model, name="SGD"):
    """The optimizer; a list of groups needs its parameters read once."""
    return OPTIMIZERS[name](list(model.parameters()))


def trained(engine_class, model, data, optimizer, loss=mse, epochs=2, batch=6, twice=False, **kw):
    """Weights after training on ``data`` in order; ``twice``: two batches for each step."""
    engine = engine_class(accountant="rdp")
    options = dict(noise_multiplier=0.0, max_grad_norm=1e6, poisson_sampling=False) | kw
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=parts(model, optimizer),
        data_loader=DataLoader(data, batch_size=batch),
        **options,
    )
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            loss(wrapped(x), y).backward()
            if not twice or i % 2:
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def largest_gap(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_weights_as_opacus_unclipped(optimizer, reduction):
    """Where no sample is clipped the two differ by rounding alone: a few ulps for each of eight steps."""
    model, data = net(), dataset()
    kw = dict(loss_reduction=reduction, loss=mse if reduction == "mean" else sse)
    theirs = trained(opacus.PrivacyEngine, copy.deepcopy(model), data, optimizer, **kw)
    ours = trained(dpfast.PrivacyEngine, copy.deepcopy(model), data, optimizer, **kw)
    for a, b, start in zip(ours, theirs, model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, start)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_weights_as_opacus_clipped(optimizer, reduction):
    """Opacus divides by ``norm + 1e-6``: its sums are short by up to 1e-6/C of themselves.

    So the whole way that the weights went may differ by about that (twice over where Adam divides by it).
    """
    model, data = net(), dataset()
    bound = 0.1
    kw = dict(loss_reduction=reduction, loss=mse if reduction == "mean" else sse, max_grad_norm=bound)
    theirs = trained(opacus.PrivacyEngine, copy.deepcopy(model), data, optimizer, **kw)
    ours = trained(dpfast.PrivacyEngine, copy.deepcopy(model), data, optimizer, **kw)
    way = largest_gap(ours, [p.detach() for p in model.parameters()])
    assert largest_gap(ours, theirs) <= 2 * 8 * way * 1e-6 / bound


def test_the_same_weights_as_opacus_with_two_batches_a_step():
    """The step divides by the number of batches too."""
    model, data = net(), dataset()
    theirs = trained(opacus.PrivacyEngine, copy.deepcopy(model), data, "SGD", twice=True)
    ours = trained(dpfast.PrivacyEngine, copy.deepcopy(model), data, "SGD", twice=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_weights_as_opacus_per_layer():
    model, data = net(), dataset()
    kw = dict(clipping="per_layer", max_grad_norm=[1e5] * len(list(model.parameters())))
    theirs = trained(opacus.PrivacyEngine, copy.deepcopy(model), data, "SGD", **kw)
    ours = trained(dpfast.PrivacyEngine, copy.deepcopy(model), data, "SGD", **kw)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("physical", [1, 3, 5, 12, 100])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_batch_memory_manager(optimizer, physical):
    """Small physical batches give what one batch gives."""
    model, data = net(), dataset()
    whole = trained(dpfast.PrivacyEngine, copy.deepcopy(model), data, optimizer, batch=12, max_grad_norm=0.1)
    wrapped, private, loader = make_private(
        model, optimizer=parts(model, optimizer), data_loader=DataLoader(data, batch_size=12), max_grad_norm=0.1
    )
    steps = []
    private.attach_step_hook(lambda o: steps.append(o))
    for _ in range(2):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=private) as batches:
            for x, y in batches:
                assert len(x) <= physical
                mse(wrapped(x), y).backward()
                private.step()
                private.zero_grad()
    assert len(steps) == 4
    for a, p in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.detach())


def test_poisson_sampling_gives_opacus_loader():
    data = dataset()
    loader = DataLoader(data, batch_size=6)
    model = net()
    engine = engine_of()
    _, optimizer, private = make_private(model, engine=engine, data_loader=loader, poisson_sampling=True)
    assert isinstance(private, DPDataLoader)
    assert private.dataset is data
    assert optimizer.expected_batch_size == 6
    assert engine.dataset is data
    _, _, same = make_private(net(), data_loader=private, poisson_sampling=False)
    assert same is private


def test_stepping_twice_on_the_same_gradients_is_refused():
    """As in Opacus: they would be used twice and accounted once."""
    model, data = net(), dataset(4)
    wrapped, optimizer, _ = make_private(model)
    mse(wrapped(data.tensors[0]), data.tensors[1]).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.step()


def test_zero_grad_before_the_backward_only():
    """The other common loop: zero_grad, forward, backward, step."""
    model, data = net(), dataset(4)
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, lr=LR, max_grad_norm=0.1)
    for _ in range(3):
        verdict = Verdict(follow(twin, model), (data.tensors[0],), data.tensors[1], mse, 0.1)
        optimizer.zero_grad()
        mse(wrapped(data.tensors[0]), data.tensors[1]).backward()
        verdict.check_sums(sums_of(model))
        optimizer.step()


def test_the_step_is_the_optimizers_on_the_noisy_mean():
    """σ = 0: w − lr · (clipped sum) / (expected batch), also where the batch was smaller."""
    model, data = net(), dataset(3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped, optimizer, _ = make_private(model, size=8, lr=LR, max_grad_norm=0.1)
    mse(wrapped(data.tensors[0]), data.tensors[1]).backward()
    sums = sums_of(model)
    optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] - LR * sums[n] / 8)


def test_a_closure():
    model, data = net(), dataset(4)
    wrapped, optimizer, _ = make_private(model, lr=LR)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        loss = mse(wrapped(data.tensors[0]), data.tensors[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_training_in_low_precision_moves_the_weights():
    """bfloat16 parameters: float32 sums, and a finite step."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to(torch.bfloat16)
    x, y = torch.randn(6, 4, dtype=torch.bfloat16), torch.randn(6, 2, dtype=torch.bfloat16)
    wrapped, optimizer, _ = make_private(model, size=6, lr=0.5, noise_multiplier=1.0, loss_reduction="sum")
    sse(wrapped(x), y).backward()
    assert {p.summed_grad.dtype for p in model.parameters()} == {torch.float32}
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for a, p in zip(before, model.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert p.isfinite().all()
        assert not torch.equal(a, p)


class WithLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True, num_layers=2), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class WithLoop(nn.Module):
    """Control flow that depends on the data, bare parameters, a borrowed weight: nothing serves this one."""

    def __init__(self):
        super().__init__()
        self.lin, self.w = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        x = x.sum(1)
        for _ in range(int(x.abs().sum().item()) % 3 + 1):
            x = torch.tanh(self.lin(x)) + F.linear(x, self.lin.weight.t())
        return x @ self.w


@pytest.mark.parametrize("kind", [WithLSTM, WithLoop])
def test_a_physical_batch_of_one_for_any_model(kind):
    """There the ordinary gradient is the per-sample gradient."""
    model = kind().double()
    twin = copy.deepcopy(model)
    data = TensorDataset(torch.randn(8, 5, 3, dtype=F64), torch.randn(8, 2, dtype=F64))
    wrapped, optimizer, loader = make_private(
        model,
        data_loader=DataLoader(data, batch_size=4),
        max_grad_norm=0.05,
        lr=LR,
        max_physical_batch_size=1,
    )
    assert isinstance(optimizer, DPOptimizer)
    rows = iter(range(0, 8, 4))
    seen = 0
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as batches:
        for x, y in batches:
            if seen % 4 == 0:
                start = next(rows)
                group = tuple(t[start : start + 4] for t in data.tensors)
                verdict = Verdict(follow(twin, model), (group[0],), group[1], mse, 0.05)
            mse(wrapped(x), y).backward()
            seen += 1
            if seen % 4 == 0:
                verdict.check_sums(sums_of(model))
            optimizer.step()
            optimizer.zero_grad()
    assert seen == 8


@pytest.mark.parametrize("kind", [WithLSTM, WithLoop])
def test_larger_batches_are_refused_there(kind):
    wrapped, _, _ = make_private(kind(), max_physical_batch_size=1)
    with pytest.raises((ValueError, RuntimeError), match="max_physical_batch_size"):
        mse(wrapped(torch.randn(3, 5, 3)), torch.randn(3, 2)).backward()


def test_an_ordinary_model_is_as_exact_with_that_option():
    model = net()
    x, y = torch.randn(1, 1, 4, 4, dtype=F64), torch.randn(1, 2, dtype=F64)
    verdict = Verdict(model, (x,), y, mse)
    run = run_fused(model, ((x,), y), mse, verdict.max_grad_norm, max_physical_batch_size=1)
    verdict.check_norms(run.norms)
    verdict.check_sums(run.sums)
