"""register() puts our samplers into Opacus' own registries; unregister() takes exactly them out again."""

import opacus
import pytest
import torch
from opacus.grad_sample import (
    GradSampleHooks,
    GradSampleHooksFastGradientClipping,
    GradSampleHooksFastGradientClippingFSDP,
    GradSampleHooksFastGradientClippingTP,
    GradSampleModule,
    register_norm_sampler,
)
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn

import dpfast
from tests.helpers import F32, F64, loader_of, mse
from tests.oracle import Verdict
from tests.zoo import Bag, First, vectors, words

REGISTRIES = {
    "grad": GradSampleHooks.GRAD_SAMPLERS,
    "ghost grad": GradSampleHooksFastGradientClipping.GRAD_SAMPLERS,
    "ghost norm": GradSampleHooksFastGradientClipping.NORM_SAMPLERS,
    "fsdp norm": GradSampleHooksFastGradientClippingFSDP.NORM_SAMPLERS,
    "tp norm": GradSampleHooksFastGradientClippingTP.NORM_SAMPLERS,
}
LAYERS = [
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
]


def everything() -> dict:
    return {name: dict(registry) for name, registry in REGISTRIES.items()}


@pytest.fixture(autouse=True)
def original():
    """The registries as Opacus made them, before and after each test."""
    before = everything()
    yield before
    dpfast.unregister()
    assert everything() == before


@pytest.fixture
def registered(original):
    dpfast.register()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda c: c.__name__)
def test_every_family_has_samplers(layer, registered):
    norm = REGISTRIES["ghost norm"][layer]
    assert norm.__module__.startswith("dpfast")
    assert REGISTRIES["grad"][layer].__module__.startswith("dpfast")


def test_unregister_restores_exactly(original):
    dpfast.register()
    assert everything() != original
    dpfast.unregister()
    assert everything() == original
    for name, registry in original.items():
        assert list(REGISTRIES[name]) == list(registry), "the order too"


def test_registering_twice_is_registering_once(original):
    dpfast.register()
    once = everything()
    dpfast.register()
    assert everything() == once
    dpfast.unregister()
    assert everything() == original


def test_unregister_without_register(original):
    dpfast.unregister()
    assert everything() == original


def test_a_users_own_sampler_is_kept():
    class Mine(nn.Linear):
        pass

    register_norm_sampler(Mine)(sampler := lambda layer, activations, backprops: {})
    try:
        dpfast.register()
        assert REGISTRIES["ghost norm"][Mine] is sampler
        dpfast.unregister()
        assert REGISTRIES["ghost norm"][Mine] is sampler
    finally:
        del REGISTRIES["ghost norm"][Mine]


def test_importing_registers_nothing(original):
    assert not any(f.__module__.startswith("dpfast") for registry in original.values() for f in registry.values())


def conv(layer, channels=4):
    kind = {"1": nn.Conv1d, "2": nn.Conv2d, "3": nn.Conv3d}[type(layer).__name__[-2]]
    return nn.Sequential(kind(channels, channels, 1), nn.Tanh(), layer)


NETS = {
    "Linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), vectors(6, 4)),
    "Linear, 2-D": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), vectors(4)),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), words(5, 7)),
    "Embedding, padding": (lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=1)), words(5, 7)),
    "EmbeddingBag": (lambda: nn.Sequential(Bag(flat=False), nn.Linear(4, 3)), words(3, 7)),
    "EmbeddingBag, offsets": (lambda: nn.Sequential(Bag(flat=True), nn.Linear(4, 3)), words(3, 7)),
    "Conv1d": (lambda: conv(nn.Conv1d(4, 6, 3, groups=2, dilation=2)), vectors(4, 9)),
    "Conv2d": (lambda: conv(nn.Conv2d(4, 6, 3, stride=2, padding=1)), vectors(4, 5, 6)),
    "Conv2d, circular": (lambda: conv(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), vectors(4, 4, 4)),
    "Conv2d, reflect": (lambda: conv(nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect")), vectors(4, 4, 4)),
    "Conv2d, same": (lambda: conv(nn.Conv2d(4, 6, 2, padding="same")), vectors(4, 4, 4)),
    "Conv3d": (lambda: conv(nn.Conv3d(4, 4, 2, groups=4)), vectors(4, 3, 4, 3)),
    "ConvTranspose1d": (lambda: conv(nn.ConvTranspose1d(4, 3, 3, stride=2)), vectors(4, 5)),
    "ConvTranspose2d": (lambda: conv(nn.ConvTranspose2d(4, 6, 3, groups=2)), vectors(4, 3, 3)),
    "ConvTranspose3d": (lambda: conv(nn.ConvTranspose3d(4, 2, 2)), vectors(4, 2, 3, 2)),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), vectors(6, 4)),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)), vectors(6, 4)),
    "GroupNorm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), vectors(2, 3, 3)),
    "InstanceNorm1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True)),
        vectors(2, 5),
    ),
    "InstanceNorm2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.InstanceNorm2d(4, affine=True)),
        vectors(2, 3, 3),
    ),
    "InstanceNorm3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True)),
        vectors(2, 3, 2, 2),
    ),
    "DPMultiheadAttention": (
        # add_bias_kv is left out: stock Opacus takes the batch of its SequenceBias from the wrong dimension
        lambda: First(DPMultiheadAttention(4, 2, batch_first=True), 3),
        vectors(5, 4),
    ),
    "DPRNN": (lambda: First(DPRNN(4, 3, batch_first=True)), vectors(5, 4)),
    "DPGRU": (lambda: First(DPGRU(4, 3, batch_first=True, bidirectional=True)), vectors(5, 4)),
    "DPLSTM": (lambda: First(DPLSTM(4, 3, batch_first=True, num_layers=2)), vectors(5, 4)),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", NETS)
def test_stock_ghost_has_exact_norms(name, dtype, registered):
    make, draw = NETS[name]
    model, (x,) = make().to(dtype), draw(4)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        target = 2 * torch.randn_like(model(x))
    verdict = Verdict(model, (x,), target, mse)
    engine = opacus.PrivacyEngine(accountant="rdp")
    wrapped, _, criterion, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.MSELoss(),
        data_loader=loader_of(4),
        noise_multiplier=0.0,
        max_grad_norm=verdict.max_grad_norm,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )
    # the first of Opacus' two backwards, which is where its norms come from
    criterion(wrapped(x), target).loss_per_sample.flatten(1).mean(1).mean().backward()
    verdict.check_norms(wrapped.get_norm_sample(), certified=True)


@pytest.mark.parametrize("name", NETS)
def test_stock_hooks_have_exact_gradients(name, registered):
    make, draw = NETS[name]
    model, (x,) = make().double(), draw(4)
    with torch.no_grad():
        target = 2 * torch.randn_like(model(x))
    verdict = Verdict(model, (x,), target, mse)
    wrapped = GradSampleModule(model)
    mse(wrapped(x), target).backward()
    for p_name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, verdict.grads[p_name])
