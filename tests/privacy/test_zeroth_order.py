"""``dpfast.zeroth_order``: what one sample moves, the noise, the accounting, and the way back to the weights."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.noise.stream import NoiseStream
from dpfast.reference.noise import low_bits, standard_normal
from tests.helpers import BF16, F32, F64, engine_of, make_private

B, D, PHI, C = 6, 5, 1e-2, 2.2


def net(dtype: torch.dtype = F64) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def data(n: int = B, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(n, D, dtype=dtype), torch.randint(3, (n,))


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def made(model: nn.Module, loss=losses, x: Tensor | None = None, y: Tensor | None = None, seed: int | None = 3, **kw):
    """A step and its loader, at σ = 0 and lr = 0.1 unless told; of a data set whose batches are nearly all of it."""
    x, y = data() if x is None else (x, y)
    options = dict(lr=0.1, noise_multiplier=0.0, max_grad_norm=C, phi=PHI, sample_rate=1.0, expected_batch_size=len(x))
    options |= dict(engine=kw.pop("engine", None) or engine_of(), noise_generator=None)
    if seed is not None:
        options["noise_generator"] = torch.Generator().manual_seed(seed)
    return dpfast.zeroth_order(model, loss, data_loader=DataLoader(TensorDataset(x, y), batch_size=B), **options | kw)


def once(step, loader) -> float:
    (batch,) = loader
    return step(*batch)


def z_of(step, model: nn.Module) -> list[Tensor]:
    """The direction of the step that was just taken, from the reference."""
    key, at = step.directions.key, step.directions.step - 1
    out = []
    for k, p in enumerate(model.parameters()):
        z = standard_normal(key, at, k, 0, p.numel()).double()
        out.append((z + low_bits(key, at, k, 0, p.numel()) if p.dtype == F64 else z).view(p.shape))
    return out


def slopes_of(model: nn.Module, z: list[Tensor], x: Tensor, y: Tensor, loss=losses) -> Tensor:
    """``s_i`` of each sample by itself, in float64."""
    twin, ends = copy.deepcopy(model).double(), []
    start = [p.detach().clone() for p in twin.parameters()]
    for side in (1, -1):
        with torch.no_grad():
            for p, w, each in zip(twin.parameters(), start, z, strict=True):
                p.copy_(w + side * PHI * each)
            ends.append(torch.cat([loss(twin, x[k : k + 1].double(), y[k : k + 1]) for k in range(len(x))]))
    return (ends[0] - ends[1]) / (2 * PHI)


def params(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_step_is_the_papers(dtype):
    """Value and update, judged in float64, one sample at a time; elements to their roundings."""
    x, y = data(dtype=dtype)
    model = net(dtype)
    before = copy.deepcopy(model)
    step, loader = made(model, x=x, y=y)
    value = once(step, loader)
    z = z_of(step, model)
    slopes = slopes_of(before, z, x, y)
    assert (slopes.abs() > C).any() and (slopes.abs() < C).any()
    assert value == pytest.approx(slopes.clamp(-C, C).mean().item(), rel=1e-6 if dtype == F64 else 1e-3)
    for p, w, each in zip(model.parameters(), before.parameters(), z, strict=True):
        largest = w.double().abs() + PHI * each.abs()
        moved = (w.double() - 0.1 * value * each).detach()
        assert ((p.double() - moved).abs() <= 3 * torch.finfo(dtype).eps * largest + 1e-7 * (moved - w).abs()).all()


def with_huge(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The last column says what becomes of a sample: 1e9 times its loss, NaN, or infinite above or below."""
    ours = losses(model, x[:, :-1], y)
    kind = x[:, -1]
    ours = torch.where(kind == 1, 1e9 * ours, ours)
    ours = torch.where(kind == 2, math.nan, ours)
    return torch.where(kind == 3, torch.where(ours > 1, math.inf, ours), ours)


