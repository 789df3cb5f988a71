"""PrivacyEngine: what it returns, the modes that are Opacus' own, accounting, checkpoints."""

import copy
import io

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from opacus.schedulers import ExponentialGradClip, StepNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from tests.helpers import F64, engine_of, make_private, mse, sums_of
from tests.oracle import Verdict

ACCOUNTANTS = ["rdp", "prv", "gdp"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def data(n: int = 24, batch: int = 6) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(n, 4), torch.randn(n, 2)), batch_size=batch)


def stock(engine_class=opacus.PrivacyEngine, model=None, accountant="rdp", **kw):
    """The same call to either engine: ``(engine, what make_private returned)``."""
    model = net() if model is None else model
    engine = engine_class(accountant=accountant)
    options = dict(noise_multiplier=1.0, max_grad_norm=1.0, data_loader=data()) | kw
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return engine, engine.make_private(module=model, optimizer=optimizer, **options)


def test_it_is_opacus_engine():
    assert issubclass(dpfast.PrivacyEngine, opacus.PrivacyEngine)
    assert isinstance(engine_of("prv", secure_mode=False), opacus.PrivacyEngine)


def test_three_things_by_default():
    wrapped, optimizer, loader = make_private(net())
    assert isinstance(wrapped, nn.Module)
    assert isinstance(optimizer, DPOptimizer)
    assert isinstance(loader, DataLoader)


def test_four_things_with_a_criterion():
    """A ghost script changes its mode string alone."""
    model = net()
    out = make_private(model, criterion=nn.MSELoss(), grad_sample_mode="fused", max_grad_norm=0.1)
    assert len(out) == 4
    wrapped, optimizer, criterion, _ = out
    x, y = torch.randn(4, 4), torch.randn(4, 2)
    loss = criterion(wrapped(x), y)
    assert loss.item() == pytest.approx(mse(model(x), y).item())
    loss.backward()
    assert wrapped.per_sample_gradient_norms.shape == (4,)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_other_modes_are_opacus_untouched(mode):
    _, theirs = stock(grad_sample_mode=mode)
    _, ours = stock(dpfast.PrivacyEngine, grad_sample_mode=mode)
    assert [type(t) for t in ours] == [type(t) for t in theirs]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="bogus"):
        stock(dpfast.PrivacyEngine, grad_sample_mode="bogus")


def test_the_optimizers_attributes_are_opacus():
    original = torch.optim.SGD((model := net()).parameters(), lr=0.5)
    _, optimizer, _ = make_private(
        model, optimizer=original, size=7, noise_multiplier=1.5, max_grad_norm=0.3, loss_reduction="sum"
    )
    assert optimizer.original_optimizer is original
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm) == (1.5, 0.3)
    assert (optimizer.expected_batch_size, optimizer.loss_reduction) == (7, "sum")
    assert optimizer.param_groups is original.param_groups
    assert [id(p) for p in optimizer.params] == [id(p) for p in model.parameters()]
    assert optimizer.state_dict() == original.state_dict()


