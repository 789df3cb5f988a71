"""``DPCallback`` against the one-sample-at-a-time oracle; accounting, resuming, refusing."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tests import oracle
from tests.helpers import SLACK, distance

L = pytest.importorskip("lightning")

from dpfast.integrations.lightning import DPCallback  # noqa: E402

LR, C = 0.5, 0.6


class Net(L.LightningModule):
    def __init__(self, optimizer="SGD", dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
        self.kind, self.seen, self.dtypes = optimizer, [], set()

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.dtypes.add(out.dtype)
        self.seen.append(len(x))
        return {"loss": F.cross_entropy(out, y)}

    def configure_optimizers(self):
        private = self.privacy.make_private(self, getattr(torch.optim, self.kind)(self.parameters(), lr=LR))
        schedule = torch.optim.lr_scheduler.ExponentialLR(private, 0.9)
        return {"optimizer": private, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plain(Net):
    """It knows nothing of privacy."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LR)
        if self.kind == "alone":
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule if self.kind == "dict" else {"scheduler": schedule}}


def data(count=16):
    g = torch.Generator().manual_seed(1)
    return TensorDataset(3 * torch.randn(count, 4, generator=g), torch.randint(0, 3, (count,), generator=g))


def callback_of(net, dataset=None, rows=None, **kw):
    settings = dict(batch_size=4, noise_multiplier=0.0, max_grad_norm=C, accountant="rdp", seed=3)
    net.privacy = DPCallback(data() if dataset is None else dataset, **(settings | kw))
    if rows is not None:
        net.privacy._batches.logical_batch = lambda step: list(rows)
    return net.privacy


