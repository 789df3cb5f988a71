"""TRL's trainers, private: a pair is clipped as one, exactly, and what couples samples is refused by name."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from tests import oracle
from tests.helpers import SLACK, distance

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl", reason="TRL is an extra: pip install 'dpfast[trl]'")

from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from dpfast.integrations.trl import DPArguments, DPDPOTrainer, DPSFTTrainer  # noqa: E402
from tests.integrations.test_trainer import gpt2, weights  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LR, C = 0.5, 0.02
WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstu"]


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("CI", "1")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def pairs(count=5, **columns):
    """Prompts of 1 to 3 words, and two completions of 1 to 4 each."""
    draw = torch.Generator().manual_seed(3)

    def text(least, most):
        n = int(torch.randint(least, most + 1, (), generator=draw))
        return " ".join(WORDS[int(k)] for k in torch.randint(2, len(WORDS), (n,), generator=draw))

    rows = [dict(prompt=text(1, 3) + " ", chosen=text(1, 4), rejected=text(1, 4)) for _ in range(count)]
    return datasets.Dataset.from_list([{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(rows)])


def settings(cls, folder, **kw):
    found = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        max_length=12,
    )
    return cls(**(found | kw))


def reference():
    """Another model than the policy, so that no log-ratio is 0."""
    torch.manual_seed(7)
    model = gpt2()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def dpo(folder, data=None, model=None, privacy=None, ref_model="another", args=(), **kw):
    keep = {k: kw.pop(k) for k in ("eval_dataset", "peft_config", "compute_metrics") if k in kw}
    dp = dict(noise_multiplier=0.0, max_grad_norm=C, seed=3, accountant="gdp", expected_batch_size=1)
    return DPDPOTrainer(
        gpt2() if model is None else model,
        ref_model=reference() if ref_model == "another" else ref_model,
        args=settings(trl.DPOConfig, folder, **(dict(args) | kw)),
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer(),
        privacy=DPArguments(**(dp | (privacy or {}))),
        **keep,
    )


def only(trainer, rows, method="logical_batch"):
    """The trainer, with every batch made of ``rows``."""
    plain = trainer.get_train_dataloader

    def loader():
        made = plain()
        setattr(made.batch_sampler, method, lambda step: copy.deepcopy(rows))
        return made

    trainer.get_train_dataloader = loader
    return trainer


def log_probs(model, prompt, completion):
    """Of each token of a completion, one sequence at a time and without padding."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, :-1]
    return -F.cross_entropy(logits, ids[0, 1:], reduction="none")[len(prompt) - 1 :]


def dpo_loss(policy, ref, pair, beta=0.1):
    with torch.no_grad():
        old = [log_probs(ref, pair["prompt_ids"], pair[f"{side}_ids"]).sum() for side in ("chosen", "rejected")]
    new = [log_probs(policy, pair["prompt_ids"], pair[f"{side}_ids"]).sum() for side in ("chosen", "rejected")]
    return -F.logsigmoid(beta * ((new[0] - old[0]) - (new[1] - old[1])))


def by_hand(model, units, loss):
    """The weights after a step: gradients of one unit at a time, in float64, clipped to C and added up."""
    twin = oracle.pristine(model, torch.float64)
    parts = {n: torch.zeros_like(p) for n, p in twin.named_parameters() if p.requires_grad}
    for samples in units:
        twin.zero_grad()
        (sum(loss(twin, sample) for sample in samples) / len(samples)).backward()
        grads = {n: twin.get_parameter(n).grad[None] for n in parts}
        for name, total in oracle.clipped_sum(grads, C).items():
            parts[name] += total
    return {n: twin.get_parameter(n).detach() - LR * total for n, total in parts.items()}


def test_a_pair_is_clipped_as_one(tmp_path):
    model, ref = gpt2(), reference()
    trainer = only(dpo(tmp_path, model=model, ref_model=copy.deepcopy(ref)), [0, 1, 2, 3, 4])
    ref = oracle.pristine(ref, torch.float64)
    want = by_hand(model, [[pair] for pair in trainer.train_dataset], lambda m, pair: dpo_loss(m, ref, pair))
    trainer.train()
    torch.testing.assert_close({n: p.double() for n, p in weights(model).items()}, want, rtol=1e-5, atol=1e-6)
    assert distance(want, weights(gpt2())) > 0.01 and str(trainer.engine.unit) == "one preference pair"
    (entry,) = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert "epsilon_per_preference_pair" in entry
    assert not [name for name in entry if "rewards" in name or "logps" in name or name == "loss"]


