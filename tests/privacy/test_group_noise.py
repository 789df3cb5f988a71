"""``make_private(group_noise=...)``: each group's noise, on every path, and that it hides what one sample moves."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, RMSprop

import dpfast
from dpfast import ops
from dpfast.clipping.thresholds import Clipping
from tests.helpers import BF16, F32, F64, SLACK, engine_of, loader_of, make_private, sums_of
from tests.optim.private import B, Run, batch
from tests.test_graphed import STEPS, Twins, small, train

D = 4
GROUPS = {"0": 0.3, "2": 0.4}  # sensitivity 0.5
RULES: dict[str, tuple] = {  # what is given, and γ of both groups
    "global": ("global", (0.5, 0.5)),
    "equal": ("equal", (0.3 * math.sqrt(2), 0.4 * math.sqrt(2))),
    "numbers": ([0.375, 2 / 3], (0.375, 2 / 3)),
    "by name": ({"2": 0.5, "0": 0.5}, (0.5, 0.5)),
    "more than is needed": ([1.0, 1.0], (1.0, 1.0)),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def run_of(rule: str = "equal", model: nn.Module | None = None, make=lambda p: SGD(p, lr=0.1), **kw) -> Run:
    options = dict(clipping="per_layer", max_grad_norm=GROUPS, group_noise=RULES[rule][0])
    return Run(model or net(), make, **options | kw)


PATHS = {
    "the update's pass": {},
    "adam": dict(make=lambda p: Adam(p, lr=0.1)),
    "noise alone": dict(make=lambda p: RMSprop(p, lr=0.1)),
    "a hook": dict(hook=True),
    "16 bits": dict(dtype=BF16, loss_reduction="sum"),
    "the reference": dict(native=False),
    "an ascent": dict(ascent=dpfast.DPSAT(rho=0.1)),
    "a filter": dict(ascent=dpfast.DiSK()),
}


@each_rule
@pytest.mark.parametrize("path", PATHS)
def test_each_group_has_its_own_noise_on_every_path(rule, path, monkeypatch):
    """In an empty batch: ``p.grad`` is z times σ γ_r over the batch size, z that of a run with one noise."""
    kw = dict(PATHS[path])
    if not kw.pop("native", True):
        monkeypatch.setattr(ops, "is_native", lambda *_: False)
        monkeypatch.setattr("dpfast.ops.noise.is_native", lambda *_: False)
    hook, dtype = kw.pop("hook", False), kw.pop("dtype", F32)
    grads = []
    for each in (rule, "global"):
        run = run_of(each, net().to(dtype), **kw)
        if hook:
            run.optimizer.attach_step_hook(lambda optimizer: None)
        grads.append(run.step(None))
    assert run.optimizer.noise_scales == pytest.approx([0.5, 0.5])
    gamma = RULES[rule][1]
    for k, (mine, other) in enumerate(zip(*grads, strict=True)):
        torch.testing.assert_close(
            mine.float(), other.float() * gamma[k // 2] / 0.5, rtol=2e-2 if dtype == BF16 else 1e-5, atol=0
        )


@pytest.mark.parametrize("rule", ["equal", "numbers"])
@pytest.mark.parametrize("correction", [False, True])
def test_recorded_steps_to_the_bit(rule, correction):
    options = dict(clipping="per_layer", max_grad_norm={"0": 0.03, "": 0.04}, group_noise="equal")
    if rule == "numbers":
        options["group_noise"] = {"0": 0.0375, "": 0.2 / 3}
    options |= dict(make=lambda m: Adam(m.parameters(), lr=0.1), noise_correction=correction)
    twins = Twins(small(), 5, whole=True, **options)
    assert train(twins) == twins.step.updates >= STEPS - 3
    if correction:  # each group's own
        values = {s["noise_variance"] for s in twins.optimizer.state.values()}
        assert len(values) == 2


def test_secure_noise_is_raised_for_each_groups_rounding(monkeypatch):
    """``(C_r + √d_r · grid) / (std_r / σ)`` are the groups' shares, however many elements a group has."""
    seen: list[ops.Noise] = []
    real = ops.noisy_step_
    monkeypatch.setattr(ops, "noisy_step_", lambda *args, **kw: seen.append(args[7]) or real(*args, **kw))
    kw = dict(engine=engine_of(secure_mode=True), unseeded=True, poisson_sampling=True)
    run_of("numbers", noise_multiplier=2.0, **kw).step(None)
    assert len(seen) == 2 and seen[0].key == seen[1].key and seen[0].step == seen[1].step
    for noise, C, share, elements in zip(seen, (0.3, 0.4), (0.8, 0.6), (35, 18), strict=True):
        assert (C + math.sqrt(elements) * noise.grid) / (noise.std / 2.0) == pytest.approx(share, rel=1e-12)


