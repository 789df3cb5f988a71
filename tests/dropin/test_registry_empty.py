"""Samplers of ours in stock Opacus where there is nothing: no samples, no positions, no ids."""

import opacus
import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.layers import DPRNN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.dropin import registry
from tests.dropin.test_registry import NETS
from tests.helpers import BF16, F32, F64
from tests.zoo import First

# Their own forwards fail on an empty batch, torch's and Opacus': no sampler is asked.
NO_FORWARD = {"InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "DPMultiheadAttention"}
EMPTY = [name for name in NETS if name not in NO_FORWARD]


@pytest.fixture(autouse=True)
def registered():
    dpfast.register()
    yield
    dpfast.unregister()


def empty(name, dtype):
    make, draw = NETS[name]
    (x,) = draw(3)
    return make().to(dtype), (x.to(dtype) if x.is_floating_point() else x)[:0]


def all_grad_samples(model, x):
    wrapped = GradSampleModule(model)
    wrapped(x).sum().backward()
    return {name: p.grad_sample for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize("name", EMPTY)
def test_hooks_have_no_gradients(name, dtype):
    model, x = empty(name, dtype)
    for p_name, samples in all_grad_samples(model, x).items():
        p = model.get_parameter(p_name)
        assert samples.shape == (0, *p.shape) and samples.dtype == p.dtype, p_name


@pytest.mark.parametrize("ghost", [True, False], ids=["ghost", "fast gradient clipping"])
@pytest.mark.parametrize("name", EMPTY)
def test_ghost_has_no_norms(name, ghost):
    model, x = empty(name, F32)
    wrapped = GradSampleModuleFastGradientClipping(model, use_ghost_clipping=ghost)
    wrapped(x).sum().backward()
    for p in model.parameters():
        assert p._norm_sample.shape == (0,) and p._norm_sample.dtype == F32
    assert wrapped.get_clipping_coef().shape == (0,)


@pytest.mark.parametrize("cls", [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
def test_samplers_of_instance_norms(cls):
    layer = cls(4, affine=True)
    x = torch.randn(0, 4, *[2] * int(cls.__name__[-2]))
    assert {tuple(g.shape) for g in registry.grad_sampler(layer, [x], x).values()} == {(0, 4)}
    assert [n.shape for n in registry.norm_sampler(layer, [x], x).values()] == [(0,), (0,)]


def test_frozen_parameters_get_nothing():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    x, G = torch.randn(0, 3), torch.randn(0, 2)
    assert [*registry.grad_sampler(layer, [x], G)] == [*registry.norm_sampler(layer, [x], G)] == [layer.weight]


NOTHING_IN = {  # samples, but nothing to take a gradient of
    "no positions": (nn.Linear(3, 2), [(4, 0, 3)], (4, 0, 2)),
    "no inputs": (nn.Linear(0, 2), [(4, 0)], (4, 2)),
    "no outputs": (nn.Linear(3, 0), [(4, 3)], (4, 0)),
    "no texts": (nn.Embedding(5, 3), [(4, 0)], (4, 0, 3)),
    "no rows to normalise": (nn.LayerNorm(3), [(4, 0, 3)], (4, 0, 3)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", NOTHING_IN)
def test_samples_with_nothing_in_them(name):
    layer, inputs, output = NOTHING_IN[name]
    embeds = isinstance(layer, nn.Embedding)
    inputs = [torch.zeros(shape, dtype=torch.long) if embeds else torch.randn(shape) for shape in inputs]
    G = torch.randn(output)
    samples, norms = registry.grad_sampler(layer, inputs, G), registry.norm_sampler(layer, inputs, G)
    assert {*samples} == {*norms} == {*layer.parameters()}
    for p in layer.parameters():
        one_by_one = [
            torch.autograd.grad(layer(*[x[i : i + 1] for x in inputs]), p, G[i : i + 1], allow_unused=True)[0]
            for i in range(4)
        ]
        torch.testing.assert_close(samples[p], torch.stack(one_by_one))
        torch.testing.assert_close(norms[p], torch.stack([g.norm() for g in one_by_one]))


def test_bags_with_nothing_in_them():
    bag = nn.EmbeddingBag(5, 3, mode="sum")
    inputs, G = [torch.zeros(0, dtype=torch.long), torch.zeros(4, dtype=torch.long)], torch.randn(4, 3)
    assert not registry.grad_sampler(bag, inputs, G)[bag.weight].any()
    torch.testing.assert_close(registry.norm_sampler(bag, inputs, G)[bag.weight], torch.zeros(4))


def test_a_bag_of_maxima_is_refused():
    """Which is no linear function of the table: its gradient is not that of a sum."""
    bag = nn.EmbeddingBag(5, 3, mode="max")
    with pytest.raises(ValueError, match="mode='max' has no per-sample path; use mode='sum'"):
        registry.grad_sampler(bag, [torch.tensor([1, 2]), torch.tensor([0, 1])], torch.randn(2, 3))


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = First(DPRNN(4, 3, batch_first=True))

    def forward(self, x):
        return self.cells(x)[:, -1]


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 3)), Last], ids=["Linear", "DPRNN"])
def test_a_step_on_an_empty_batch_is_noise(make, mode):
    """A whole step of stock Opacus: it moves the parameters by noise alone, and a later batch trains on."""
    model = make()
    made = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(torch.randn(8, 5, 4)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer, criterion = made[0], made[1], made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    for size in (0, 3, 0):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        criterion(wrapped(torch.randn(size, 5, 4)), torch.zeros(size, dtype=torch.long)).backward()
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.isfinite().all() and (p != old).any()
            assert bool(p.summed_grad.any()) == bool(size)
