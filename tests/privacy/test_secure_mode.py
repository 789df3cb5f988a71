"""The fused mode's secure noise: fresh keys, a grid that hides the sum, and no other package."""

import copy
import importlib.util
import math

import opacus
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpfast.noise.stream import NoiseStream
from tests.ops.noisy import same
from tests.privacy.test_noise_stream import D, net, noise_of, private


def test_secure_mode_never_repeats():
    """Two runs with one seed; two steps; two streams that were one. No generator is asked."""
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(noise_of(private(copy.deepcopy(net()), secure=True), 2))
    flat = [g.flatten() for run in runs for g in run]
    assert not any(same(a, b) for k, a in enumerate(flat) for b in flat[k + 1 :] if a.shape == b.shape)
    stream = NoiseStream(secure=True)
    keys = [s.next(1.0, 1.0, 9, 1.0).key for s in (stream, stream, copy.deepcopy(stream), NoiseStream(secure=True))]
    words = [word for key in keys for word in key]
    assert len(set(words)) == len(words) == 32 and min(words) < 1 << 31 < max(words)


def test_secure_mode_refuses_a_generator():
    model = net()
    with pytest.raises(ValueError, match=r"noise_generator.*secure"):
        private(model, secure=True, noise_generator=torch.Generator())
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match=r"noise_generator.*secure"):
        NoiseStream(torch.Generator(), secure=True)


def test_secure_mode_needs_no_other_package(monkeypatch):
    """It trains on Poisson batches, which no seed repeats either."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchcsprng" else real(name, *a))
    data = TensorDataset(torch.randn(400, D), torch.arange(400))
    batches = []
    for _ in range(2):
        torch.manual_seed(3)
        loader = DataLoader(data, batch_size=40)
        model, wrapped, optimizer, loader = private(secure=True, data_loader=loader, poisson_sampling=True)
        batches.append([y.tolist() for _, y in loader])
        for x, y in loader:
            F.cross_entropy(wrapped(x), y % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.isfinite().all() for p in model.parameters())
    assert batches[0] != batches[1]
    # 10 batches, each with a tenth of the samples: 260 ± 9.5 of them are seen
    assert 200 < len({i for batch in batches[0] for i in batch}) < 320


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_opacus_modes_are_as_secure_as_opacus(mode):
    """Without torchcsprng they raise what Opacus raises, and nothing is changed."""
    if importlib.util.find_spec("torchcsprng") is not None:
        pytest.skip("torchcsprng is installed: nothing is missing")
    with pytest.raises(ImportError, match="torchcsprng"):
        opacus.PrivacyEngine(secure_mode=True)
    model = net()
    with pytest.raises(ImportError, match="torchcsprng"):
        private(model, secure=True, grad_sample_mode=mode)
    assert "forward" not in vars(model) and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 1.0, 1.999, 2.0, 77.0])
@pytest.mark.parametrize("elements", [1, 1000, 10**9])
def test_the_grid_is_fine_and_paid_for(sigma, elements):
    """A power of two, 2⁻²⁴ to 2⁻²⁵ of σ·S, and a std raised by what rounding adds to the sensitivity: √d steps."""
    stream, S = NoiseStream(secure=True), 0.7
    noise = stream.next(sigma, S, elements, 1 / 3)
    assert math.frexp(noise.grid)[0] == 0.5
    assert 2.0**24 <= sigma * S / noise.grid <= 2.0**25
    assert noise.std >= sigma * (S + math.sqrt(elements) * noise.grid) * (1 - 1e-12)
    assert noise.std <= sigma * S * (1 + 1.01 * math.sqrt(elements) * noise.grid / S)
    assert stream.next(0.0, S, elements, 1.0).std == 0.0
