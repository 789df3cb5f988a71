"""Every step is accounted for, whatever is attached, loaded or rolled back; and ε is never more than was asked for."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant, create_accountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpfast.accounting.epsilon import epsilon_of, noise_multiplier_for, quietly
from dpfast.accounting.runs import _of as runs_of
from dpfast.accounting.runs import joined, state_of
from tests.helpers import engine_of, make_private
from tests.privacy.test_noise_checkpoint import Run, batches

ACCOUNTANTS = ("prv", "rdp", "gdp")
each_accountant = pytest.mark.parametrize("accountant", ACCOUNTANTS)
Q = 1 / 20


def counted(history, accountant="rdp"):
    counter = quietly(create_accountant, mechanism=accountant)
    counter.history = list(history)
    return counter


# ---------------------------------------------------------------- hooks


@pytest.fixture(params=["fused", "apart"])
def private(request):
    """An optimizer whose update is in the noise's pass, or not; with the engine's accountant."""
    engine, model = engine_of(), nn.Linear(3, 2)
    inner = {"fused": torch.optim.SGD, "apart": torch.optim.RMSprop}[request.param](model.parameters(), lr=0.1)
    _, optimizer, _ = make_private(model, engine=engine, optimizer=inner, noise_multiplier=1.0)
    return engine, optimizer


def steps(optimizer, count=1) -> None:
    for _ in range(count):
        optimizer.expect_no_samples()
        optimizer.step()
        optimizer.zero_grad()


def test_hooks_are_called_beside_the_accounting(private):
    """Each once a step, on noisy gradients, in the order in which they came."""
    engine, optimizer = private
    seen = []

    def first(o):
        seen.append(("first", o is optimizer, o.param_groups[0]["params"][0].grad is not None))

    def second(o):
        seen.append(("second", o is optimizer, True))

    for hook in (first, second, first):
        optimizer.attach_step_hook(hook)
    steps(optimizer, 2)
    assert seen == [("first", True, True), ("second", True, True)] * 2
    assert engine.accountant.history == [(1.0, 1.0, 2)]


@pytest.mark.parametrize("way", ["assigned", "taken off", "None attached"])
def test_nothing_takes_the_accounting_off(private, way):
    engine, optimizer = private
    seen = []
    optimizer.attach_step_hook(seen.append)
    if way == "assigned":
        optimizer.step_hook = lambda o: seen.append(1)
    elif way == "taken off":
        optimizer.step_hook = None
    else:
        optimizer.attach_step_hook(None)
    steps(optimizer)
    assert engine.accountant.history == [(1.0, 1.0, 1)] and seen == ([1] if way == "assigned" else [])


def test_a_hook_that_is_chained_by_hand_counts_a_step_once(private):
    """As scripts for Opacus do it, twice over."""
    engine, optimizer = private
    seen = []
    for k in range(2):
        before = optimizer.step_hook
        optimizer.attach_step_hook(lambda o, before=before, k=k: (before(o), seen.append(k)))
    steps(optimizer, 2)
    assert engine.accountant.history == [(1.0, 1.0, 2)] and seen == [0, 1, 0, 1]


def test_the_accountants_own_hook_takes_the_place_of_its_hook(private):
    """With a rate of the caller's own; another accountant's counts beside it."""
    engine, optimizer = private
    other = RDPAccountant()
    optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate=0.25))
    optimizer.attach_step_hook(other.get_optimizer_hook_fn(sample_rate=0.5))
    steps(optimizer, 2)
    assert engine.accountant.history == [(1.0, 0.25, 2)] and other.history == [(1.0, 0.5, 2)]


def test_a_hook_that_fails_leaves_the_step_accounted(private):
    engine, optimizer = private

    def fail(o):
        raise RuntimeError("a user's own")

    optimizer.attach_step_hook(fail)
    optimizer.expect_no_samples()
    with pytest.raises(RuntimeError, match="a user's own"):
        optimizer.step()
    assert engine.accountant.history == [(1.0, 1.0, 1)]
    optimizer.step_hook = None
    optimizer.zero_grad()
    steps(optimizer)
    assert engine.accountant.history == [(1.0, 1.0, 2)]


# ---------------------------------------------------------------- checkpoints


def test_a_run_that_is_rolled_back_has_all_its_steps():
    """What was released after the checkpoint cannot be taken back."""
    run = Run().train(batches(3))
    kept = run.save()
    run.train(batches(5))
    for more in (2, 1):
        kept.seek(0)
        with pytest.warns(UserWarning, match="steps more than the checkpoint"):
            run.load(kept)
        run.train(batches(more))
    assert run.engine.accountant.history == [(1.0, 1.0, 11)]


A, B, C = (1.0, Q), (2.0, Q), (1.0, 2 * Q)


@pytest.mark.parametrize(
    ("mine", "held", "both"),
    [
        ([], [], []),
        ([], [(*A, 5)], [(*A, 5)]),
        ([(*A, 5)], [], [(*A, 5)]),
        ([(*A, 5)], [(*A, 5)], [(*A, 5)]),
        ([(*A, 3)], [(*A, 5)], [(*A, 5)]),
        ([(*A, 3)], [(*A, 5), (*B, 2)], [(*A, 5), (*B, 2)]),
        ([(*A, 5), (*B, 9)], [(*A, 5), (*B, 2)], [(*A, 5), (*B, 9)]),
        ([(*A, 5), (*B, 9)], [(*A, 3)], [(*A, 5), (*B, 9)]),
        ([(*A, 5), (*B, 9)], [(*A, 5), (*C, 2)], [(*A, 5), (*B, 9), (*C, 2)]),  # a file that was written to by hand
    ],
)
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_all_steps_that_a_run_has_taken(mine, held, both, accountant):
    """Those with which both begin are the same; none of the others is forgotten."""
    counter = counted(mine, accountant)
    state = {"mechanism": accountant, "history": held, "runs": [[runs_of(counter).own, held]] if held else []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = joined(counter, state)
    assert counter.history == mine, "changed before all was checked"
    found.take_over()
    assert counter.history == both


@pytest.mark.parametrize("named", [True, False])
def test_steps_of_another_run_are_other_steps(named):
    """However alike they are, and of a file that does not say whose they are too."""
    mine, other = counted([(*A, 100)]), counted([(*A, 100)])
    state = state_of(other)
    if not named:
        del state["runs"]
    with pytest.warns(UserWarning, match="100 steps more"):
        joined(mine, state).take_over()
    assert mine.history == [(*A, 200)]


def test_branches_of_one_run():
    """Each goes on from the same file, then takes over the other's; a copy is a branch, and a forked process too."""

    def take(counter, steps):
        for _ in range(steps):
            counter.step(noise_multiplier=A[0], sample_rate=A[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = counted([]), counted([])
        take(first, 50)
        joined(second, state_of(first)).take_over()
        third = copy.deepcopy(second)
        take(first, 50)
        take(second, 30)
        take(third, 30)
        joined(second, state_of(first)).take_over()
        assert second.history == [(*A, 130)]
        for _ in range(2):  # a second time it has nothing new
            joined(first, state_of(second)).take_over()
            assert first.history == [(*A, 130)]
        take(first, 1)
        joined(second, state_of(first)).take_over()
        assert second.history == [(*A, 131)]
        joined(second, state_of(third)).take_over()
        assert second.history[0][2] >= 161  # of a copy nobody knows which steps it has from its original
        forked = state_of(second)
        runs_of(second).process = (-1, 0)
        take(second, 1)
        joined(second, forked).take_over()
        assert second.history[0][2] > 162


def test_a_history_that_was_replaced_by_hand():
    """What is counted after it are the steps of another run."""
    counter, whole = counted([(*A, 5)]), counted([])
    for history in ([(*A, 5)], [(*A, 3)], [(*B, 9)]):
        counter.history = history
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            joined(whole, state_of(counter)).take_over()
    assert sorted(whole.history) == sorted([(*A, 8), (*B, 9)])


def test_a_step_that_the_accountant_refuses_leaves_its_history():
    """Opacus' GaussianAccountant takes it apart first."""
    run = Run(engine=quietly(engine_of, "gdp")).train(batches(5))
    spent = run.engine.get_epsilon(1e-5)
    run.optimizer.noise_multiplier *= 2
    for _ in range(2):
        with pytest.raises(ValueError, match="have to stay constant"):
            run.train(batches(1))
        assert run.engine.get_epsilon(1e-5) == spent > 0
        run.optimizer.zero_grad()
    run.optimizer.noise_multiplier /= 2
    assert run.train(batches(1)).engine.accountant.history == [(1.0, 1.0, 6)]


def test_gdp_takes_one_kind_of_step():
    """It looks at the last entry alone."""
    with pytest.raises(ValueError, match="accountant='gdp' takes one"):
        joined(counted([(*B, 5)], "gdp"), {"mechanism": "gdp", "history": [(*A, 100)]})
    counter = counted([], "gdp")
    joined(counter, {"mechanism": "gdp", "history": [(*A, 8)]}).take_over()
    assert counter.history == [(*A, 8)]


# ---------------------------------------------------------------- ε


@each_accountant
def test_nothing_is_spent_before_the_first_step(accountant):
    engine = quietly(engine_of, accountant)
    assert engine.get_epsilon(1e-5) == engine.get_epsilon(delta=0.1) == 0.0
    make_private(nn.Linear(3, 2), engine=engine, noise_multiplier=1.0)
    assert engine.get_epsilon(1e-5) == 0.0


@each_accountant
@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, math.inf, "1e-5", None, True])
def test_a_delta_that_is_none(accountant, delta):
    with pytest.raises(ValueError, match="delta="):
        epsilon_of(counted([(*A, 5)], accountant), delta)


