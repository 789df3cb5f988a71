"""``dpfast.graphed`` with an optimizer: noise and update in the graph, to the bit, accounted for and never twice."""

import logging
import random
import secrets
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast import ops
from dpfast.amp import GradScaler
from dpfast.optim.fused_update import MASTER
from tests.helpers import BF16, F16, engine_of, mse, sse
from tests.test_graphed import STEPS, Twins, batch, private, small, train

LATER = 100  # batches that no earlier step of a test has seen


def whole(model: nn.Module | None = None, **options) -> Twins:
    return Twins(model or small(), 5, whole=True, **options)


def in_16_bits(dtype: torch.dtype, low_precision: str, make) -> Twins:
    """A loss that is a sum: its mean would be rounded in 16 bits."""
    options = dict(low_precision=low_precision, loss_reduction="sum")
    return whole(small().to(dtype), make=make, loss=sse, **options)


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


def two_groups(model: nn.Module) -> SGD:
    first, *rest = model.parameters()
    return SGD([dict(params=[first], lr=0.2, momentum=0.5), dict(params=rest)], lr=0.1, maximize=True)


UPDATES = {
    "sgd": sgd,
    "momentum": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "nesterov": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "two groups": two_groups,
    "adam": lambda m: Adam(m.parameters(), lr=0.1),
    "adamw amsgrad": lambda m: AdamW(m.parameters(), lr=0.1, amsgrad=True),
}


def states(optimizer) -> list[Tensor]:
    return [x for state in optimizer.original_optimizer.state.values() for x in state.values()]


def tensors_of(twins: Twins) -> list[Tensor]:
    """All that an update may write."""
    return [x.detach() for x in (*twins.model.parameters(), *states(twins.optimizer))]


def assert_states_alike(twins: Twins) -> None:
    for one, other in zip(states(twins.optimizer), states(twins.plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", UPDATES)
def test_updates_to_the_bit(name):
    twins = whole(make=UPDATES[name])
    assert train(twins) == twins.step.updates >= 3
    assert twins.step.recorded == 1
    assert twins.optimizer.noise.step == STEPS
    assert_states_alike(twins)


@pytest.mark.parametrize(
    ("dtype", "low_precision", "name"),
    [
        (BF16, "nearest", "momentum"),
        (F16, "stochastic", "sgd"),
        (BF16, "stochastic", "adamw amsgrad"),
        (F16, "master", "momentum"),
        (BF16, "master", "adamw amsgrad"),
    ],
)
def test_parameters_of_16_bits_to_the_bit(dtype, low_precision, name):
    twins = in_16_bits(dtype, low_precision, UPDATES[name])
    for k in range(STEPS + 1):
        twins.backward(*(x.to(dtype) for x in batch(k)))
        twins.update()
    assert twins.step.updates >= 2
    assert_states_alike(twins)
    assert all((MASTER in state) == (low_precision == "master") for state in twins.optimizer.state.values())


def test_p_grad_is_the_noisy_gradient():
    twins = whole()
    train(twins)
    versions = [p._version for p in twins.model.parameters()]
    twins.backward(*batch(LATER))
    twins.plain.step()
    for p, version in zip(twins.model.parameters(), versions, strict=True):
        assert p._version > version  # a graph that is kept from before is stale
    for p, q in zip(twins.model.parameters(), twins.twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) and p.summed_grad is None
    twins.optimizer.zero_grad()
    assert all(p.grad is None for p in twins.model.parameters())


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("options", [{}, dict(ascent=dpfast.DPSAT(rho=0.1))], ids=str)
def test_physical_batches_to_the_bit(secure, options, monkeypatch):
    """Poisson batches in several parts, padded; an empty one is among them."""
    data = TensorDataset(*batch(0, rows=24))

    def run(graph: bool) -> tuple:
        keys = random.Random(7)  # of the secure mode, which no generator gives
        monkeypatch.setattr(secrets, "randbits", keys.getrandbits)
        torch.manual_seed(3)
        model = small()
        model, optimizer, loader = engine_of(secure_mode=secure).make_private(
            module=model,
            optimizer=Adam(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=0.05,
            **({} if secure else {"noise_generator": torch.Generator().manual_seed(1)}),
            **options,
        )
        step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y), optimizer)
        logical, parts, norms = 0, 0, []
        for _ in range(4):
            with dpfast.BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=3, optimizer=optimizer, pad=True
            ) as physical:
                for x, y in physical:
                    piece = optimizer.clipped_sum.batches.piece
                    logical, parts = logical + piece.last, parts + 1
                    if graph:
                        step(x, y)
                    else:
                        optimizer.zero_grad()
                        mse(model(x), y).backward()
                        optimizer.step()
                    norms.append(model.per_sample_gradient_norms)  # of the samples, without padding
        assert optimizer.noise.step == logical < parts
        return [*norms, *(p.detach().clone() for p in model.parameters())], step, logical, parts

    (found, step, logical, parts), (expected, *_) = run(True), run(False)
    for p, q in zip(found, expected, strict=True):
        assert torch.equal(p, q)
    assert step.updates > logical / 2
    assert step.replays - step.updates > (parts - logical) / 2


