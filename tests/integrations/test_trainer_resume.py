"""A resumed run of ``DPTrainer`` is the same to the bit, or its noise has another key: never the same on other sums."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("transformers")

from dpfast.distributed.ranks import Ranks
from dpfast.integrations import trainer_checkpoints
from dpfast.integrations.replayed import Replayed, Rows, digest_of, seeded, whole
from dpfast.integrations.trainer import PRIVACY_NAME, DPTrainer
from dpfast.integrations.trainer_checkpoints import ResumableTrainer, newest_whole
from tests.integrations.test_trainer import DROPOUT, collate, gpt2, lora, texts, trainer_of, weights

PRIVACY = {"noise_multiplier": 1.0, "seed": None}
RUN = dict(max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch", privacy=PRIVACY)


class Transformed(Dataset):
    """Samples in which tokens change at random, by each of the generators that people use."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, k):
        ids = self.samples[k]["input_ids"].clone()
        ids[torch.randint(len(ids), ())] = 1 + random.randrange(20)
        ids[np.random.randint(len(ids))] = 3
        return {"input_ids": ids}


def masked(samples):
    """A collator that draws too."""
    batch = collate(samples)
    batch["labels"] = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.2, -100)
    return batch


def trained(folder, model=None, resume=False, **kw):
    """Two steps, or the second of them."""
    trainer = trainer_of(folder, gpt2(**DROPOUT) if model is None else model, **(RUN | kw))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resume else None)
    return trainer


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The folder of a run, and its key."""
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(folder).optimizer.noise.key


@pytest.mark.parametrize("workers", [0, 1])
def test_random_transforms_are_drawn_again(tmp_path, workers):
    """In the main process or in a worker."""
    kw = dict(data=Transformed(texts(16)), data_collator=masked, dataloader_num_workers=workers)
    first = trained(tmp_path, **kw)
    torch.manual_seed(77)
    random.seed(77)
    again = trained(tmp_path, resume=True, **kw)
    assert again.optimizer.noise.key == first.optimizer.noise.key
    assert again.optimizer.noise.step == first.optimizer.noise.step == 2
    a, b = weights(first.model), weights(again.model)
    assert all(torch.equal(a[n], b[n]) for n in a)


class Opaque(Dataset):
    """Samples that nothing is known of."""

    def __len__(self):
        return 16

    def __getitem__(self, k):
        return {"input_ids": texts(16)[k]["input_ids"], "what": object()}


def other_collate(samples):
    return collate(samples)


def other_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits[:, 0].square().mean(1)  # the first position knows of no padding


def with_setting(name, value):
    model = gpt2(**DROPOUT)
    setattr(model.config, name, value)
    return model


CHANGES = {
    "a sample": (dict(data=[{"input_ids": torch.tensor([5, 6, 7])}, *texts(16)[1:]]), "train_dataset"),
    "a token": (dict(data=[{"input_ids": x["input_ids"].clamp(max=21)} for x in texts(16)]), "train_dataset"),
    "the order": (dict(data=texts(16)[::-1]), "train_dataset"),
    "the collator": (dict(data_collator=other_collate), "data_collator"),
    "the loss": (dict(compute_loss_func=other_loss), "compute_loss_func"),
    "the expected batch size": (dict(privacy={**PRIVACY, "expected_batch_size": 5}), "expected_batch_size"),
    "the accumulated batches": (
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=5),
        "expected_batch_size",
    ),
    "dropout that no module has": (dict(model=lambda: with_setting("attention_dropout", 0.3)), "config"),
    "rows that are padded": (dict(privacy={**PRIVACY, "pad": True}), "privacy.pad"),
    "the device": (dict(), "device"),
    "the ranks": (dict(), "world_size"),
    "dropout": (dict(model=lambda: gpt2(**{**DROPOUT, "resid_pdrop": 0.1})), "model"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_other_sums_has_other_noise(before, change, monkeypatch):
    """Every change that another sum may come of."""
    if not CHANGES[change][0]:  # a machine that is not here
        whole, name = DPTrainer._settings, CHANGES[change][1]
        monkeypatch.setattr(DPTrainer, "_settings", lambda self: {**whole(self), name: "'another'"})
    (folder, key), (changed, name) = before, CHANGES[change]
    model = changed["model"]() if "model" in changed else None
    with pytest.warns(UserWarning, match=f"{name}.*changed; the noise takes a new key"):
        again = trained(folder, model, True, save_strategy="no", **{k: v for k, v in changed.items() if k != "model"})
    assert again.steps_accounted() == 2
    assert again.optimizer.noise.key not in (None, key)


def test_without_a_change_it_has_the_same(before):
    folder, key = before
    again = trained(folder, resume=True, save_strategy="no")
    assert again.optimizer.noise.key == key
    assert {"device", "world_size", "torch", "torch_compile", "model", "parameters"} <= set(again._settings())


def test_a_seed_does_not_bring_the_key_back_either(tmp_path):
    """Other data under the same seed of experiments."""
    kw = dict(privacy={**PRIVACY, "seed": 3})
    first = trained(tmp_path, **kw)
    with pytest.warns(UserWarning, match="train_dataset changed"):
        again = trained(tmp_path, resume=True, data=texts(16, seed=2), **kw)
    assert again.optimizer.noise.key != first.optimizer.noise.key


def test_other_frozen_weights(tmp_path):
    """Adapters alone are in the checkpoint, and the gradient depends on what they stand on."""
    first, model = trained(tmp_path, lora()), lora()
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).mul_(2)
    with pytest.warns(UserWarning, match="parameters changed; the noise takes a new key"):
        again = trained(tmp_path, model, resume=True)
    assert again.optimizer.noise.key != first.optimizer.noise.key


def test_weights_that_are_not_in_the_checkpoint(tmp_path):
    """PEFT saves adapters, and none of the base's own that train beside them."""

    def model():
        made = lora()
        made.base_model.model.transformer.ln_f.weight.requires_grad_(True)
        return made

    first = trained(tmp_path, model())
    with pytest.warns(UserWarning, match="weights changed; the noise takes a new key"):
        again = trained(tmp_path, model(), resume=True)
    assert again.optimizer.noise.key != first.optimizer.noise.key


