"""``DPTrainer`` with packing: samples are drawn, packed and clipped one by one, exactly as without padding or with."""

import pytest
import torch

from tests.helpers import SLACK, distance

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dpfast.data.packed import PackedAfter  # noqa: E402
from dpfast.integrations.heads import LossForward  # noqa: E402
from dpfast.integrations.trainer import DPArguments  # noqa: E402
from tests.integrations.test_trainer import (  # noqa: E402
    LR,
    assert_same,
    by_hand,
    classifier,
    collate,
    gpt2,
    lora,
    only,
    texts,
    trainer_of,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def packed_trainer(folder, model=None, privacy=None, **kw):
    settings = dict(per_device_train_batch_size=3, gradient_accumulation_steps=1)
    return trainer_of(folder, model=model, privacy=dict(packing=True) | (privacy or {}), **(settings | kw))


class Seen:
    """What a model was called with."""

    def __init__(self, model):
        self.batches = []
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs):
        if module.training:
            self.batches.append({name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize("kind", ["whole", "logits", "LoRA", "checkpoints"])
def test_a_step_is_that_of_one_sample_at_a_time(tmp_path, kind, monkeypatch):
    make = lora if kind == "LoRA" else gpt2
    data, rows = texts(8), [0, 2, 3, 6, 7]
    want = by_hand(make(), [data[k] for k in rows], 4)
    if kind == "logits":
        monkeypatch.setattr(LossForward, "takes", lambda self, inputs: False)
    trainer = packed_trainer(
        tmp_path, make(), dict(expected_batch_size=4), data=data, gradient_checkpointing=kind == "checkpoints"
    )
    seen = Seen(trainer.model)
    only(trainer, rows).train()
    assert_same(weights(trainer.model), want)
    assert str(trainer.engine.unit) == "one row"
    tokens = [sum(len(data[k]["input_ids"]) for k in part) for part in ([0, 2, 3], [6, 7])]
    batches = [x for x in seen.batches if x["input_ids"].shape[1] in tokens]  # and not trials
    assert batches and all(len(x["input_ids"]) == 1 and "attention_mask" not in x for x in batches)


def test_without_a_sample_the_sum_moves_by_c_at_most(tmp_path):
    def after(rows):
        trainer = packed_trainer(tmp_path, privacy=dict(max_grad_norm=0.01, expected_batch_size=1))
        only(trainer, rows).train()
        return weights(trainer.model)

    rows = [1, 2, 4, 5]
    whole = after(rows)
    for k in (0, 2):
        moved = distance(whole, after(rows[:k] + rows[k + 1 :])) / LR
        assert 0.005 < moved <= 0.01 * SLACK * (1 + 1e-4)  # what weights were rounded to


def test_poisson_batches_empty_ones_and_evaluation(tmp_path):
    trainer = packed_trainer(
        tmp_path, privacy=dict(noise_multiplier=1.0, expected_batch_size=1), max_steps=5, eval_dataset=texts(4, 2)
    )
    sizes = [len(trainer._batches(5).logical_batch(step)) for step in range(5)]
    trainer.train()
    ((_, rate, steps),) = trainer.engine.accountant.history
    assert (rate, steps) == (1 / 16, 5) and len({*sizes}) > 1
    found = trainer.evaluate()["eval_loss"]
    trainer.model.eval()
    with torch.no_grad():
        alone = [float(trainer.model(**collate([s]), use_cache=False).logits.sum()) for s in texts(4, 2)]
    assert found > 0 and all(x == x for x in alone)


def test_with_padding_and_without(tmp_path):
    found = []
    for packing in (True, False):
        trainer = packed_trainer(tmp_path, privacy=dict(packing=packing, noise_multiplier=0.5), max_steps=3)
        trainer.train()
        found.append(weights(trainer.model))
    assert_same(*found)


def test_a_run_that_goes_on_without_packing_takes_a_new_noise_key(tmp_path):
    kw = dict(save_strategy="steps", save_steps=1, max_steps=2)
    packed_trainer(tmp_path, **kw).train()
    other = packed_trainer(tmp_path, privacy=dict(packing=False), **kw)
    with pytest.warns(UserWarning, match=r"privacy\.packing.*new key"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    same = packed_trainer(tmp_path, **kw)
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_does_not_go_with_it(tmp_path):
    with pytest.raises(ValueError, match="packing=True with unit_column='user'"):
        DPArguments(packing=True, unit_column="user", rows_per_unit=2)
    with pytest.raises(ValueError, match="packing=True with pad=True"):
        DPArguments(packing=True, pad=True)
    with pytest.raises(ValueError, match="packing=True with model=BertForSequenceClassification"):
        packed_trainer(tmp_path, classifier()[0])
    with pytest.raises(ValueError, match="packing=True with compute_loss_func"):
        packed_trainer(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(1))
    with pytest.raises(ValueError, match="packing=True with torch_compile=True"):
        packed_trainer(tmp_path, torch_compile=True)


def test_samples_are_collated_alone():
    def with_a_prompt(samples):
        return collate(samples) | {"token_type_ids": torch.ones_like(collate(samples)["input_ids"])}

    data = [{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}]
    batch = PackedAfter(with_a_prompt)(data)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[5, 6, 7, 8]],
        "labels": [[5, 6, 7, 8]],
        "position_ids": [[0, 1, 2, 0]],
        "token_type_ids": [[1, 1, 1, 1]],
    }
    padded = lambda samples: {k: torch.nn.functional.pad(x, (2, 1)) for k, x in collate(samples).items()}  # noqa: E731
    assert PackedAfter(padded)(data)["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert PackedAfter(collate)([])["position_ids"].shape == (1, 0)
    for bad in (lambda s: {"input_ids": torch.zeros(1, 0)}, lambda s: collate(s) | {"scores": torch.ones(1)}):
        with pytest.raises(ValueError, match="packing needs a number for each token"):
            PackedAfter(bad)(data)
    names = iter(["a", "b"])
    with pytest.raises(ValueError, match="the same columns"):
        PackedAfter(lambda s: collate(s) | {next(names): torch.ones_like(collate(s)["input_ids"])})(data)