def test_without_a_pair_the_sum_moves_by_c_at_most(tmp_path):
    def after(rows):
        trainer = only(dpo(tmp_path), rows)
        trainer.train()
        return weights(trainer.model)

    whole = after([0, 1, 2, 3])
    for left_out in range(4):
        moved = distance(whole, after([k for k in range(4) if k != left_out])) / LR
        assert 0.9 * C < moved <= C * SLACK * (1 + 1e-4)


def test_pairs_of_one_user_are_clipped_as_one(tmp_path):
    model, ref = gpt2(), reference()
    data = pairs(5, user_id=["a", "b", "a", "c", "b"])
    trainer = dpo(tmp_path, data, model, dict(unit_column="user_id", rows_per_unit=2), copy.deepcopy(ref))
    only(trainer, [[3], [0, 2], [1, 4]], "logical_units")
    ref = oracle.pristine(ref, torch.float64)
    users = [[trainer.train_dataset[row] for row in rows] for rows in ([3], [0, 2], [1, 4])]
    want = by_hand(model, users, lambda m, pair: dpo_loss(m, ref, pair))
    trainer.train()
    torch.testing.assert_close(weights(model), want, rtol=1e-5, atol=1e-6)
    assert str(trainer.engine.unit) == "one user (user_id), at most 2 preference pairs of each in a step"


LOSSES = [
    dict(loss_type=[name], label_smoothing=0.1)
    for name in (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero"),
        *("apo_down", "discopop", "sigmoid_norm", "sft"),
    )
]
LOSSES += [dict(f_divergence_type=name) for name in ("forward_kl", "js_divergence", "alpha_divergence")]
LOSSES += [
    dict(loss_type=["sigmoid", "sft"], loss_weights=[0.3, 0.7]),
    dict(ld_alpha=0.4),
    dict(ld_alpha=0.4, loss_type=["sft"]),
    dict(use_weighting=True),
]


def test_losses_are_those_of_trl_of_one_pair(tmp_path):
    """The loss of each pair of a batch, and its gradient, are TRL's own of a batch of that pair alone."""
    mine = dpo(tmp_path)
    plain = trl.DPOTrainer(
        gpt2(), reference(), settings(trl.DPOConfig, tmp_path), train_dataset=pairs(), processing_class=tokenizer()
    )
    plain_losses = {"loss_type": ["sigmoid"], "loss_weights": None, "label_smoothing": 0.0, "ld_alpha": None}
    plain_losses |= {"f_divergence_type": "reverse_kl", "use_weighting": False}
    batch = mine.data_collator([mine.train_dataset[k] for k in range(3)])
    rows = mine._data_and_collator()[1]([mine.train_dataset[k] for k in range(3)])
    for asked in LOSSES:
        mine.preference = type(mine.preference)(**asked)
        for name, value in (plain_losses | asked).items():
            setattr(plain, "loss_types" if name == "loss_type" else name, value)
        plain.loss_weights = asked.get("loss_weights") or [1.0]
        if plain.use_weighting:  # what TRL's head is to return is chosen when the trainer is made
            del plain.model.forward
            add_fused_lm_head(
                plain.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
            )
        losses = mine.compute_loss(mine.model, mine._on_device(rows))
        for k, loss in enumerate(losses):
            alone = {name: x[[k, 3 + k]] for name, x in batch.items()}
            want = plain.compute_loss(plain.model, alone)
            torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
            got = torch.autograd.grad(loss, [*mine.model.parameters()], retain_graph=True)
            also = torch.autograd.grad(want, [*plain.model.parameters()])
            size = sum(g.square().sum() for g in also).sqrt()
            apart = sum((a - b).square().sum() for a, b in zip(got, also, strict=True)).sqrt()
            assert apart <= 1e-4 * size + 1e-6, (asked, k)
    assert mine.model.transformer.wte.weight is not plain.model.transformer.wte.weight