def test_sixteen_bit_adapters_stay_so(tmp_path):
    """PEFT makes them float32 as it loads them."""
    first = trained(tmp_path, lora().bfloat16())
    again = trained(tmp_path, lora().bfloat16(), resume=True)
    assert again.optimizer.noise.key == first.optimizer.noise.key
    a, b = weights(first.model), weights(again.model)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}


def test_ranks_that_disagree_take_a_new_key(before, monkeypatch):
    """This one sees no change, and another one does."""
    whole = ResumableTrainer._load_optimizer_and_scheduler

    def load(self, checkpoint):
        with monkeypatch.context() as two:
            two.setattr(Ranks, "gathered", lambda self, values: [list(values), [1.0]])
            whole(self, checkpoint)

    monkeypatch.setattr(ResumableTrainer, "_load_optimizer_and_scheduler", load)
    with pytest.warns(UserWarning, match="something on another rank changed"):
        again = trained(before[0], resume=True, save_strategy="no")
    assert again.optimizer.noise.key not in (None, before[1])


class Own(Transformed):
    """Draws from a generator of its own, which nobody can seed."""

    def __getitem__(self, k):
        ids = self.samples[k]["input_ids"].clone()
        ids[0] = 1 + np.random.default_rng().integers(20)
        return {"input_ids": ids}


def own_collate(samples, generator=np.random.default_rng(1)):  # noqa: B008
    batch = collate(samples)
    kept = torch.from_numpy(generator.random(batch["labels"].shape)) < 0.8
    return batch | {"labels": batch["labels"].where(kept, -100)}