def weighed(moves: list[float], scales: list[float]) -> float:
    return math.hypot(*(move / scale for move, scale in zip(moves, scales, strict=True)))


@each_rule
@pytest.mark.parametrize("style", ["per_layer", "prefixes", "each parameter"])
def test_leaving_a_sample_out_moves_no_more_than_the_noise_hides(rule, style):
    """Over their noise's scales, all groups together by at most 1: as far as σ of noise of unit scale is for."""
    x, y = torch.randn(6, 6, dtype=F64) * 10, torch.randint(3, (6,))
    kw: dict = dict(clipping="per_layer", max_grad_norm=GROUPS, group_noise=RULES[rule][0])
    if style == "prefixes":
        kw = dict(clipping=["0", "2"], max_grad_norm=0.05, group_noise="equal" if rule == "equal" else "global")
    elif style == "each parameter":
        kw = dict(clipping="per_layer", max_grad_norm=[0.1, 0.2, 0.3, 0.4], group_noise=[0.2, 0.4, 0.6, 0.8])
    model, optimizer, _ = make_private(net().double(), size=6, loss_reduction="sum", **kw)
    parts = [optimizer.clipping.group_of(p) for p in model.parameters()]

    def sums(keep: list[int]) -> list[Tensor]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[keep]), y[keep], reduction="sum").backward()
        return list(sums_of(model).values())

    whole, scales, most = sums([*range(6)]), optimizer.noise_scales, 0.0
    for i in range(6):
        rest = sums([j for j in range(6) if j != i])
        moves = [0.0] * len(scales)
        for r, a, b in zip(parts, whole, rest, strict=True):
            moves[r] = math.hypot(moves[r], (a - b).norm().item())
        assert all(move <= C * SLACK for move, C in zip(moves, optimizer.max_grad_norms, strict=True))
        most = max(most, weighed(moves, scales))
    assert most <= SLACK and (most > 0.99 or rule == "more than is needed")


@pytest.mark.parametrize("rule", ["equal", "numbers"])
def test_noise_is_for_the_largest_threshold_of_a_logical_batch(rule):
    """Two backwards under other thresholds, and a change before the step: each group's largest counts."""
    gamma, noises = RULES[rule][1], []
    run = run_of(rule, loss_reduction="sum")
    run.backward(batch())
    run.optimizer.clipping.thresholds = [0.6, 0.2]  # as a schedule of the user's own may
    run.backward(batch())
    run.optimizer.clipping.thresholds = [0.1, 0.1]
    real = ops.noisy_step_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "noisy_step_", lambda *args, **kw: noises.append(args[7]) or real(*args, **kw))
        run.optimizer.step()
    assert [noise.std for noise in noises] == pytest.approx([2 * gamma[0], gamma[1]])


def test_schedules_of_the_norm_keep_the_shares():
    run = run_of("numbers")
    run.optimizer.max_grad_norm = 1.0
    assert run.optimizer.max_grad_norms == pytest.approx([0.6, 0.8])
    assert run.optimizer.noise_scales == pytest.approx([0.75, 4 / 3])


def test_epsilon_is_what_it_is_for_one_noise():
    engines = engine_of(), engine_of()
    for engine, rule in zip(engines, ("global", "numbers"), strict=True):
        run_of(rule, engine=engine).step(None)
    assert engines[0].accountant.history == engines[1].accountant.history


def test_explain_tells_of_groups(capsys):
    run = run_of("numbers")
    said = dpfast.explain(run.wrapped, torch.randn(4, 6))
    assert "clipped together" in said and [line.split() for line in said.splitlines()[-2:]] == [
        ["0", "0.3", "0.375"],
        ["2", "0.4", "0.6667"],
    ]
    flat, *_ = make_private(net())
    assert "clipped together" not in dpfast.explain(flat, torch.randn(4, 6))


def test_a_checkpoint_tells_of_groups(tmp_path):
    """What another engine would do otherwise is warned of; the same is not."""
    path, engine = tmp_path / "checkpoint.pt", engine_of()
    run = run_of("numbers", engine=engine)
    engine.save_checkpoint(path=path, module=run.wrapped, optimizer=run.optimizer)
    assert torch.load(path)["noise_scales"] == run.optimizer.noise_scales
    for rule, others in (("numbers", False), ("equal", True), ("global", True)):
        other, its = engine_of(), run_of(rule, engine=engine_of())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            other.load_checkpoint(path=path, module=its.wrapped, optimizer=its.optimizer)
        assert bool([w for w in said if "group_noise" in str(w.message)]) == others
        assert its.optimizer.noise_scales == pytest.approx(RULES[rule][1])