def test_leaving_a_sample_out_moves_the_sum_by_at_most_c():
    """Whatever the sample: an ordinary one, one that is a billion times as steep, and ones that are not finite."""
    x, y = data()
    x = torch.cat([x, torch.tensor([[0.0], [1], [2], [3], [1], [0]], dtype=F64)], 1)
    start = net().state_dict()
    sums = []
    for kept in (range(B), *([j for j in range(B) if j != i] for i in range(B))):
        model = net()
        model.load_state_dict(start)
        step, loader = made(model, with_huge, x[list(kept)], y[list(kept)], expected_batch_size=1)
        sums.append(once(step, loader))
    moves = [abs(sums[0] - other) for other in sums[1:]]
    assert max(moves) <= C * (1 + 1e-12)
    assert moves[1] == pytest.approx(C) and moves[4] == pytest.approx(C), "as steep as C, and no steeper"
    assert moves[2] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
def test_a_sample_that_is_not_finite_contributes_exactly_nothing(bad, sides):
    """On both sides, or on one: as if its losses were alike."""
    x, y = data()
    start, values = net().state_dict(), []
    for instead in (bad, 7.0):
        calls = iter(range(100))

        def loss(model, x, y, instead=instead, calls=calls):
            ours = losses(model, x, y)
            spoilt = sides[next(calls)] or instead == 7.0
            return torch.where(torch.arange(len(ours)) == 2, instead, ours) if spoilt else ours

        model = net()
        model.load_state_dict(start)
        step, loader = made(model, loss, x, y)
        step._look = lambda batch, count: None  # it calls the loss too, and is not what this is about
        values.append(once(step, loader))
        assert step.nonfinite_samples == (instead is bad)
        assert all(p.isfinite().all() for p in model.parameters())
    assert values[0] == values[1]


def test_the_noise_of_one_number_and_the_accounting_of_every_step():
    """Of empty batches too: σC/B once a step; ε is that of DP-SGD at the same σ, rate and number of steps."""
    x, y = data(40, F32)
    engine, other = engine_of(), engine_of()
    step, loader = made(net(F32), x=x, y=y, engine=engine, noise_multiplier=2.0, sample_rate=0.02, lr=0.0, seed=None)
    sizes, values, count = [], [], 0
    for _ in range(6):
        for batch in loader:
            sizes.append(len(batch[0]))
            values.append(step(*batch))
            count += 1
    assert count == 300 and sizes.count(0) > 100
    assert engine.accountant.history == [(2.0, 0.02, 300)]
    other.accountant.history = [(2.0, 0.02, 300)]
    assert engine.get_epsilon(1e-5) == other.get_epsilon(1e-5) > 0
    empty = torch.tensor([v for v, n in zip(values, sizes, strict=True) if n == 0], dtype=F64) * 40 / (2.0 * C)
    assert abs(empty.std() - 1) < 4 / math.sqrt(2 * len(empty)) and abs(empty.mean()) < 4 / math.sqrt(len(empty))


def test_weights_do_not_tell_that_a_batch_was_empty():
    """An update is rounded as often as where samples were seen, of which one might be the only one."""
    ends = []
    for rate in (1.0, 1e-9):
        torch.manual_seed(0)
        model = net(F32)
        step, loader = made(
            model, lambda m, x, y: 0 * losses(m, x, y), *data(dtype=F32), sample_rate=rate, noise_multiplier=1.0
        )
        batch = next(iter(loader))
        value = step(*batch)
        assert len(batch[0]) == (B if rate == 1.0 else 0)
        ends.append((value, *[p.detach() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0] != 0
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1:], ends[1][1:], strict=True))


def test_the_noise_is_added_to_the_sum():
    model, x, y = net(), *data()
    start = copy.deepcopy(model.state_dict())
    quiet = once(*made(model, x=x, y=y))
    model.load_state_dict(start)
    step, loader = made(model, x=x, y=y, noise_multiplier=1.5)
    noisy = once(step, loader)
    z = standard_normal(step.noise.key, 0, 0, 0, 1).double() + low_bits(step.noise.key, 0, 0, 0, 1)
    assert noisy - quiet == pytest.approx(1.5 * C * z.item() / B, rel=1e-6)