def test_parameters_that_no_sample_reaches():
    """They get noise alone, as ever."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    twins = whole(Half(), make=UPDATES["adam"])
    before = twins.model.get_parameter("unused.weight").detach().clone()
    assert train(twins) == twins.step.updates > 0
    assert not torch.equal(before, twins.model.get_parameter("unused.weight"))


def test_schedulers_need_no_other_recording():
    twins = whole(make=UPDATES["momentum"])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.8) for each in (twins.optimizer, twins.plain)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, where a scheduler believes that no step was taken
        for k in range(STEPS + 3):
            twins.backward(*batch(k))
            twins.update()
            for scheduler in schedulers:
                scheduler.step()
            for optimizer in (twins.optimizer, twins.plain):
                optimizer.noise_multiplier *= 1.1
                optimizer.param_groups[0].update(momentum=0.9 - 0.05 * k, nesterov=k > 6, dampening=0.0)
    assert twins.step.recorded == 1 and twins.step.updates >= 4


def _reload(model: nn.Module, optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _freeze(model: nn.Module, optimizer) -> None:
    model.get_parameter("0.weight").requires_grad_(False)


def _move(model: nn.Module, optimizer) -> None:
    weight = model.get_parameter("0.weight")
    weight.data = weight.data.clone()


def _regroup(model: nn.Module, optimizer) -> None:
    group = optimizer.param_groups[0]
    moved = group["params"].pop()
    optimizer.add_param_group({**group, "params": [moved], "lr": 0.3})


def _restart_one(model: nn.Module, optimizer) -> None:
    """One parameter's history begins anew: it is updated by another call than the rest."""
    del optimizer.original_optimizer.state[model.get_parameter("0.weight")]


def _other_states(model: nn.Module, optimizer) -> None:
    """In the place of a state stands another tensor, under the same name."""
    for state in optimizer.original_optimizer.state.values():
        for name in state:
            state[name] = state[name].clone()


