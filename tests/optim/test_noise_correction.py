"""``make_private(noise_correction=...)``: Adam's second moments without the noise's variance, judged in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import dpfast
from dpfast.optim.noise_correction import FLOOR, NOISE_VARIANCE
from tests.helpers import engine_of, loader_of, make_private
from tests.ops.noisy import F32, same
from tests.optim.private import B, Run, batch, net
from tests.test_graphed import STEPS, Twins, small, train

pytestmark = pytest.mark.usefixtures("passes")
GAMMA = 1e-4
EPS = torch.finfo(F32).eps


def adam(params, **kw):
    return Adam(params, **dict(lr=0.01, betas=(0.8, 0.9)) | kw)


def run_of(model=None, make=adam, correction=GAMMA, **kw):
    return Run(model or net(), make, noise_correction=correction, **kw)


def judged(run, step):
    """``step()`` is DP-AdamBC's: from torch's own moments, as they are after it, in float64."""
    optimizer = run.optimizer.original_optimizer
    before = [p.detach().double() for p in run.model.parameters()]
    step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                continue
            state, (beta1, beta2), start = optimizer.state[p], group["betas"], before.pop(0)
            t = state["step"].item()
            noisy = state["exp_avg_sq"].double() / (1 - beta2**t)
            left = (noisy - state[NOISE_VARIANCE] / (1 - beta2**t)).clamp(min=run.optimizer.noise_correction)
            moved = group["lr"] * state["exp_avg"].double() / (1 - beta1**t) / (left.sqrt() + group["eps"])
            decayed = start * (1 - group["lr"] * group["weight_decay"] * group["decoupled_weight_decay"])
            # what rounding v leaves of the difference, and of the weights
            allowed = EPS * (2 * start.abs() + moved.abs() * (8 + 2 * noisy / left))
            assert ((p.detach().double() - (decayed - moved)).abs() <= allowed).all()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_that_is_taken_off_is_that_of_every_step(decoupled, secure, passes):
    """Of each step as it was: under other noise, another C, another batch size. An empty batch is a step too."""
    make = (lambda p: AdamW(p, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1)) if decoupled else adam
    kw = dict(engine=engine_of(secure_mode=True), unseeded=True, poisson_sampling=True) if secure else {}
    run, variance = run_of(make=make, **kw), 0.0
    for sigma, C, data in ((1.0, 0.5, batch()), (3.0, 0.5, None), (0.5, 2.0, batch(3)), (0.0, 2.0, batch())):
        run.optimizer.noise_multiplier, run.optimizer.max_grad_norm = sigma, C
        judged(run, lambda data=data: run.step(data))
        variance = 0.9 * variance + 0.1 * (sigma * C / B) ** 2
        for state in run.optimizer.state.values():
            assert state[NOISE_VARIANCE] == pytest.approx(variance, rel=1e-3 if secure else 1e-6)
    assert len(passes) == 4


def test_what_is_taken_off_is_what_noise_leaves_there():
    """Steps of noise alone: on average nothing is left of second moments, over all elements."""
    model = nn.Linear(64, 128)
    run = run_of(model, lambda p: Adam(p, lr=0.0, betas=(0.9, 0.95)), expected_batch_size=5)
    for _ in range(30):
        run.step(None)
    left = [(s["exp_avg_sq"].double() - s[NOISE_VARIANCE]).flatten() for s in run.optimizer.state.values()]
    variance = next(iter(run.optimizer.state.values()))[NOISE_VARIANCE]
    # each has Σ w² of the variance 2Φ² of a square, w the weights of the steps
    squares = sum((0.05 * 0.95**k) ** 2 for k in range(30)) / (1 - 0.95**30) ** 2
    elements = torch.cat(left)
    assert abs(elements.mean()) < 4 * variance * (2 * squares / len(elements)) ** 0.5


@pytest.mark.parametrize("make", [adam, lambda p: AdamW(p, lr=0.01)], ids=["adam", "adamw"])
def test_without_noise_it_is_torchs_to_the_bit(make):
    start = net()
    runs = [run_of(copy.deepcopy(start), make, correction, noise_multiplier=0.0) for correction in (False, True)]
    for _ in range(3):
        data = batch()
        for run in runs:
            run.step(data)
    assert same(*(run.values() for run in runs))


def test_moments_and_epsilon_stay_what_they_are():
    """The gradients are those of the same run without it; True is a floor of 5e-8."""
    start, engines = net(), [engine_of(), engine_of()]
    data = batch()
    runs = [run_of(copy.deepcopy(start), correction=c, engine=e) for c, e in zip((False, True), engines, strict=True)]
    assert same(*(run.step(data) for run in runs))
    for one, other in zip(*(run.optimizer.state.values() for run in runs), strict=True):
        assert [*other] == [*one, NOISE_VARIANCE]
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not same(*(run.values() for run in runs))
    assert engines[0].accountant.history == engines[1].accountant.history
    assert [run.optimizer.noise_correction for run in runs] == [0.0, FLOOR]


def test_param_groups_and_late_parameters_have_a_history_of_their_own(passes):
    model = net()
    model[3].requires_grad_(False)
    groups = [dict(params=[*model[:3].parameters()], betas=(0.5, 0.6)), dict(params=[*model[3].parameters()], lr=0.1)]
    run = run_of(model, adam(groups))
    for _ in range(2):
        judged(run, lambda: run.step(batch()))
    model[3].requires_grad_(True)
    run.optimizer.noise_multiplier = 2.0
    for _ in range(2):
        judged(run, lambda: run.step(batch()))
    first, late = (run.optimizer.state[p][NOISE_VARIANCE] for p in (model[0].weight, model[3].weight))
    before, after = (0.5 / B) ** 2, (1.0 / B) ** 2
    assert first == pytest.approx(0.36 * 0.64 * before + 0.64 * after, rel=1e-6)
    assert late == pytest.approx(0.19 * after, rel=1e-6)
    assert passes == [4, 4, 4, 2, 4, 2]


def test_a_state_goes_on_to_the_bit_and_one_without_it_is_taken_to_be_like_now():
    run, other, twin = run_of(), run_of(), run_of()
    for _ in range(2):
        run.step(batch())
    for each in (other, twin):
        each.model.load_state_dict(run.model.state_dict())
        each.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for state in twin.optimizer.state.values():
        assert state.pop(NOISE_VARIANCE) == pytest.approx(0.19 * (0.5 / B) ** 2, rel=1e-6)
    kept = run.optimizer.noise.state_dict()
    data = batch()
    run.step(data)
    for each in (other, twin):
        each.optimizer.noise.load_state_dict(kept)
        judged(each, lambda each=each: each.step(data))
        for state in each.optimizer.state.values():
            assert state[NOISE_VARIANCE] == pytest.approx(0.271 * (0.5 / B) ** 2, rel=1e-6)
    assert same(other.values(), run.values())


def test_a_step_without_it_forgets_what_was_known():
    """What a later step takes off is not of a time before others."""
    run = run_of()
    run.step(batch())
    run.optimizer.noise_correction = 0.0
    run.step(batch())
    assert all(NOISE_VARIANCE not in state for state in run.optimizer.state.values())


def test_a_checkpoint_of_the_engine_has_it(tmp_path):
    engine, path = engine_of(), tmp_path / "checkpoint.pt"
    run = run_of(engine=engine)
    run.step(batch())
    engine.save_checkpoint(path=path, module=run.wrapped, optimizer=run.optimizer)
    kept = [state[NOISE_VARIANCE] for state in run.optimizer.state.values()]
    run.step(batch())
    engine.load_checkpoint(path=path, module=run.wrapped, optimizer=run.optimizer)
    assert [state[NOISE_VARIANCE] for state in run.optimizer.state.values()] == kept


def test_a_recorded_step_to_the_bit():
    twins = Twins(small(), 5, whole=True, make=lambda m: AdamW(m.parameters(), lr=0.1), noise_correction=1e-3)
    assert train(twins) == twins.step.updates >= STEPS - 3
    for one, other in zip(*(o.original_optimizer.state.values() for o in (twins.optimizer, twins.plain)), strict=True):
        assert one[NOISE_VARIANCE] == other[NOISE_VARIANCE] > 0


def test_a_step_hook_does_not_turn_it_off(passes):
    """As with a master copy, the update is made in the noise's pass, and the hook sees no gradient."""
    run, seen = run_of(), []
    run.optimizer.attach_step_hook(lambda optimizer: seen.append([p.grad for p in run.model.parameters()]))
    judged(run, lambda: run.step(batch()))
    assert seen == [[None] * 6] and passes == [6]


