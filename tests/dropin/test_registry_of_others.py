"""What others put into Opacus' registries, before register(), after it and after unregister(), is theirs."""

import copy
import functools

import pytest
import torch
from opacus.grad_sample import (
    GradSampleHooks,
    GradSampleHooksFastGradientClipping,
    GradSampleModule,
    register_grad_sampler,
    register_norm_sampler,
)
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.optimizers import DPOptimizer
from torch import nn

import dpfast
from dpfast.dropin import registry

HOOKS, GHOST = GradSampleHooks.GRAD_SAMPLERS, GradSampleHooksFastGradientClipping.GRAD_SAMPLERS
NORMS = GradSampleHooksFastGradientClipping.NORM_SAMPLERS


@pytest.fixture(autouse=True)
def as_before():
    held = [(one, dict(one)) for one in (HOOKS, GHOST, NORMS)]
    method = DPOptimizer.clip_and_accumulate
    yield
    dpfast.unregister()
    for one, before in held:
        one.clear()
        one.update(before)
    DPOptimizer.clip_and_accumulate = method


def mine(layer, activations, backprops):
    return {}


@functools.wraps(compute_linear_grad_sample)  # which takes over the name of the module that it is in
def wrapped(layer, activations, backprops):
    return compute_linear_grad_sample(layer, activations, backprops)


class Callable:
    def __call__(self, layer, activations, backprops):
        return {}


SAMPLERS = {"function": mine, "wrapper": wrapped, "partial": functools.partial(mine), "object": Callable()}


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return SAMPLERS[request.param]


def test_one_from_before_is_kept(sampler):
    register_grad_sampler(nn.Linear)(sampler)
    dpfast.register()
    assert HOOKS[nn.Linear] is GHOST[nn.Linear] is sampler
    assert NORMS[nn.Linear] is registry.norm_sampler, "there is no norm sampler of theirs"
    assert HOOKS[nn.LayerNorm] is registry.grad_sampler
    dpfast.unregister()
    assert HOOKS[nn.Linear] is GHOST[nn.Linear] is sampler


def test_one_from_before_is_replaced_if_asked(sampler):
    stock = HOOKS[nn.Linear]
    register_grad_sampler(nn.Linear)(sampler)
    register_norm_sampler(nn.Conv2d)(sampler)
    dpfast.register(override=True)
    assert HOOKS[nn.Linear] is registry.grad_sampler and NORMS[nn.Conv2d] is registry.norm_sampler
    dpfast.unregister()
    assert HOOKS[nn.Linear] is GHOST[nn.Linear] is NORMS[nn.Conv2d] is sampler is not stock


def test_asked_for_later():
    """After register() has kept it."""
    register_norm_sampler(nn.Linear)(mine)
    dpfast.register()
    dpfast.register(override=True)
    assert NORMS[nn.Linear] is registry.norm_sampler
    dpfast.unregister()
    assert NORMS[nn.Linear] is mine


def test_one_from_in_between_survives(sampler):
    dpfast.register()
    register_grad_sampler([nn.Linear, nn.Bilinear])(sampler)
    register_norm_sampler(nn.RMSNorm)(sampler)
    dpfast.register()
    assert HOOKS[nn.Linear] is sampler and NORMS[nn.RMSNorm] is sampler
    dpfast.unregister()
    for cls in (nn.Linear, nn.Bilinear):
        assert HOOKS[cls] is GHOST[cls] is sampler
    assert NORMS[nn.RMSNorm] is sampler
    assert HOOKS[nn.RMSNorm].__module__.startswith("opacus"), "which they left alone"


def test_one_from_in_between_is_put_back_if_it_was_replaced():
    dpfast.register()
    register_grad_sampler(nn.Linear)(mine)
    dpfast.register(override=True)
    assert HOOKS[nn.Linear] is registry.grad_sampler
    dpfast.unregister()
    assert HOOKS[nn.Linear] is mine


def test_one_of_a_class_without_a_stock_sampler():
    assert nn.ConvTranspose2d not in NORMS
    dpfast.register()
    register_norm_sampler(nn.ConvTranspose2d)(mine)
    dpfast.unregister()
    assert NORMS[nn.ConvTranspose2d] is mine


def test_one_that_was_taken_out_stays_out():
    dpfast.register()
    del HOOKS[nn.Linear]
    dpfast.unregister()
    assert nn.Linear not in HOOKS


def test_a_second_round_leaves_the_first_behind():
    stock = HOOKS[nn.Linear]
    dpfast.register()
    register_grad_sampler(nn.Linear)(mine)
    dpfast.unregister()
    register_grad_sampler(nn.Linear)(stock)
    dpfast.register()
    dpfast.unregister()
    assert HOOKS[nn.Linear] is stock


def clip_of_mine(self):
    raise NotImplementedError


def test_a_way_of_clipping_from_before():
    DPOptimizer.clip_and_accumulate = clip_of_mine
    dpfast.register()
    assert DPOptimizer.clip_and_accumulate is clip_of_mine
    dpfast.register(override=True)
    assert DPOptimizer.clip_and_accumulate is not clip_of_mine
    dpfast.unregister()
    assert DPOptimizer.clip_and_accumulate is clip_of_mine


def test_a_way_of_clipping_from_in_between():
    dpfast.register()
    DPOptimizer.clip_and_accumulate = clip_of_mine
    dpfast.unregister()
    assert DPOptimizer.clip_and_accumulate is clip_of_mine


def test_keys_are_classes():
    """Opacus' FSDP wrapper compares them with the types of modules."""
    dpfast.register()
    assert all(isinstance(cls, type) for cls in (*HOOKS, *NORMS))


def test_layers_of_transformers_once_it_is_there():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    dpfast.register()
    assert HOOKS[Conv1D] is GHOST[Conv1D] is registry.grad_sampler and NORMS[Conv1D] is registry.norm_sampler
    layer, x = Conv1D(3, 4), torch.randn(2, 5, 4)
    twin = copy.deepcopy(layer)
    GradSampleModule(nn.Sequential(layer), loss_reduction="sum")(x).square().sum().backward()
    for sample, g in zip(x, layer.weight.grad_sample, strict=True):
        torch.testing.assert_close(g, torch.autograd.grad(twin(sample).square().sum(), twin.weight)[0])
    dpfast.unregister()
    assert Conv1D not in HOOKS and Conv1D not in NORMS
