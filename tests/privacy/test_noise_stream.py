"""Where the noise comes from: what repeats it, what never does, how large it is, and that it is added once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast.noise.stream import NoiseStream
from tests.helpers import engine_of, loader_of, make_private
from tests.ops.noisy import BF16, F32, F64, require, same

B, D = 8, 5
each_mode = pytest.mark.parametrize("secure", [False, True], ids=["fast", "secure"])


def net(shape=(D, 40, 3)) -> nn.Module:
    return nn.Sequential(nn.Linear(*shape[:2]), nn.Tanh(), nn.Linear(*shape[1:]))


def private(model=None, secure=False, **kw):
    kw = dict(engine=engine_of(secure_mode=secure), noise_multiplier=1.0, lr=0.1) | kw
    kw.setdefault("data_loader", loader_of(B, shuffle=True))  # Opacus' secure mode wants a loader that draws
    model = model or net()
    wrapped, optimizer, loader = make_private(model, **kw)
    return model, wrapped, optimizer, loader


def noise_of(parts, steps=1, data=None):
    """Gradients of steps without a batch, or with one, of each parameter and step."""
    model, wrapped, optimizer, _ = parts
    out = []
    for _ in range(steps):
        if data is not None:
            F.cross_entropy(wrapped(data[0]), data[1]).backward()
        else:
            optimizer.expect_no_samples()
        optimizer.step()
        out += [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
    return out


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("when", ["before make_private", "after it"])
def test_no_seed_of_torchs_repeats_the_noise(when, optimizer):
    """A seed that others know, 42 in every other script, must not give the key away."""
    start, runs = net(), []
    for _ in range(2):
        model = copy.deepcopy(start)
        torch.manual_seed(4)
        parts = private(model, optimizer=optimizer(model.parameters(), lr=0.1))
        if when == "after it":
            torch.manual_seed(4)
        noise_of(parts, 3)
        runs.append([p.detach() for p in model.parameters()])
    assert not any(same(p, q) for p, q in zip(*runs, strict=True))


def test_keys_are_made_of_64_bits_of_the_system(monkeypatch):
    """And of nothing else: no generator is asked, and keys are as many as the system's numbers."""
    drawn = iter(range(1, 99))
    monkeypatch.setattr("dpfast.noise.stream.secrets.randbits", lambda bits: next(drawn) if bits == 32 else 0)
    streams = [NoiseStream() for _ in range(3)]
    assert [s.next(1.0, 1.0, 1, 1.0).key[:3] for s in streams] == [(1, 2, 0), (3, 4, 0), (5, 6, 0)]
    assert streams[0].rounding_key() == (7, 8)


def test_every_bit_of_a_generators_seed_counts():
    """Torch's own generator for the CPU starts from the low 32 alone."""
    seeds = [7, 7 + (1 << 32), 7 + (1 << 62), 8, *(1 << k for k in range(63))]
    keys = [NoiseStream(torch.Generator().manual_seed(seed)).next(1.0, 1.0, 1, 1.0).key for seed in seeds]
    assert len({*keys}) == len({*seeds})
    words = {word for key in keys for word in key[:2]}
    assert len(words) > 2 * len({*seeds}) - 3 and max(words) > 1 << 31
    generator = torch.Generator().manual_seed(7)
    torch.rand(1, generator=generator)
    assert NoiseStream(generator).next(1.0, 1.0, 1, 1.0).key not in keys, "its state counts, not its seed alone"


