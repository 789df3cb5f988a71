"""``DPTrainer`` against the one-sample-at-a-time oracle; accounting, resuming, refusing."""

import copy
import gc
import inspect
import itertools
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from tests import oracle
from tests.helpers import SLACK, distance

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from dpfast.integrations.trainer import PRIVACY_NAME, DPArguments, DPTrainer  # noqa: E402
from dpfast.losses import causal_lm_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
LR, C = 0.5, 0.7


@pytest.fixture(autouse=True, scope="module")
def little_to_collect():
    """Each ``train()`` collects garbage, which takes longer than a run here, if it looks at every module's objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def gpt2(**kw):
    torch.manual_seed(0)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = dict(vocab_size=23, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(**(sizes | off | kw))
    return transformers.GPT2LMHeadModel(config)


def texts(count, seed=1):
    """Samples of 3 to 11 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=g).tolist()
    return [{"input_ids": torch.randint(1, 23, (n,), generator=g)} for n in lengths]


def collate(samples):
    """Padded on the right; the labels of the padding are ignored."""
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True)
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def arguments(folder, **kw):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
    )
    return transformers.TrainingArguments(**(settings | kw))


def trainer_of(folder, model=None, data=None, privacy=None, cls=DPTrainer, **kw):
    keep = {k: kw.pop(k) for k in ("compute_loss_func", "eval_dataset", "callbacks", "data_collator") if k in kw}
    settings = dict(noise_multiplier=0.0, max_grad_norm=C, seed=3, accountant="gdp")  # the quickest to ask
    return cls(
        gpt2() if model is None else model,
        arguments(folder, **kw),
        train_dataset=texts(16) if data is None else data,
        **({"data_collator": collate} | keep),
        privacy=DPArguments(**(settings | (privacy or {}))),
    )


def only(trainer, rows):
    """The trainer, with every batch made of ``rows``."""
    trainer._fixed = rows
    plain = trainer.get_train_dataloader

    def loader():
        made = plain()
        made.batch_sampler.logical_batch = lambda step: list(rows)
        return made

    trainer.get_train_dataloader = loader
    return trainer


def weights(model):
    return {n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad}


def per_sample_loss(logits, labels):
    """Of one sample: the mean over its own tokens."""
    return F.cross_entropy(logits[0, :-1], labels[0, 1:])


def by_hand(model, data, expected_batch_size):
    """The weights after one step of SGD: clip each sample's gradient, add up, divide."""
    before = weights(model)
    parts = {n: torch.zeros_like(p) for n, p in before.items()}
    for sample in data:
        ids = sample["input_ids"][None]
        grads = oracle.per_sample_gradients(_Logits(model), (ids,), ids, per_sample_loss, dtype=torch.float64)
        for name, total in oracle.clipped_sum(grads, C).items():
            parts[name.removeprefix("model.")] += total
    return {n: before[n] - LR * parts[n] / expected_batch_size for n in before}


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def assert_same(got, want, rtol=1e-4):
    assert set(got) == set(want)
    for name in want:
        scale = want[name].abs().max().item() + 1e-3
        error = (got[name] - want[name]).abs().max().item()
        assert error <= rtol * scale, f"{name} is off by {error}"


