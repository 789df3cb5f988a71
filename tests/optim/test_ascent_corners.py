"""The weights are never touched; what a run may do between its steps."""

import copy

import pytest
import torch
from torch.optim import SGD

import dpfast
from tests.helpers import F64, make_private
from tests.ops.noisy import same
from tests.optim.ascending import RHO, B, C, Net, Plain, Private, data, loss_of, sgd, started
from tests.optim.test_ascent import OPTIMIZERS, close, each_ascent


@each_ascent
def test_everyone_else_sees_the_weights(ascent):
    """eval(), no_grad, state_dict and a copy, also between forward and backward and after an exception."""
    run = started(ascent)
    twin, batch = Net().double(), data()
    twin.load_state_dict(run.model.state_dict())
    truth, values = twin(*batch), run.values()

    def check():
        assert same(run.values(), values)
        assert same(list(run.wrapped._module.state_dict().values()), list(twin.state_dict().values()))
        with torch.no_grad():
            assert torch.equal(run.wrapped(*batch), truth)
            assert torch.equal(run.wrapped.eval()(*batch), truth)
        assert torch.equal(run.wrapped(*batch), truth)
        assert torch.equal(copy.deepcopy(run.wrapped)(*batch), truth)
        run.wrapped.train()

    check()
    shifted = run.wrapped(*batch)
    assert not torch.allclose(shifted, truth)
    check()
    shifted.sum().backward()
    check()

    def fails(gradient):
        raise ZeroDivisionError

    out = run.wrapped(*batch)
    out.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    check()
    with pytest.raises(IndexError):
        run.wrapped(batch[0], batch[1] + 100)
    check()
    assert torch.equal(run.wrapped(*batch), shifted)


@each_ascent
def test_a_copy_of_the_model_is_not_shifted(ascent):
    run, batch = started(ascent), data()
    twin = copy.deepcopy(run.wrapped)
    assert torch.equal(twin(*batch), run.wrapped.eval()(*batch))


@each_ascent
@pytest.mark.parametrize("how", ["load_state_dict", "data", "new data", "no_grad"])
def test_weights_changed_between_steps(how, ascent):
    """The shift is kept, and is from the weights as they are at the forward."""
    run, batch = started(ascent), data()
    other = Net().double()
    run.wrapped(*batch)
    shifts = dict(run.optimizer.ascending.shift.shifts)
    if how == "load_state_dict":
        run.model.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            for p, q in zip(run.model.parameters(), other.parameters(), strict=True):
                if how == "data":
                    p.data.copy_(q)
                elif how == "new data":
                    p.data = q.detach().clone()
                else:
                    p.copy_(q)
    with torch.no_grad():
        for p, q in zip(run.model.parameters(), other.parameters(), strict=True):
            q += shifts[p]
    torch.testing.assert_close(run.wrapped(*batch), other(*batch))


@each_ascent
def test_frozen_and_unfrozen(ascent):
    """A frozen parameter is not shifted and takes no part in the norm; unfrozen it is shifted after its first step."""
    model = Net().double()
    model.block.norm.requires_grad_(False)
    run, start = started(ascent, model), model.block.norm.weight.detach().clone()
    assert torch.equal(model.block.norm.weight, start)
    assert model.block.norm.weight not in run.optimizer.ascending.shift.shifts
    if isinstance(ascent, (dpfast.DPSAT, dpfast.DPSATMomentum)):
        norm = sum(s.square().sum() for s in run.optimizer.ascending.shift.shifts.values()).sqrt()
        torch.testing.assert_close(norm, torch.tensor(0.3, dtype=F64))
    model.block.norm.requires_grad_(True)
    model.fc.bias.requires_grad_(False)
    twin, batch = Net().double(), data()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            if not name.startswith(("block.norm", "fc.bias")):
                q += run.optimizer.ascending.shift.shifts[p]
    torch.testing.assert_close(run.wrapped(*batch), twin(*batch))
    run.step(batch)
    assert model.block.norm.weight in run.optimizer.ascending.shift.shifts
    run.step(data())


def test_the_other_way_where_a_group_maximises():
    """Minus the loss, maximised, is the loss minimised."""
    model, steps, ends = Net().double(), [data() for _ in range(3)], []
    for sign in (1, -1):
        run = Private(
            copy.deepcopy(model),
            lambda params, maximize=sign < 0: SGD(params, lr=0.3, maximize=maximize),
            ascent=RHO,
            noise_multiplier=0.0,
        )
        for batch in steps:
            run.optimizer.zero_grad()
            (sign * loss_of(run.wrapped(*batch), batch[1])).backward()
            run.optimizer.step()
        ends.append(run.values())
    close(*ends, 1e-12)