@pytest.mark.parametrize("lora", [False, True])
def test_references_that_are_computed_before_and_adapters(tmp_path, lora):
    kw = dict(peft_config=pytest.importorskip("peft").LoraConfig(r=2, target_modules=["c_attn"])) if lora else {}
    found = []
    for before in (False, True):
        torch.manual_seed(0)
        trainer = dpo(
            tmp_path,
            ref_model=None if lora else "another",
            args=dict(precompute_ref_log_probs=before, max_steps=2),
            **kw,
        )
        only(trainer, [0, 1, 2]).train()
        found.append(weights(trainer.model))
        assert ("ref_chosen_logps" in trainer.train_dataset.column_names) is before
    assert len(found[0]) == (4 if lora else len(found[0])) or lora
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    assert any(v.abs().sum() > 0 for n, v in found[0].items() if "lora_B" in n) or not lora


def test_evaluation_and_metrics_of_pairs(tmp_path):
    trainer = only(dpo(tmp_path, eval_dataset=pairs(3), privacy=dict(log_training_loss=True)), [0, 1, 2])
    trainer.train()
    (entry,) = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert {"loss", "rewards/accuracies", "rewards/margins"} <= {*entry}
    found = trainer.evaluate()
    ref = oracle.pristine(trainer.ref_model, torch.float32)
    with torch.no_grad():
        want = [dpo_loss(oracle.pristine(trainer.model, torch.float32), ref, pair) for pair in trainer.eval_dataset]
    assert found["eval_loss"] == pytest.approx(float(torch.stack(want[:2]).mean() * 2 + want[2]) / 3, rel=1e-4)
    logged = [log for log in trainer.state.log_history if "eval_rewards/accuracies" in log]
    assert logged and 0 <= logged[0]["eval_rewards/accuracies"] <= 1


def test_figures_of_training_pairs_are_not_among_those_of_evaluation(tmp_path):
    """The trial that compares pairs alone and together runs in eval()."""
    trainer = only(dpo(tmp_path, eval_dataset=pairs(3)), [0, 1, 2])
    trainer.train()
    assert not trainer._seen
    found = trainer.evaluate()
    assert found["eval_loss"] > 0 and not trainer._seen


def test_a_run_goes_on_bit_for_bit_and_not_with_another_reference(tmp_path):
    kw = dict(privacy=dict(noise_multiplier=1.0), save_strategy="steps", save_steps=1, max_steps=2)
    whole = dpo(tmp_path / "whole", **kw)
    whole.train()
    path = str(tmp_path / "whole" / "checkpoint-1")
    again = dpo(tmp_path / "again", **kw)
    again.train(resume_from_checkpoint=path)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    other = dpo(tmp_path / "other", ref_model=gpt2(), **kw)
    with pytest.warns(UserWarning, match="reference changed; the noise takes a new key"):
        other.train(resume_from_checkpoint=path)


@pytest.mark.parametrize(
    ("kw", "named"),
    [
        (dict(loss_type=["aot"]), "loss_type='aot'"),
        (dict(loss_type=["sigmoid", "aot_unpaired"]), "loss_type='aot_unpaired'"),
        (dict(loss_type=["of tomorrow"]), "loss_type='of tomorrow'"),
        (dict(padding_free=True), "padding_free=True"),
        (dict(sync_ref_model=True), "sync_ref_model=True"),
        (dict(activation_offloading=True), "activation_offloading=True"),
        (dict(router_aux_loss_coef=0.1), "router_aux_loss_coef=0.1"),
        (dict(compute_metrics=len), "compute_metrics"),
        (dict(data=pairs(2, image=[0, 1])), "column 'image'"),
    ],
    ids=str,
)
def test_dpo_refuses_by_name_before_anything_changes(tmp_path, kw, named):
    model = gpt2()
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=named):
        dpo(tmp_path, model=model, **kw)
    assert model.config.to_dict() == before and "forward" not in vars(model)


def sft(folder, data, model=None, privacy=None, **kw):
    dp = dict(noise_multiplier=0.0, max_grad_norm=C, seed=3, accountant="gdp", expected_batch_size=1)
    return DPSFTTrainer(
        gpt2() if model is None else model,
        args=settings(trl.SFTConfig, folder, **kw),
        train_dataset=data,
        processing_class=tokenizer(),
        privacy=DPArguments(**(dp | (privacy or {}))),
    )


