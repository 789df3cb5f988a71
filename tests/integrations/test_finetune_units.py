"""The command with users and with preference pairs: what is clipped as one, and what its page and privacy.json say."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests import oracle

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpfast.integrations.finetune import FinetuneConfig, finetune
from dpfast.integrations.finetune.config import FinetuneError
from dpfast.integrations.finetune.preferences import CollatePairs, Pairs
from dpfast.integrations.pairs import PairsFirst, as_rows

ROWS = [{"text": f"the number after {k} is {k + 1}", "user_id": "abcd"[k % 3]} for k in range(12)]
PAIRS = [
    {"prompt": f"after {k} comes", "chosen": f" {k + 1}", "rejected": f" {k + 2}, I think", "user_id": k // 2}
    for k in range(8)
]


def config(folder, **kw):
    settings = dict(noise_multiplier=1.0, max_steps=2, batch_size=2, report_to="none", physical_batch_size=8)
    return FinetuneConfig(**(settings | dict(output=str(folder), device="cpu", target_delta=1e-2) | kw))


@pytest.mark.parametrize("size", ["auto", 4])
def test_users_are_what_epsilon_is_for(tmp_path, capsys, size):
    asked = config(tmp_path, train=ROWS, unit_column="user_id", rows_per_unit=4, physical_batch_size=size)
    result = finetune(asked)
    said, facts = capsys.readouterr().out, json.loads((tmp_path / "privacy.json").read_text())
    unit = "one user (user_id), at most 4 rows of each in a step"
    assert facts["unit"] == f"{unit}, added or removed" and facts["sample_rate"] == 0.5
    assert f"epsilon is for {unit}" in said and f"at delta 0.01 for {unit}, after 2 steps" in said
    assert "12 samples of the bundled" not in said and "12 samples of 3 users (user_id)" in said
    page = (tmp_path / "README.md").read_text()
    assert f"towards adding or removing {unit}" in page and "protected less" not in page
    assert result.steps == 2


def test_a_run_of_users_goes_on_with_its_users(tmp_path):
    asked = dict(train=ROWS, unit_column="user_id", rows_per_unit=4, save_every=1)
    finetune(config(tmp_path, **asked))
    for changed, named in (
        (dict(rows_per_unit=2), "--rows-per-unit 4, and here it is 2"),
        (dict(unit_column=None, rows_per_unit=None), "other training data|--unit-column user_id"),
        (dict(train=[{**row, "user_id": k // 4} for k, row in enumerate(ROWS)]), "other training data"),
    ):
        with pytest.raises(FinetuneError, match=named):
            finetune(config(tmp_path, resume=True, **(asked | changed)))


REFUSED = {
    "no cap": (dict(train=ROWS, unit_column="user_id"), "--unit-column user_id: give --rows-per-unit"),
    "no column": (dict(train=ROWS, rows_per_unit=2), "--rows-per-unit 2: .*--unit-column"),
    "a cap of none": (dict(train=ROWS, unit_column="user_id", rows_per_unit=0), "--rows-per-unit 0"),
    "another column": (dict(train=ROWS, unit_column="author", rows_per_unit=2), "no column 'author'.*--unit-column"),
    "rows without a user": (
        dict(train=[*ROWS, {"text": "mine", "user_id": None}], unit_column="user_id", rows_per_unit=2),
        "--unit-column: .*is no id",
    ),
    "empty names": (
        dict(train=[*ROWS, {"text": "mine", "user_id": " "}], unit_column="user_id", rows_per_unit=2),
        "row 13 has no user",
    ),
    "a user that does not fit": (
        dict(train=ROWS, unit_column="user_id", rows_per_unit=4, physical_batch_size=3),
        "--physical-batch-size 3: a user has 4 rows",
    ),
    "a batch of more users than there are": (
        dict(train=ROWS, unit_column="user_id", rows_per_unit=4, batch_size=4),
        "--batch-size 4: there are 3 users",
    ),
    "text without columns": (dict(unit_column="user_id", rows_per_unit=4), "plain text has no columns"),
    "pairs of nothing": (dict(dpo=True), "--dpo: give --train"),
    "pairs without a side": (dict(dpo=True, train=ROWS), "no column 'prompt'"),
    "pairs and classes": (dict(dpo=True, train=PAIRS, task="classification"), "--task with --dpo"),
    "beta": (dict(dpo=True, train=PAIRS, dpo_beta=0.0), "--dpo-beta 0.0"),
    "packed pairs": (dict(dpo=True, train=PAIRS, packing=True), "--dpo with --packing"),
    "packed users": (
        dict(train=ROWS, unit_column="user_id", rows_per_unit=4, packing=True),
        "--unit-column with --pack",
    ),
    "packed classes": (dict(train=ROWS, task="classification", packing=True), "--task with --packing"),
    "packed and padded": (dict(train=ROWS, pad=True, packing=True), "--pad with --packing"),
    "packed and compiled": (dict(train=ROWS, compile=True, packing=True), "--compile with --packing"),
    "an empty text": (dict(dpo=True, train=[*PAIRS, {**PAIRS[0], "chosen": ""}]), "row 9 has no text"),
    "a long pair": (dict(dpo=True, train=PAIRS, context=8), "pairs are longer than|fills the context"),
}


@pytest.mark.parametrize(("asked", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_names_the_option(tmp_path, asked, named):
    with pytest.raises(FinetuneError, match=named):
        finetune(config(tmp_path, **asked))


@pytest.mark.parametrize("size", ["auto", 3])
def test_packed_rows_are_what_padded_ones_are(tmp_path, capsys, size):
    """ε is for one row of the data, and the model that comes out is the same to rounding."""
    asked = dict(train=ROWS, eval=ROWS[:2], batch_size=6, seed=1, physical_batch_size=size)
    models = []
    for packing in (True, False):
        made = finetune(config(tmp_path / str(packing), packing=packing, **asked))
        models.append(made.model.state_dict())
        assert made.figures["perplexity"] > 0
    assert "epsilon is for one row" in capsys.readouterr().out
    facts = json.loads((tmp_path / "True" / "privacy.json").read_text())
    assert facts["unit"] == "one row, added or removed"
    for name, x in models[0].items():
        torch.testing.assert_close(x, models[1][name], rtol=1e-3, atol=2e-3)
    with pytest.raises(FinetuneError, match="--packing"):
        finetune(config(tmp_path / "True", packing=False, resume=True, **asked))


@pytest.mark.parametrize("how", ["whole", "LoRA, users"])
def test_pairs(tmp_path, capsys, how):
    more = dict(lora_rank=2, unit_column="user_id", rows_per_unit=2) if how != "whole" else dict(pad=True)
    result = finetune(config(tmp_path, train=PAIRS, dpo=True, eval=PAIRS[:3], physical_batch_size="auto", **more))
    facts, said = json.loads((tmp_path / "privacy.json").read_text()), capsys.readouterr().out
    user = "one user (user_id), at most 2 preference pairs of each in a step"
    assert facts["unit"] == f"{'one preference pair' if how == 'whole' else user}, added or removed"
    assert {*result.figures} == {"loss", "accuracy"} and "8 pairs" in said


def test_a_pair_of_the_command_is_clipped_as_one(tmp_path, monkeypatch):
    """One step without noise, of two pairs, against one pair at a time in float64."""
    from dpfast.integrations.finetune import run

    found = {}

    class Seen(run.FinetunePairTrainer):
        def train(self, *args, **kwargs):
            self.optimizer.original_optimizer.param_groups[0]["lr"] = 0.0
            found["net"], found["reference"] = oracle.pristine(self.model, torch.float64), self.ref_model
            found["collate"], found["data"] = self._data_and_collator()[1], self.run.data
            plain = self.optimizer.pre_step

            def pre_step(*args, **kwargs):
                found["sums"] = {n: p.summed_grad.clone() for n, p in self.model.named_parameters()}
                return plain(*args, **kwargs)

            monkeypatch.setattr(self.optimizer, "pre_step", pre_step)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(run, "FinetunePairTrainer", Seen)
    finetune(config(tmp_path, train=PAIRS[:2], dpo=True, max_steps=1, noise_multiplier=0.0, max_grad_norm=1e-3))
    net, reference = found["net"], oracle.pristine(found["reference"], torch.float64)

    def log_prob(model, prompt, text):
        ids = torch.tensor([prompt + text])
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        return -losses[len(prompt) - 1 :].sum()

    want = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for prompt, chosen, rejected in found["data"]:
        net.zero_grad()
        new, old = ([log_prob(m, prompt, text) for text in (chosen, rejected)] for m in (net, reference))
        (-F.logsigmoid(0.1 * (new[0] - old[0] - new[1] + old[1]))).backward()
        grads = {n: p.grad[None] for n, p in net.named_parameters()}
        for name, total in oracle.clipped_sum(grads, 1e-3).items():
            want[name] += total
    size = sum(s.square().sum() for s in want.values()).sqrt()
    apart = sum((found["sums"][n] - s).square().sum() for n, s in want.items()).sqrt()
    assert apart <= 1e-4 * size and size > 1e-3


def test_rows_of_pairs_stand_one_after_the_other():
    pairs = Pairs([([1], [2, 3], [4]), ([5, 6], [7], [8, 9])])
    batch = as_rows(PairsFirst(CollatePairs(0, 16))([*pairs]))
    assert batch["input_ids"][:, :4].tolist() == [[1, 2, 3, 0], [1, 4, 0, 0], [5, 6, 7, 0], [5, 6, 8, 9]]
    none = [-100] * 3
    assert batch["labels"][:2, :4].tolist() == [[-100, 2, 3, -100], [-100, 4, -100, -100]]
    assert batch["labels"][2:, :4].tolist() == [[-100, -100, 7, -100], [-100, -100, 8, 9]]
    assert batch["labels"][:, 4:7].tolist() == [none] * 4
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 3, 4]
