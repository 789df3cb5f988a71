"""Transformers' architectures: every one is exact, in whatever way a batch is laid out, or refused by name."""

import copy

import pytest
import torch

from tests import oracle
from tests.helpers import BF16, F64, make_private, sums_of
from tests.integrations.transformer_models import (
    MODELS,
    B,
    T,
    V,
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

BY_SAMPLE = {"t5", "mixtral"}  # under vmap: a bias that all samples share, and tokens of all samples in one list


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name):
    private = assert_private(model(name), batch(name))
    assert private.wrapped.runs_by_sample == (name in BY_SAMPLE)
    assert private.wrapped.separation.proved


@pytest.mark.parametrize("name", ["gpt2", "bert", "bert, masked", "bart", "opt"])
def test_within_c_in_float64(name):
    """Models whose code computes nothing in float32."""
    assert_private(model(name).to(F64), batch(name), slack=1 + 1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_heads_tied_and_not(name, tied):
    assert_private(model(name, tie_word_embeddings=tied), batch(name))


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_padding_and_position_ids(name, pad):
    given = tokens(pad)
    assert_private(model(name), given)
    assert_private(model(name), {**given, "position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)})
    assert_private(model(name), {**given, "position_ids": torch.arange(T).expand(B, T)})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_attention_kernels(name, attention):
    private = assert_private(model(name, attn_implementation=attention), batch(name))
    assert private.wrapped.separation.proved


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_position_id_row_for_all(name):
    assert_private(model(name), {"input_ids": torch.randint(3, V, (B, T))}, lambda m, x: logits(m, {**x, **SHARED}))


SHARED = {"position_ids": torch.arange(T)[None]}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packed_rows(name):
    """A row of several documents, told apart by their position ids, is one sample."""
    lengths = [(3, 4), (7,), (1, 2, 4)]
    ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    assert_private(model(name), {"input_ids": torch.randint(3, V, (B, T)), "position_ids": ids})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "opt"])
def test_gradient_checkpointing(name, reentrant):
    private = model(name)
    private.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    private.enable_input_require_grads()
    assert_private(private, tokens())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_bfloat16(name):
    """Norms and sums as near to the truth as PyTorch's own, and within C."""
    low = model(name).to(BF16)
    given = tokens()
    target = targets(low, given)
    verdict = Verdict(Called(low, logits), (given,), target, sum_loss)
    private = Private(low, verdict.max_grad_norm, logits, loss_reduction="sum")
    sums = private.backward((given,), target, sum_loss)
    verdict.check_norms(private.wrapped.per_sample_gradient_norms, certified=True)
    verdict.check_sums(sums)


def autocast(model, given):
    with torch.autocast("cpu", BF16):
        return logits(model, given)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mamba", "vit"])
def test_autocast(name):
    """Against one sample at a time under autocast; a row alone is rounded as in the batch."""
    plain, given = model(name, scale=1), batch(name)
    target = targets(plain, given, autocast)
    wanted = []
    for i in range(B):
        plain.zero_grad()
        sum_loss(autocast(plain, {k: x[i : i + 1] for k, x in given.items()}), target[i : i + 1]).backward()
        grads = [p.grad.flatten() for p in plain.parameters() if p.grad is not None]
        wanted.append(torch.cat(grads).norm())
    private = Private(plain, 1.0, autocast, loss_reduction="sum")
    private.backward((given,), target, sum_loss)
    torch.testing.assert_close(private.wrapped.per_sample_gradient_norms, torch.stack(wanted), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch(name):
    """A Poisson batch of nobody: the step releases noise alone."""
    private, given = Private(model(name), 1.0, logits, loss_reduction="sum"), batch(name)
    target = targets(private.model, given)
    for _ in range(2):  # as the first batch, and after another
        sums = private.backward((oracle.take(given, []),), target[:0], sum_loss)
        assert len(private.output) == len(private.wrapped.per_sample_gradient_norms) == 0
        assert not any(s.any() for s in sums.values())
        assert all(p.grad is None for p in private.model.parameters())
        private.backward((given,), target, sum_loss)


def test_experts_in_groups():
    """PyTorch's grouped matrix product, which has no float64, against one product for each token."""
    experts, given = model("mixtral"), tokens()
    target, norms = targets(experts, given), []
    for implementation in ("batched_mm", "grouped_mm"):
        experts.set_experts_implementation(implementation)
        private = Private(experts, 1.0, logits, loss_reduction="sum")
        private.backward((given,), target, sum_loss)
        norms.append(private.wrapped.per_sample_gradient_norms)
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


def test_experts_that_loop_over_what_is_hit():
    """Refused before anything is trained, by name and with what to do."""
    experts = model("mixtral")
    experts.set_experts_implementation("eager")
    wrapped, _, _ = make_private(experts)
    with pytest.raises(RuntimeError, match=r"mlp\.experts\.down_proj.*set_experts_implementation\('batched_mm'\)"):
        wrapped(**tokens())
    assert not any(s.any() for s in sums_of(experts).values())


def test_what_transformers_asks_of_a_tensor_is_given_back():
    from transformers.utils import import_utils

    before = import_utils.is_fake_tensor
    assert_private(model("t5"), batch("t5"))
    assert import_utils.is_fake_tensor is before


def test_the_model_as_it_was():
    """Mamba's projection lends its bias to the mixer, whose copies take its tap's place, until the clean-up."""
    plain = model("mamba")
    names = list(plain.state_dict())
    private = copy.deepcopy(plain)
    wrapped, _, _ = make_private(private)
    given = tokens()
    sum_loss(logits(wrapped, given), targets(plain, given)).backward()
    assert list(private.state_dict()) == names
    wrapped.cleanup()
    wrapped.remove_hooks()
    assert not any("forward" in vars(module) for module in private.modules())
    torch.testing.assert_close(logits(private, given), logits(plain, given))
