"""``DPTrainer`` calls body and head of a causal language model apart, where this computes the same."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dpfast.integrations import heads  # noqa: E402
from dpfast.integrations import trainer as trainers  # noqa: E402
from dpfast.integrations.heads import LABELS, with_losses  # noqa: E402
from dpfast.losses import causal_lm_loss  # noqa: E402
from tests.integrations.test_trainer import LR, C, assert_same, distance, gpt2, lora, only, trainer_of, weights  # noqa: E402
from tests.integrations.transformer_models import GROUPED, model  # noqa: E402


def tokens():
    ids = torch.randint(1, 20, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100)


def capped(**settings):
    config = transformers.Gemma2Config(**GROUPED, head_dim=4, attn_logit_softcapping=None, **settings)
    return transformers.Gemma2ForCausalLM(config)


def scaled(kind, **settings):
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**GROUPED, **settings))


class Scaled(transformers.GPT2LMHeadModel):
    """Of one's own, and nothing in the config says so."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.0001
        return outputs


Scaled.__name__ = "GPT2LMHeadModel"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3", "opt"])
@pytest.mark.parametrize("adapted", [False, True])
def test_losses_are_those_of_the_logits(kind, adapted):
    made = model(kind)
    if adapted:
        peft = pytest.importorskip("peft")
        made = peft.get_peft_model(made, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    inputs, labels = tokens()
    want = causal_lm_loss(made(**inputs).logits, labels, reduction="none")
    forward = with_losses(made.train())
    assert forward is not None and forward.takes(inputs) and made.training
    assert not forward.takes({**inputs, "logits_to_keep": 2})
    torch.testing.assert_close(made(**inputs, **{LABELS: labels}), want)
    torch.testing.assert_close(causal_lm_loss(made(**inputs).logits, labels, reduction="none"), want)


OTHERS = {
    "capped": lambda: capped(final_logit_softcapping=30.0),
    "cohere": lambda: scaled("Cohere"),
    "granite": lambda: scaled("Granite", logits_scaling=2.0),
    "own": lambda: Scaled(gpt2().config),
    "classes": lambda: model("bert"),
    "encoder-decoder": lambda: model("t5"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_change_their_logits_keep_them(kind):
    assert with_losses(OTHERS[kind]()) is None


def test_without_a_cap_there_is_nothing_to_keep():
    assert with_losses(capped(final_logit_softcapping=None)) is not None


def test_heads_of_other_kinds_keep_their_logits():
    made = gpt2()
    made.lm_head = nn.Sequential(made.lm_head)
    assert with_losses(made) is None
    patched = gpt2()
    patched.forward = lambda **inputs: type(patched).forward(patched, **inputs)
    assert with_losses(patched) is None
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn", "lm_head"])
    assert with_losses(peft.get_peft_model(gpt2(tie_word_embeddings=False), config)) is None
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert with_losses(peft.get_peft_model(gpt2(), prompts)) is None


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("make", [gpt2, lora, lambda: gpt2(tie_word_embeddings=False)], ids=["gpt2", "lora", "untied"])
def test_a_step_is_that_of_the_logits(tmp_path, monkeypatch, make, pad):
    """Two physical batches of samples of several lengths, the second with a row of padding."""
    rows, ends, made = [1, 4, 5], [], []
    plain = heads.linear_cross_entropy
    monkeypatch.setattr(heads, "linear_cross_entropy", lambda *args, **kw: made.append(1) or plain(*args, **kw))
    start = weights(make())
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr(trainers, "with_losses", lambda model: None)
        network = make()
        only(trainer_of(tmp_path, network, privacy={"pad": pad}), rows).train()
        ends.append(weights(network))
        assert made if apart else not made
        made.clear()
    assert_same(*ends, rtol=1e-5)
    assert 1e-3 < distance(ends[0], start) <= LR * C * len(rows)