@each_accountant
def test_it_is_opacus_own_wherever_that_works(accountant):
    for entry in ((1.0, 0.01, 300), (0.7, 1 / 93, 93), (3.0, 1.0, 10)):
        counter = counted([entry], accountant)
        assert epsilon_of(counter, 1e-5) == quietly(counter.get_epsilon, delta=1e-5)


@each_accountant
@pytest.mark.parametrize(
    "history",
    [[(1e-3, Q, 50)], [(1e-6, 0.5, 5)], [(1e6, Q, 5)], [(1e6, 1.0, 1)], [(0.05, 0.3, 3)], [(0.9, 1e-7, 10)]],
    ids=str,
)
def test_it_is_there_for_any_noise(accountant, history):
    """Finite, not negative, within seconds, and no less than a bound from below: one step of a Gaussian."""
    found = quietly(epsilon_of, counted(history, accountant), 1e-5)
    assert found >= 0 and (math.isfinite(found) or accountant == "gdp")
    (sigma, rate, _) = history[0]
    if sigma < 0.1 and accountant != "gdp":  # δ = 1e-5 hides nothing here
        assert found >= 1 / (2 * sigma**2) - 10 / sigma - math.log(1 / rate)


def test_a_grid_that_would_take_minutes_is_not_asked_for(monkeypatch):
    """Of ten million steps, or of a privacy loss whose exponential overflows: the bound serves."""
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *args, **kw: pytest.fail("it was asked"))
    for history in ([(1.0, 1e-2, 10**8)], [(1e-2, 0.5, 100)]):
        found = quietly(epsilon_of, counted(history, "prv"), 1e-5)
        assert 0 < found <= quietly(epsilon_of, counted(history, "rdp"), 1e-5)


