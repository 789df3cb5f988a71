"""Units together with everything else that a step may have: each is exact, or is refused by name."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpfast
from tests import oracle
from tests.helpers import F64, engine_of, follow, make_private, mse, sums_of, token_loss
from tests.oracle import Verdict
from tests.privacy.users import IDS, Users, everyone, examine_users, rows_of
from tests.zoo import TinyGPT, specimen


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return checkpoint(lambda h: self.b(torch.sin(h)), x, use_reentrant=self.reentrant)


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 3), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)).mean(1))


MODELS = {
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed with reentry": lambda: Checkpointed(True),
    "LoRA": LoRA,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make):
    x = torch.randn(len(IDS), 6, 4, dtype=F64)
    examine_users(make().double(), (x,), torch.randn(len(IDS), 6, 3, dtype=F64), mse, IDS)


def test_a_weight_with_one_position_in_one_use_and_several_in_another():
    x = torch.randn(len(IDS), 6, 4, dtype=F64)
    examine_users(Twice().double(), (x,), torch.randn(len(IDS), 4, dtype=F64), mse, IDS)


@pytest.mark.parametrize("plan", ["ghost", "instantiate"])
@pytest.mark.parametrize("name", ["Linear on sequences", "Conv2d", "Conv1d"])
def test_every_way_of_a_layer(name, plan):
    model, inputs, target = specimen(name, B=len(IDS))
    examine_users(model, inputs, target, mse, IDS, leave_out=False, plan={"": plan})


def test_compiled_with_units():
    """A compiled model's gradients are not clipped at the end of its graph, where no unit is known."""
    model, inputs, target = specimen("Linear", B=len(IDS))
    users = Users(model, inputs, target, IDS, 0.1)
    want = users.backward(mse)
    run = torch.compile(users.wrapped, backend="aot_eager")
    for _ in range(3):
        users.optimizer.zero_grad()
        *x, y = next(iter(users.loader))
        mse(run(*x), y).backward()
        torch.testing.assert_close(sums_of(users.model), want)
        users.optimizer.step()


@pytest.mark.parametrize("fn", ["global", "automatic", "normalised", "psac"])
def test_clipping_functions(fn):
    model, inputs, target = specimen("Linear", B=len(IDS))
    found, C = [], 20.0 if fn == "global" else 0.5  # which leaves out what is larger
    for ids in (IDS, [user for user in IDS if user != 3]):
        keep = [row for row, user in enumerate(IDS) if user in ids]
        users = Users(model, *oracle.take((inputs, target), keep), ids, C, clipping_fn=fn)
        found.append(torch.cat([s.flatten() for s in users.backward(mse).values()]))
    assert 0 < (found[0] - found[1]).norm() <= C * (1 + 1e-6)


def test_per_layer_and_groups():
    model, inputs, target = specimen("Linear", B=len(IDS))
    units, names = rows_of(IDS), [name for name, _ in model.named_parameters()]
    bounds = {name: 0.05 * (k + 1) for k, name in enumerate(names)}
    users = Users(model, inputs, target, IDS, list(bounds.values()), clipping="per_layer")
    verdict = Verdict(model, inputs, target, mse, bounds, dict(zip(names, names, strict=True)), units=units)
    verdict.check_sums(users.backward(mse))
    users = Users(model, inputs, target, IDS, {"0": 0.1, "": 0.2}, clipping="per_layer")
    groups = {name: "0" if name.startswith("0") else "" for name in names}
    Verdict(model, inputs, target, mse, {"0": 0.1, "": 0.2}, groups, units=units).check_sums(users.backward(mse))


def test_gradients_of_users_are_kept():
    model, inputs, target = specimen("tied GPT", B=len(IDS))
    users = Users(model, inputs, target, IDS, 0.1, keep_grad_samples=True)
    users.backward(token_loss)
    want = Verdict(model, inputs, target, token_loss, units=rows_of(IDS)).grads
    for name, p in users.model.named_parameters():
        torch.testing.assert_close(p.grad_sample, want[name])


def test_a_user_whose_gradient_is_not_finite_contributes_nothing():
    model, inputs, target = specimen("Linear", B=len(IDS))
    bad = target.clone()
    bad[2] = math.nan  # user 3 has three more rows
    with pytest.warns(RuntimeWarning, match="1 of 4"):
        users = Users(model, inputs, bad, IDS, 0.1)
        got = users.backward(mse)
    keep = [row for row, user in enumerate(IDS) if user != 3]
    rest = Users(model, *oracle.take((inputs, target), keep), [IDS[row] for row in keep], 0.1)
    torch.testing.assert_close(got, rest.backward(mse), rtol=1e-9, atol=1e-12)
    assert users.wrapped.nonfinite_samples == 1