def lora():
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    model = peft.get_peft_model(gpt2(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zeros at first, where A would have no gradient
                p.normal_()
    return model


@pytest.mark.parametrize("make", [gpt2, lora])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_is_the_oracles(tmp_path, make, checkpointing):
    """Variable lengths, physical batches of two, one of them of one sample."""
    model, data, rows = make(), texts(16), [1, 4, 5, 8, 13]
    want = by_hand(copy.deepcopy(model), [data[k] for k in rows], 4)
    start = weights(model)
    trainer = only(trainer_of(tmp_path, model, data, activation_checkpointing=checkpointing), rows)
    trainer.train()
    assert trainer.optimizer.expected_batch_size == 4
    assert_same(weights(model), want)
    assert distance(weights(model), start) > 1e-3
    assert trainer.steps_accounted() == 1
    clipped = trainer.hooks.per_sample_gradient_norms
    assert len(clipped) == 1, "the last physical batch has one sample"


@pytest.mark.parametrize("fp16", [False, True])
def test_without_a_sample_the_update_moves_by_no_more_than_its_share(tmp_path, fp16):
    rows, ends = [1, 4, 5, 8, 13], {}
    for left_out in [None, *rows]:
        model = gpt2()
        only(trainer_of(tmp_path, model, fp16=fp16), [r for r in rows if r != left_out]).train()
        ends[left_out] = weights(model)
    moves = [distance(ends[None], ends[r]) for r in rows]
    bound = LR * C / 4
    assert max(moves) <= bound * SLACK + 1e-6, [m / bound for m in moves]
    assert max(moves) > 0.9 * bound, "no sample is clipped: the test says nothing"


def test_steps_are_counted_once_and_empty_batches_are_steps(tmp_path):
    """Three samples, a rate of 1/3: about a third of the batches are empty."""
    args = dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=7)
    model = gpt2()
    trainer = trainer_of(tmp_path, model, texts(3), privacy={"noise_multiplier": 1.0}, **args)
    seen, step = [], DPTrainer.training_step

    def training_step(self, model, inputs, *rest):
        seen.append((inputs["samples"], weights(model)))
        return step(self, model, inputs, *rest)

    trainer.training_step = training_step.__get__(trainer)
    trainer.train()
    seen.append((None, weights(model)))
    assert 0 in [count for count, _ in seen], "no batch was empty: take another seed"
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert all((before[n] != after[n]).any() for n in before), "a step without noise"
    assert trainer.engine.accountant.history == [(1.0, 1 / 3, 7)]
    assert trainer.optimizer.noise.step == trainer.state.global_step == 7


def test_batches_are_sampled_afresh_in_every_epoch_at_the_rate_that_is_accounted_for(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=1, max_steps=12)
    loader = trainer.get_train_dataloader()
    assert len(loader) == math.ceil(16 / 3)
    first, second = ([batch["samples"] for batch in loader] for _ in range(2))
    assert len(first) == len(second) == 6
    assert loader.batch_sampler.logical_batch(0) != loader.batch_sampler.logical_batch(6)
    assert len({*first, *second}) > 1, "batches of a fixed size"


RESUMED = dict(max_steps=6, save_strategy="steps", optim="adamw_torch", lr_scheduler_type="linear")
DROPOUT = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


@pytest.mark.parametrize("at, fp16", [(2, False), (4, True)])
def test_a_resumed_run_is_bit_equal(tmp_path, at, fp16):
    """Within an epoch (of four steps) and at the end of one; with dropout, Adam, a schedule and noise."""
    privacy = {"noise_multiplier": 1.0, "seed": None}
    whole = trainer_of(tmp_path / "a", gpt2(**DROPOUT), privacy=privacy, fp16=fp16, save_steps=at, **RESUMED)
    whole.train()
    other = trainer_of(tmp_path / "a", gpt2(**DROPOUT), privacy=privacy, fp16=fp16, save_steps=at, **RESUMED)
    torch.manual_seed(99)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{at}"))
    a, b = weights(whole.model), weights(other.model)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert other.engine.accountant.history == whole.engine.accountant.history == [(1.0, 1 / 4, 6)]
    assert other.privacy_spent() == whole.privacy_spent()
    logged = [[(e["step"], e["epoch"], e["epsilon"]) for e in t.state.log_history] for t in (whole, other)]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("change", [{"fp16": True}, {"privacy": {"max_grad_norm": 0.1}}], ids=str)
def test_a_run_that_goes_on_otherwise_takes_a_new_noise_key(tmp_path, change):
    """The same noise on the sums of both would lay their difference bare."""
    privacy = {"noise_multiplier": 1.0, "seed": None}
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    whole = trainer_of(tmp_path, privacy=privacy, **settings)
    whole.train()
    other = trainer_of(tmp_path, privacy=privacy | change.pop("privacy", {}), **settings, **change)
    with pytest.warns(UserWarning, match="changed; the noise takes a new key"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.optimizer.noise.key != whole.optimizer.noise.key
    assert other.optimizer.noise.step == 2 and other.steps_accounted() == 2


class Interrupted(DPTrainer):
    """The second physical batch of all is not come through."""

    passes = 0

    def compute_loss(self, *args, **kwargs):
        self.passes += 1
        if self.passes == 2:
            raise KeyboardInterrupt
        return super().compute_loss(*args, **kwargs)


def test_a_logical_batch_that_was_interrupted_leaves_nothing_behind(tmp_path):
    """Its samples would count twice in the next train()'s first step, which draws the same batch here."""
    ends = []
    for cls in (DPTrainer, Interrupted):
        trainer = trainer_of(tmp_path, gpt2(), cls=cls, gradient_accumulation_steps=4)
        if cls is Interrupted:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        trainer.train()
        assert trainer.steps_accounted() == 1
        ends.append(weights(trainer.model))
    assert distance(*ends) == 0


def test_a_run_that_is_complete_takes_no_step_more(tmp_path):
    """``max_steps`` in the middle of an epoch, where the Trainer takes one."""
    args = dict(max_steps=3, save_strategy="steps", save_steps=3, privacy={"noise_multiplier": 1.0})
    trainer_of(tmp_path, **args).train()
    again = trainer_of(tmp_path, **args)
    again.train(resume_from_checkpoint=True)
    assert again.engine.accountant.history == [(1.0, 1 / 4, 3)] and again.state.global_step == 3


def test_checkpoints_that_do_not_fit_are_refused_before_anything_changes(tmp_path):
    run = trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    last = str(tmp_path / "checkpoint-2")
    assert not [f for f in os.listdir(last) if f.endswith(".tmp")]
    with pytest.raises(ValueError, match="would be forgotten"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    def refused(match, path=last, **kw):
        trainer = trainer_of(tmp_path, max_steps=4, **kw)
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=match):
            trainer.train(resume_from_checkpoint=path)
        assert distance(before, weights(trainer.model)) == 0

    refused("num_samples", data=texts(15))
    refused("steps_per_epoch", gradient_accumulation_steps=4)
    bare = shutil.copytree(last, tmp_path / "bare")
    os.remove(bare / PRIVACY_NAME)
    refused(PRIVACY_NAME, str(bare))


def test_the_users_arguments_stay_as_they_are(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=8)
    before = args.to_dict()
    trainer = DPTrainer(gpt2(), args, train_dataset=texts(40), data_collator=collate, privacy=DPArguments(seed=1))
    assert args.to_dict() == before
    assert trainer.get_train_dataloader().batch_sampler.steps_per_epoch == math.ceil(40 / 16)


@pytest.mark.parametrize(
    "name, value",
    [
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("auto_find_batch_size", True),
        ("include_num_input_tokens_seen", "all"),
        ("train_sampling_strategy", "group_by_length"),
        ("use_liger_kernel", True),
        ("optim", "schedule_free_sgd"),
        ("mixed_precision", "fp8"),
    ],
)
def test_arguments_that_break_the_guarantee_are_refused_by_name(tmp_path, name, value):
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=name):
        DPTrainer(gpt2(), args, train_dataset=texts(4))


def test_published_checkpoints_are_refused(tmp_path):
    args = arguments(tmp_path)
    args.push_to_hub, args.hub_strategy = True, "all_checkpoints"
    with pytest.raises(ValueError, match="hub_strategy"):
        DPTrainer(gpt2(), args, train_dataset=texts(4))


@pytest.mark.parametrize(
    "given",
    [
        {"target_epsilon": 1.0, "noise_multiplier": 1.0},
        {"target_epsilon": 0.0},
        {"target_delta": 1.0},
        {"loss_scale": 3.0},
        {"secure_mode": True, "seed": 1},
    ],
)
def test_privacy_arguments_are_checked(given):
    with pytest.raises(ValueError, match=next(iter(given)).replace("secure_mode", "seed")):
        DPArguments(**given)


@pytest.mark.parametrize(
    ("name", "setting", "bad", "good"),
    [
        ("WandbCallback", "WANDB_LOG_MODEL", "checkpoint", "end"),
        ("MLflowCallback", "HF_MLFLOW_LOG_ARTIFACTS", "1", "0"),
        ("DagsHubCallback", "HF_DAGSHUB_LOG_ARTIFACTS", "true", None),
        ("CometCallback", "COMET_LOG_ASSETS", "TRUE", None),
        ("ClearMLCallback", "CLEARML_LOG_MODEL", None, "FALSE"),  # uploads unless told otherwise
        ("DVCLiveCallback", "_log_model", "all", True),
        ("NeptuneCallback", "_log_checkpoints", "last", None),
        ("FlyteCallback", "sync_checkpoints", True, False),
    ],
)
def test_reports_that_would_upload_checkpoints_are_refused(tmp_path, monkeypatch, name, setting, bad, good):
    """Their names and settings are Transformers' own; their packages are not needed to be refused."""
    assert setting in inspect.getsource(getattr(transformers.integrations.integration_utils, name))
    report = type(name, (transformers.TrainerCallback,), {})()
    for value, refused in ((bad, True), (good, False)):
        if not setting.isupper():
            setattr(report, setting, value)
        elif value is None:
            monkeypatch.delenv(setting, raising=False)
        else:
            monkeypatch.setenv(setting, value)
        trainer = trainer_of(tmp_path, callbacks=[report])
        if not refused:
            trainer.train()
            continue
        with pytest.raises(ValueError, match=rf"{name} with {setting}=.* would upload checkpoints"):
            trainer.train()
        assert trainer.optimizer is None


def test_the_expected_batch_size_may_be_any(tmp_path):
    """Not only a multiple of the physical one: the noisy sum is divided by it, and the sample rate follows."""
    data = texts(16)
    model = gpt2()
    want = by_hand(model, data[:5], 7)
    trainer = only(trainer_of(tmp_path, model, data, dict(expected_batch_size=7)), range(5))
    trainer.train()
    assert_same(weights(model), want)
    assert trainer.engine.accountant.history == [(0.0, 1 / 3, 1)]
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match="expected_batch_size="):
            DPArguments(expected_batch_size=bad)


