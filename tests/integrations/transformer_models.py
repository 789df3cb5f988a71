"""Tiny random models of Transformers, and what is asked of them: exact in float32, and within C."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor, nn

from tests import oracle
from tests.helpers import distance
from tests.oracle import Verdict
from tests.privacy.judging import Call, Called, Private

B, T, V = 3, 7, 50
SMALL = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = dict(SMALL, num_key_value_heads=2)
SEQ2SEQ = dict(vocab_size=V, d_model=16, pad_token_id=0, decoder_start_token_id=0)
GPT2 = dict(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
OPT = dict(vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
VIT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4)
DISTIL = dict(vocab_size=V, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=32)
MAMBA = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
BART = dict(
    SEQ2SEQ,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(GROUPED, sliding_window=4)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", dict(GROUPED, head_dim=4)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "opt": ("OPTConfig", "OPTForCausalLM", dict(OPT, max_position_embeddings=32, word_embed_proj_dim=16)),
    "bloom": ("BloomConfig", "BloomForCausalLM", dict(vocab_size=V, hidden_size=16, n_layer=2, n_head=4)),
    "mamba": ("MambaConfig", "MambaForCausalLM", MAMBA),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(GROUPED, num_local_experts=4)),
    "bert": ("BertConfig", "BertForSequenceClassification", dict(SMALL, num_labels=3)),
    "bert, masked": ("BertConfig", "BertForMaskedLM", SMALL),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", dict(SMALL, num_labels=3)),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", dict(DISTIL, num_labels=3)),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        dict(SMALL, num_labels=3, cls_token_id=1, sep_token_id=2),
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", dict(SEQ2SEQ, d_kv=4, d_ff=24, num_layers=2, num_heads=4)),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "vit": ("ViTConfig", "ViTForImageClassification", dict(VIT, num_labels=3)),
}


def model(name: str, scale: float = 4, **options: Any) -> nn.Module:
    """A model in training, without dropout; ``scale`` times its usual weights, so that every layer counts."""
    config, cls, settings = MODELS[name]
    settings = {**settings, **options}
    made = getattr(tr, config)(**settings)
    for key, value in vars(made).items():
        if "drop" in key and isinstance(value, float):
            setattr(made, key, 0.0)
    out: nn.Module = getattr(tr, cls)(made).train()
    if name == "mixtral":
        out.set_experts_implementation("batched_mm")  # type: ignore[operator]  # the oracle needs float64
    with torch.no_grad():
        for p in out.parameters():
            if p.dim() > 1:
                p.mul_(scale)
    return out


def tokens(pad: str = "right", rows: int = B) -> dict[str, Tensor]:
    """Rows of 7, 5 and 3 tokens."""
    mask = torch.ones(rows, T, dtype=torch.long)
    for i, length in enumerate((T, 5, 3)[:rows]):
        if pad == "right":
            mask[i, length:] = 0
        else:
            mask[i, : T - length] = 0
    return {"input_ids": torch.randint(3, V, (rows, T)) * mask, "attention_mask": mask}


def batch(name: str) -> dict[str, Tensor]:
    """What the model is called with."""
    if name == "vit":
        return {"pixel_values": torch.randn(B, 3, 8, 8)}
    if name in ("t5", "bart"):
        return {**tokens(), "decoder_input_ids": torch.randint(3, V, (B, T))}
    return tokens()


def logits(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    out: Tensor = model(**given).logits
    return out


def sum_loss(out: Tensor, target: Tensor) -> Tensor:
    """The sum over samples of the mean over a sample's tokens."""
    losses = F.cross_entropy(out.movedim(-1, 1).float(), target, reduction="none")
    return losses.flatten(1).mean(1).sum() if losses.dim() > 1 else losses.sum()


def targets(model: nn.Module, given: Mapping[str, Any], call: Call = logits) -> Tensor:
    with torch.no_grad():
        shape = call(model, given).shape
    return torch.randint(0, shape[-1], shape[:-1])


def assert_private(
    model: nn.Module, given: Mapping[str, Any], call: Call = logits, slack: float = 1 + 1e-4, **kw: Any
) -> Private:
    """Norms and clipped sums are exact with some samples clipped; none moves the sum by more than C with all clipped.

    ``slack`` is for the rounding of float32 sums.
    """
    target = targets(model, given, call)
    verdict = Verdict(Called(model, call), (given,), target, sum_loss)
    assert verdict.norms.min() > 0
    private = Private(model, verdict.max_grad_norm, call, loss_reduction="sum", **kw)
    sums = private.backward((given,), target, sum_loss)
    verdict.check_norms(private.wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums)
    bound = 0.5 * float(verdict.norms.min())
    private = Private(model, bound, call, loss_reduction="sum", **kw)
    whole = private.backward((given,), target, sum_loss)
    count = len(verdict.norms)
    for i in range(count):
        rest = oracle.take(((given,), target), [j for j in range(count) if j != i])
        moved = distance(whole, private.backward(*rest, sum_loss))
        assert 0.9 * bound < moved <= bound * slack, f"without sample {i} the clipped sum moved by {moved / bound} C"
    return private
