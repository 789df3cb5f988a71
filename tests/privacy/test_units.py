"""Rows of one user are clipped as one: exact against one user at a time, and within C without any of them."""

import pytest
import torch

from tests.helpers import F32, SLACK, run_fused
from tests.privacy.users import IDS, Users, examine_users
from tests.zoo import every_layer, loss_of, specimen


@every_layer
def test_every_layer(name):
    model, inputs, target = specimen(name, B=len(IDS))
    examine_users(model, inputs, target, loss_of(name), IDS)


@pytest.mark.parametrize("ids", [[0] * 6, [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1], ["b", "a", "b", "a", "b", "a"]])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "tied GPT"])
def test_users_of_many_and_of_few_rows(name, ids):
    model, inputs, target = specimen(name, B=6)
    examine_users(model, inputs, target, loss_of(name), ids)


@pytest.mark.parametrize(
    "name", ["Linear", "Linear on sequences", "Conv2d", "LayerNorm", "bare parameters", "tied GPT"]
)
def test_in_float32(name):
    model, inputs, target = specimen(name, B=len(IDS), dtype=F32)
    examine_users(model, inputs, target, loss_of(name), IDS, leave_out=False)


@pytest.mark.parametrize("name", ["Linear", "Linear on sequences", "Conv2d", "LayerNorm", "bare parameters"])
def test_rows_that_nearly_cancel(name):
    """What is summed of a user is within C, though what its rows add up to is a millionth of each of them."""
    model, (x,), target = specimen(name, B=3, dtype=F32)
    with torch.no_grad():
        out, away = model(x), 1e3 * torch.randn_like(target)
    y = torch.cat([out + away, out - away * (1 + 1e-6)])
    users = Users(model, (torch.cat([x, x]),), y, [0] * 6, 1e-3)
    sums = users.backward(loss_of(name))
    assert sum(s.double().square().sum() for s in sums.values()).sqrt() <= 1e-3 * SLACK


@every_layer
def test_units_of_one_row_are_samples(name):
    model, inputs, target = specimen(name, B=4)
    users = Users(model, inputs, target, range(4), 0.1)
    sums = users.backward(loss_of(name))
    plain = run_fused(model, (inputs, target), loss_of(name), 0.1)
    torch.testing.assert_close(users.wrapped.per_sample_gradient_norms, plain.norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, plain.sums, rtol=1e-12, atol=1e-14)