def test_a_generator_repeats_a_run_whatever_else_is_drawn():
    runs = []
    for seed, other in ((7, 0), (7, 1), (8, 1)):
        torch.manual_seed(other)
        parts = private(noise_generator=torch.Generator().manual_seed(seed))
        torch.randn(other + 1)
        runs.append(noise_of(parts, 2))
    assert same(runs[0], runs[1])
    assert not any(same(p, q) for p, q in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize(
    ("secure", "kw"),
    [
        (False, {}),
        (False, dict(low_precision="stochastic")),
        (False, dict(noise_multiplier=0.0)),
        (False, dict(noise_generator=torch.Generator())),
        (True, {}),
    ],
    ids=["fast", "stochastic", "no noise", "own generator", "secure"],
)
def test_the_global_generator_is_never_drawn_from(secure, kw):
    """What it decides (dropout, say) is the same with and without noise."""
    if "low_precision" in kw:
        require("noisy_sgd_")
    parts = private(secure=secure, **kw)
    before = torch.get_rng_state()
    noise_of(parts, 3)
    assert torch.equal(torch.get_rng_state(), before)


@each_mode
def test_every_parameter_and_step_gets_noise_of_its_own(secure):
    """Three layers of one shape, three steps: no two draws are alike or correlated."""
    model = nn.Sequential(*[nn.Linear(50, 50, bias=False) for _ in range(3)])
    draws = torch.stack([g.flatten().double() for g in noise_of(private(model, secure), 3)])
    table = torch.corrcoef(draws) - torch.eye(len(draws), dtype=F64)
    assert table.abs().max() <= 5.5 / draws.shape[1] ** 0.5
    equal = (draws[:, None] == draws[None]).sum(-1) - torch.eye(len(draws)).long() * draws.shape[1]
    assert equal.max() <= 3
    neighbours = draws[:, 1:] * draws[:, :-1]
    assert neighbours.mean().abs() <= 5 * draws.var() / neighbours.numel() ** 0.5


@each_mode
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize(("clipping", "given"), [("flat", 0.5), ("per_layer", [0.1, 0.2, 0.2, 0.4])])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_its_size(secure, dtype, clipping, given, reduction):
    """σ · S over the expected batch size, within 5 standard errors, and of a normal's shape."""
    model = net((100, 200, 90)).to(dtype)
    kw = dict(clipping=clipping, max_grad_norm=given, loss_reduction=reduction, noise_multiplier=1.7)
    parts = private(model, secure, **kw)
    z = torch.cat([g.double().flatten() for g in noise_of(parts)]) / (1.7 * 0.5 / (B if reduction == "mean" else 1))
    n = len(z)
    assert abs(z.mean()) <= 5 / n**0.5
    assert abs(z.std() - 1) <= 5 / (2 * n) ** 0.5 + (1e-5 if dtype == BF16 else 0)
    assert abs(z.pow(4).mean() - 3) <= 5 * (96 / n) ** 0.5
    assert 3.5 < z.abs().max() < 7


def silent(model) -> None:
    """Every sample's gradient becomes 0: what a step leaves is its noise alone."""
    for p in model.parameters():
        nn.init.zeros_(p)


def test_micro_batches_get_the_noise_of_one_batch():
    """One backward, several, or a BatchMemoryManager: noise is added once, the same bits."""
    x, y = torch.zeros(B, D), torch.zeros(B, 3)
    data = TensorDataset(x, y)
    grads = {}
    for way in ("whole", "pieces", "manager"):
        model = net()
        silent(model)
        kw = dict(noise_generator=torch.Generator().manual_seed(6), loss_reduction="sum")
        _, wrapped, optimizer, loader = private(model, data_loader=DataLoader(data, batch_size=B), **kw)
        if way == "manager":
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as pieces:
                sizes = []
                for a, b in pieces:
                    optimizer.zero_grad()
                    F.mse_loss(wrapped(a), b, reduction="sum").backward()
                    optimizer.step()
                    sizes.append(len(a))
            assert len(sizes) > 1 and sum(sizes) == B
        else:
            for part in [slice(0, B)] if way == "whole" else [slice(0, 3), slice(3, 4), slice(4, B)]:
                F.mse_loss(wrapped(x[part]), y[part], reduction="sum").backward()
            optimizer.step()
        assert optimizer.noise.step == 1
        grads[way] = [p.grad for p in model.parameters()]
    assert all(g.any() for g in grads["whole"])
    assert same(grads["pieces"], grads["whole"]) and same(grads["manager"], grads["whole"])


def test_the_last_step(monkeypatch):
    """2³² steps and no more: then an error, with parameters, sums and accountant as they were."""
    engine = engine_of()
    model, wrapped, optimizer, _ = parts = private(engine=engine)
    optimizer.noise.step = (1 << 32) - 1
    assert all(g.any() for g in noise_of(parts))
    wrapped(torch.randn(B, D)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()], [p.summed_grad.clone() for p in model.parameters()]
    history = copy.deepcopy(engine.accountant.history)
    for _ in range(2):
        with pytest.raises(OverflowError, match="4294967296"):
            optimizer.step()
    assert same([p.detach() for p in model.parameters()], before[0])
    assert same([p.summed_grad for p in model.parameters()], before[1])
    assert engine.accountant.history == history