CHANGES = {
    "the state is loaded": _reload,
    "a parameter is frozen": _freeze,
    "a parameter is elsewhere": _move,
    "a group of its own": _regroup,
    "one state is gone": _restart_one,
    "states are other tensors": _other_states,
    "momentum is switched off": lambda _, optimizer: optimizer.param_groups[0].update(momentum=0.0),
    "a mean over more samples": lambda _, optimizer: setattr(optimizer, "expected_batch_size", 8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_update_is_not_used(change):
    twins = whole(make=UPDATES["momentum" if "momentum" in change else "adamw amsgrad"])
    train(twins, 5)
    twins.both(CHANGES[change])
    before = twins.step.updates
    train(twins, 5, first=LATER)  # one of them is looked at, and one checks parameters that are new
    assert twins.step.updates > before
    assert_states_alike(twins)


def test_momentum_that_is_switched_on_begins_as_ever():
    """And switched off, and on again: its buffers are there."""
    twins = whole(make=sgd)
    for k, momentum in enumerate((0.0, 0.9, 0.0, 0.5)):
        for optimizer in (twins.optimizer, twins.plain):
            optimizer.param_groups[0].update(momentum=momentum, dampening=0.5)
        assert train(twins, 4, first=LATER * k) > 0
    assert_states_alike(twins)


@pytest.mark.parametrize("name", ["sgd", "adamw amsgrad"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite(name, bad, monkeypatch):
    """The graph writes nothing; the step is made once, with noise that no sum has met."""
    used = watch(monkeypatch)
    twins = whole(make=UPDATES[name])
    train(twins, 9)
    x, y = batch(LATER)
    x[2, 0, 0] = bad
    replays, recorded, steps = twins.step.updates, twins.step.recorded, len(used)
    with pytest.warns(RuntimeWarning, match="contributes exact zeros"):
        twins.step(x, y)
    assert len(used) == steps + 1
    twins.plain.zero_grad()
    mse(twins.twin(x), y).backward()
    assert twins.model.nonfinite_samples == twins.twin.nonfinite_samples == 1
    twins.update()
    assert all(p.isfinite().all() for p in twins.model.parameters())
    assert twins.step.updates == twins.step.replays == replays and twins.step.recorded == recorded
    assert twins.optimizer.noise.step == twins.plain.noise.step == 10
    assert_states_alike(twins)
    assert train(twins, 3, first=LATER + 1) >= 2
    assert len({words for words, *_ in used}) == len(used)


def watch(monkeypatch) -> list:
    """Key and step of every update that an operator of a graph makes, from now on."""
    from dpfast.ops import update_in_graph

    used, made = [], update_in_graph.noisy_step_

    def look(*args, **kwargs):
        noise = args[7]
        used.append(((noise.key, noise.step), noise.std))
        return made(*args, **kwargs)

    monkeypatch.setattr(update_in_graph, "noisy_step_", look)
    return used


def test_the_operator_writes_all_or_nothing():
    """Nothing while it is recorded, nothing where a sample is lost; and for no other reason."""
    noise = ops.Noise((3, 4, *(0,) * 6), 5, 0.5, 0.0, 0.25)
    rule = ops.Adam(0.1, 0.9, 0.99, 1e-8, 0.01, t=3.0, decoupled=True)
    given = [torch.randn(4, 3) for _ in range(5)]  # sum, parameter, two states, the largest

    def run(numbers: list[float], lost: list[bool]) -> list[Tensor]:
        total, p, *moments = (x.abs().clone() for x in given)
        ops.noisy_step_in_graph_(
            ops.Adam,
            *([p], [total], [total], [[x] for x in moments], [], [7], "nearest", [2]),
            torch.tensor(numbers, dtype=torch.float64),
            torch.tensor(ops.words_of(noise, (0, 0))),
            torch.tensor(lost),
        )
        return [total, p, *moments]

    numbers = ops.numbers_of(rule, noise)
    untouched = [x.abs() for x in given]
    for found in (run(numbers, [False, True]), run([0.0] * ops.NUMBERS, [False, False])):
        assert all(map(torch.equal, found, untouched))
    total, p, *moments = (x.abs().clone() for x in given)
    ops.noisy_step_(rule, [p], [total], [total], [[x] for x in moments], [], [7], noise, offsets=[2])
    assert all(map(torch.equal, run(numbers, [False, False]), [total, p, *moments]))


def test_numbers_and_words_hold_every_setting():
    """What one of them lost, the graph would keep as it was recorded."""
    noise = ops.Noise(tuple(range(1, 9)), 2**32 - 1, 0.5, 2.0**-24, 0.1)
    rules = [
        ops.SGD(0.1, 0.2, 0.3, 0.4, nesterov=True, maximize=False, first=True),
        ops.SGD(0.1, 0.2, 0.3, 0.4, nesterov=False, maximize=True, first=False),
        ops.Adam(0.1, 0.2, 0.3, 0.4, 0.5, 6.0, 0.7, 0.8, decoupled=True, maximize=False),
        ops.Adam(0.1, 0.2, 0.3, 0.4, 0.5, 6.0, decoupled=False, maximize=True),
    ]
    seen: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpfast.ops.update_in_graph.noisy_step_", lambda *args, **kw: seen.append(args))
        for rule in rules:
            x = [torch.zeros(2)]
            numbers = torch.tensor(ops.numbers_of(rule, noise), dtype=torch.float64)
            words = torch.tensor(ops.words_of(noise, (9, 2**32 - 1)))
            ops.noisy_step_in_graph_(
                *(type(rule), x, x, x, [x, x, x][: 1 if isinstance(rule, ops.SGD) else 3], [], [0], "stochastic", [1]),
                *(numbers, words, torch.zeros(3, dtype=torch.bool)),
            )
    assert [args[0] for args in seen] == rules
    assert all(args[7] == noise and args[8:] == ("stochastic", (9, 2**32 - 1), [1]) for args in seen)


def test_one_graph_has_the_whole_step_and_no_key():
    twins = whole(make=UPDATES["adam"])
    train(twins)
    (known,) = twins.step.kinds.values()
    (graph,) = known.graphs.values()
    module = graph.replay
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    for part in ("aten.tanh.default", "aten.tanh_backward.default", "aten.nextafter.default"):
        assert part in called  # forward, backward, factors
    assert called[-1] == "dpfast.noisy_step_in_graph_.default"
    assert called.count(called[-1]) == 1
    secret = [word for word in twins.optimizer.noise.key if word]
    texts = (module.code, str(module.graph), repr(graph), repr(vars(twins.step)), str(twins.step.kinds))
    assert len(secret) == 2 and not any(str(word) in text or hex(word) in text for word in secret for text in texts)
    kept = [x for x in module.state_dict().values()] + [*module.buffers(), *module.parameters()]
    of_model = {p.data_ptr() for p in twins.model.parameters()}
    wide = [x for x in kept if x.dtype in (torch.int64, torch.float64) and x.data_ptr() not in of_model]
    assert not any((x == word).any() for x in wide for word in secret)


def test_a_graph_is_a_function_of_its_tensors():
    """Run by hand, twice on copies of the same inputs: the same is written, and what is written depends on the key."""
    twins = whole()
    train(twins)
    (known,) = twins.step.kinds.values()
    (graph,) = known.graphs.values()
    x, y = batch(LATER)
    params = [p.detach().clone() for p in twins.model.parameters()]

    def run(word: int) -> list[Tensor]:
        noise = ops.Noise((word, *(0,) * 7), 1, 0.5, 0.0, 0.2)
        numbers = torch.tensor([ops.numbers_of(ops.SGD(0.1), noise)], dtype=torch.float64)
        parts = [p.clone() for p in params]
        given = [twins.model.clipped_sum.clipping.on(x.device), torch.ones(5, dtype=torch.float64), x, y]
        with torch.no_grad():
            graph.replay(*given, numbers, torch.tensor(ops.words_of(noise, (0, 0))), *parts)
        return parts

    first, again, other = run(11), run(11), run(12)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other)) and not any(map(torch.equal, first, params))
    assert all(map(torch.equal, params, twins.model.parameters()))


def refuse(optimizer) -> None:
    raise ValueError("the budget is spent")


def test_a_refusal_of_the_accountant_releases_nothing():
    twins = whole(make=UPDATES["adam"])
    train(twins, 9)
    counted = twins.optimizer.accounting
    before = [x.clone() for x in tensors_of(twins)]
    twins.optimizer.accounting = refuse
    with pytest.raises(ValueError, match="budget is spent"):
        twins.step(*batch(LATER))
    assert all(map(torch.equal, before, tensors_of(twins)))
    assert all(p.grad is None for p in twins.model.parameters())
    assert twins.optimizer.noise.step == 9
    twins.optimizer.accounting = counted
    with pytest.raises(ValueError, match="no backward pass"):
        twins.optimizer.step()  # there is no sum to release
    assert all(map(torch.equal, before, tensors_of(twins)))
    twins.backward(*batch(LATER))  # the same batch, as nothing of it was released
    twins.update()
    assert train(twins, 2, first=LATER + 1) == 2


def test_every_step_is_accounted_for_once():
    engine = engine_of()
    model = small()
    model, optimizer, _ = engine.make_private(
        module=model,
        optimizer=sgd(model),
        data_loader=DataLoader(TensorDataset(torch.zeros(40, 1)), batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=0.05,
    )
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y), optimizer)
    for k in range(9):
        x, y = batch(k)
        x[0, 0, 0] = torch.nan if k == 6 else 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(x, y)
        assert sum(steps for *_, steps in engine.accountant.history) == k + 1 == optimizer.noise.step
    assert step.updates > 3


def test_a_refusal_takes_the_whole_logical_batch_along():
    """What is left of it depends on the sum that was not made."""
    model, optimizer = private(small(), 5)
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y), optimizer)

    def logical(first: int, parts: int) -> None:
        for k in range(parts):
            optimizer.signal_skip_step(do_skip=k < parts - 1)
            step(*batch(first + k))

    for k in range(6):
        logical(2 * k, 2)
    assert step.updates > 2
    before, counted = [p.detach().clone() for p in model.parameters()], optimizer.accounting
    optimizer.accounting = refuse
    with pytest.warns(RuntimeWarning, match="whole of its logical batch"), pytest.raises(ValueError, match="spent"):
        logical(LATER, 2)
    optimizer.accounting = counted
    step(*batch(LATER + 1))  # the part that was refused, alone
    assert all(map(torch.equal, before, model.parameters())) and optimizer.noise.step == 6
    logical(LATER + 10, 2)
    assert optimizer.noise.step == 7 and not any(map(torch.equal, before, model.parameters()))