def test_a_loss_of_the_whole_batch_is_refused(tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    class Own(DPTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs).mean()

    for trainer in (trainer_of(tmp_path, compute_loss_func=mean), trainer_of(tmp_path, cls=Own)):
        before = weights(trainer.model)
        with pytest.raises(ValueError, match="one loss for each sample"):
            only(trainer, [1, 2, 3]).train()
        assert distance(before, weights(trainer.model)) == 0


def test_a_model_of_unknown_loss_needs_one(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x, labels=None):
            return (self.layer(x),)

    def losses(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs[0], labels, reduction="none")

    data = [{"x": torch.randn(3), "labels": k % 2} for k in range(8)]
    plain = dict(data=data, data_collator=transformers.default_data_collator)
    with pytest.raises(ValueError, match="Net"):
        trainer_of(tmp_path, Net(), **plain)
    trainer = trainer_of(tmp_path, Net(), compute_loss_func=losses, max_steps=2, eval_dataset=data, **plain)
    trainer.train()
    want = losses(trainer.model(torch.stack([s["x"] for s in data])), torch.tensor([s["labels"] for s in data]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want.mean().item(), rel=1e-5)


def bert(**kw):
    sizes = dict(vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return transformers.BertConfig(**sizes, max_position_embeddings=12, **kw)


def classifier():
    return transformers.BertForSequenceClassification(bert(num_labels=3)), torch.tensor([0, 2, 1])


def regression():
    return transformers.BertForSequenceClassification(bert(num_labels=1)), torch.randn(3)


def multi_label():
    config = bert(num_labels=3, problem_type="multi_label_classification")
    return transformers.BertForSequenceClassification(config), torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])


def tagger():
    labels = torch.randint(0, 3, (3, 6))
    labels[0, 2:] = -100
    return transformers.BertForTokenClassification(bert(num_labels=3)), labels


def masked():
    labels = torch.randint(0, 23, (3, 6))
    labels[0, 2:] = labels[1, :3] = -100
    return transformers.BertForMaskedLM(bert()), labels


def translator():
    sizes = dict(vocab_size=23, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    labels = torch.randint(1, 23, (3, 5))
    labels[1, 2:] = -100
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), labels


def causal():
    labels = torch.randint(0, 23, (3, 6))
    labels[2, 3:] = -100
    return gpt2(), labels


@pytest.mark.parametrize("make", [classifier, regression, multi_label, tagger, masked, translator, causal])
def test_losses_are_what_the_model_says_of_each_sample_alone(tmp_path, make):
    model, labels = make()
    ids = torch.randint(1, 23, (3, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trainer = trainer_of(tmp_path, model)
    model.eval()
    losses = trainer.compute_loss(model, batch)
    assert batch["labels"] is labels, "the caller's batch keeps its labels"
    alone = torch.stack([model(**{n: x[k : k + 1] for n, x in batch.items()}).loss for k in range(3)])
    torch.testing.assert_close(losses, alone)


def test_logs_hold_epsilon_and_nothing_that_is_not_private(tmp_path):
    trainer = trainer_of(tmp_path, privacy={"noise_multiplier": 1.0, "accountant": "rdp"}, max_steps=3)
    result = trainer.train()
    *steps, last = trainer.state.log_history
    assert [e["step"] for e in steps] == [1, 2, 3]
    epsilons = [e["epsilon"] for e in steps]
    assert epsilons == sorted(set(epsilons)) and last["epsilon"] == epsilons[-1] == trainer.privacy_spent()[0]
    for entry in (*steps, last, result.metrics):
        assert not {"loss", "train_loss", "grad_norm", "num_input_tokens_seen"} & set(entry)
    assert result.training_loss == 0 and trainer.state.total_flos == 0
    told = trainer_of(tmp_path, privacy={"log_training_loss": True}, max_steps=1)
    told.train()
    assert told.state.log_history[0]["loss"] > 0


def test_target_epsilon_is_spent_once(tmp_path):
    privacy = {"noise_multiplier": None, "target_epsilon": 3.0}
    trainer = trainer_of(tmp_path, privacy=privacy, max_steps=5)
    trainer.train()
    assert 2.9 < trainer.privacy_spent()[0] <= 3.0
    with pytest.raises(ValueError, match="target_epsilon"):
        trainer.train()


def test_a_second_run_adds_up_and_has_batches_of_its_own(tmp_path):
    trainer = trainer_of(tmp_path, privacy={"noise_multiplier": 1.0}, max_steps=3)
    trainer.train()
    first = trainer._batch_seed
    trainer.train()
    assert trainer.engine.accountant.history == [(1.0, 1 / 4, 6)] and trainer.optimizer.noise.step == 6
    assert trainer._batch_seed != first


def test_the_key_is_not_drawn_from_the_trainers_seed(tmp_path):
    """``TrainingArguments.seed`` is 42 for everyone."""
    keys = set()
    for _ in range(2):
        trainer = trainer_of(tmp_path, privacy={"noise_multiplier": 1.0, "seed": None})
        trainer.train()
        keys |= {trainer.optimizer.noise.key, trainer._batch_seed}
    assert len(keys) == 4


def test_own_optimizer_and_schedule(tmp_path):
    model, rows, data = gpt2(), [1, 4, 5], texts(16)
    want = by_hand(copy.deepcopy(model), [data[k] for k in rows], 4)
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
    trainer = trainer_of(tmp_path, model, data)
    trainer.optimizer, trainer.lr_scheduler = sgd, schedule
    only(trainer, rows).train()
    assert_same(weights(model), want)
    assert sgd.param_groups[0]["lr"] == LR / 2


@pytest.mark.parametrize("dtype, launched", [("bf16", False), ("fp16", False), ("fp16", True)])
def test_autocast(tmp_path, monkeypatch, dtype, launched):
    """Asked for by the arguments, or by ``accelerate launch --mixed_precision``."""
    model, data, rows = gpt2(), texts(16), [1, 4, 5, 8, 13]
    start = weights(model)
    want = by_hand(copy.deepcopy(model), [data[k] for k in rows], 4)
    dtypes = []
    model.lm_head.register_forward_hook(lambda m, x, y: dtypes.append(y.dtype))
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", dtype)
    privacy = {"log_training_loss": True}
    trainer = only(trainer_of(tmp_path, model, data, privacy, **({} if launched else {dtype: True})), rows)
    trainer.train()
    assert set(dtypes) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}
    moved, off = distance(want, start), distance(want, weights(model))
    assert 0 < off < {"bf16": 0.05, "fp16": 0.005}[dtype] * moved
    losses = [per_sample_loss(gpt2()(data[k]["input_ids"][None]).logits, data[k]["input_ids"][None]) for k in rows]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses).item() / 4, rel=0.01)