@pytest.mark.parametrize(
    ("kw", "words"),
    [
        (dict(group_noise="local"), "use 'global', 'equal'"),
        (dict(group_noise=[0.37, 0.66]), r"is 1\.02.*multiply all of them by 1\.01"),
        (dict(group_noise=[0.3, 0.4]), "is 2, and more than 1"),
        (dict(group_noise=[1.0]), "each of the 2 groups"),
        (dict(group_noise=1.0), "each of the 2 groups"),
        (dict(group_noise=None), "each of the 2 groups"),
        (dict(group_noise={"0": 1.0}), r"names \['0', '2'\]"),
        (dict(group_noise={"0": 1.0, "2": 1.0, "3": 1.0}), r"names \['0', '2'\]"),
        (dict(group_noise=[1.0, 0.0]), "positive finite"),
        (dict(group_noise=[1.0, -2.0]), "positive finite"),
        (dict(group_noise=[1.0, math.inf]), "positive finite"),
        (dict(group_noise=[1.0, math.nan]), "positive finite"),
        (dict(group_noise=[1.0, True]), "positive finite"),
        (dict(group_noise=["1", 1.0]), "positive finite"),
        (dict(clipping="flat", max_grad_norm=1.0, group_noise={"": 1.0}), "no names here"),
        (dict(clipping="flat", max_grad_norm=1.0, group_noise=[0.5]), "is 4, and more than 1"),
        (dict(grad_sample_mode="hooks", group_noise="equal"), "of the fused mode"),
    ],
    ids=str,
)
def test_refused_before_anything_is_changed(kw, words):
    model = net()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=f"group_noise.*{words}"):
        make_private(model, **dict(clipping="per_layer", max_grad_norm=GROUPS) | kw)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_numbers_that_are_one_but_for_rounding_are_taken_and_hide_all():
    shares = [0.1, 0.2, 0.3]
    clipping = Clipping([0.1, 0.2, 0.3], {})
    clipping.share_noise([C * math.sqrt(3) * (1 - 1e-12) for C in shares])
    assert math.fsum(share**2 for share in clipping.shares) <= 1 + 4e-16


def test_one_group_may_have_more_noise():
    run = Run(net(), lambda p: SGD(p, lr=0.1), group_noise=[2.0])
    assert run.optimizer.noise_scales == [2.0] and run.optimizer.max_grad_norm == 0.5


@pytest.mark.parametrize("part", ["add_noise", "scale_grad", "clip_and_accumulate"])
def test_a_replaced_part_of_the_step_knows_of_one_noise(part):
    run = run_of("equal")
    setattr(run.optimizer, part, lambda: None)
    run.backward(batch())
    with pytest.raises(dpfast.refusals.ReplacedMethodError, match="group_noise"):
        run.optimizer.step()
    assert run.optimizer.noise.step == 0


# ---------------------------------------------------------------- adaptive thresholds of groups

ADAPTIVE = dict(
    target_unclipped_quantile=0.4,
    clipbound_learning_rate=0.3,
    max_clipbound=10.0,
    min_clipbound=1e-3,
    unclipped_num_std=3.0,
)


def adaptive(norms=GROUPS, sigma: float = 1.0, **kw) -> Run:
    options = dict(clipping="adaptive", max_grad_norm=norms, noise_multiplier=sigma, **ADAPTIVE)
    return Run(net(), lambda p: SGD(p, lr=0.1), **options | kw)


def test_each_threshold_follows_its_own_quantile():
    """Without noise: ``C_r exp(-η (b_r - q))``, b_r the fraction of the batch whose norm of the group is below."""
    run = adaptive(sigma=0.0)
    x, y = batch()
    with torch.no_grad():
        twin = copy.deepcopy(run.wrapped._module)
    norms = []
    for k in range(B):
        one = net()
        one.load_state_dict(twin.state_dict())
        F.cross_entropy(one(x[k : k + 1]), y[k : k + 1]).backward()
        grads = [p.grad for p in one.parameters()]
        norms.append([math.hypot(*(g.norm().item() for g in its)) for its in (grads[:2], grads[2:])])
    run.step((x, y))
    for r, C in enumerate(GROUPS.values()):
        below = sum(norm[r] <= C for norm in norms)
        assert run.optimizer.max_grad_norms[r] == pytest.approx(C * math.exp(-0.3 * (below / B - 0.4)), rel=1e-5)