def test_the_same_samples_do_not_count_twice():
    model, optimizer = private(small(), 5)
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y), optimizer)

    def logical(*batches: tuple[Tensor, Tensor]) -> None:
        for k, given in enumerate(batches):
            optimizer.signal_skip_step(do_skip=k < len(batches) - 1)
            step(*given)

    for k in range(6):
        logical(batch(2 * k), batch(2 * k + 1))
    before, replayed = [p.detach().clone() for p in model.parameters()], step.updates
    (x, y), other = batch(LATER), batch(LATER + 1)
    with pytest.raises(ValueError, match="second backward pass"):
        logical((x, y), (x, y))
    assert all(map(torch.equal, before, model.parameters())) and optimizer.noise.step == 6
    optimizer.abandon()
    logical((x, y), other)
    assert optimizer.noise.step == 7 and replayed > 2


def test_an_error_of_the_graph_writes_nothing():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))
    model, optimizer = private(model, 5)
    step = dpfast.graphed(model, lambda model, x, y: mse(model(x), y), optimizer)
    ids = torch.arange(5).repeat(7, 1).T.contiguous()
    for k in range(STEPS):
        step((ids + k) % 6, batch(k)[1])
    assert step.updates
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(IndexError):
        step(ids + 4, batch(LATER)[1])
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.noise.step == STEPS + 1  # its noise is not used again
    step(ids, batch(LATER + 1)[1])
    assert optimizer.noise.step == STEPS + 2