def fit(net, folder, ckpt_path=None, **kw):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    settings = dict(max_steps=1, accelerator="cpu", default_root_dir=str(folder)) | quiet | kw
    settings["callbacks"] = [net.privacy, *settings.get("callbacks", [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**settings)
        trainer.fit(net, net.privacy.train_dataloader(), ckpt_path=ckpt_path)
    return trainer


def weights(net):
    return {n: p.detach().double().clone() for n, p in net.layers.named_parameters()}


def by_hand(net, rows, expected_batch_size=4):
    before = weights(net)
    x, y = data()[rows]
    grads = oracle.per_sample_gradients(net.layers, (x,), y, F.cross_entropy)
    total = oracle.clipped_sum(grads, C)
    return {n: before[n] - LR * total[n] / expected_batch_size for n in before}


@pytest.mark.parametrize("size", [None, 2, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_step_is_the_oracles(tmp_path, size, reduction):
    rows, net = [1, 4, 5, 8, 13], Net()
    if reduction == "sum":
        step = net.training_step
        net.training_step = lambda batch, batch_idx: step(batch, batch_idx)["loss"] * len(batch[0])
    want = by_hand(copy.deepcopy(net), rows)
    privacy = callback_of(net, rows=rows, max_physical_batch_size=size, loss_reduction=reduction)
    fit(net, tmp_path)
    assert net.seen == {None: [5], 2: [2, 2, 1], 5: [5]}[size]
    assert distance(weights(net), want) < 1e-6
    assert privacy.steps_accounted() == 1


def test_samples_of_equal_values_are_several(tmp_path):
    """In several physical batches of one step they are no sample that counts twice."""
    net = Net()
    callback_of(net, TensorDataset(*(x[[0, 1, 0, 1]] for x in data().tensors)), range(4), max_physical_batch_size=2)
    fit(net, tmp_path)
    assert net.seen == [2, 2]


def test_without_a_sample_the_update_moves_by_no_more_than_its_share(tmp_path):
    rows, ends = [1, 4, 5], {}
    for left_out in [None, *rows]:
        net = Net()
        callback_of(net, rows=[r for r in rows if r != left_out], max_physical_batch_size=2)
        fit(net, tmp_path)
        ends[left_out] = weights(net)
    bound = LR * C / 4
    moves = [distance(ends[None], ends[r]) for r in rows]
    assert 0.9 * bound < max(moves) <= bound * SLACK + 1e-6


def test_steps_are_counted_once_and_empty_batches_are_steps(tmp_path):
    net, ends = Net(), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, k):
            ends.append((len(batch), weights(net)))

    privacy = callback_of(net, data(3), batch_size=1, noise_multiplier=1.0, seed=4)
    trainer = fit(net, tmp_path, max_steps=7, max_epochs=9, callbacks=[Watch()])
    assert 0 in [size for size, _ in ends], "no batch was empty: take another seed"
    for (_, before), (_, after) in itertools.pairwise(ends):
        assert all((before[n] != after[n]).any() for n in before), "a step without noise"
    assert trainer.global_step == len(ends) == 7
    assert privacy.engine.accountant.history == [(1.0, 1 / 3, 7)]
    assert 0 < privacy.get_epsilon(1e-5) < float("inf")


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("at, workers", [(2, 0), (4, 0), (2, 1)])
def test_a_resumed_run_has_all_its_steps_and_new_noise(tmp_path, at, workers, seed):
    """Within an epoch (of four steps) and at the end of one; with dropout, Adam, a schedule and noise; twice."""
    whole = Net("Adam", dropout=0.3)
    settings = dict(noise_multiplier=1.0, max_physical_batch_size=2, seed=seed, loader={"num_workers": workers})
    first = callback_of(whole, **settings)
    keep = L.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    fit(whole, tmp_path, max_steps=7, callbacks=[keep], enable_checkpointing=True)
    path, keys = tmp_path / f"step={at}.ckpt", {first.optimizer.noise.key}
    for _ in range(2):
        other = Net("Adam", dropout=0.3)
        second = callback_of(other, **settings)
        fit(other, tmp_path, max_steps=7, ckpt_path=str(path))
        assert second.engine.accountant.history == first.engine.accountant.history == [(1.0, 1 / 4, 7)]
        assert second._batches.step >= 7 and len(other.seen) >= 7 - at
        keys.add(second.optimizer.noise.key)
    assert len(keys) == 3 and None not in keys
    held = torch.load(path, weights_only=True)["callbacks"]
    (state,) = [state for state in held.values() if "accountant" in state]
    assert set(state) == {"accountant", "plan", "sampled", "unit"}, "a key, a seed"


def test_a_seed_repeats_noise_and_batches(tmp_path):
    ends = []
    for seed in (3, 3, 3 + (1 << 32), None):
        net = Net()
        callback_of(net, noise_multiplier=1.0, seed=seed)
        fit(net, tmp_path, max_steps=3)
        ends.append(weights(net))
    assert distance(ends[0], ends[1]) == 0
    assert all(distance(ends[0], end) > 0 for end in ends[2:])


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    net = Net()
    callback_of(net, noise_multiplier=1.0)
    trainer = fit(net, tmp_path, max_steps=2)
    path = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(path)
    other = Net()
    callback_of(other, data(15))
    with pytest.raises(ValueError, match="steps per epoch"):
        fit(other, tmp_path, max_steps=4, ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, path)
    other = Net()
    callback_of(other)
    with pytest.raises(ValueError, match="not accounted for"):
        fit(other, tmp_path, max_steps=4, ckpt_path=path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("gradient_clip_val", 1.0),
        ("accumulate_grad_batches", 2),
        ("precision", "16-true"),
        ("overfit_batches", 1),
        ("strategy", "ddp"),
    ],
)
def test_what_breaks_the_guarantee_is_refused_by_name(tmp_path, name, value):
    net = Net()
    callback_of(net)
    with pytest.raises(ValueError, match=name):
        fit(net, tmp_path, **{name: value})
    assert net.privacy.optimizer is None


def test_other_optimizers_loaders_and_losses_are_refused(tmp_path):
    net = Net()
    callback_of(net)
    net.configure_optimizers = lambda: [torch.optim.SGD(net.parameters(), lr=LR)]
    with pytest.raises(ValueError, match="make_private"):
        fit(net, tmp_path)
    net = Net()
    callback_of(net)
    net.privacy.train_dataloader = lambda: torch.utils.data.DataLoader(data(), batch_size=4)
    with pytest.raises(ValueError, match="train_dataloader"):
        fit(net, tmp_path)
    net = Net()
    callback_of(net, rows=[1, 2])
    net.training_step = lambda batch, batch_idx: None
    with pytest.raises(ValueError, match="training_step"):
        fit(net, tmp_path)
    net.training_step = Net.training_step.__get__(net)
    fit(net, tmp_path)
    assert net.seen == [2], "what the failed fit left is in the way"
    with pytest.raises(ValueError, match="wrap_model"):
        callback_of(Net(), wrap_model=True)


@pytest.mark.parametrize("size", [None, 2])
def test_bfloat16_mixed(tmp_path, size):
    rows, net = [1, 4, 5, 8, 13], Net()
    start, want = weights(net), by_hand(copy.deepcopy(net), rows)
    step = net.training_step
    net.training_step = lambda batch, batch_idx: step(batch, batch_idx)["loss"] * len(batch[0])
    callback_of(net, rows=rows, max_physical_batch_size=size, loss_reduction="sum")
    fit(net, tmp_path, precision="bf16-mixed")
    assert net.dtypes == {torch.bfloat16}
    assert 0 < distance(weights(net), want) < 0.05 * distance(want, start)


def test_a_mean_in_16_bits_is_refused_at_fit(tmp_path):
    """But not where a physical batch is one sample."""
    for precision in ("bf16-mixed", "bf16-true"):
        net = Net()
        callback_of(net)
        with pytest.raises(ValueError, match=r"precision='bf16.*loss_reduction='sum'"):
            fit(net, tmp_path, precision=precision)
        assert net.seen == []
    callback_of(net, rows=[1, 4], max_physical_batch_size=1)
    fit(net, tmp_path, precision="bf16-mixed")
    assert net.seen == [1, 1]


def test_a_second_fit_goes_on_and_the_module_stays_the_users_own(tmp_path):
    net = Net()
    privacy = callback_of(net, noise_multiplier=1.0)
    fit(net, tmp_path, max_steps=2)
    key = privacy.optimizer.noise.key
    fit(net, tmp_path, max_steps=3)
    assert privacy.steps_accounted() == 5 and privacy._batches.step >= 5
    assert type(net) is Net and "training_step" not in vars(net)
    assert privacy.optimizer.noise.key != key, "the same noise on other batches"
    assert list(net.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize("kind", ["alone", "dict", "nested"])
def test_a_module_that_knows_nothing_of_privacy(tmp_path, kind):
    """Three lines make it private: its own optimizer is, and the scheduler goes along."""
    net, rows = Plain(kind), [0, 3, 5]
    start, want = weights(net), by_hand(copy.deepcopy(net), rows)
    callback_of(net, rows=rows)
    fit(net, tmp_path)
    assert distance(weights(net), want) <= 1e-5 * distance(want, start)
    assert net.privacy.steps_accounted() == 1
    assert "configure_optimizers" not in vars(net) and "training_step" not in vars(net)
    lr = net.privacy.optimizer.param_groups[0]["lr"]
    assert lr == LR


def test_a_budget_in_place_of_noise(tmp_path):
    net = Plain("alone")
    settings = dict(noise_multiplier=None, target_epsilon=3.0, target_delta=1e-3, epochs=2)
    callback_of(net, **settings)
    fit(net, tmp_path, max_steps=-1, max_epochs=2)
    assert 2.5 < net.privacy.get_epsilon(1e-3) <= 3.0 and net.privacy.steps_accounted() == 8


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(noise_multiplier=None), "target_epsilon, target_delta, epochs: give noise_multiplier"),
        (dict(noise_multiplier=None, target_epsilon=3.0, epochs=2), "target_delta: give"),
        (dict(noise_multiplier=1.0, target_epsilon=3.0), "noise_multiplier=1.0 and target_epsilon"),
        (dict(noise_multiplier=None, target_epsilon=3.0, target_delta=1e-3, epochs=0), "epochs=0"),
    ],
)
def test_noise_and_budgets_that_do_not_fit(settings, said):
    with pytest.raises(ValueError, match=said):
        callback_of(Plain(), **settings)
