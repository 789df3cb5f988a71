"""``DPTrainer`` with users: exact against one user at a time, ε that says whose it is, and runs that go on."""

import math

import pytest
import torch

from tests import oracle
from tests.helpers import SLACK, distance

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dpfast.integrations.trainer import PRIVACY_NAME  # noqa: E402
from tests.integrations.test_trainer import (  # noqa: E402
    LR,
    C,
    _Logits,
    collate,
    gpt2,
    per_sample_loss,
    texts,
    trainer_of,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
IDS = ["b", "a", "b", "c", "b", "a", "d", "b"]  # of users with 4, 2, 1 and 1 rows


def data_of(ids=IDS):
    return [{**row, "user_id": user} for row, user in zip(texts(len(ids)), ids, strict=True)]


def users_trainer(folder, data=None, privacy=None, **kw):
    privacy = dict(unit_column="user_id", rows_per_unit=4) | (privacy or {})
    settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    return trainer_of(folder, data=data_of() if data is None else data, privacy=privacy, **(settings | kw))


def only_users(trainer, users):
    """The trainer, with every batch made of these users, by the rows of each."""
    plain = trainer.get_train_dataloader

    def loader():
        made = plain()
        made.batch_sampler.logical_units = lambda step: [list(rows) for rows in users]
        return made

    trainer.get_train_dataloader = loader
    return trainer


def by_hand(model, data, users):
    """The weights after a step of SGD: the mean gradient of each user's rows is clipped, sums are divided by 4."""
    before = weights(model)
    parts = {n: torch.zeros_like(p) for n, p in before.items()}
    for rows in users:
        of_rows = []
        for row in rows:
            ids = data[row]["input_ids"][None]
            of_rows.append(oracle.per_sample_gradients(_Logits(model), (ids,), ids, per_sample_loss))
        mean = {n: torch.stack([g[f"model.{n}"] for g in of_rows]).mean(0) for n in before}
        for name, total in oracle.clipped_sum(mean, C).items():
            parts[name] += total
    return {n: before[n] - LR * parts[n] / 4 for n in before}


@pytest.mark.parametrize("pad", [False, True])
def test_a_step_is_that_of_one_user_at_a_time(tmp_path, pad):
    data, users = data_of(), [[3], [6], [1, 5], [0, 2, 4, 7]]
    want = by_hand(gpt2(), data, users)
    trainer = only_users(users_trainer(tmp_path, privacy=dict(pad=pad, expected_batch_size=4)), users)
    trainer.train()
    torch.testing.assert_close(weights(trainer.model), want, rtol=1e-4, atol=1e-5)
    (entry,) = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert "epsilon_per_user_id" in entry and "epsilon" not in entry
    assert str(trainer.engine.unit) == "one user (user_id), at most 4 rows of each in a step"
    (history,) = trainer.engine.accountant.history
    assert history[1] == 1.0  # four users, of whom four are expected: not eight rows


def test_without_a_user_the_sum_moves_by_c_at_most(tmp_path):
    users = [[3], [6], [1, 5], [0, 2, 4, 7]]

    def after(users):
        trainer = only_users(users_trainer(tmp_path, privacy=dict(max_grad_norm=0.01, expected_batch_size=1)), users)
        trainer.train()
        return weights(trainer.model)

    whole = after(users)
    for left_out in (0, 3):
        moved = distance(whole, after(users[:left_out] + users[left_out + 1 :])) / LR
        assert 0.005 < moved <= 0.01 * SLACK * (1 + 1e-4)  # what weights were rounded to


def test_batches_draw_users_with_their_rows(tmp_path):
    trainer = users_trainer(tmp_path, privacy=dict(rows_per_unit=2, expected_batch_size=2))
    rows = {}
    for row, user in enumerate(IDS):
        rows.setdefault(user, set()).add(row)
    seen = set()
    batches = trainer._batches(5)
    batches.total = 40
    for _ in range(20):
        for batch in batches:
            for user in {IDS[row] for row in batch}:
                taken = rows[user] & {*batch}
                assert len(taken) == min(2, len(rows[user]))
                seen |= taken
            assert [IDS[of[0]] for of in batches.units.rows] == ["b", "a", "c", "d"] and len(batch.units) == len(batch)
    assert seen == {*range(8)} and batches.sample_rate == 0.5


def test_a_run_goes_on_with_its_users_alone(tmp_path):
    kw = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = users_trainer(tmp_path / "whole", privacy=dict(noise_multiplier=1.0), **kw)
    whole.train()
    path = str(tmp_path / "whole" / "checkpoint-2")
    again = users_trainer(tmp_path / "again", privacy=dict(noise_multiplier=1.0), **kw)
    again.train(resume_from_checkpoint=path)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    assert again.privacy_spent() == whole.privacy_spent()
    for privacy, here in (
        (dict(rows_per_unit=3), "at most 3 rows"),
        (dict(unit_column=None, rows_per_unit=None), "for one row here"),
    ):
        other = users_trainer(tmp_path / "other", privacy=dict(noise_multiplier=1.0) | privacy, **kw)
        with pytest.raises(ValueError, match=rf"{here}.* and was for one user \(user_id\), at most 4 rows of each"):
            other.train(resume_from_checkpoint=path)
        assert other.steps_accounted() == 0
    shared_out_otherwise = data_of(["a", "b", "b", "c", "b", "a", "d", "b"])
    other = users_trainer(tmp_path / "third", data=shared_out_otherwise, privacy=dict(noise_multiplier=1.0), **kw)
    with pytest.warns(UserWarning, match="users changed; the noise takes a new key"):
        other.train(resume_from_checkpoint=path)


@pytest.mark.parametrize(
    ("privacy", "named"),
    [
        (dict(unit_column="user_id", rows_per_unit=None), "rows_per_unit=None"),
        (dict(unit_column="user_id", rows_per_unit=0), "rows_per_unit=0"),
        (dict(unit_column="user_id", rows_per_unit=True), "rows_per_unit=True"),
        (dict(unit_column="", rows_per_unit=2), "unit_column=''"),
        (dict(unit_column=None, rows_per_unit=2), "without unit_column"),
        (dict(unit_column="author", rows_per_unit=2), "units='author'.*no such key"),
        (dict(unit_column="user_id", rows_per_unit=5), "per_device_train_batch_size=3: a user has 4 rows"),
    ],
)
def test_what_is_refused_before_anything_changes(tmp_path, privacy, named):
    model = gpt2()
    with pytest.raises(ValueError, match=named):
        users_trainer(tmp_path, model=model, privacy=privacy, per_device_train_batch_size=3)
    assert "forward" not in vars(model) and not any(vars(p) for p in model.parameters())


def test_a_user_without_an_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no id"):
        users_trainer(tmp_path, data=data_of([*IDS[:-1], None]))


def test_the_model_does_not_see_the_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": row["input_ids"].tolist(), "user_id": row["user_id"]} for row in data_of()]

    def strict(samples):
        assert not any("user_id" in sample for sample in samples)
        return collate([{"input_ids": torch.as_tensor(sample["input_ids"])} for sample in samples])

    for data in (rows, datasets.Dataset.from_list(rows)):
        trainer = users_trainer(tmp_path, data=data, data_collator=strict, remove_unused_columns=False)
        trainer.train()
        assert trainer.steps_accounted() == 1


def test_epsilon_is_that_of_users(tmp_path):
    """Planned for users too: eight rows of four users, two of whom a step expects."""
    trainer = users_trainer(
        tmp_path,
        privacy=dict(noise_multiplier=None, target_epsilon=2.0, target_delta=1e-2, expected_batch_size=2),
        max_steps=4,
    )
    trainer.train()
    ((sigma, rate, steps),) = trainer.engine.accountant.history
    assert rate == 0.5 and steps == 4 and 1.9 < trainer.privacy_spent()[0] <= 2.0
    assert math.isfinite(sigma)
    assert torch.load(str(_saved(trainer, tmp_path)), weights_only=False)["unit"]["column"] == "user_id"


def _saved(trainer, folder):
    trainer._save_optimizer_and_scheduler(str(folder))
    return folder / PRIVACY_NAME


def test_a_collator_that_sorts_its_samples_is_refused(tmp_path):
    def by_length(samples):
        return collate(sorted(samples, key=lambda sample: len(sample["input_ids"])))

    trainer = users_trainer(tmp_path, data_collator=by_length)
    with pytest.raises(ValueError, match="does not keep the order"):
        trainer.train()
    assert trainer.steps_accounted() == 0
