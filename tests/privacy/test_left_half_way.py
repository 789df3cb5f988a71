"""A loop that is left in the middle of a logical batch, and batches that are added up: no sample counts twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast import BatchMemoryManager, PrivacyEngine
from dpfast.sampling import PoissonBatches

C, N = 1e-3, 24


def data():
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(N, 5, generator=g), torch.randint(0, 3, (N,), generator=g))


def private(loader):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    return PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=C,
        loss_reduction="sum",
        poisson_sampling=False,
    )


def summed(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step(physical, model, optimizer, leave_after=None):
    """One logical batch; or only its first physical batches, as where an exception ends the loop."""
    for k, (x, y) in enumerate(physical):
        if k == leave_after:
            return
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
        if not optimizer._is_last_step_skipped:
            return


@pytest.mark.parametrize("poisson", [True, False])
def test_what_a_loop_left_half_way_has_summed_is_dropped(poisson):
    batches = PoissonBatches(N, 2, seed=1)
    loader = DataLoader(data(), batch_sampler=batches) if poisson else DataLoader(data(), batch_size=N // 2)
    model, optimizer, loader = private(loader)
    whole = data()[batches.logical_batch(0) if poisson else slice(0, N // 2)]
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as physical:
        step(physical, model, optimizer, leave_after=1)
    batches.step = 0  # the same samples again
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as physical:
        step(physical, model, optimizer)
    got = summed(model)
    model, optimizer, _ = private(loader)
    step([whole], model, optimizer)
    torch.testing.assert_close(got, summed(model), rtol=1e-4, atol=1e-7)


def test_poisson_batches_are_not_added_up_whatever_make_private_is_told():
    """A sample may be in both: it would move the sum by 2C."""
    model, _, _ = private(DataLoader(data(), batch_sampler=PoissonBatches(N, 3, seed=1)))
    x, y = data()[:1]
    F.cross_entropy(model(x), y, reduction="sum").backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        F.cross_entropy(model(x), y, reduction="sum").backward()