def test_no_key_and_step_twice_and_the_direction_has_a_key_of_its_own(tmp_path, monkeypatch):
    """Over failures, checkpoints and new steps; the noise's key is never z's, whatever it is drawn from."""
    seen: dict[NoiseStream, list] = {}
    real = NoiseStream.next

    def spy(stream, *args):
        noise = real(stream, *args)
        seen.setdefault(stream, []).append((noise.key, noise.step))
        return noise

    monkeypatch.setattr(NoiseStream, "next", spy)
    engine, path, fails = engine_of(), tmp_path / "checkpoint.pt", [False]

    def loss(model, x, y):
        if fails[0]:
            raise KeyboardInterrupt
        return losses(model, x, y)

    model = net(F32)
    x, y = data(dtype=F32)
    options = dict(engine=engine, noise_multiplier=1.0, seed=None)
    step, loader = made(model, loss, x, y, **options)
    once(step, loader)
    engine.save_checkpoint(path=path, module=model)
    fails[0] = True
    with pytest.raises(KeyboardInterrupt):
        once(step, loader)
    fails[0] = False
    once(step, loader)
    assert engine.accountant.history == [(1.0, 1.0, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the two steps stay accounted for
        engine.load_checkpoint(path=path, module=model)
        once(step, loader)
        once(*made(model, loss, x, y, **options))
    assert sum(count for _, _, count in engine.accountant.history) == 4
    noises = [each for stream, its in seen.items() for each in its]
    assert len({*noises}) == len(noises) >= 8  # of four steps, and their directions
    directions, keys = {step.directions.key}, {step.noise.key}
    assert not directions & keys
    seeded, loader = made(model, loss, x, y, engine=engine, noise_multiplier=1.0)
    once(seeded, loader)
    assert seeded.noise.key != seeded.directions.key


def test_the_way_back_is_the_weights_but_for_rounding():
    """lr = 0: each step leaves at most three roundings of an element, and of many steps they do not add up one way."""
    model = net(F32)
    before, steps = params(model), 40
    step, loader = made(model, lr=0.0, x=data(dtype=F32)[0], y=data()[1], phi=1e-3, sample_rate=0.3)
    taken = 0
    while taken < steps:
        for batch in loader:
            last = params(model)
            step(*batch)
            taken += 1
            for p, w in zip(model.parameters(), last, strict=True):
                assert ((p - w).abs() <= 1.5 * torch.finfo(F32).eps * (w.abs() + 8e-3)).all()
    drift = torch.cat([((p - w) / (w.abs() + 1e-3)).flatten() for p, w in zip(params(model), before, strict=True)])
    assert 0 < drift.square().mean().sqrt() < 3 * math.sqrt(taken) * torch.finfo(F32).eps


class Largest(TorchDispatchMode):
    """How many elements the largest new tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return out


def test_no_copy_of_the_weights_or_of_z_is_made():
    if not dpfast.ops.is_native("noisy_grad_", torch.device("cpu")):
        pytest.skip("the reference makes z in pieces")
    model = nn.Linear(200, 200)
    x, y = torch.randn(3, 200), torch.randint(3, (3,))
    step, loader = made(model, x=x, y=y)
    for _ in range(2):  # these look at the samples
        once(step, loader)
    (batch,) = loader
    with Largest() as largest:
        step(*batch)
    assert 600 <= largest.elements < 2000


def test_both_forwards_draw_the_same_random_numbers():
    drop, seen = nn.Dropout(0.5), []
    drop.register_forward_hook(lambda module, given, out: seen.append(out.detach() / given[0]))
    model = nn.Sequential(drop, net(F32))
    step, loader = made(model, x=1 + data(dtype=F32)[0].abs(), y=data()[1])
    for _ in range(2):
        once(step, loader)
    assert torch.equal(seen[-1], seen[-2]) and not torch.equal(seen[-2], seen[0])


def test_adapters_beside_frozen_weights_of_16_bits():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(D, 3).to(BF16).requires_grad_(False)
            self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x):
            return self.base(x.to(BF16)).float() + self.up(self.down(x))

    model = Adapted()
    before = params(model)
    once(*made(model, x=data(dtype=F32)[0], y=data()[1]))
    assert [torch.equal(p, q) for p, q in zip(params(model), before, strict=True)] == [True, True, False, False]


def test_a_batch_in_parts_is_the_batch():
    x, y = data()
    start, values = net().state_dict(), []

    def in_parts(model, x, y):
        return torch.cat([losses(model, *part) for part in zip(x.split(2), y.split(2), strict=True)])

    for loss in (losses, in_parts):
        model = net()
        model.load_state_dict(start)
        values.append(once(*made(model, loss, x, y)))
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_it_learns():
    torch.manual_seed(1)
    x, model = torch.randn(32, D), nn.Linear(D, 3)
    y = x[:, :3].argmax(1)
    step, loader = made(model, x=x, y=y, lr=0.3, max_grad_norm=5.0, noise_multiplier=0.1, phi=1e-3)
    before = losses(model, x, y).mean().item()
    for _ in range(60):
        for batch in loader:
            step(*batch)
    assert losses(model, x, y).mean().item() < 0.7 * before


def test_secure_mode():
    """The sum and its noise are whole steps of a grid, from a key that is not kept."""
    step, loader = made(net(), engine=engine_of(secure_mode=True), noise_multiplier=1.0, seed=None)
    value = once(step, loader)
    grid = math.ldexp(1.0, math.frexp(C)[1] - 25)
    assert (value * B / grid) == pytest.approx(round(value * B / grid), abs=1e-6)
    assert step.noise.key is None and step.directions.key is not None


def test_what_fails_releases_nothing():
    """In the second forward, and in the accountant: weights go back, no step is counted, the batch may be retried."""
    engine, model = engine_of(), net(F32)
    before, fails, calls = params(model), [True], []

    def loss(model, x, y):
        calls.append(params(model))
        if fails[0] and len(calls) > 100:
            raise ValueError("no")
        return losses(model, x, y)

    step, loader = made(model, loss, *data(dtype=F32), engine=engine, noise_multiplier=1.0)
    (batch,) = loader
    step._look = lambda batch, count: calls.extend([[]] * 100)
    with pytest.raises(ValueError, match="no"):
        step(*batch)
    assert len(calls) == 101
    fails[0] = False
    engine.accountant.step = lambda **_: (_ for _ in ()).throw(RuntimeError("the budget is spent"))
    with pytest.raises(RuntimeError, match="the budget"):
        step(*batch)
    del engine.accountant.step
    assert engine.accountant.history == [] and step.noise.step == 0
    for p, w in zip(params(model), before, strict=True):
        assert ((p - w).abs() <= 6 * torch.finfo(F32).eps * (w.abs() + 8 * PHI)).all()
    step(*batch)
    assert engine.accountant.history == [(1.0, 1.0, 1)] and step.noise.step == 1


# ---------------------------------------------------------------- refused


class Norm(nn.Module):
    """A buffer that follows the samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.layer(x)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(D, 3), None

    def forward(self, x):
        out = self.layer(x) + (0 if self.last is None else self.last.mean())
        self.last = x
        return out


class Meets(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0))


class Decides(nn.Module):
    """Another branch where some sample is large, as none of the batch is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, x):
        return self.layer(x) if x.max() < 1e3 else -self.layer(x)


class Hidden(nn.Module):
    """Samples meet where no operator shows it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, x):
        return self.layer(x) * torch.from_numpy(x.numpy().mean(0)).sum()


