"""Fine-tuning from Python: a whole run on a tiny model, what it leaves, and that it resumes bit for bit."""

import itertools
import json
import re
import shutil
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from huggingface_hub import ModelCard
from opacus.accountants import RDPAccountant
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpfast.integrations.distributed import PRIVACY_NAME
from dpfast.integrations.finetune import FinetuneConfig, FinetuneError, checkpoint, command, finetune, model
from dpfast.integrations.finetune.trainer import FinetuneTrainer
from dpfast.optim.optimizer import FusedDPOptimizer
from tests.integrations.ended_runs import Killed, killed_at, weights

TEXTS = [f"the number {k} comes after {k - 1}" for k in range(1, 41)]
ROWS = [{"text": text, "label": ["no", "yes"][len(text) % 2]} for text in TEXTS]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(model, "SMALL", {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2})
    monkeypatch.setattr(model, "NO_DROPOUT", {"resid_pdrop": 0.2})  # some: a resumed run has to repeat it
    monkeypatch.setattr(model, "VOCABULARY", 300)


def config(tmp_path, **changes):
    given = dict(
        train=ROWS,
        output=str(tmp_path / "out"),
        noise_multiplier=1.0,
        accountant="rdp",
        batch_size=8,
        physical_batch_size=3,
        max_steps=6,
        log_every=100,
        save_every=3,
    )
    return FinetuneConfig(**{**given, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 2, "task": "classification", "physical_batch_size": "auto"},
        {"lora_rank": 2, "pure_bf16": True, "low_precision": "master"},
    ],
)
def test_a_resumed_run_is_bit_equal(tmp_path, monkeypatch, changes):
    uninterrupted = weights(finetune(config(tmp_path / "a", seed=5, **changes)))
    alive = killed_at(monkeypatch, 4)
    with pytest.raises(Killed):
        finetune(config(tmp_path / "b", seed=5, **changes))
    alive()
    resumed = finetune(config(tmp_path / "b", resume=True, **changes))  # the seed is in the checkpoint
    assert resumed.steps == 6
    found = weights(resumed)
    assert all(torch.equal(found[name], p) for name, p in uninterrupted.items())
    other = weights(finetune(config(tmp_path / "c", seed=6, **changes)))
    assert not all(torch.equal(other[name], p) for name, p in uninterrupted.items())