@pytest.mark.parametrize("pad", [False, True])
def test_physical_batches_of_whole_users(pad):
    model, inputs, target = specimen("Linear", B=len(IDS))
    users = Users(model, inputs, target, IDS, 0.1, loss_reduction="sum")
    want = {name: s.clone() for name, s in users.backward(lambda out, y: mse(out, y) * len(out)).items()}
    users.optimizer.zero_grad()
    seen, norms = [], []
    with dpfast.BatchMemoryManager(
        data_loader=users.loader, max_physical_batch_size=4, optimizer=users.optimizer, pad=pad
    ) as parts:
        for x, y in parts:
            seen.append(len(x))
            (mse(users.wrapped(x), y) * len(x)).backward()
            norms += users.wrapped.per_sample_gradient_norms.tolist()
            last = sums_of(users.model)
            users.optimizer.step()
            users.optimizer.zero_grad()
    assert seen == [4, 4] and len(norms) == 4, (seen, norms)
    torch.testing.assert_close(last, want)


def test_no_users_in_a_batch():
    model = nn.Linear(4, 2)
    data = TensorDataset(torch.randn(6, 4), torch.randn(6, 2))
    private, optimizer, loader = everyone(
        data, [0, 0, 0, 1, 1, 1], model, 0.1, sample_rate=0.01, noise_multiplier=1.0, lr=1.0
    )
    before = copy.deepcopy(model.weight)
    for x, y in loader:
        F.mse_loss(private(x), y, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
        if not len(x):
            break
    assert len(x) == 0 and len(private.per_sample_gradient_norms) == 0
    assert not torch.equal(before, model.weight)


def test_adaptive_clipping_counts_users():
    model, inputs, target = specimen("Linear", B=len(IDS))
    adaptive = dict(target_unclipped_quantile=0.5, clipbound_learning_rate=0.5, max_clipbound=9.0, min_clipbound=0.01)
    users = Users(
        model, inputs, target, IDS, 0.5, clipping="adaptive", unclipped_num_std=1.0, expected_batch_size=4, **adaptive
    )
    users.backward(mse)
    assert users.optimizer.sample_size == 4
    within = (users.wrapped.per_sample_gradient_norms <= 0.5).sum()
    assert users.optimizer.unclipped_num == within
    users.optimizer.step()
    assert users.optimizer.max_grad_norm == pytest.approx(0.5 * math.exp(-0.5 * (float(within) / 4 - 0.5)))


def test_an_ascent_takes_the_gradients_of_users():
    model, inputs, target = specimen("Linear", B=len(IDS))
    users = Users(model, inputs, target, IDS, 0.1, ascent=dpfast.DPSAT(rho=0.1), expected_batch_size=4)
    users.backward(mse)
    users.optimizer.step()
    grads = torch.cat([p.grad.flatten() for p in users.model.parameters()])
    users.optimizer.zero_grad()
    got = users.backward(mse)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        start = 0
        for p, q in zip(twin.parameters(), users.model.parameters(), strict=True):
            p.copy_(q + 0.1 * grads[start : start + p.numel()].view(p.shape) / grads.norm())
            start += p.numel()
    Verdict(twin, inputs, target, mse, 0.1, units=rows_of(IDS)).check_sums(got)


def test_a_scaled_loss():
    model, inputs, target = specimen("Linear", B=len(IDS), dtype=torch.float32)
    users = Users(model, inputs, target, IDS, 0.1)
    scaler = dpfast.amp.GradScaler(users.optimizer, init_scale=2.0**10, device="cpu")
    *x, y = next(iter(users.loader))
    scaler.scale(mse(users.wrapped(*x), y)).backward()
    Verdict(model, inputs, target, mse, 0.1, units=rows_of(IDS)).check_sums(sums_of(users.model))


def test_a_criterion_of_the_ghost_mode():
    model, inputs, target = specimen("Linear", B=len(IDS))
    twin = copy.deepcopy(model)
    private, _, criterion, loader = everyone(
        TensorDataset(*inputs, target), IDS, model, 0.1, criterion=nn.MSELoss(), grad_sample_mode="ghost"
    )
    x, y = next(iter(loader))
    criterion(private(x), y).backward()
    Verdict(twin, inputs, target, mse, 0.1, units=rows_of(IDS)).check_sums(sums_of(model))


def test_a_graphed_step_is_refused():
    model, inputs, target = specimen("Linear", B=len(IDS))
    users = Users(model, inputs, target, IDS, 0.1)
    with pytest.raises(ValueError, match="graphed: units of several rows"):
        dpfast.graphed(users.wrapped, lambda model, x, y: mse(model(x), y), users.optimizer)


def test_a_graphed_step_of_a_model_that_gets_units_later_runs_as_it_is_written():
    model, inputs, target = specimen("Linear", B=len(IDS))
    dataset = TensorDataset(*inputs, target)
    private, optimizer, loader = make_private(model, data_loader=DataLoader(dataset, batch_size=len(IDS)))
    step = dpfast.graphed(private, lambda model, x, y: mse(model(x), y))
    for _ in range(3):
        step(*next(iter(loader)))
        optimizer.zero_grad()
    private, optimizer, loader = everyone(dataset, IDS, private, 0.1, optimizer=optimizer)
    for _ in range(3):
        replays = step.replays
        step(*next(iter(loader)))
        Verdict(model, inputs, target, mse, 0.1, units=rows_of(IDS)).check_sums(sums_of(model))
        optimizer.zero_grad()
        assert step.replays == replays


class Random(Dataset):
    """Every look at a sample is another view of it."""

    def __init__(self, n, inputs, target):
        self.n, self.inputs, self.target = n, inputs, target

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        return self.inputs[k] + torch.randn(4, dtype=F64), self.target[k]


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentations(workers):
    torch.manual_seed(0)
    model, (inputs,), target = specimen("Linear", B=4)
    twin = copy.deepcopy(model)
    data = DataLoader(Random(4, inputs, target), batch_size=2, num_workers=workers)
    options = dict(data_loader=data, sample_rate=1.0, poisson_sampling=True, expected_batch_size=2, max_grad_norm=0.3)
    private, _, loader = make_private(model, engine=engine_of(), augmentations=3, **options)
    x, y = next(iter(loader))
    assert len(x) == 12 and not torch.equal(x[0], x[1])
    mse(private(x), y).backward()
    units = [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(4)]
    verdict = Verdict(twin, (x,), y, mse, 0.3, units=units)
    verdict.check_norms(private.per_sample_gradient_norms)
    verdict.check_sums(sums_of(model))


def test_augmentations_of_users():
    model, inputs, target = specimen("Linear", B=5)
    twin = copy.deepcopy(model)
    ids = [0, 1, 0, 0, 1]
    private, _, loader = everyone(TensorDataset(*inputs, target), ids, model, 0.1, augmentations=2, rows_per_unit=2)
    x, y = next(iter(loader))
    assert len(x) == 8
    mse(private(x), y).backward()
    Verdict(twin, (x,), y, mse, 0.1, units=[[0, 1, 2, 3], [4, 5, 6, 7]]).check_sums(sums_of(model))


def test_epsilon_does_not_change_with_augmentations():
    spent = []
    for copies in (1, 4):
        engine = engine_of()
        data = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=2)
        _, optimizer, loader = make_private(
            nn.Linear(3, 1),
            engine=engine,
            augmentations=copies,
            poisson_sampling=True,
            noise_multiplier=1.0,
            data_loader=data,
        )
        optimizer.expect_no_samples()
        optimizer.step()
        spent.append((len(loader), optimizer.expected_batch_size, engine.get_epsilon(1e-5)))
    assert spent[0] == spent[1]