@pytest.mark.parametrize(
    ("make", "kw", "words"),
    [
        (lambda p: SGD(p, lr=0.1), {}, "SGD is neither"),
        (lambda p: RMSprop(p, lr=0.1), {}, "RMSprop is neither"),
        (lambda p: Adam(p, amsgrad=True), {}, "amsgrad's largest"),
        (Adam, dict(ascent=dpfast.DiSK()), "filtered gradients"),
        (lambda p: Adam(p, capturable=True), {}, "capturable"),
        (Adam, dict(noise_correction=0.0), "give True, False"),
        (Adam, dict(noise_correction=-1e-8), "give True, False"),
        (Adam, dict(noise_correction=float("nan")), "give True, False"),
        (Adam, dict(noise_correction="yes"), "give True, False"),
        (Adam, dict(noise_correction=None), "give True, False"),
        (Adam, dict(grad_sample_mode="hooks"), "of the fused mode"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_before_anything_is_changed(make, kw, words):
    model = nn.Linear(3, 2)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=f"noise_correction.*{words}"):
        make_private(
            model, optimizer=make(model.parameters()), data_loader=loader_of(4), **dict(noise_correction=True) | kw
        )
    assert vars(model) == before and not hasattr(model.weight, "summed_grad")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_second_moments_that_are_too_coarse_and_updates_that_are_torchs_own(dtype):
    with pytest.raises(
        ValueError, match=r"noise_correction=True: .*parameter 'weight' is|noise_correction=True: a param"
    ):
        make_private(model := nn.Linear(3, 2).to(dtype), optimizer=Adam(model.parameters()), noise_correction=True)


def half(run):
    run.model[3].bias.data = run.model[3].bias.data.half()


def hook(run):
    run.optimizer.original_optimizer.register_step_post_hook(lambda *_: None)


def own_noise(run):
    run.optimizer.add_noise = lambda: None


def amsgrad(run):
    run.optimizer.param_groups[0]["amsgrad"] = True


@pytest.mark.parametrize("change", [half, hook, own_noise, amsgrad])
def test_refused_in_training_with_nothing_released(change):
    run = run_of(engine=(engine := engine_of()))
    run.step(batch())
    run.optimizer.zero_grad()
    run.backward(batch())
    change(run)
    before, history = run.values(), [*engine.accountant.history]
    with pytest.raises(ValueError, match="noise_correction="):
        run.optimizer.step()
    assert same(run.values(), before) and run.optimizer.noise.step == 1 and engine.accountant.history == history
