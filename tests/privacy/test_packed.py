"""The samples of a packed row are clipped one by one: exact against one sample at a time, and within C without any."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpfast
from dpfast.clipping import segments
from dpfast.losses import causal_lm_loss, segment_linear_cross_entropy
from tests.helpers import BF16, F32, F64, distance, make_private, sums_of
from tests.integrations import transformer_models as tm
from tests.privacy.packed import LENGTHS, Segmented, V, check_moves, examine, judge, packed, tokens

DECODERS = [(name, attention) for name in ("llama", "gpt2") for attention in ("sdpa", "eager")]


def decoder(name, attention="sdpa", dtype=F64, **options):
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    options = {"attn_implementation": attention, "use_cache": False} | layers | options
    return tm.model(name, scale=2, **options).to(dtype)


class Block(nn.Module):
    """A small transformer of plain PyTorch, whose mask is made of positions as they are given."""

    def __init__(self, d=8, layer=None):
        super().__init__()
        self.ids, self.places = nn.Embedding(V, d), nn.Embedding(16, d)
        self.layer = layer or nn.TransformerEncoderLayer(d, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(d, V)

    def mask(self, position_ids):
        numbers = (position_ids == 0).cumsum(1)
        apart = numbers[:, :, None] != numbers[:, None, :]
        return (apart | torch.ones_like(apart).triu(1)).repeat_interleave(2, 0)

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.ids(input_ids) + self.places(position_ids)
        return self.head(self.layer(x, self.mask(position_ids)))


class Fused(nn.Module):
    """Causal attention without weights of its own, and a loss inside of the forward, from a head tied or not."""

    def __init__(self, tied, keep_logits, d=8):
        super().__init__()
        self.ids, self.mix, self.head = nn.Embedding(V, d), nn.Linear(d, d), nn.Linear(d, V, bias=False)
        self.keep_logits = keep_logits
        if tied:
            self.head.weight = self.ids.weight

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.ids(input_ids)
        numbers = (position_ids == 0).cumsum(1)
        mask = (numbers[:, :, None] == numbers[:, None, :]).tril()
        q = self.mix(x)
        x = x + F.scaled_dot_product_attention(q[:, None], x[:, None], x[:, None], mask[:, None])[:, 0]
        return segment_linear_cross_entropy(
            x, self.head, input_ids, position_ids=position_ids, reduction="none", keep_logits=self.keep_logits
        )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name, attention", DECODERS)
def test_models_of_transformers(name, attention):
    examine(decoder(name, attention, F64 if name == "gpt2" else F32))  # Llama computes in float32 in any case


class NormedHeads(Block):
    """Queries and keys are normalised with heads first, ``[rows, heads, length, d]`` as in Gemma 3, or last."""

    def __init__(self, heads_first, d=8, heads=4):
        super().__init__(d)
        self.qkv, self.norm, self.of_heads = nn.Linear(d, 3 * d), nn.LayerNorm(d // heads), nn.Linear(2, 2)
        self.heads_first, self.heads = heads_first, heads

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.ids(input_ids) + self.places(position_ids)
        q, k, v = (each.unflatten(2, (self.heads, -1)) for each in self.qkv(x).chunk(3, -1))
        if self.heads_first:
            q, k = (self.of_heads(self.norm(each.transpose(1, 2))) for each in (q, k))
        else:
            q, k = (self.of_heads(self.norm(each)).transpose(1, 2) for each in (q, k))
        numbers = (position_ids == 0).cumsum(1)
        mask = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]
        return self.head(F.scaled_dot_product_attention(q, k, v.transpose(1, 2), mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads_first", [True, False])
def test_as_many_heads_as_positions(heads_first):
    """After a batch that tells which of them are which."""
    model = NormedHeads(heads_first).double()
    del model.layer
    private = examine(model, tokens([5, 1, 4]))
    samples = tokens([1, 3], seed=1)
    verdict = judge(model, samples, private.optimizer.max_grad_norm)
    sums = private.backward(packed(samples))
    verdict.check_norms(private.wrapped.per_sample_gradient_norms)
    verdict.check_sums(sums)


def test_a_transformer_of_pytorch():
    examine(Block().double())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_large_layers(name, monkeypatch):
    """What is not put beside each other, and norms that are taken of one layer at a time."""
    monkeypatch.setattr(segments, "LARGE", 1)
    monkeypatch.setattr(segments, "AT_ONCE", 1)
    examine(decoder(name, dtype=F64 if name == "gpt2" else F32), leave_out=name == "gpt2")


@pytest.mark.parametrize("way", ["ghost", "instantiate"])
def test_ways(way):
    examine(Block().double(), tokens([1, 12, 2, 1, 7, 3]), plan={"": way}, leave_out=way == "ghost")


@pytest.mark.parametrize("lengths", [[6], [1, 1, 1], [1, 12, 2, 1, 7, 3], [4, 4, 4]])
def test_lengths(lengths):
    examine(Block().double(), tokens(lengths), leave_out=len(lengths) == 6)


def test_as_many_samples_of_one_length_as_not_of_another():
    """In float32, where small products of all layers are one call."""
    examine(decoder("gpt2", dtype=F32), tokens([4, 3, 5]), leave_out=False)


def test_no_sample_at_all():
    private = Segmented(decoder("gpt2"), 1.0)
    before = private.backward(packed(tokens()))
    assert any(s.any() for s in before.values())
    nothing = private.backward(packed([]))
    assert not any(s.any() for s in nothing.values()) and len(private.wrapped.per_sample_gradient_norms) == 0


def in_two_rows(samples):
    """Rows ``[2, length]``, the second one filled up by a sample that is put at its end."""
    length = max(sum(map(len, samples[:2])), sum(map(len, samples[2:])))
    batch = {"input_ids": torch.zeros(2, length, dtype=torch.long), "seq_idx": torch.full((2, length), -1)}
    for row, its in enumerate((samples[:2], samples[2:])):
        start = 0
        for k, sample in enumerate(its):
            batch["input_ids"][row, start : start + len(sample)] = sample
            batch["seq_idx"][row, start : start + len(sample)] = k
            start += len(sample)
    return batch


class ByNumbers(Block):
    """The same, with ``seq_idx``, in which -1 is padding."""

    def forward(self, input_ids, seq_idx=None, position_ids=None):
        if seq_idx is None:
            return super().forward(input_ids, position_ids)
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return super().forward(input_ids, places - torch.where(begins, places, 0).cummax(1).values)


def test_rows_without_padding():
    """As TRL packs them: rows of one length, and position ids."""
    samples = tokens([4, 3, 2, 5])

    def pack(some):
        its = packed(some)
        rows = len(some) // 2 or 1
        return {name: x.view(rows, -1) for name, x in its.items()}

    examine(Block().double(), samples, pack, leave_out=False)


def test_several_rows_and_padding():
    model, samples = ByNumbers().double(), tokens([5, 2, 3, 1])
    examine(model, samples, in_two_rows)


def test_lengths_as_transformers_gives_them():
    """``cu_seq_lens_q``, which stands beside position ids or alone."""
    samples = tokens()
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    batch = packed(samples) | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    examine(decoder("gpt2"), samples, lambda some: batch, leave_out=False)


def test_as_the_padded_batch():
    """The same samples in rows of their own, padded behind."""
    model, samples = decoder("gpt2"), tokens([5, 2, 7])
    private = Segmented(model, 0.5)
    sums = private.backward(packed(samples))
    mask = torch.tensor([[1] * len(s) + [0] * (7 - len(s)) for s in samples])
    ids = torch.stack([F.pad(s, (0, 7 - len(s))) for s in samples])
    padded = copy.deepcopy(model)
    wrapped, _, _ = make_private(padded, max_grad_norm=0.5, size=3, loss_reduction="sum")
    causal_lm_loss(wrapped(ids, attention_mask=mask).logits, ids.masked_fill(mask == 0, -100)).backward()
    theirs = {f"model.model.{name}": s for name, s in sums_of(padded).items()}
    assert distance(sums, theirs) < 1e-9
    torch.testing.assert_close(private.wrapped.per_sample_gradient_norms, wrapped.per_sample_gradient_norms)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep_logits", [True, False])
def test_the_loss_from_the_head(tied, keep_logits):
    model, samples = Fused(tied, keep_logits).double(), tokens()
    twin = copy.deepcopy(model)
    norms, gradients = [], []
    for sample in samples:
        twin.zero_grad()
        twin(sample[None]).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in twin.named_parameters()})
        norms.append(sum(g.square().sum() for g in gradients[-1].values()).sqrt())
    norms = torch.stack(norms)
    C = float(norms.median())
    wrapped, _, _ = make_private(model, units="packed", max_grad_norm=C, loss_reduction="sum")
    wrapped(**packed(samples)).sum().backward()
    torch.testing.assert_close(wrapped.per_sample_gradient_norms, norms)
    factors = (C / norms.clamp_min(1e-30)).clamp(max=1)
    for name, got in sums_of(model).items():
        torch.testing.assert_close(got, sum(f * g[name] for f, g in zip(factors, gradients, strict=True)))


def test_bfloat16():
    model, samples = decoder("gpt2", dtype=BF16), tokens()
    private = Segmented(model, 0.05)
    whole = private.backward(packed(samples))
    norms = judge(model, samples, 0.05).norms
    torch.testing.assert_close(private.wrapped.per_sample_gradient_norms.double(), norms, rtol=0.1, atol=0.02)
    check_moves(private, samples, whole, 0.05, slack=1 + 1e-5)


def test_autocast():
    private, samples = Segmented(decoder("llama", dtype=F32), 0.1), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        check_moves(private, samples[:3], private.backward(packed(samples[:3])), 0.1, slack=1 + 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """What is computed again in the backward runs by segments too."""
    samples, plain = tokens(), decoder("gpt2")
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        again.enable_input_require_grads()
    expected, got = (Segmented(model, 0.5).backward(packed(samples)) for model in (plain, again))
    assert distance(expected, got) < 1e-9


@pytest.mark.parametrize("function", ["automatic", "normalised", "global", "psac"])
def test_clipping_functions(function):
    """As the samples in rows of their own."""
    model, samples = Block().double(), tokens([3, 3, 3])
    sums = Segmented(model, 0.5, clipping_fn=function).backward(packed(samples))
    wrapped, _, _ = make_private(model, max_grad_norm=0.5, size=3, loss_reduction="sum", clipping_fn=function)
    ids = torch.stack(samples)
    causal_lm_loss(wrapped(ids), ids).backward()
    assert distance(sums, {f"model.model.{name}": s for name, s in sums_of(model).items()}) < 1e-9


def test_a_mean_over_samples():
    model, samples = Block().double(), tokens()
    of_mean = Segmented(model, 0.5, loss_reduction="mean").backward(packed(samples))
    assert distance(of_mean, Segmented(model, 0.5).backward(packed(samples))) < 1e-9


def test_groups_and_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(decoder("gpt2"), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    samples = tokens()
    verdict = judge(model, samples)
    private = Segmented(model.double(), verdict.max_grad_norm)
    whole = private.backward(packed(samples))
    verdict.check_norms(private.wrapped.per_sample_gradient_norms)
    verdict.check_sums(whole)


def test_ascent():
    """DP-SAT moves the weights by the last noisy gradient; segments are clipped at what is moved."""
    samples, sums = tokens([3, 4, 2]), []
    for pack in (packed, None):
        torch.manual_seed(0)
        model = Block().double()
        options = {"units": "packed"} if pack else {}
        wrapped, optimizer, _ = make_private(
            model, max_grad_norm=0.5, size=3, lr=0.1, loss_reduction="sum", ascent=dpfast.DPSAT(rho=0.5), **options
        )
        for _ in range(2):
            optimizer.zero_grad()
            if pack:
                batch = pack(samples)
                dpfast.losses.segment_cross_entropy(
                    wrapped(**batch), batch["input_ids"], position_ids=batch["position_ids"]
                ).backward()
            else:
                ids = torch.stack([F.pad(s, (0, 4 - len(s))) for s in samples])
                labels = torch.stack([F.pad(s, (0, 4 - len(s)), value=-100) for s in samples])
                causal_lm_loss(wrapped(ids), labels).backward()
            sums.append(sums_of(model))
            optimizer.step()
    assert distance(sums[0], sums[2]) < 1e-9
    assert distance(sums[1], sums[3]) < 1e-9
    assert distance(sums[0], sums[1]) > 1e-3