def test_training_is_that_of_the_oracle():
    """Ten steps of SGD over drawn users and a cap: every update is the oracle's for the rows that came."""
    model, data = TinyGPT().double(), torch.randint(9, (12, 5))
    twin = copy.deepcopy(model)
    ids = [0] * 5 + [1] * 3 + [2] * 2 + [3, 4]
    dataset = TensorDataset(data)
    of = {tuple(row.tolist()): user for row, user in zip(data, ids, strict=True)}
    private, optimizer, loader = everyone(
        dataset, ids, model, 0.2, sample_rate=0.4, rows_per_unit=2, expected_batch_size=2, lr=0.5
    )

    def loss(out, x):
        return F.cross_entropy(out.flatten(0, 1), x.flatten())

    steps = 0
    for _ in range(3):
        for (x,) in loader:
            if not len(x):
                continue
            users: dict = {}
            for row, sample in enumerate(x):
                users.setdefault(of[tuple(sample.tolist())], []).append(row)
            assert max(map(len, users.values())) <= 2
            verdict = Verdict(follow(twin, model), (x,), x, loss, 0.2, units=[*users.values()])
            before = [p.detach().clone() for p in model.parameters()]
            loss(private(x), x).backward()
            optimizer.step()
            optimizer.zero_grad()
            for p, old, (_, total) in zip(model.parameters(), before, verdict.sums.items(), strict=True):
                torch.testing.assert_close(p.detach(), old - 0.5 * total / 2, rtol=1e-5, atol=1e-7)
            steps += 1
    assert steps >= 3


@pytest.mark.parametrize("coupled", [False, True])
def test_check_sensitivity_leaves_users_out(coupled):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(6, 4), 5 * torch.randn(6, 2)

    def loss(model, batch):
        out = model(batch[0])
        return F.mse_loss(out - out.mean(0) if coupled else out, batch[1])

    report = dpfast.check_sensitivity(model, loss, (x, y), 0.1, units=["a", "b", "a", "a", "b", "c"])
    assert report.ok is not coupled and report.left_out == 3
    if not coupled:
        assert "left out 3 units" in str(report) and 0.05 < report.largest_move <= 0.1 * (1 + 1e-4)


@pytest.mark.parametrize("units", [[0, 0, 0], [0, 0], [0, None, 1]])
def test_check_sensitivity_refuses_units_that_are_none(units):
    with pytest.raises(ValueError, match="units"):
        dpfast.check_sensitivity(
            nn.Linear(4, 2), nn.MSELoss(), (torch.randn(3, 4), torch.randn(3, 2)), 0.1, units=units
        )


def test_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "units.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/units.md", "exec"), {})
    assert re.search(r"user-level epsilon \d", capsys.readouterr().out)
