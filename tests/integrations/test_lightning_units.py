"""``DPCallback`` with users: exact against one user at a time, within C without one, whole in physical batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from tests import oracle
from tests.helpers import SLACK, distance

pytest.importorskip("lightning")

from tests.integrations.test_lightning import LR, C, Net, Plain, callback_of, data, fit, weights

IDS = [k % 5 for k in range(16)]  # 4, 3, 3, 3 and 3 samples
USERS = [[0, 5, 10, 15], [1, 6], [2, 7, 12]]


def callback(net, users=USERS, **kw):
    found = callback_of(net, **(dict(units=IDS, rows_per_unit=4, accountant="rdp") | kw))
    if users is not None:
        found._batches.logical_units = lambda step: [list(rows) for rows in users]
    return found


def by_hand(net, users):
    """The weights after a step: the mean gradient of each user's samples is clipped, sums are divided by 4."""
    before = weights(net)
    x, y = data().tensors
    grads = oracle.per_sample_gradients(net.layers, (x,), y, F.cross_entropy, units=users)
    total = oracle.clipped_sum(grads, C)
    return {n: before[n] - LR * total[n] / 4 for n in before}


@pytest.mark.parametrize(("size", "seen"), [(None, [9]), (5, [4, 5]), (16, [9])])
@pytest.mark.parametrize("cls", [Net, Plain])
def test_a_step_is_that_of_one_user_at_a_time(tmp_path, size, seen, cls):
    net = cls()
    want = by_hand(copy.deepcopy(net), USERS)
    privacy = callback(net, max_physical_batch_size=size)
    fit(net, tmp_path)
    assert net.seen == seen and distance(weights(net), want) < 1e-6
    assert str(privacy.engine.unit) == "one user (by a list of ids), at most 4 rows of each in a step"
    ((_, rate, steps),) = privacy.engine.accountant.history
    assert rate == 0.5 and steps == 1  # five users, of whom four are expected


def test_without_a_user_the_sum_moves_by_c_at_most(tmp_path):
    def after(users):
        net = Net()
        callback(net, users, max_grad_norm=0.05)
        fit(net, tmp_path)
        return weights(net)

    whole = after(USERS)
    for k in range(3):
        moved = distance(whole, after(USERS[:k] + USERS[k + 1 :])) * 4 / LR
        assert 0.01 < moved <= 0.05 * SLACK * (1 + 1e-5)


def test_workers_and_a_column(tmp_path):
    class Named(Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, k):
            x, y = data()[k]
            return {"x": x, "y": y, "user_id": f"user {IDS[k]}"}

    class Reads(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    net = Reads()
    want = by_hand(copy.deepcopy(net), USERS)
    loader = dict(num_workers=1, multiprocessing_context="fork")
    privacy = callback(net, dataset=Named(), units="user_id", loader=loader)
    fit(net, tmp_path)
    assert distance(weights(net), want) < 1e-6 and privacy.engine.unit.column == "user_id"


def test_a_run_goes_on_with_its_users_alone(tmp_path):
    net = Net()
    callback(net, None, noise_multiplier=1.0)
    trainer = fit(net, tmp_path)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for kw, here in ((dict(rows_per_unit=2), "at most 2 rows"), (dict(units=None, rows_per_unit=None), "for one row")):
        other = Net()
        callback(other, None, noise_multiplier=1.0, **kw)
        with pytest.raises(ValueError, match=f"{here}.* and was for one user"):
            fit(other, tmp_path, ckpt_path=tmp_path / "one.ckpt", max_steps=2)
    again = Net()
    privacy = callback(again, None, noise_multiplier=1.0)
    fit(again, tmp_path, ckpt_path=tmp_path / "one.ckpt", max_steps=2)
    assert privacy.steps_accounted() == 2


def by_first_number(samples):
    """As a collate function that sorts texts by their length."""
    return torch.utils.data.default_collate(sorted(samples, key=lambda sample: float(sample[0][0])))


@pytest.mark.parametrize(
    ("kw", "named"),
    [
        (dict(units=IDS, rows_per_unit=None), "rows_per_unit=None"),
        (dict(units=None, rows_per_unit=2), "without units="),
        (dict(units=IDS[1:], rows_per_unit=2), "15 ids"),
        (dict(max_physical_batch_size=3), "max_physical_batch_size=3: a user has 4 samples"),
        (dict(collate_fn=by_first_number), "does not keep the order"),
        (dict(augmentations=2), "augmentations"),
    ],
)
def test_what_is_refused(kw, named):
    with pytest.raises(ValueError, match=named):
        callback(Net(), **kw)


def test_a_hook_that_loses_the_users_is_refused(tmp_path):
    class Loses(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch.batch

    net = Loses()
    callback(net)
    with pytest.raises(ValueError, match="whose its rows are"):
        fit(net, tmp_path)