def test_a_step_without_noise_spends_everything():
    assert epsilon_of(counted([(*A, 5), (0.0, Q, 1)]), 1e-5) == math.inf


# ---------------------------------------------------------------- the noise for an ε


def data_of(batches_: int, size: int = 1):
    return DataLoader(TensorDataset(torch.zeros(batches_ * size, 3)), batch_size=size)


class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)


def with_epsilon(model=None, accountant="rdp", loader=None, engine=None, **kw):
    model = model or Net()
    engine = engine or quietly(engine_of, accountant)
    given = dict(target_epsilon=3.0, target_delta=1e-5, epochs=1, max_grad_norm=1.0) | kw
    made = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data_of(20) if loader is None else loader,
        **given,
    )
    return engine, made


# int(1 / (1 / n)) is n - 1 for 49, 93, 98, 103, 107, 161, 187, ...
@pytest.mark.parametrize("n", [93, 100])
@pytest.mark.parametrize("poisson", [True, False])
def test_what_is_spent_is_what_was_asked_for(n, poisson):
    """After every epoch's every batch, as the engine and as the accountant itself report it."""
    engine, (_, optimizer, loader) = with_epsilon(loader=data_of(n), epochs=2, poisson_sampling=poisson)
    for _ in range(2):
        for _ in loader:
            steps(optimizer)
    ((_, rate, count),) = engine.accountant.history
    assert count == 2 * len(loader)
    assert rate == (loader.batch_sampler.sample_rate if poisson else 1 / n) == 1 / n
    assert 2.9 <= engine.get_epsilon(1e-5) == engine.accountant.get_epsilon(1e-5) <= 3.0