@pytest.fixture
def interruptible():
    """Ctrl-C does what it does in a terminal, though the tests may run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_is_saved(tmp_path, monkeypatch, capsys, interruptible):
    """Ctrl-C ends a run after its step, with a checkpoint, and says of which step; what comes out is the same."""
    uninterrupted = weights(finetune(config(tmp_path / "a", seed=5, max_steps=4)))
    whole = FinetuneTrainer.training_step

    def training_step(self, *given):
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return whole(self, *given)

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = "--noise-multiplier 1 --accountant rdp --batch-size 8 --physical-batch-size 3 --max-steps 4 --seed 5"
    given = f"{given} --log-every 100 --save-every 3 --train {rows} --output {tmp_path / 'b'}".split()
    assert command.main(given) == 130
    assert "interrupted after step 2, which is saved; --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(FinetuneTrainer, "training_step", whole)
    assert command.main([*given, "--resume"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").named_parameters()
    assert all(torch.equal(uninterrupted[name], p) for name, p in again)


def test_an_interruption_before_any_step(tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(FinetuneTrainer, "_choose_size", interrupted)
    given = [
        "--output",
        str(tmp_path / "out"),
        "--noise-multiplier",
        "1",
        "--batch-size",
        "8",
        "--max-steps",
        "1",
        "--truncate",
    ]
    assert command.main(given) == 130
    assert "before there was a checkpoint; start anew" in capsys.readouterr().out


def test_the_result_loads(tmp_path):
    found = finetune(config(tmp_path, eval=[{"text": "the number 7"}], max_steps=2))
    assert set(found.figures) == {"loss", "perplexity"}
    loaded = AutoModelForCausalLM.from_pretrained(found.output)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, dict(found.model.named_parameters())[name])
    text = "Größe, 数字: any text goes"
    tokenizer = AutoTokenizer.from_pretrained(found.output)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("the number 3", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded.eval()(ids).logits, found.model(ids).logits)
    top = {path.name for path in found.output.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "checkpoints", "logs"} <= top
    assert not [path for path in found.output.iterdir() if path.suffix == ".pt"]
    card = ModelCard.load(found.output / "README.md")
    assert f"({found.epsilon:.3f}, 1e-05)" in card.text and "differential-privacy" in card.data.tags
    facts = json.loads((found.output / "privacy.json").read_text())
    assert (facts["epsilon"], facts["delta"], facts["steps"]) == (found.epsilon, 1e-5, 2)
    assert facts["clipping"] == {"style": "flat", "function": "abadi", "max_grad_norm": 1.0}
    assert facts["separation_of_samples"].startswith("samples are kept apart: proved")
    assert facts["versions"]["torch"] == torch.__version__ and facts["noise_multiplier"] == 1.0
    check = RDPAccountant()
    for _ in range(2):
        check.step(noise_multiplier=facts["noise_multiplier"], sample_rate=facts["sample_rate"])
    assert check.get_epsilon(facts["delta"]) == pytest.approx(facts["epsilon"], rel=1e-2)


def test_a_classifier_knows_its_classes(tmp_path):
    rows = [{"text": row["text"], "label": len(row["text"]) % 12} for row in ROWS]
    found = finetune(config(tmp_path, train=rows, task="classification", eval=rows, max_steps=1))
    loaded = AutoModelForSequenceClassification.from_pretrained(found.output)
    labels = sorted({row["label"] for row in rows})  # as numbers: 10 after 9
    assert loaded.config.id2label == {k: str(label) for k, label in enumerate(labels)}
    assert 0 <= found.figures["accuracy"] <= 1


def test_a_lora_result_loads(tmp_path):
    from peft import AutoPeftModelForCausalLM

    found = finetune(config(tmp_path, lora_rank=2, max_steps=2))
    trained = {name: p for name, p in found.model.named_parameters() if "lora_" in name}
    assert trained and all(p.requires_grad for p in trained.values())
    loaded = dict(AutoPeftModelForCausalLM.from_pretrained(str(found.output)).named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in found.model.named_parameters())
    moved = shutil.copytree(found.output, tmp_path / "elsewhere")
    shutil.rmtree(found.output / "base")
    code = re.search(r"```python\n(.*?)```", (moved / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace('folder = "."', f"folder = {str(moved)!r}"), names := {})
    loaded = dict(names["model"].named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in found.model.named_parameters())
    held = load_file(checkpoint.newest(found.output) / "adapter_model.safetensors")
    assert set(held) == {name.replace(".default", "") for name in trained}  # not the frozen base


def test_empty_batches_step_too(tmp_path, monkeypatch):
    sizes, before, whole = [], [], FinetuneTrainer.training_step

    def training_step(self, model, inputs, *more):
        sizes.append(inputs["samples"])
        before.append([p.detach().clone() for p in self.model.parameters()])
        assert sum(steps for _, _, steps in self.engine.accountant.history) == len(sizes) - 1
        return whole(self, model, inputs, *more)

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    found = finetune(config(tmp_path, batch_size=1, max_steps=8, seed=1))
    before.append([*found.model.parameters()])
    for old, new in itertools.pairwise(before):
        assert not all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert 0 in sizes and max(sizes) > 0


@pytest.mark.parametrize(
    "changes", [{"pure_bf16": True}, {"bf16": True, "gradient_checkpointing": True, "secure": True}]
)
def test_sixteen_bits(tmp_path, changes):
    found = finetune(config(tmp_path, max_steps=2, **changes))
    dtypes = {p.dtype for p in found.model.parameters()}
    assert dtypes == {torch.bfloat16 if "pure_bf16" in changes else torch.float32}
    assert all(p.isfinite().all() for p in found.model.parameters())


def test_the_noise_spends_the_target(tmp_path):
    found = finetune(config(tmp_path, noise_multiplier=None, target_epsilon=4.0, max_steps=4))
    assert 3.9 <= found.epsilon <= 4.0


def test_an_interrupted_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    alive = killed_at(monkeypatch, 4)
    with pytest.raises(Killed):
        finetune(config(tmp_path))
    alive()
    folder = tmp_path / "out" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-3").iterdir()}

    def full(state, file, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", full)
        with pytest.raises(FinetuneError, match=r"step 6 cannot be written .*No space left.*checkpoint-3 is whole"):
            finetune(config(tmp_path, resume=True))
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-3").iterdir()} == before
    assert finetune(config(tmp_path, resume=True)).steps == 6


def test_only_the_same_run_is_resumed(tmp_path):
    finetune(config(tmp_path, max_steps=3))
    for changes, message in (
        ({"seed": 3}, "another noise key"),
        ({"train": ROWS[1:]}, "other training data"),
        ({"lora_rank": 2}, "another model"),
        ({"max_grad_norm": 2.0}, "--max-grad-norm 1.0, and here it is 2.0"),
        ({"max_steps": 9}, "--max-steps 3, and here it is 9"),
    ):
        with pytest.raises(FinetuneError, match=message):
            finetune(config(tmp_path, **{"max_steps": 3, "resume": True, **changes}))
    path = tmp_path / "out" / "checkpoints" / "checkpoint-3" / PRIVACY_NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FinetuneError, match="no checkpoint that can be read"):
        finetune(config(tmp_path, max_steps=3, resume=True))
    with pytest.raises(FinetuneError, match="holds a run already"):
        finetune(config(tmp_path, max_steps=3))


def test_a_run_with_other_dropout_has_other_noise(tmp_path, monkeypatch):
    """Cut into other physical batches; and it goes on from its own checkpoints, once and again."""
    keys = []
    whole = FinetuneTrainer.log

    def log(self, logs, *given):
        if "learning_rate" in logs:
            keys.append(self.optimizer.noise.key)
        whole(self, logs, *given)

    monkeypatch.setattr(FinetuneTrainer, "log", log)
    for step, size in ((2, 3), (4, 2), (6, 2), (8, 3)):
        with monkeypatch.context() as stopped:
            stopped.setattr(FinetuneTrainer, "_maybe_log_save_evaluate", killed_after(step))
            with pytest.raises(Killed):
                finetune(
                    config(tmp_path, max_steps=9, save_every=1, log_every=1, physical_batch_size=size, resume=step > 2)
                )
    assert len(keys) == 8 and keys[0] == keys[1]
    assert keys[2] == keys[3] == keys[4] == keys[5], "resumed as it was"
    assert keys[6] == keys[7] and len({*keys}) == 3


def killed_after(step):
    whole = FinetuneTrainer._maybe_log_save_evaluate

    def maybe_log_save_evaluate(self, *given, **keywords):
        whole(self, *given, **keywords)
        if self.state.global_step == step:
            raise Killed

    return maybe_log_save_evaluate


def test_a_refused_resume_leaves_the_base_as_it_was(tmp_path):
    found = finetune(config(tmp_path, lora_rank=2, max_steps=1))
    base = {path.name: path.read_bytes() for path in (found.output / "base").iterdir()}
    for changes, message in (({"seed": 3}, "another noise key"), ({"lora_alpha": 16.0}, "--lora-alpha None")):
        with pytest.raises(FinetuneError, match=message):
            finetune(config(tmp_path, **{"lora_rank": 2, "max_steps": 1, "resume": True, **changes}))
    assert {path.name: path.read_bytes() for path in (found.output / "base").iterdir()} == base


def test_memory_that_runs_out_is_one_line_and_takes_no_step(tmp_path, monkeypatch):
    def too_much(self, *piece):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for place in ((FinetuneTrainer, "_losses"), (FusedDPOptimizer, "step")):  # which makes AdamW's moments
        with monkeypatch.context() as full:
            full.setattr(*place, too_much)
            with pytest.raises(FinetuneError, match=r"3 samples at once do not fit.*--physical-batch-size 1"):
                finetune(config(tmp_path))
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def events_of(found):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(found.output / "logs"))
    events.Reload()
    return events


@pytest.mark.parametrize("shown", [False, True])
def test_the_training_loss_is_not_logged(tmp_path, capsys, shown):
    """Neither where it is shown on the progress bar."""
    found = finetune(config(tmp_path, eval=0.3, max_steps=2, log_every=1, show_training_loss=shown))
    assert ("training loss (not private)=" in capsys.readouterr().err) is shown
    assert "train_loss" not in (found.output / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text()
    events = events_of(found)
    tags = {"train/epsilon", "train/samples_per_second", "train/learning_rate", "eval/loss", "eval/perplexity"}
    found = set(events.Tags()["scalars"])
    assert tags <= found and not [name for name in found if "loss" in name and "eval" not in name], found
    assert [event.step for event in events.Scalars("train/epsilon")] == [1, 2, 2]


def test_the_logs_of_a_resumed_run_have_each_step_once(tmp_path, monkeypatch):
    """Steps 4 and 5 were logged before it was killed; an evaluation after training is logged there too."""
    given = dict(eval=0.3, log_every=1)
    alive = killed_at(monkeypatch, 5)
    with pytest.raises(Killed):
        finetune(config(tmp_path, **given))
    alive()
    found = finetune(config(tmp_path, resume=True, **given))
    assert [event.step for event in events_of(found).Scalars("train/learning_rate")] == [1, 2, 3, 4, 5, 6]
    finetune(config(tmp_path, resume=True, **given))  # has no step left to take
    folders = [path.name for path in (found.output / "checkpoints").iterdir()]
    assert sorted(folders) == ["checkpoint-3", "checkpoint-6"]


def test_a_model_from_a_folder_or_a_kind(tmp_path):
    first = finetune(config(tmp_path / "a", max_steps=1))
    second = finetune(config(tmp_path / "b", max_steps=1, model=str(first.output)))
    assert len(second.tokenizer) == len(first.tokenizer)
    settings = json.loads((first.output / "config.json").read_text())
    folder = tmp_path / "only-config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    made = finetune(config(tmp_path / "c", max_steps=1, model=str(folder)))
    assert made.model.config.n_embd == 16
    with pytest.raises(FinetuneError, match="merge it"):
        (folder / "adapter_config.json").write_text("{}")
        finetune(config(tmp_path / "d", model=str(folder)))
