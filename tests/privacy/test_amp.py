"""float16 with a scaled loss: norms, clipping and noise are of the unscaled gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import PrivacyEngine
from dpfast.amp import GradScaler

B, D = 6, 8


def private(noise: float = 0.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(B, D), torch.randint(0, 3, (B,))
    model, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=B),
        noise_multiplier=noise,
        max_grad_norm=0.3,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(1),
        **options,
    )
    return model, optimizer, x, y


def step(model, optimizer, x, y, scaler=None, autocast=False, reduction="mean"):
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = F.cross_entropy(model(x), y, reduction=reduction)
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [2.0**-9, 2.0**14])
def test_the_scale_is_divided_out_exactly(scale, reduction):
    """In float32, bit for bit: a power of two changes no digit."""
    plain = step(*private(1.0, loss_reduction=reduction), reduction=reduction)
    model, optimizer, x, y = private(1.0, loss_reduction=reduction)
    scaler = GradScaler(optimizer, scale, device="cpu")
    scaled = step(model, optimizer, x, y, scaler, reduction=reduction)
    assert torch.equal(plain, scaled)
    assert scaler.get_scale() == scale


def test_float16_gradients_that_would_vanish_are_kept():
    """Each sample's gradient is about 1e-8 of the loss's: in float16 it is nothing without a scale."""
    found = {}
    for name, scale, autocast in (("exact", 1.0, False), ("lost", 1.0, True), ("scaled", 2.0**14, True)):
        model, optimizer, x, y = private(loss_reduction="sum")
        optimizer.max_grad_norm = 1e-6
        scaler = GradScaler(optimizer, scale, device="cpu")
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), y, reduction="sum") * 1.7e-7
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        found[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.cosine_similarity(found["scaled"], found["exact"], dim=0) > 0.999
    assert (found["scaled"] - found["exact"]).norm() < 0.01 * found["exact"].norm()
    assert (found["lost"] - found["exact"]).norm() > 0.05 * found["exact"].norm()


def test_a_sample_that_overflows_contributes_zeros_and_no_step_is_left_out():
    model, optimizer, x, y = private(loss_reduction="sum")
    scaler = GradScaler(optimizer, 2.0**13, device="cpu")
    weights = torch.ones(B)
    weights[0] = 1e6
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="1 of 6 samples"), torch.autocast("cpu", torch.float16):
        losses = F.cross_entropy(model(x).float(), y, reduction="none")
        scaler.scale((losses * weights).sum()).backward()
    scaler.step(optimizer)
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert grad.isfinite().all() and grad.norm() > 0
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert model.nonfinite_samples == 1


def test_one_sample_moves_the_sum_by_at_most_C_under_float16():
    """Leave one out, at a scale at which some samples' gradients are rounded coarsely."""

    def total(rows):
        model, optimizer, x, y = private(loss_reduction="sum")
        scaler = GradScaler(optimizer, 2.0**8, device="cpu")
        return step(model, optimizer, x[rows], y[rows], scaler, autocast=True, reduction="sum")

    everyone = total(list(range(B)))
    for left_out in range(B):
        moved = (everyone - total([k for k in range(B) if k != left_out])).norm().item()
        assert moved <= 0.3 * (1 + 1e-5)


def test_torchs_own_scaler_is_refused():
    model, optimizer, x, y = private()
    with pytest.raises(ValueError, match=r"dpfast.amp.GradScaler"):
        step(model, optimizer, x, y, torch.amp.GradScaler("cpu", init_scale=2.0**4))
    optimizer.zero_grad()
    step(model, optimizer, x, y, GradScaler(optimizer, 2.0**4, device="cpu"))  # and no other step is refused for it


def test_misuse_is_refused():
    model, optimizer, x, y = private()
    scaler = GradScaler(optimizer, 2.0**4, device="cpu")
    with pytest.raises(ValueError, match=r"init_scale=3\.0: give a power of two"):
        GradScaler(optimizer, 3.0)
    with pytest.raises(ValueError, match="the one that make_private has returned"):
        GradScaler(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="new_scale"):
        scaler.update(2.0)
    with pytest.raises(ValueError, match="init_scale=32"):
        scaler.load_state_dict(scaler.state_dict() | {"scale": 32.0})
    scaler.load_state_dict(scaler.state_dict())
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="a loss that was not scaled"):
        scaler.step(optimizer)
    with pytest.raises(ValueError, match="not the one that this GradScaler was made for"):
        scaler.step(private()[1])


def test_disabled_it_does_nothing():
    model, optimizer, x, y = private()
    scaler = GradScaler(optimizer, 2.0**4, device="cpu", enabled=False)
    assert torch.equal(step(model, optimizer, x, y, scaler), step(*private()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_backward_inside_of_autocast_is_clipped_in_float32(dtype):
    """The sum of what autocast would make of the norms and of the sum is off by 1e-3 and more."""
    found = []
    for inside in (True, False):
        model, _optimizer, x, y = private(loss_reduction="sum")
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x), y, reduction="sum")
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        sums = [p.summed_grad for p in model.parameters()]
        assert {total.dtype for total in sums} == {torch.float32}
        found.append(torch.cat([total.flatten() for total in sums]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()
