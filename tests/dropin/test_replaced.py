"""Opacus' own methods and functions that somebody has replaced are what a patched engine keeps to."""

import functools
import sys

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.dropin import patch
from dpfast.dropin.replaced import replaced_in_opacus
from dpfast.optim.optimizer import FusedDPOptimizer

PLACES = [
    (DPOptimizer, "add_noise", "DPOptimizer.add_noise"),
    (DPOptimizer, "scale_grad", "DPOptimizer.scale_grad"),
    (DPOptimizer, "pre_step", "DPOptimizer.pre_step"),
    (DPPerLayerOptimizer, "clip_and_accumulate", "DPPerLayerOptimizer.clip_and_accumulate"),
    (GradSampleModule, "capture_backprops_hook", "GradSampleModule.capture_backprops_hook"),
    (PrivacyEngine, "_prepare_optimizer", "PrivacyEngine._prepare_optimizer"),
    (sys.modules["opacus.optimizers.optimizer"], "_generate_noise", "opacus.optimizers.optimizer._generate_noise"),
    (sys.modules["opacus.privacy_engine"], "get_optimizer_class", "opacus.privacy_engine.get_optimizer_class"),
]


def replacement(stock, how):
    """A function of this file that does what ``stock`` does."""
    if how == "wrapped by name":
        return functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs))
    if how == "without gradients":
        return torch.no_grad()(lambda *args, **kwargs: stock(*args, **kwargs))
    return lambda *args, **kwargs: stock(*args, **kwargs)


@pytest.mark.parametrize("how", ["plain", "wrapped by name", "without gradients"])
@pytest.mark.parametrize("owner, name, said", PLACES, ids=[said for *_, said in PLACES])
def test_it_is_seen(owner, name, said, how, monkeypatch):
    monkeypatch.setattr(owner, name, replacement(getattr(owner, name), how))
    assert replaced_in_opacus() == said


def test_nothing_is_replaced_in_stock_opacus_or_by_dpfast(monkeypatch):
    assert replaced_in_opacus() is None
    monkeypatch.setattr(DPOptimizer, "step", torch.optim.Optimizer.profile_hook_step(DPOptimizer.step))
    dpfast.register()
    try:
        assert replaced_in_opacus() is None
    finally:
        dpfast.unregister()


@pytest.mark.parametrize("replaced", [True, False])
def test_the_engine_keeps_to_it(replaced, monkeypatch, caplog):
    """Noise of one's own is the noise of the step."""
    called = []
    if replaced:
        stock = sys.modules["opacus.optimizers.optimizer"]._generate_noise
        noise = lambda **kwargs: (called.append(1), stock(**kwargs))[1]  # noqa: E731
        monkeypatch.setattr(sys.modules["opacus.optimizers.optimizer"], "_generate_noise", noise)
    data = DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 2)), batch_size=4)
    model = nn.Linear(3, 2)
    monkeypatch.setattr(patch, "first_need", lambda frame: None)  # this very file names what it replaces
    engine = patch.PatchedEngine(accountant="rdp")
    model, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert bool(called) == replaced == ("_generate_noise was replaced" in caplog.text)
    assert isinstance(optimizer, FusedDPOptimizer) != replaced