def tokens(model, x, y):
    return F.cross_entropy(
        model(x).unsqueeze(1).expand(-1, 2, -1).flatten(0, 1), y.repeat_interleave(2), reduction="none"
    )


def twice(model, x, y):
    return losses(model, x, y)[[0, *range(len(x) - 1)]]


def of_all(model, x, y):
    each = losses(model, x, y)
    return each / each.sum()


def of_the_number(model, x, y):
    return losses(model, x, y) / len(x)


@pytest.mark.parametrize(
    ("model", "loss", "topic"),
    [
        (nn.Linear(D, 3), lambda model, x, y: losses(model, x, y).mean(), "loss-per-sample"),
        (nn.Linear(D, 3), lambda model, x, y: losses(model, x, y).unsqueeze(1), "loss-per-sample"),
        (nn.Linear(D, 3), lambda model, x, y: None, "loss-per-sample"),
        (nn.Linear(D, 3), tokens, "loss-per-sample"),
        (nn.Linear(D, 3), lambda model, x, y: losses(model, x[1:], y[1:]), "loss-per-sample"),
        (nn.Linear(D, 3), twice, "samples-meet"),
        (nn.Linear(D, 3), of_all, "samples-meet"),
        (nn.Linear(D, 3), of_the_number, "samples-meet"),
        (nn.Linear(D, 3), lambda model, x, y: losses(model, x, y).mean().expand(len(x)), "samples-meet"),
        (Meets(), losses, "samples-meet"),
        (Decides(), losses, "samples-meet"),
        (Hidden(), losses, "samples-meet"),
        (Norm(), losses, "left-behind"),
        (Remembers(), losses, "samples-meet"),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__) if not isinstance(x, str) else x,
)
def test_what_lets_samples_meet_is_refused_with_the_model_as_it_was(model, loss, topic):
    step, loader = made(model, loss, *data(dtype=F32), engine=(engine := engine_of()), noise_multiplier=1.0)
    before = [*params(model), *(b.clone() for b in model.buffers())]
    with pytest.raises(dpfast.refusals.Refusal, match=topic):
        once(step, loader)
    assert all(map(torch.equal, [*params(model), *model.buffers()], before))
    assert engine.accountant.history == [] and step.noise.step == step.directions.step == 0