def test_param_groups_share_one_norm():
    def groups(params):
        params = list(params)
        return SGD([dict(params=params[:3], lr=0.1), dict(params=params[3:], lr=0.5, momentum=0.9)], lr=1.0)

    model = Net().double()
    plain, run = Plain(model, groups, rho=0.3), Private(model, groups, ascent=RHO)
    for _ in range(4):
        batch = data()
        plain.step(batch)
        run.step(batch)
    close(run.values(), plain.values(), 1e-7)


def test_no_direction_no_shift():
    """All gradients zero (σ = 0 and an empty batch): the next step is DP-SGD; so it is after an overflow."""
    run = started(noise_multiplier=0.0)
    assert run.optimizer.ascending.shift
    run.step()
    assert not run.optimizer.ascending.shift
    run = started(dpfast.DPSATMomentum(0.3), make=lambda params: SGD(params, lr=0.0))
    assert not run.optimizer.ascending.shift


@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_direction_of_any_size(dtype, scale):
    from dpfast.optim.ascent import normalised

    tensors = [scale * torch.randn(3, 4, dtype=F64), scale * torch.randn(5, dtype=F64)]
    tensors = [x.to(dtype) for x in tensors]
    found = normalised(tensors, 0.5)
    norm = sum(x.double().square().sum() for x in found)
    norm = norm.sqrt() if found else 0.0
    exact = torch.linalg.vector_norm(torch.cat([x.double().flatten() for x in tensors]) * 1e60) / 1e60
    assert (float(exact) == 0 and not found) or abs(float(norm) - 0.5) < 1e-6


def test_two_private_models_in_one_process():
    """One ascent object serves both; neither shifts the other."""
    start, steps = Net().double(), [data() for _ in range(3)]
    alone = Private(copy.deepcopy(start), sgd, ascent=RHO)
    a, b = Private(copy.deepcopy(start), sgd, ascent=RHO), Private(Net().double(), sgd, seed=8, ascent=RHO)
    for batch in steps:
        alone.step(batch)
        a.step(batch)
        b.step(data())
    assert same(alone.values(), a.values())


def test_a_new_private_optimizer_starts_afresh():
    run, batch = started(), data()
    _, optimizer, _ = make_private(run.wrapped, size=B)
    assert torch.equal(run.wrapped(*batch), run.wrapped.eval()(*batch))
    assert not optimizer.ascending.shift


@each_ascent
def test_a_group_added_later(ascent):
    model = Net().double()
    run = started(ascent, model, lambda params: SGD([p for p in params if p is not model.block.gate], lr=0.3))
    run.optimizer.add_param_group(dict(params=[model.block.gate]))
    for _ in range(2):
        run.step(data())
    assert model.block.gate in run.optimizer.ascending.shift.shifts


@each_ascent
def test_explain_and_check_sensitivity(ascent):
    run, batch = started(ascent), data()
    assert "fc" in dpfast.explain(run.wrapped, dict(image=batch[0], ids=batch[1]))
    report = dpfast.check_sensitivity(
        run.wrapped, lambda model, given: loss_of(model(*given), given[1]), batch, max_grad_norm=C
    )
    assert report.ok


def test_half_a_step_is_refused():
    run = started()
    run.optimizer.zero_grad()
    with pytest.raises(ValueError, match="call step"):
        run.optimizer.pre_step()


def test_a_step_hook_sees_what_the_optimizer_uses():
    """The filtered gradient; and its presence changes no bit of DiSK."""
    ends = []
    for hooked in (True, False):
        torch.manual_seed(5)
        run, seen = Private(Net().double(), OPTIMIZERS["sgd"], ascent=dpfast.DiSK(0.7)), []
        account = run.optimizer.step_hook
        if hooked:
            run.optimizer.attach_step_hook(
                lambda o, account=account, run=run, seen=seen: (
                    account(o),
                    seen.append(run.model.block.gate.grad.clone()),
                )
            )
        for _ in range(3):
            run.step(data())
        if hooked:
            assert torch.equal(seen[-1], run.model.block.gate.grad)
        ends.append(run.values())
    assert same(*ends)


@each_ascent
def test_gradients_belong_to_the_user(ascent):
    """What is done to them after the step, such as ``zero_grad(set_to_none=False)``, changes no later step."""
    model, steps, ends = Net().double(), [data() for _ in range(3)], []
    for kept in (False, True):
        run = Private(copy.deepcopy(model), sgd, ascent=ascent)
        for batch in steps:
            run.step(batch)
            if kept:
                run.optimizer.zero_grad(set_to_none=False)
        ends.append(run.values())
    assert same(*ends)
