"""PEFT's adapters on tiny bases: exact, and the frozen base costs nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from tests.helpers import BF16, make_private
from tests.integrations.transformer_models import (
    T,
    assert_private,
    batch,
    logits,
    model,
    sum_loss,
    targets,
    tokens,
)
from tests.oracle import Verdict
from tests.privacy.judging import Called, Private

NAMES = {  # of the layers to adapt: attention, the feed-forward's, the embedding's
    "gpt2": (["c_attn", "c_proj"], ["c_fc"], "wte"),
    "llama": (["q_proj", "v_proj"], ["down_proj"], "embed_tokens"),
}


def configs(base):
    attention, feedforward, embedding = NAMES[base]
    lora = dict(task_type="CAUSAL_LM", r=4, target_modules=attention, init_lora_weights=False)
    prompt = dict(task_type="CAUSAL_LM", num_virtual_tokens=5)
    return {
        "lora": LoraConfig(**lora),
        "rslora": LoraConfig(**lora, use_rslora=True),
        "dora": LoraConfig(**lora, use_dora=True),
        "lora, embedding": LoraConfig(**{**lora, "target_modules": [embedding]}),
        "lora, whole head": LoraConfig(**lora, modules_to_save=["lm_head"]),
        "lora, biases": LoraConfig(**lora, bias="all"),
        "ia3": IA3Config(
            task_type="CAUSAL_LM",
            target_modules=attention + feedforward,
            feedforward_modules=feedforward,
            init_ia3_weights=False,
        ),
        "vera": VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=attention),
        "adalora": AdaLoraConfig(**{k: v for k, v in lora.items() if k != "r"}, init_r=4, total_step=10),
        "prompt": PromptTuningConfig(**prompt),
        "prefix": PrefixTuningConfig(**prompt),
        "prefix, projected": PrefixTuningConfig(**prompt, prefix_projection=True, encoder_hidden_size=8),
        "p-tuning": PromptEncoderConfig(**prompt, encoder_hidden_size=8),
    }


def adapted(base, method):
    out = get_peft_model(model(base), configs(base)[method]).train()
    if method == "vera":  # starts at zeros, where nothing flows
        for p in (p for p in out.parameters() if p.requires_grad):
            nn.init.normal_(p)
    return out


def of_tokens(model, given):
    """Prompts come first."""
    return logits(model, given)[:, -T:]


@pytest.mark.parametrize("method", configs("gpt2"))
@pytest.mark.parametrize("base", NAMES)
def test_every_method(base, method):
    private = assert_private(adapted(base, method), tokens(), of_tokens)
    assert private.wrapped.runs_by_sample == (method in ("prompt", "p-tuning"))


@pytest.mark.parametrize("name", ["t5", "bert, masked", "mixtral", "vit", "mamba"])
def test_lora_on_other_bases(name):
    targets_of = {"t5": ["q", "v"], "bert, masked": ["query"], "mixtral": ["q_proj"], "mamba": ["in_proj", "x_proj"]}
    config = LoraConfig(r=4, target_modules=targets_of.get(name, "all-linear"), init_lora_weights=False)
    assert_private(get_peft_model(model(name), config).train(), batch(name))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradient_checkpointing(method, reentrant):
    private = adapted("llama", method)
    private.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    given = tokens()
    embedded = private.get_input_embeddings()(given.pop("input_ids")).detach()

    def call(model, given):  # a reentrant checkpoint wants an input with a gradient
        return logits(model, {**given, "inputs_embeds": given["inputs_embeds"].requires_grad_()})

    assert_private(private, {**given, "inputs_embeds": embedded}, call)


def test_a_bfloat16_base_with_float32_adapters():
    private = adapted("llama", "lora")
    for p in private.parameters():
        p.data = p.data if p.requires_grad else p.data.to(BF16)

    def autocast(model, given):
        with torch.autocast("cpu", BF16):
            return logits(model, given)

    given = tokens()
    target = targets(private, given, autocast)
    float32 = copy.deepcopy(private).float()
    verdict = Verdict(Called(float32, logits), (given,), target, sum_loss)
    low = Private(private, 1.0, autocast, loss_reduction="sum")
    low.backward((given,), target, sum_loss)
    torch.testing.assert_close(low.wrapped.per_sample_gradient_norms.double(), verdict.norms, rtol=0.05, atol=0)


class EightBit(nn.Linear):
    """A base layer in eight bits, as quantisation libraries make it: a subclass of nn.Linear that dequantises."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Quantised(nn.Module):
    """The oracle casts parameters to float64; the eight bits hold whole numbers, which stay the same."""

    def __init__(self, base):
        super().__init__()
        for block in base.model.layers:
            for name in ("q_proj", "v_proj"):
                setattr(block.self_attn, name, EightBit(getattr(block.self_attn, name)))
        self.base = base


def test_lora_on_a_quantised_base():
    base = Quantised(model("llama")).base
    private = assert_private(get_peft_model(base, configs("llama")["lora"]).train(), tokens())
    assert private.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.int8


class Kept:
    """Bytes that autograd keeps for the backward, but for parameters and what they share memory with."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        self.storages = {}

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage
        return x

    def run(self, model, given):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
            out = logits(model, given)
        size = sum(storage.nbytes() for storage in self.storages.values())
        self.storages = {}
        return out, size


@pytest.mark.parametrize("method", ["lora", "rslora", "ia3"])
@pytest.mark.parametrize("base", NAMES)
def test_frozen_weights_keep_no_activations(base, method):
    """Nothing more than plain PyTorch keeps; and only trained parameters have norms or sums."""
    plain, given = adapted(base, method), tokens()
    _, expected = Kept(plain).run(plain, given)
    private = copy.deepcopy(plain)
    wrapped, _, _ = make_private(private, loss_reduction="sum")
    target = targets(plain, given)
    sum_loss(logits(wrapped, given), target).backward()  # the first forward also checks
    recorded = set()
    record = type(wrapped.clipped_sum).record_call

    def seen(self, call, forms):
        recorded.update(self.names[parameter] for parameter, _ in forms)
        record(self, call, forms)

    for p in private.parameters():
        p.summed_grad = None
    out, kept = Kept(private).run(wrapped, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(wrapped.clipped_sum), "record_call", seen)
        sum_loss(out, target).backward()
    trained = {name for name, p in private.named_parameters() if p.requires_grad}
    assert recorded == trained
    assert {name for name, p in private.named_parameters() if getattr(p, "summed_grad", None) is not None} == trained
    assert kept <= 1.02 * expected