def test_what_is_declared_public_may_be_left_behind():
    model = Norm()
    step, loader = made(model, x=data(dtype=F32)[0], y=data()[1], public_state=["mean"])
    once(step, loader)
    assert model.mean.any()


def test_it_is_looked_at_again_when_it_is_called_in_another_mode():
    class Later(nn.Linear):
        def forward(self, x):
            return super().forward(x if self.training else x - x.mean(0))

    model = Later(D, 3)
    step, loader = made(model, x=data(dtype=F32)[0], y=data()[1])
    once(step, loader)
    model.eval()
    with pytest.raises(dpfast.refusals.SamplesMeetError, match=r"aten\.mean"):
        once(step, loader)


def test_it_is_looked_at_again_when_an_input_first_differs_between_samples():
    """What samples that are all alike do to each other, no check shows; and the third step is none that is due."""

    class Padded(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x) * float(mask.numpy().mean())  # where no operator shows it

    model, masks = Padded(D, 3), [torch.ones(B, 2), torch.ones(B, 2), torch.eye(B)[:, :2]]
    step, loader = made(model, lambda model, x, y, mask: losses(lambda x: model(x, mask), x, y), *data(dtype=F32))
    for k, mask in enumerate(masks):
        (batch,) = loader
        if k == 2:
            with pytest.raises(dpfast.refusals.SamplesMeetError):
                step(*batch, mask)
        else:
            step(*batch, mask)


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm(frozen):
    """Refused where it is made, and where it begins to normalise by the batch; with fixed statistics it trains."""
    model = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3))
    model[1].requires_grad_(not frozen)
    with pytest.raises(dpfast.refusals.BatchStatisticsError, match=r"1 \(BatchNorm1d\).*troubleshooting#layers"):
        made(model)
    model.eval()
    step, loader = made(model, x=data(dtype=F32)[0], y=data()[1])
    once(step, loader)
    model.train()
    with pytest.raises(dpfast.refusals.BatchStatisticsError):
        once(step, loader)


def test_a_batch_is_one_step():
    step, loader = made(net(), engine=(engine := engine_of()), noise_multiplier=1.0)
    (batch,) = loader
    step(*batch)
    with pytest.raises(dpfast.refusals.NothingToReleaseError, match="no batch of its own"):
        step(*batch)
    other, _ = made(net(), engine=engine)
    with pytest.raises(dpfast.refusals.NothingToReleaseError, match="no batch of its own"):
        other(*batch)
    assert engine.accountant.history == [(1.0, 1.0, 1)]


@pytest.mark.parametrize(
    ("name", "value"), [("lr", math.nan), ("phi", 0.0), ("noise_multiplier", -1.0), ("max_grad_norm", math.inf)]
)
def test_numbers_that_were_set_are_looked_at_before_the_step(name, value):
    step, loader = made(net(), engine=(engine := engine_of()), noise_multiplier=1.0)
    setattr(step, name, value)
    with pytest.raises(ValueError, match=f"{name}="):
        once(step, loader)
    assert engine.accountant.history == [] and step.directions.step == 0


