"""``finetune --probe-first``: the head alone, then everything; each step clipped by what trains then, and counted."""

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from safetensors.torch import load_file, save_file

from dpfast.__main__ import main
from dpfast.integrations.finetune import FinetuneConfig, FinetuneError, finetune, model, run
from dpfast.integrations.finetune.probe import ProbeFirst, steps_of_probe
from dpfast.integrations.finetune.trainer import FinetuneTrainer
from tests import oracle
from tests.helpers import F64, SLACK, distance, make_private, sums_of
from tests.integrations.ended_runs import Killed, killed_at, weights
from tests.integrations.transformer_models import SMALL

ROWS = [{"text": f"the number {k} comes next", "label": ["no", "yes"][k % 3 % 2]} for k in range(1, 25)]
SWITCH, STEPS = 3, 6  # of half the steps
SHARE = dict(task="classification", probe_first=0.5, max_steps=STEPS)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(model, "SMALL", {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2})
    monkeypatch.setattr(model, "NO_DROPOUT", {"resid_pdrop": 0.2})  # some: a resumed run has to repeat it
    monkeypatch.setattr(model, "VOCABULARY", 300)


def config(folder, **changes):
    given = dict(train=ROWS, noise_multiplier=1.0, accountant="rdp", batch_size=6, physical_batch_size=4)
    given |= dict(output=str(folder), report_to="none", save_every=1, target_delta=1e-2)
    return FinetuneConfig(**{**given, **SHARE, **changes})


def of_head(name):
    return "score." in name


def watched(monkeypatch, look):
    """``look(trainer, inputs, twin)`` after each backward; the twin is the model as it was before, in float64."""
    whole = FinetuneTrainer.training_step

    def training_step(self, *given):
        twin = oracle.pristine(self.model, F64)
        out = whole(self, *given)
        look(self, given[1], twin)
        return out

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)


def test_the_head_is_clipped_by_itself_and_then_everything_together(tmp_path, monkeypatch):
    """Against plain PyTorch, one sample at a time: norms are over what trains at the time, and over that alone."""
    norm, seen = 0.05, []

    def look(trainer, inputs, twin):
        step = trainer.state.global_step
        trained = {n: p for n, p in twin.named_parameters() if step >= SWITCH or of_head(n)}
        sums = {name: torch.zeros_like(p) for name, p in trained.items()}
        for p in twin.parameters():
            p.requires_grad_(True)
        for batch in inputs["pieces"]:
            for i in range(0 if batch is None else len(batch["labels"])):
                one = {name: x[i : i + 1] for name, x in batch.items()}
                loss = F.cross_entropy(twin(**one).logits, one["labels"])
                grads = torch.autograd.grad(loss, list(trained.values()))
                factor = min(1.0, norm / float(sum(g.square().sum() for g in grads).sqrt()))
                for total, g in zip(sums.values(), grads, strict=True):
                    total += factor * g
        found = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert set(found) == set(trained)
        for name, p in found.items():
            torch.testing.assert_close(p.summed_grad.double(), sums[name], rtol=2e-4, atol=1e-8)
        seen.append((step, inputs["samples"]))

    monkeypatch.setattr(model, "NO_DROPOUT", {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")})
    watched(monkeypatch, look)
    finetune(config(tmp_path, max_grad_norm=norm, seed=1, physical_batch_size=24))
    assert [step for step, _ in seen] == list(range(STEPS)) and all(samples for _, samples in seen)


def bert():
    torch.manual_seed(0)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = transformers.BertConfig(**SMALL, **quiet, num_labels=3)
    return transformers.BertForSequenceClassification(settings).double()


@pytest.mark.parametrize("step", [0, 2])
def test_without_a_sample_the_sum_moves_by_at_most_the_sensitivity(step):
    """Before the switch and after it, whichever came first in the same private model."""
    net, norm = bert(), 0.01
    probe = ProbeFirst(net, 2)
    private, _, _ = make_private(net, max_grad_norm=norm)
    ids, labels = torch.randint(3, 50, (4, 5)), torch.tensor([0, 2, 1, 1])

    def clipped(rows, at):
        probe.before_step(at)
        for p in net.parameters():
            p.summed_grad = p.grad = None
        F.cross_entropy(private(input_ids=ids[rows]).logits, labels[rows]).backward()
        return sums_of(net)

    clipped([0, 1, 2, 3], 2 - step)
    whole = clipped([0, 1, 2, 3], step)
    assert all(p.requires_grad == (step == 2 or n.startswith("classifier")) for n, p in net.named_parameters())
    for i in range(4):
        moved = distance(whole, clipped([j for j in range(4) if j != i], step))
        assert norm * 0.99 < moved <= norm * SLACK  # every sample is clipped, and has all of C to itself


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_the_rest_is_still_until_the_switch_and_then_moves(tmp_path, monkeypatch, changes):
    before = []

    def look(trainer, inputs, twin):
        before.append({name: p.detach() for name, p in twin.named_parameters()})

    watched(monkeypatch, look)
    result = finetune(config(tmp_path, **changes))
    before.append({name: p.detach().double() for name, p in result.model.named_parameters()})
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert any(of_head(name) for name in trained) and not all(of_head(name) for name in trained)
    for step in range(STEPS):
        moved = {name for name in trained if not torch.equal(before[step][name], before[step + 1][name])}
        expected = trained if step >= SWITCH else {name for name in trained if of_head(name)}
        # B of LoRA is zero at first, and A then learns from noise alone, which moves it too
        assert moved == expected, step


def test_epsilon_is_that_of_as_many_steps_of_anything(tmp_path):
    found = finetune(config(tmp_path / "a"))
    plain = finetune(config(tmp_path / "b", probe_first=None))
    assert found.steps == plain.steps and found.epsilon == plain.epsilon > 0
    with_target = dict(noise_multiplier=None, target_epsilon=3.0)
    noise = [finetune(config(tmp_path / x, probe_first=p, **with_target)) for x, p in (("c", 0.5), ("d", None))]
    assert noise[0].noise_multiplier == noise[1].noise_multiplier and noise[0].epsilon <= 3.0


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"pure_bf16": True, "low_precision": "master"}])
def test_a_run_resumed_on_either_side_of_the_switch_is_bit_equal(tmp_path, monkeypatch, changes):
    whole = weights(finetune(config(tmp_path / "whole", seed=5, **changes)))
    for step in (SWITCH - 1, SWITCH, SWITCH + 1):  # checkpoints of steps before it, at it and behind it
        alive = killed_at(monkeypatch, step)
        with pytest.raises(Killed):
            finetune(config(tmp_path / str(step), seed=5, **changes))
        alive()
        resumed = weights(finetune(config(tmp_path / str(step), resume=True, **changes)))
        assert all(torch.equal(resumed[name], p) for name, p in whole.items()), step