@pytest.mark.parametrize(("accountant", "mode"), [*((a, "fused") for a in ACCOUNTANTS), ("rdp", "hooks")])
def test_never_more_than_the_target(accountant, mode):
    engine, (_, optimizer, loader) = with_epsilon(
        accountant=accountant, loader=data_of(93, 2), epochs=3, grad_sample_mode=mode, target_epsilon=2.0
    )
    hook = optimizer.accounting if mode == "fused" else optimizer.step_hook
    if mode == "fused":
        for _ in range(3 * len(loader)):
            hook(optimizer)
    else:
        engine.accountant.history = [(optimizer.noise_multiplier, 1 / len(loader), 3 * len(loader))]
    assert 1.9 <= engine.get_epsilon(1e-5) <= 2.0


@each_accountant
@pytest.mark.parametrize("epsilon", [500, 1e5, np.float64(0.5)])
def test_large_budgets_have_an_answer(accountant, epsilon, monkeypatch):
    asked, whole = [], PRVAccountant.get_epsilon
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda self, **kw: asked.append(1) or whole(self, **kw))
    engine, (_, optimizer, _) = with_epsilon(accountant=accountant, target_epsilon=epsilon)
    assert len(asked) <= 15, "each can take seconds"
    engine.accountant.history = [(optimizer.noise_multiplier, Q, 20)]
    assert optimizer.noise_multiplier > 0
    assert 0.9 * epsilon <= quietly(engine.get_epsilon, 1e-5) <= epsilon


@pytest.mark.parametrize(
    "wrong",
    [
        *({"target_epsilon": x} for x in (0, -1, 0.0, math.nan, math.inf, "3", None, True)),
        *({"target_delta": x} for x in (0, 1, 1.0, -1e-5, 2, math.nan, "1e-5", None)),
        *({"epochs": x} for x in (0, -1, math.nan, math.inf, "3", None)),
        *({"epsilon_tolerance": x} for x in (0, -0.1)),
        {"target_epsilon": 1e-9},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["fused", "hooks"])
def test_arguments_out_of_range_are_refused_in_a_line(wrong, mode):
    """Before anything is changed."""
    model = Net()
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=") as refusal:
        with_epsilon(model, grad_sample_mode=mode, **wrong)
    assert "\n" not in str(refusal.value)
    assert "forward" not in vars(model) and not model._forward_hooks


@each_accountant
def test_a_budget_that_no_noise_meets(accountant):
    """Told at once: the search would double the noise for ever."""
    engine, model = quietly(engine_of, accountant), Net()
    if accountant == "gdp":  # it sees no ε at all under a million of noise
        with_epsilon(model, engine=engine, target_epsilon=1e-9)
        return
    with pytest.raises(ValueError, match=f"target_epsilon=1e-09 cannot be met.*{accountant} accountant"):
        with_epsilon(model, engine=engine, target_epsilon=1e-9)


def test_fractions_of_an_epoch():
    engine, (_, optimizer, _) = with_epsilon(epochs=0.5)
    engine.accountant.history = [(optimizer.noise_multiplier, Q, 10)]
    assert 2.9 <= engine.get_epsilon(1e-5) <= 3.0


def test_the_search_is_as_close_as_it_is_told():
    for tolerance in (0.002, 0.5):
        sigma = noise_multiplier_for(
            target_epsilon=3, target_delta=1e-5, sample_rate=Q, steps=20, accountant="rdp", epsilon_tolerance=tolerance
        )
        assert 3 - tolerance <= epsilon_of(counted([(sigma, Q, 20)]), 1e-5) <= 3


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_budget_is_spent_to_two_decimal_places(accountant):
    """As users of Opacus check it, and Opacus' own tests do."""
    sigma = noise_multiplier_for(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=0.125, steps=16, accountant=accountant
    )
    assert 1.995 < epsilon_of(counted([(sigma, 0.125, 16)], accountant), 1e-5) <= 2.0


def test_a_checkpoint_does_not_change_what_is_reported():
    run = Run().train(batches(2))
    kept, other = io.BytesIO(run.save().getvalue()), Run()
    other.load(kept)
    assert other.engine.get_epsilon(1e-5) == run.engine.get_epsilon(1e-5) > 0