def test_schedules_change_the_clipping_and_its_noise_together():
    model, x, y = net(), *data()
    start, values = copy.deepcopy(model.state_dict()), []
    for norm, sigma in ((C, 0.0), (0.5, 0.0), (0.5, 2.0)):
        model.load_state_dict(start)
        step, loader = made(model, x=x, y=y)
        step.max_grad_norm, step.noise_multiplier = norm, sigma
        values.append(once(step, loader))
    z = standard_normal(step.noise.key, 0, 0, 0, 1).double() + low_bits(step.noise.key, 0, 0, 0, 1)
    assert abs(values[1]) <= 0.5 and values[1] != values[0]
    assert values[2] - values[1] == pytest.approx(2.0 * 0.5 * z.item() / B, rel=1e-6)


def test_a_part_of_a_batch_is_not_the_batch():
    step, loader = made(net())
    for x, y in loader:
        with pytest.raises(dpfast.refusals.LossCouplesError, match="all of its batch"):
            step(x[:2], y[:2])


@pytest.mark.parametrize(
    ("model", "kw", "words"),
    [
        (net(BF16), {}, "parameter '0.weight' is torch.bfloat16"),
        (net().requires_grad_(False), {}, "no parameter with requires_grad"),
        (net(), dict(lr=-1.0), "lr=-1.0"),
        (net(), dict(lr=math.nan), "lr=nan"),
        (net(), dict(lr=True), "lr=True"),
        (net(), dict(phi=0.0), "phi=0.0"),
        (net(), dict(phi=math.inf), "phi=inf"),
        (net(), dict(phi=True), "phi=True"),
        (net(), dict(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
        (net(), dict(max_grad_norm=0.0), "max_grad_norm=0.0"),
        (net(), dict(sample_rate=2.0), "sample_rate=2.0"),
        (net(), dict(loss=nn.CrossEntropyLoss()), "loss=CrossEntropyLoss"),
        (net(), dict(loss=None), "loss=None"),
        (net(), dict(engine=engine_of(secure_mode=True)), "prohibited in secure mode"),
        (net(), dict(noise_generator=7), "noise_generator=7"),
        (net(), dict(public_state=["nothing"]), "public_state="),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_before_anything_is_changed(model, kw, words):
    before = [dict(vars(module)) for module in model.modules()]
    engine = kw.get("engine") or engine_of()
    with pytest.raises(ValueError, match=words):
        made(model, **dict(engine=engine) | kw)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert engine.unit is None and engine.dataset is None


def test_parameters_that_share_memory():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model[1].bias = nn.Parameter(model[0].bias.data)
    step, loader = made(model, x=data(dtype=F32)[0], y=data()[1])
    before = params(model)
    with pytest.raises(ValueError, match="overlap in memory"):
        once(step, loader)
    assert all(map(torch.equal, params(model), before))


def test_a_private_model():
    private, *_ = make_private(net(F32))
    for model in (private, private._module):
        with pytest.raises(dpfast.refusals.AlreadyPrivateError, match="to_standard_module"):
            made(model)
    made(private.to_standard_module())


class Wrapped(DistributedDataParallel):
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def test_ranks():
    with pytest.raises(dpfast.refusals.RanksError, match="it is a Wrapped, and ranks do not share"):
        made(Wrapped(net(F32)))


def test_a_loader_that_is_poisson_sampled_already():
    engine = engine_of()
    _, loader = made(net(F32), x=data(dtype=F32)[0], y=data()[1], engine=engine, sample_rate=0.5)
    step, again = dpfast.zeroth_order(
        net(F32), losses, engine=engine, data_loader=loader, lr=0.1, noise_multiplier=1.0, max_grad_norm=C
    )
    assert [*map(lambda batch: step(*batch), again)] and engine.accountant.history == [(1.0, 0.5, 2)]


def test_units_of_several_rows():
    engine = engine_of()
    x, y = data(dtype=F32)
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    units = dict(units=[0, 0, 1, 1, 2, 2], rows_per_unit=2, poisson_sampling=True)
    *_, loader = make_private(net(F32), engine=engine, data_loader=loader, **units)
    with pytest.raises(dpfast.refusals.LoaderError, match="batches are of units"):
        dpfast.zeroth_order(
            net(F32), losses, engine=engine_of(), data_loader=loader, lr=0.1, noise_multiplier=1.0, max_grad_norm=C
        )


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_no_copies(copied):
    step, _ = made(net())
    with pytest.raises(TypeError, match="call zeroth_order with a copy of the model"):
        copied(step)