def test_weights_that_are_frozen_for_now_are_known_again(tmp_path, monkeypatch):
    """Another backbone in a checkpoint of the probe: the same noise on other sums would lay their difference bare."""
    alive, keys = killed_at(monkeypatch, 2), []
    with pytest.raises(Killed):
        finetune(config(tmp_path / "a", seed=5))
    alive()
    path = shutil.copytree(tmp_path / "a", tmp_path / "b") / "checkpoints" / "checkpoint-2" / "model.safetensors"
    held = load_file(path)
    name = next(name for name in held if name.endswith("wte.weight"))
    save_file({**held, name: held[name] + 1e-3}, path, metadata={"format": "pt"})
    watched(monkeypatch, lambda trainer, *_: keys.append(str(trainer.optimizer.noise.key)))
    finetune(config(tmp_path / "a", resume=True))
    kept = keys.pop()
    keys.clear()
    finetune(config(tmp_path / "b", resume=True))
    assert len(keys) == STEPS - 2 and kept not in keys


def test_another_share_is_another_run(tmp_path):
    finetune(config(tmp_path))
    for share in (None, 0.3):
        with pytest.raises(FinetuneError, match=f"--probe-first 0.5, and here it is {share}"):
            finetune(config(tmp_path, resume=True, probe_first=share))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--probe-first 1.5", "--probe-first 1.5: give a share of the steps, between 0 and 1, such as 0.2"),
        ("--probe-first 1", "--probe-first 1.0: give a share"),
        ("--probe-first 0", "--probe-first 0.0: give a number above 0"),
        ("--probe-first nan", "--probe-first nan: give a number above 0"),
        ("--probe-first 0.2 --task causal-lm", "--probe-first with --task: a language model's head is pretrained"),
        ("--probe-first 0.2 --fsdp", "--probe-first with --fsdp"),
        ("--probe-first 0.2 --max-steps 2", "--probe-first 0.2: of 2 steps that is 0 for the head, and 2 for"),
        ("--probe-first 0.9 --max-steps 2", "--probe-first 0.9: of 2 steps that is 2 for the head, and 0 for"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, given, message):
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(f"x{k},{k % 2}" for k in range(8)))
    arguments = f"--train {tmp_path / 'rows.csv'} --output {tmp_path / 'out'} --noise-multiplier 1 --batch-size 2"
    assert main(["finetune", "--task", "classification", *arguments.split(), *given.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_a_model_without_a_head_of_its_own():
    class Whole(torch.nn.Linear):
        base_model_prefix = "backbone"

    for net in (Whole(2, 2), bert().bert, torch.nn.Linear(2, 2)):
        before = [p.requires_grad for p in net.parameters()]
        with pytest.raises(FinetuneError, match="no head of its own"):
            ProbeFirst(net, 2)
        assert [p.requires_grad for p in net.parameters()] == before
    frozen = bert()
    frozen.classifier.requires_grad_(False)
    with pytest.raises(FinetuneError, match="no head of its own"):
        ProbeFirst(frozen, 2)


def test_what_is_frozen_for_good_stays_frozen():
    net = bert()
    net.bert.embeddings.requires_grad_(False)
    probe, before = ProbeFirst(net, 1), copy.deepcopy([p.requires_grad for p in net.parameters()])
    probe.before_step(0)
    assert sum(p.requires_grad for p in net.parameters()) == 2
    probe.before_step(1)
    assert [p.requires_grad for p in net.parameters()] == before


def test_the_share_of_the_steps():
    assert steps_of_probe(None, 10) == 0
    assert [steps_of_probe(0.2, n) for n in (3, 10, 101)] == [1, 2, 20]
    assert math.isclose(steps_of_probe(0.2, 10_000), 2000)
    assert "probe_first" in run.DECISIVE