@pytest.mark.parametrize("users, packing", [(False, {}), (True, {}), (False, "packing"), (False, "padding_free")])
def test_completions_alone_have_a_loss(tmp_path, users, packing):
    model, packing = gpt2(), {packing: True} if packing else {}
    rows = pairs(4, user_id=["a", "b", "a", "b"])
    data = rows.remove_columns("rejected").rename_column("chosen", "completion")
    privacy = dict(unit_column="user_id", rows_per_unit=2) if users else {}
    trainer = sft(tmp_path, data, model, privacy, **packing)
    rows_seen = []
    see = lambda module, args: rows_seen.append(len(args[0])) if module.training else None  # noqa: E731
    model.transformer.wte.register_forward_pre_hook(see)
    batches = ([[0, 2], [1, 3]], "logical_units") if users else ([0, 1, 2, 3], "logical_batch")
    only(trainer, *batches)

    def loss(model, row):
        labels = torch.tensor(row["labels"])
        first = int((labels != -100).nonzero()[0])
        assert first > 0
        return -log_probs(model, row["input_ids"][:first], row["input_ids"][first:]).mean()

    prepared = [*trainer.train_dataset]
    units = [[prepared[k] for k in unit] for unit in (batches[0] if users else [[0], [1], [2], [3]])]
    want = by_hand(model, units, loss)
    rows_seen.clear()
    trainer.train()
    assert ({*rows_seen} == {1}) == bool(packing)
    torch.testing.assert_close(weights(model), want, rtol=1e-5, atol=1e-6)
    found = trainer.evaluate(datasets.Dataset.from_list(prepared))["eval_loss"]
    with torch.no_grad():
        twin = oracle.pristine(model, torch.float32)
        assert found == pytest.approx(float(sum(loss(twin, row) for row in prepared)) / 4, rel=1e-4)
    entry = trainer.state.log_history[0]
    assert ("epsilon_per_user_id" if users else "epsilon") in entry and "mean_token_accuracy" not in entry


@pytest.mark.parametrize(
    ("kw", "named"),
    [
        (dict(packing=True, packing_strategy="bfd_split"), "packing_strategy='bfd_split'.*use 'bfd'"),
        (dict(packing=True, packing_strategy="wrapped"), "packing_strategy='wrapped'"),
        (dict(eval_packing=True), "eval_packing=True"),
        (dict(packing=True, pad=True), "packing=True with pad=True"),
        (dict(loss_type="dft"), "loss_type='dft'"),
        (dict(activation_offloading=True), "activation_offloading"),
    ],
    ids=str,
)
def test_sft_refuses_by_name_before_anything_changes(tmp_path, kw, named):
    model, kw = gpt2(), dict(kw)
    privacy = {name: kw.pop(name) for name in ("pad",) if name in kw}
    with pytest.raises(ValueError, match=named):
        sft(tmp_path, pairs(2), model, privacy, **kw)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("ref", ["a model", "adapters off", "adapters of before"])
def test_what_a_user_of_trl_would_write(tmp_path, ref):
    """bf16 and checkpointing, which are TRL's defaults; a reference of each kind; Poisson batches, empty ones too."""
    kw, model = {}, gpt2()
    if ref != "a model":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        kw["ref_model"] = None
        if ref == "adapters off":
            kw["peft_config"] = lora
        else:
            model = peft.get_peft_model(model, lora)
    trainer = dpo(tmp_path, model=model, bf16=True, gradient_checkpointing=True, max_steps=4, **kw)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.steps_accounted() == 4
    changed = {n for n, p in weights(trainer.model).items() if not torch.equal(p, before[n])}
    assert changed and (ref == "a model" or all(".default." in name for name in changed))


def test_every_loss_of_trl_is_served_or_refused():
    known = {name for name in itertools.chain.from_iterable(asked.get("loss_type", ()) for asked in LOSSES)}
    text = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {part.strip("`'., ") for part in text.partition("Possible values are:")[2].partition(". ")[0].split(",")}
    assert {name for name in named if name} <= known | {"aot", "aot_unpaired"}