def tiny_losses(outputs, labels, num_items_in_batch=None):
    """Gradients of which float16 holds only what a scale has lifted."""
    return 1e-6 * causal_lm_loss(outputs.logits.float(), labels, reduction="none")


@pytest.mark.parametrize("scale, kept", [(2.0**16, True), (1.0, False)])
def test_float16_losses_are_scaled_and_sums_are_not(tmp_path, scale, kept):
    rows, ends = [1, 4, 5, 8, 13], []
    start = weights(gpt2())
    for fp16 in (False, True):
        privacy = {"max_grad_norm": 1.45e-6, "loss_scale": scale}  # norms are 1.3e-6 to 2.2e-6
        trainer = trainer_of(
            tmp_path, privacy=privacy, compute_loss_func=tiny_losses, fp16=fp16, learning_rate=LR / 1e-6
        )
        only(trainer, rows).train()
        ends.append(weights(trainer.model))
    assert (distance(*ends) < 0.01 * distance(ends[0], start)) == kept


def test_a_sample_whose_float16_gradient_overflows_contributes_nothing(tmp_path):
    rows = [1, 4, 5, 8, 13]

    def losses(outputs, labels, num_items_in_batch=None):
        each = causal_lm_loss(outputs.logits.float(), labels, reduction="none")
        return torch.where(labels[:, 0] == 7, 1e6 * each, each)

    data = texts(16)
    for k in range(16):
        data[k]["input_ids"][0] = 7 if k == 5 else 8
    ends = []
    for left in (rows, [r for r in rows if r != 5]):
        trainer = only(trainer_of(tmp_path, data=data, compute_loss_func=losses, fp16=True), left)
        trainer.train()
        ends.append(weights(trainer.model))
        assert trainer.hooks.nonfinite_samples == (5 in left)
    assert distance(*ends) < 1e-3 * distance(ends[0], weights(gpt2()))


def test_the_model_stays_the_users_own(tmp_path):
    model = gpt2()
    trainer = trainer_of(tmp_path, model, max_steps=1)
    trainer.train()
    assert trainer.model is model and type(model) is transformers.GPT2LMHeadModel
    trainer.save_model(str(tmp_path / "model"))
    assert PRIVACY_NAME not in os.listdir(tmp_path / "model")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert distance(weights(again), weights(model)) == 0
    model.eval()
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_a_compiled_run_takes_the_same_steps(tmp_path):
    found = []
    for compiled in (False, True):
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        torch._dynamo.reset()
        trainer = trainer_of(tmp_path, max_steps=2, privacy={"noise_multiplier": 0.5}, **options)
        trainer.train()
        found.append(weights(trainer.model))
    assert trainer.model._compiled_call_impl is not None
    for name, p in found[0].items():
        torch.testing.assert_close(found[1][name], p, rtol=1e-5, atol=1e-6)
