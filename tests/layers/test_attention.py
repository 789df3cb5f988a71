"""nn.MultiheadAttention itself and nn.TransformerEncoderLayer: as they are, not replaced."""

import pytest
import torch
from torch import nn

from tests.helpers import F32, F64, assert_exact, check_layer, mse

D, HEADS = 6, 2


class Attend(nn.Module):
    """Self or cross attention on batch-first data, whatever the layer's own order; its weights count too."""

    def __init__(self, cross=False, call=None, mask=None, **kw):
        super().__init__()
        self.att = nn.MultiheadAttention(D, HEADS, **({"batch_first": True} | kw))
        for name, p in self.att.named_parameters():
            if "bias" in name:  # zeros at the start, which would hide an error
                nn.init.normal_(p)
        self.before = nn.Linear(D, D)
        self.cross, self.call, self.mask = cross, call or {}, mask

    def masks(self, T, S, B, padding):
        causal = torch.ones(T, S, dtype=torch.bool).triu(1)
        if self.mask == "bool":
            return dict(attn_mask=causal)
        if self.mask == "float":
            return dict(attn_mask=torch.zeros(T, S, dtype=self.before.weight.dtype).masked_fill(causal, -1e4))
        if self.mask == "per head":
            own = padding[:, None, None, :].expand(B, HEADS, T, S) | causal
            return dict(attn_mask=own.reshape(B * HEADS, T, S))
        if self.mask == "padding":
            return dict(key_padding_mask=padding)
        if self.mask == "is_causal":
            return dict(attn_mask=causal, is_causal=True)
        return {}

    def forward(self, x, memory, padding):
        query = self.before(x)
        key = value = memory[..., :D] if self.cross else query
        if self.att.kdim != D or self.att.vdim != D:
            key, value = memory[..., : self.att.kdim], memory[..., : self.att.vdim]
        options = self.call | self.masks(query.shape[1], key.shape[1], len(x), padding)
        parts = (query, key, value)
        if not self.att.batch_first:
            parts = tuple(t.transpose(0, 1) for t in parts)
        if not self.cross and self.att.kdim == D and self.att.vdim == D:
            parts = (parts[0],) * 3  # the very same tensor: PyTorch takes another path then
        out, weights = self.att(*parts, **options)
        if not self.att.batch_first:
            out = out.transpose(0, 1)
        return out.flatten(1) if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)


def batch(B=4, T=5, S=5, dtype=torch.float32):
    padding = torch.arange(S) >= torch.randint(1, S + 1, (B, 1))  # the first key is always seen
    return torch.randn(B, T, D, dtype=dtype), torch.randn(B, S, 9, dtype=dtype), padding


CASES = {
    "self": dict(),
    "cross": dict(cross=True),
    "no bias": dict(bias=False),
    "kdim": dict(kdim=9),
    "vdim": dict(vdim=4),
    "kdim and vdim, no bias": dict(kdim=9, vdim=4, bias=False),
    "add_bias_kv": dict(add_bias_kv=True),
    "add_bias_kv, cross": dict(cross=True, add_bias_kv=True, bias=False),
    "add_zero_attn": dict(add_zero_attn=True),
    "both": dict(add_bias_kv=True, add_zero_attn=True, kdim=9, vdim=9),
    "no weights": dict(call=dict(need_weights=False)),
    "weights by head": dict(call=dict(average_attn_weights=False)),
    "bool mask": dict(mask="bool"),
    "float mask": dict(mask="float"),
    "mask per head": dict(mask="per head"),
    "padding mask": dict(mask="padding"),
    "padding mask, bias_kv, zero": dict(mask="padding", add_bias_kv=True, add_zero_attn=True),
    "causal, no weights": dict(mask="is_causal", call=dict(need_weights=False)),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_exact(options, batch_first):
    S = 7 if options.get("cross") or "kdim" in options or "vdim" in options else 5
    check_layer(Attend(batch_first=batch_first, **options), batch(S=S), F64)


@pytest.mark.parametrize("options", [CASES["self"], CASES["kdim"], CASES["both"]], ids=["self", "kdim", "both"])
def test_float32(options):
    check_layer(Attend(**options), batch(), F32)


@pytest.mark.parametrize("cross", [True, False])
def test_a_sequence_of_one(cross):
    check_layer(Attend(cross=cross), batch(T=1, S=1), F64)


def test_as_many_tokens_as_samples():
    """Nothing but the layer's ``batch_first`` says which dimension is the batch."""
    check_layer(Attend(batch_first=False), batch(B=5), F64)


@pytest.mark.parametrize(
    "frozen", ["att.in_proj_weight", "att.in_proj_bias", "att.out_proj.weight", "att.out_proj.bias"]
)
def test_half_frozen(frozen):
    model = Attend().double()
    model.get_parameter(frozen).requires_grad_(False)
    inputs = batch(dtype=F64)
    with torch.no_grad():
        target = torch.randn_like(model(*inputs))
    assert_exact(model, inputs, target, mse)


def test_twice_in_one_forward():
    class Twice(Attend):
        def forward(self, x, memory, padding):
            y = self.before(x)
            y = y + self.att(y, y, y)[0]
            return self.att(y, memory[..., :D], memory[..., :D], need_weights=False)[0]

    check_layer(Twice(), batch(S=7), F64)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_layer(norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        D, HEADS, 10, dropout=0.0, batch_first=True, norm_first=norm_first, activation=activation
    )
    check_layer(layer, (torch.randn(4, 5, D),), F64)
    check_layer(layer, (torch.randn(4, 1, D),), F32)


class Encoder(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, 10, dropout=0.0, batch_first=True, **kw)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        pad = torch.zeros(padding.shape, dtype=x.dtype).masked_fill(padding, float("-inf"))
        return self.enc(x, mask=mask, src_key_padding_mask=pad, is_causal=True)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_with_masks(norm_first):
    x, _, padding = batch()
    check_layer(Encoder(norm_first=norm_first), (x, padding), F64)


def test_transformer_decoder_layer():
    layer = nn.TransformerDecoderLayer(D, HEADS, 10, dropout=0.0, batch_first=True)
    check_layer(layer, (torch.randn(4, 5, D), torch.randn(4, 3, D)), F64)


def test_evaluation_is_untouched():
    """PyTorch's fast path in ``eval()`` reads the weights directly; it must still be right."""
    layer = nn.TransformerEncoderLayer(D, HEADS, 10, dropout=0.0, batch_first=True).double()
    x = torch.randn(4, 5, D, dtype=F64)
    run = assert_exact(layer, (x,), torch.randn(4, 5, D, dtype=F64), mse)
    run.wrapped.eval()
    with torch.no_grad():
        torch.testing.assert_close(run.wrapped(x), layer.eval()(x))