@pytest.mark.parametrize("group_noise", ["global", "equal", [0.4, 2 / 3]])
@pytest.mark.parametrize("secure", [False, True])
def test_all_counts_and_sums_together_are_one_step(group_noise, secure, monkeypatch):
    """What one sample moves, over the noise that it gets: of sums C_r / std_r, of each count ½ / std, in all 1/σ."""
    stds: dict[str, list[ops.Noise]] = {"sums": [], "counts": []}
    step, grad = ops.noisy_step_, ops.noisy_grad_
    monkeypatch.setattr(ops, "noisy_step_", lambda *a, **kw: stds["sums"].append(a[7]) or step(*a, **kw))
    monkeypatch.setattr(
        ops, "noisy_grad_", lambda *a, **kw: stds["counts"].append((len(a[0][0]), a[3])) or grad(*a, **kw)
    )
    kw = dict(engine=engine_of(secure_mode=True), unseeded=True, poisson_sampling=True) if secure else {}
    run = adaptive(sigma=1.3, group_noise=group_noise, **kw)
    run.step(None)
    ((groups, count),) = stds["counts"]
    assert groups == 2 and count.std == pytest.approx(3.0, rel=1e-3)
    scales = (0.5, 0.5) if group_noise == "global" else (noise.std for noise in stds["sums"])
    if group_noise == "global":
        (noise,) = stds["sums"]
        of_sums = (0.5 / noise.std) ** 2
    else:
        of_sums = sum((C / std) ** 2 for C, std in zip(GROUPS.values(), scales, strict=True))
    total = math.sqrt(of_sums + 2 * (0.5 / count.std) ** 2)
    exact = group_noise != [0.4, 2 / 3]
    assert total <= 1 / 1.3 * (1 + 1e-9) and (not exact or total == pytest.approx(1 / 1.3, rel=1e-5))


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_the_formula(groups):
    of = dpfast.clipping.adaptive.AdaptiveClipping(**ADAPTIVE)
    z = of.of_sums(1.1, groups)
    assert pytest.approx(1 / z**2 + groups / (2 * 3.0) ** 2) == 1 / 1.1**2
    with pytest.raises(ValueError, match=r"unclipped_num_std=3\.0: must be more than"):
        of.of_sums(6.0 / math.sqrt(groups), groups)
    assert of.of_sums(0.0, groups) == 0.0


def test_leaving_a_sample_out_moves_each_count_by_a_half():
    """An ordinary one, one that is clipped, one that is not finite, and one beside rows of padding."""
    x, y = batch()
    x[1] *= 1e6
    x[2] = math.nan
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keep in ([*range(B)], *([j for j in range(B) if j != i] for i in range(4))):
            run = adaptive(sigma=0.0, loss_reduction="sum")
            run.backward((x[keep], y[keep]))
            counts.append(torch.tensor(run.wrapped.clipped_sum.unclipped))
            assert run.optimizer.unclipped_num == (counts[-1] + len(keep) / 2).tolist()
    for other in counts[1:]:
        moved = counts[0] - other
        assert moved.abs().tolist() == [0.5, 0.5] and moved.norm() == pytest.approx(math.sqrt(2) / 2)


def test_counting_that_is_too_dear_is_refused_before_anything_is_changed():
    model = net()
    before = [dict(vars(module)) for module in model.modules()]
    options = dict(clipping="adaptive", max_grad_norm=[0.1] * 4, noise_multiplier=1.0, data_loader=loader_of(B))
    with pytest.raises(ValueError, match=r"unclipped_num_std=0\.9: must be more than √4 / 2 = 1 times"):
        make_private(model, **options, **ADAPTIVE | dict(unclipped_num_std=0.9))
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_checkpoint_goes_on_with_every_threshold(tmp_path):
    path, engine = tmp_path / "checkpoint.pt", engine_of()
    run = adaptive(engine=engine)
    for _ in range(2):
        run.step(batch())
    engine.save_checkpoint(path=path, module=run.wrapped, optimizer=run.optimizer)
    kept = run.optimizer.max_grad_norms
    assert kept != list(GROUPS.values())
    run.step(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.load_checkpoint(path=path, module=run.wrapped, optimizer=run.optimizer)
    assert run.optimizer.max_grad_norms == kept
    other, flat = engine_of(), adaptive(0.5)
    with pytest.raises(dpfast.refusals.CheckpointError, match="a list of 1"):
        other.load_checkpoint(path=path, module=flat.wrapped, optimizer=flat.optimizer)