def test_learning_rate_schedulers_work():
    _, optimizer, _ = make_private(net(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.zero_grad()
    scheduler.step()
    assert optimizer.original_optimizer.param_groups[0]["lr"] == 0.5


def train(engine, parts, epochs=2):
    model, optimizer, loader = parts
    for _ in range(epochs):
        for x, y in loader:
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return engine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_accounting_is_opacus(accountant, poisson):
    kw = dict(accountant=accountant, poisson_sampling=poisson)
    theirs, ours = train(*stock(**kw)), train(*stock(dpfast.PrivacyEngine, **kw))
    assert ours.accountant.history == theirs.accountant.history
    assert ours.get_epsilon(1e-5) == theirs.get_epsilon(1e-5)
    assert type(ours.accountant) is type(theirs.accountant)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_make_private_with_epsilon(accountant):
    model, loader = net(), data(60, 6)
    engine = engine_of(accountant)
    out = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        target_epsilon=5.0,
        target_delta=1e-3,
        epochs=3,
        max_grad_norm=1.0,
    )
    assert len(out) == 3
    sigma = get_noise_multiplier(
        target_epsilon=5.0, target_delta=1e-3, sample_rate=0.1, epochs=3, accountant=accountant
    )
    assert out[1].noise_multiplier == pytest.approx(sigma, rel=2e-3)  # both spend 4.99 to 5
    assert 4.98 <= train(engine, out, epochs=3).get_epsilon(1e-3) <= 5.0


@pytest.mark.parametrize("form", ["path", "buffer"])
def test_checkpoint(form, tmp_path):
    """Opacus' keys, and everything comes back in new objects."""
    target = tmp_path / "c.pt" if form == "path" else io.BytesIO()
    engine = engine_of()
    parts = make_private(net(), engine=engine, noise_multiplier=1.0, optimizer=None, data_loader=data(), lr=0.1)
    model, optimizer, _ = parts
    schedulers = StepNoise(optimizer, step_size=1, gamma=0.9), ExponentialGradClip(optimizer, gamma=0.8)
    train(engine, parts)
    for scheduler in schedulers:
        scheduler.step()
    engine.save_checkpoint(
        path=target,
        module=model,
        optimizer=optimizer,
        noise_scheduler=schedulers[0],
        grad_clip_scheduler=schedulers[1],
        checkpoint_dict={"mine": 3},
    )
    if form == "buffer":
        target.seek(0)
    assert set(torch.load(target, weights_only=True)) == {
        "mine",
        "module_state_dict",
        "privacy_accountant_state_dict",
        "optimizer_state_dict",
        "noise_scheduler_state_dict",
        "grad_clip_scheduler_state_dict",
        "plan_state_dict",
        "runs",
        "unit",
    }
    if form == "buffer":
        target.seek(0)
    fresh = engine_of()
    other, other_optimizer, _ = make_private(net(), engine=fresh, noise_multiplier=1.0, data_loader=data())
    noise, clip = StepNoise(other_optimizer, step_size=3, gamma=0.2), ExponentialGradClip(other_optimizer, gamma=0.1)
    rest = fresh.load_checkpoint(
        path=target, module=other, optimizer=other_optimizer, noise_scheduler=noise, grad_clip_scheduler=clip
    )
    assert rest["mine"] == 3
    assert fresh.accountant.history == engine.accountant.history
    assert other_optimizer.state_dict() == optimizer.state_dict()
    assert noise.state_dict() == schedulers[0].state_dict()
    assert clip.state_dict() == schedulers[1].state_dict()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_opacus_is_read(tmp_path):
    """A run may move from stock Opacus to the fused mode half-way."""
    theirs, (model, optimizer, _) = stock(poisson_sampling=False)
    theirs.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    ours, (other, other_optimizer, _) = stock(dpfast.PrivacyEngine, poisson_sampling=False)
    ours.load_checkpoint(path=tmp_path / "c.pt", module=other, optimizer=other_optimizer)
    assert list(other.state_dict()) == list(model.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_is_compatible_and_validate():
    engine = engine_of()
    parts = dict(optimizer=None, data_loader=None)
    assert engine.is_compatible(module=net(), **parts)
    engine.validate(module=net(), **parts)
    bad = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert not engine.is_compatible(module=bad, **parts)
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match="BatchNorm"):
        engine.validate(module=bad, **parts)
    fixed = dpfast.PrivacyEngine.get_compatible_module(bad)
    assert engine.is_compatible(module=fixed, **parts)


def test_attention_is_compatible_here():
    """nn.MultiheadAttention needs no replacement in the fused mode, unlike in Opacus'."""
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    assert engine_of().is_compatible(module=model, optimizer=None, data_loader=None)


def test_private_again_with_another_bound():
    """As in Opacus: a module that is private already, and its optimizer, are taken as they are."""
    model = net().double()
    twin = copy.deepcopy(model)
    engine = engine_of()
    wrapped, optimizer, _ = make_private(model, engine=engine, max_grad_norm=5.0)
    again, optimizer, _ = make_private(wrapped, engine=engine, optimizer=optimizer, max_grad_norm=0.1)
    assert again is wrapped
    assert not isinstance(optimizer.original_optimizer, DPOptimizer)
    x, y = torch.randn(4, 4, dtype=F64), torch.randn(4, 2, dtype=F64)
    verdict = Verdict(twin, (x,), y, mse, 0.1)
    mse(again(x), y).backward()
    verdict.check_sums(sums_of(model))


def test_a_loader_without_batches_is_refused_by_name():
    loader = DataLoader(TensorDataset(torch.randn(3, 4), torch.randn(3, 2)), batch_size=6, drop_last=True)
    with pytest.raises(ValueError, match="data_loader has no batches"):
        stock(dpfast.PrivacyEngine, data_loader=loader, poisson_sampling=False)