def test_leaving_a_sample_out_moves_the_step_by_at_most_c():
    """The gradient that a step without noise leaves, of recorded steps alone."""
    C, (inputs, target) = 0.05, batch(3)
    options = dict(max_grad_norm=C, noise_multiplier=0.0, lr=0.0, loss_reduction="sum")
    model, optimizer = private(small(), 5, **options)
    step = dpfast.graphed(model, lambda model, x, y: sse(model(x), y), optimizer)

    def recorded(*given: Tensor) -> Tensor:
        for _ in range(6):
            before = step.updates
            step(*given)
            if step.updates > before:
                return torch.cat([p.grad.double().flatten() for p in model.parameters()])
        raise AssertionError("never replayed")

    sum_of_all = recorded(inputs, target)
    for i in range(5):
        rest = [j for j in range(5) if j != i]
        assert (sum_of_all - recorded(inputs[rest], target[rest])).norm() <= C * (1 + 1e-6)


OUTSIDE = {
    "step hooks": (lambda _, optimizer: optimizer.attach_step_hook(lambda optimizer: None), {}),
    "step method was replaced": (lambda _, o: setattr(o, "step", (lambda old: lambda: old())(o.step)), {}),
    "a hyperparameter is a tensor": (lambda _, o: o.param_groups[0].update(lr=torch.tensor(0.1)), {}),
    "it has step hooks": (lambda _, o: o.original_optimizer.register_step_post_hook(lambda *_: None), {}),
    "filter of DiSK": (lambda *_: None, dict(ascent=dpfast.DiSK())),
    "GradScaler": (lambda _, o: GradScaler(o, 2.0**3, device="cpu"), {}),
    "RMSprop has no fused update": (
        lambda *_: None,
        dict(make=lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01)),
    ),
}


@pytest.mark.parametrize("reason", OUTSIDE)
def test_what_stays_outside_is_told_once(reason, caplog):
    change, options = OUTSIDE[reason]
    twins = whole(**options)
    twins.both(change)
    with caplog.at_level(logging.WARNING):
        assert train(twins) > 0
    assert twins.step.updates == 0
    assert [reason in message for message in caplog.messages] == [True]


def test_an_empty_batch_is_a_step():
    twins = whole(make=UPDATES["momentum"])
    train(twins)
    for _ in range(3):
        twins.both(lambda _, optimizer: optimizer.expect_no_samples())
        twins.step(*batch(0, rows=0))
        twins.plain.zero_grad()
        mse(twins.twin(batch(0, rows=0)[0]), batch(0, rows=0)[1]).backward()
        twins.update()
    assert twins.optimizer.noise.step == STEPS + 3


def test_the_optimizer_is_the_models_own():
    model, optimizer = private(small(), 5)
    other = private(small(), 5)[1]
    for wrong in (other, optimizer.original_optimizer, True):
        with pytest.raises(ValueError, match=f"optimizer is a {type(wrong).__name__} that is not this model's"):
            dpfast.graphed(model, lambda model, x, y: mse(model(x), y), wrong)
