"""The update in the noise's pass through ``make_private``: what a user of torch's SGD, Adam and AdamW expects."""

import copy
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from tests.ops.noisy import same
from tests.optim.private import OPTIMIZERS, Plain, Run, assert_close, batch, each_optimizer, net

pytestmark = pytest.mark.usefixtures("passes")  # here every update is made in the noise's pass


@each_optimizer
def test_a_run_is_torchs_on_the_noisy_gradients(name, passes):
    """Parameters and state, with torch's own names, in torch's own places."""
    model, make = net(), OPTIMIZERS[name]
    plain, start = Plain(model, make), [p.detach().clone() for p in model.parameters()]
    run = Run(model, make)
    for data in (batch(), None, batch(3), batch()):
        grads = run.step(data)
        assert all(g is not None and g.isfinite().all() and g.any() for g in grads)
        plain.step(grads)
    assert passes == [6] * 4
    assert_close(run, plain, start, 4, name)
    ours, theirs = run.optimizer.state_dict(), plain.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for k, state in theirs["state"].items():
        assert list(ours["state"][k]) == list(state)
        for key, value in state.items():
            mine = ours["state"][k][key]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
            torch.testing.assert_close(mine, value, rtol=1e-6, atol=1e-7)


@each_optimizer
def test_a_state_dict_goes_on_in_torch_and_comes_back(name):
    """Two steps here, two in a plain optimizer, two here again: the same as six plain ones."""
    model, make = net(), OPTIMIZERS[name]
    plain, start = Plain(model, make), [p.detach().clone() for p in model.parameters()]
    run = Run(model, make)
    for _ in range(2):
        plain.step(run.step(batch()))
    elsewhere = Plain(model, make)
    elsewhere.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for _ in range(2):
        grads = [torch.randn_like(p) for p in model.parameters()]
        plain.step(grads)
        elsewhere.step(grads)
    model.load_state_dict(elsewhere.model.state_dict())
    run.optimizer.load_state_dict(elsewhere.optimizer.state_dict())
    for _ in range(2):
        plain.step(run.step(batch()))
    assert_close(run, plain, start, 6, name)


@pytest.mark.parametrize("flag", [dict(foreach=True), dict(foreach=False), dict(fused=True)], ids=str)
@each_optimizer
def test_flags_that_name_torchs_own_way(name, flag, passes):
    """They are kept, and the results are theirs."""
    model = net()

    def make(params):
        return OPTIMIZERS[name](params, **flag)

    plain, start = Plain(model, make), [p.detach().clone() for p in model.parameters()]
    run = Run(model, make)
    for _ in range(3):
        plain.step(run.step(batch()))
    assert len(passes) == 3
    assert flag.items() <= run.optimizer.param_groups[0].items()
    assert_close(run, plain, start, 3)
    assert [s["step"].dtype for s in run.optimizer.state.values() if "step" in s] == [
        s["step"].dtype for s in plain.optimizer.state.values() if "step" in s
    ]


def groups_of(model):
    return [
        dict(params=model[0].parameters(), lr=0.3, weight_decay=0.1),
        dict(params=[*model[1].parameters()]),
        dict(params=[*model[3].parameters()], lr=0.001),
    ]


@each_optimizer
def test_parameter_groups(name, passes):
    """Each group's own numbers."""
    model, make = net(), OPTIMIZERS[name]
    plain, start = Plain(model, make), [p.detach().clone() for p in model.parameters()]
    plain.optimizer = make(groups_of(plain.model))
    run = Run(model, make(groups_of(model)))
    for _ in range(3):
        plain.step(run.step(batch()))
    assert passes == [2] * 9
    assert_close(run, plain, start, 3, name, size=0.6)


def test_add_param_group(passes):
    """The new parameters are clipped and noised with the others, from the next step on; their state starts then."""
    model = net()

    def make(params):
        return OPTIMIZERS["adamw"]([p for p in params if p.shape != (3, 33) and p.shape != (3,)])

    plain, start = Plain(model, make), [p.detach().clone() for p in model.parameters()]
    run = Run(model, make)
    grads = run.step(batch())
    assert grads[4] is None and grads[5] is None
    plain.step(grads)
    assert same(run.values()[4:], start[4:])
    for optimizer, of in ((run.optimizer, model), (plain.optimizer, plain.model)):
        optimizer.add_param_group(dict(params=list(of[3].parameters()), lr=0.2))
    for _ in range(2):
        plain.step(run.step(batch()))
    assert passes == [4, 4, 2, 4, 2]
    assert [int(s["step"]) for s in run.optimizer.state.values()] == [3, 3, 3, 3, 2, 2]
    assert_close(run, plain, start, 3, size=0.4)


@each_optimizer
def test_frozen_and_unfrozen(name):
    """A frozen parameter keeps its bits, has no gradient and no new state; unfrozen it goes on."""
    model, make = net(), OPTIMIZERS[name]
    plain, start = Plain(model, make), [p.detach().clone() for p in model.parameters()]
    model[0].requires_grad_(False)
    run = Run(model, make)
    for frozen in (True, False, True, False):
        model[0].requires_grad_(not frozen)
        model[3].bias.requires_grad_(frozen)
        before = run.values()
        grads = run.step(batch())
        off = [0, 1] if frozen else [5]
        assert [k for k, g in enumerate(grads) if g is None] == off
        assert [k for k, (p, q) in enumerate(zip(before, run.values(), strict=True)) if same(p, q)] == off
        plain.step(grads)
    assert_close(run, plain, start, 4, name)


SCHEDULERS = {
    "step": lambda o: StepLR(o, 1, gamma=0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 5),
    "lambda": lambda o: LambdaLR(o, lambda e: 1 / (1 + e)),
    "one cycle": lambda o: OneCycleLR(o, 0.5, total_steps=6),  # changes momentum and betas too
}


@pytest.mark.parametrize("before", [True, False], ids=["before make_private", "after it"])
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_learning_rate_schedulers(schedule, before, name, passes):
    """The rates are used in the same pass, and nothing is said about the order of the two ``step``."""
    model = net()
    plain, start = Plain(model, OPTIMIZERS[name]), [p.detach().clone() for p in model.parameters()]
    optimizer = OPTIMIZERS[name](model.parameters())
    make = SCHEDULERS[schedule]
    scheduler = make(optimizer) if before else None
    run = Run(model, optimizer)
    scheduler = scheduler or make(run.optimizer)
    theirs = make(plain.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            plain.step(run.step(batch()))
            theirs.step()
            scheduler.step()
            assert scheduler.get_last_lr() == theirs.get_last_lr()
    assert len(passes) == 4
    assert run.optimizer.state_dict()["param_groups"] == plain.optimizer.state_dict()["param_groups"]
    assert_close(run, plain, start, 4, name, size=1.0)


@pytest.mark.parametrize("before", [True, False], ids=["before make_private", "after it"])
def test_a_scheduler_that_is_stepped_first_still_warns(before):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = StepLR(optimizer, 1) if before else None
    run = Run(model, optimizer)
    scheduler = scheduler or StepLR(run.optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
        run.step(batch())