UNTOLD = {
    "opaque": lambda: dict(data=Opaque()),
    "own generator": lambda: dict(data=Own(texts(16))),
    "own collator": lambda: dict(data_collator=own_collate),
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_data_that_cannot_be_told_from_others(tmp_path, kind):
    first = trained(tmp_path, **UNTOLD[kind]())
    with pytest.warns(UserWarning, match="train_dataset changed; the noise takes a new key"):
        again = trained(tmp_path, resume=True, **UNTOLD[kind]())
    assert again.optimizer.noise.key != first.optimizer.noise.key


def test_what_is_secret_is_its_owners(before):
    """The generators' states, which tell the seed, are not in a checkpoint."""
    assert (before[0] / "checkpoint-1" / PRIVACY_NAME).stat().st_mode & 0o777 == 0o600
    assert not [path.name for path in (before[0] / "checkpoint-1").iterdir() if "rng" in path.name]


def test_what_tells_data_apart():
    numbers = [{"x": torch.ones(2), "y": 1}, {"x": torch.zeros(2), "y": 2}]
    assert digest_of(numbers) == digest_of(tuple(numbers)) is not None
    assert digest_of(Transformed(texts(3))) == digest_of(Transformed(texts(3))) != digest_of(Transformed(texts(4)))
    others = [
        [{"x": torch.ones(2), "y": 2}, numbers[1]],
        [{"x": torch.ones(2, dtype=torch.float64), "y": 1}, numbers[1]],
        [{"x": torch.ones(1, 2), "y": 1}, numbers[1]],
        [{"z": torch.ones(2), "y": 1}, numbers[1]],
        [{"x": np.ones(2), "y": 1}, numbers[1]],
        [{"x": [1.0, 1.0], "y": 1}, numbers[1]],
        [{"x": "1", "y": 1}, numbers[1]],
        [{"x": torch.ones(2, dtype=torch.bfloat16), "y": None}, numbers[1]],
        numbers[:1],
    ]
    assert len({digest_of(data) for data in [numbers, *others]}) == 10
    assert digest_of([object()]) is None and digest_of(torch.utils.data.Subset(Opaque(), [1, 2])) is None
    large = type("Large", (Dataset,), {"__len__": lambda self: 1 << 20, "__getitem__": lambda self, k: k})
    assert digest_of(large()) is None


def collated(samples, units):
    return collate(samples)


def test_batches_are_a_function_of_seed_step_and_rank():
    """And the generators are as they were."""
    made = {
        place: Replayed(Transformed(texts(8)), collated, place[0], place[1]).__getitems__(Rows([1, 2], place[2]))
        for place in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    }
    assert len({str(batch["input_ids"].tolist()) for batch in made.values()}) == 4
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    again = Replayed(Transformed(texts(8)), collated, 1, 0).__getitems__(Rows([1, 2], 0))
    assert torch.equal(again["input_ids"], made[1, 0, 0]["input_ids"])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before[0])
    assert whole(again) is again


def test_a_checkpoint_that_is_written_again_is_not_whole_until_it_is(tmp_path, monkeypatch):
    """Half of each of two runs, it would bring one's key to the other's sums."""
    trained(tmp_path)
    assert newest_whole(str(tmp_path)) == str(tmp_path / "checkpoint-2")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResumableTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.warns(UserWarning, match="train_dataset changed"), pytest.raises(OSError, match="No space"):
        trained(tmp_path, resume=True, data=texts(16, seed=2))
    assert newest_whole(str(tmp_path)) == str(tmp_path / "checkpoint-1")


def test_a_sharded_model_is_saved_and_loaded_or_refused(tmp_path, monkeypatch):
    """``save_only_model`` has no shards beside it; the Trainer would take the last model for the best."""
    monkeypatch.setattr(trainer_checkpoints, "is_sharded", lambda model: True)
    monkeypatch.setattr(trainer_checkpoints, "whole_state", lambda model: model.state_dict())
    trained(tmp_path, save_only_model=True)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, eval_dataset=texts(2))
    with pytest.raises(ValueError, match="load_best_model_at_end=True: the checkpoints of a sharded model"):
        trained(tmp_path, **best)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    """The newest whole one is resumed: its last file is there, and can be read."""
    first = trained(tmp_path)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:20])
    again = trainer_of(tmp_path, gpt2(**DROPOUT), **RUN)
    again.train(resume_from_checkpoint=True)
    assert again.optimizer.noise.step == 2 and again.steps_accounted() == 2
    a, b = weights(first.model), weights(again.model)
    assert all(torch.equal(a[n], b[n]) for n in a)
