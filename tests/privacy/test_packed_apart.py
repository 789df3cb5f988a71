"""What would let the samples of a packed row meet is refused by name, or run so that they do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpfast
from tests.helpers import distance, make_private
from tests.integrations import transformer_models as tm
from tests.privacy.packed import Logits, Segmented, V, packed, tokens
from tests.privacy.test_packed import Block, decoder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def refuse(model, match, batch=None, loss=None, **kw):
    """Refused in forward or backward, in words that ``match``; nothing is summed up."""
    private = Segmented(model, 1.0, **kw)
    with pytest.raises((ValueError, RuntimeError), match=match):
        if loss is None:
            private.backward(batch or packed(tokens()))
        else:
            loss(private.wrapped, batch or packed(tokens())).backward()
    assert private.nothing_summed()


class Mixing(Block):
    """``how`` the positions of a row see each other beside attention."""

    def __init__(self, how, trained=True):
        super().__init__()
        self.how = how
        self.conv = nn.Conv1d(8, 8, 3, padding=2).requires_grad_(trained)
        self.rnn = nn.GRU(8, 8, batch_first=True).requires_grad_(False)

    def forward(self, input_ids, position_ids=None):
        x = self.ids(input_ids)
        if self.how == "convolution":
            x = x + self.conv(x.transpose(1, 2))[..., :-2].transpose(1, 2)
        elif self.how == "recurrence":
            x = x + self.rnn(x)[0]
        elif self.how == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.how == "scan":
            x = x.cumsum(1)
        elif self.how == "shift":
            x = x + F.pad(x, (0, 0, 1, 0))[:, :-1]
        elif self.how == "two back":
            x = x + F.pad(x, (0, 0, 8, 0))[:, :-8]
        elif self.how == "backwards":
            x = x + x.flip(1)
        return self.head(x)


@pytest.mark.parametrize("how", ["recurrence", "mean", "scan", "shift", "two back", "backwards"])
def test_what_looks_across_positions(how):
    refuse(Mixing(how), "not kept apart: what layer .* is given changes")


def test_convolutions_trained_and_frozen():
    refuse(Mixing("convolution"), "'conv'.*convolution")
    refuse(Mixing("convolution", trained=False), "not kept apart")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_without_a_mask_by_segments(attention):
    """As a cache is given, Transformers makes a mask that knows of no segments."""
    refuse(decoder("gpt2", attention, use_cache=True), "meet in .*use_cache = False")


def test_a_mask_that_is_right_once(monkeypatch):
    """The mask is looked at in every forward, not in trials alone."""
    model = Block()
    private = Segmented(model, 1.0)
    private.backward(packed(tokens()))
    monkeypatch.setattr(
        Block,
        "mask",
        lambda self, position_ids: torch.zeros(2, position_ids.shape[1], position_ids.shape[1], dtype=torch.bool),
    )
    with pytest.raises(RuntimeError, match="mask that lets segments"):
        private.backward(packed(tokens()))
    assert private.nothing_summed()


def test_attention_of_pytorch_without_a_mask():
    class Bare(Block):
        def forward(self, input_ids, position_ids=None):
            return self.head(self.layer(self.ids(input_ids)))

    refuse(Bare(), "attention without a mask")


def test_a_state_space_model_without_seq_idx():
    class Marked(nn.Module):  # Mamba takes no position ids, and no seq_idx
        def __init__(self):
            super().__init__()
            self.model = tm.model("mamba").requires_grad_(False)
            self.model.lm_head.weight.requires_grad_(True)

        def forward(self, input_ids, position_ids=None):
            return self.model(input_ids).logits

    refuse(Marked(), "not kept apart.*state-space layers without seq_idx")


def test_a_loss_over_the_tokens_of_the_batch():
    """Transformers' own."""
    model = decoder("gpt2")
    refuse(model, "averages over the tokens of the batch", loss=lambda m, b: m(**b, labels=b["input_ids"]).loss)


@pytest.mark.parametrize("keys", [[], ["position_ids"]])
def test_marks_that_are_missing_or_wrong(keys):
    batch = packed(tokens())
    private = Segmented(decoder("gpt2"), 1.0)
    with pytest.raises(ValueError, match=r"where the samples|neither count on"):
        ids = batch["position_ids"].clone()
        ids[0, 1] = 7
        Logits(private.wrapped)(batch["input_ids"], **{key: ids for key in keys})


def test_marks_that_disagree():
    batch = packed(tokens()) | {"cu_seq_lens_q": torch.tensor([0, 5, 10])}
    with pytest.raises(ValueError, match="cu_seq_lens_q and position_ids say different"):
        Logits(Segmented(decoder("gpt2"), 1.0).wrapped)(**batch)


def test_a_place_in_the_row_that_a_gradient_depends_on():
    """Without position ids GPT-2 counts on over all samples: those before decide what a sample's gradient is."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = decoder("gpt2")

        def forward(self, input_ids, seq_idx=None):
            mask = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril()[:, None]
            return self.model(input_ids, attention_mask=mask).logits

    batch = packed(tokens())
    batch["seq_idx"] = (batch.pop("position_ids") == 0).cumsum(1)
    refuse(Counting(), "stands elsewhere in the row.*position_ids", batch)


def test_how_many_others_there_are():
    class Scaled(Block):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids, position_ids) / input_ids.shape[1]

    refuse(Scaled(), "beside fewer others")


def test_a_part_of_the_row():
    class Cut(Block):
        def forward(self, input_ids, position_ids=None):
            return self.head(self.ids(input_ids)[:, :-1])

    refuse(Cut(), "'head' got an input of shape")


def test_parameters_without_positions():
    class Bare(Block):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, input_ids, position_ids=None):
            return self.head(self.ids(input_ids) * self.scale)

    refuse(Bare(), "scale is not kept by the positions|scale")


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(rows_per_unit=2), "rows_per_unit=2"),
        (dict(augmentations=2), "augmentations=2"),
        (dict(rand_on_empty=True), "rand_on_empty"),
        (dict(max_physical_batch_size=1), "max_physical_batch_size"),
        (dict(keep_grad_samples=True), "keep_grad_samples"),
        (dict(batch_first=False), "batch_first=False"),
        (dict(grad_sample_mode="hooks"), "units"),
    ],
)
def test_what_does_not_go_with_it(options, name):
    model = Block()
    with pytest.raises(ValueError, match=name):
        make_private(model, units="packed", **options)
    assert "forward" not in vars(model)


def test_compiled_and_recorded_steps():
    private = Segmented(Block(), 1.0)
    with pytest.raises(ValueError, match="graphed"):
        dpfast.graphed(private.wrapped, lambda out: out.sum(), None)
    compiled = torch.compile(private.wrapped, backend="eager")
    with pytest.raises(ValueError, match=r"torch\.compile"):
        compiled(**packed(tokens()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_of_attention_is_no_reason_to_refuse(name, attention):
    """An argument of a function, and no module."""
    model = decoder(name, attention)
    for module in model.modules():
        for setting in ("attention_dropout", "attn_dropout", "resid_dropout"):
            if isinstance(getattr(module, setting, None), nn.Dropout):
                getattr(module, setting).p = 0.3
            elif isinstance(getattr(module, setting, None), float):
                setattr(module, setting, 0.3)
    sums = Segmented(model, 0.5).backward(packed(tokens()))
    assert all(s.any() for s in sums.values())


def test_dropout_of_pytorchs_attention_is_no_reason_to_refuse():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
    layer.self_attn.requires_grad_(False)
    assert Segmented(Block(layer=layer), 0.5).backward(packed(tokens()))["model.model.ids.weight"].any()


def test_dropout_is_no_reason_to_refuse():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
    sums = Segmented(Block(layer=layer), 0.5).backward(packed(tokens()))
    assert all(s.any() for s in sums.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_of_pytorch_itself(frozen):
    """A frozen layer runs PyTorch's own forward, whose mask is looked at as a whole."""
    model = Block()
    model.layer.self_attn.requires_grad_(not frozen)
    private = Segmented(model, 0.5)
    sums = private.backward(packed(tokens()))
    assert sums["model.model.ids.weight"].any()


def test_a_mean_in_16_bits():
    """Of samples, as of rows."""
    private = Segmented(decoder("gpt2", dtype=torch.bfloat16), 1.0, loss_reduction="mean")
    with pytest.raises(ValueError, match="bfloat16"):
        private.backward(packed(tokens()))


class Ordering(nn.Module):
    """A layer is given the positions of a row in an order that their values say, and so far that is their own."""

    def __init__(self, how, d=8):
        super().__init__()
        self.ids, self.mix, self.head = nn.Embedding(V, d), nn.Linear(d, d), nn.Linear(d, V)
        self.how = how

    def forward(self, input_ids, position_ids=None):
        x, high = self.ids(input_ids), (input_ids[0] >= 25).long()
        back = torch.where(high == 1, (1 - high).sum() + high.cumsum(0), (1 - high).cumsum(0)) - 1
        if self.how == "sort":
            back = high.argsort(stable=True).argsort()
        if self.how == "experts":  # the first one sees all that is low, the second one all that is high
            rows = [torch.where(high == k)[0] for k in (0, 1)]
            y = torch.cat([self.mix(x[0, its]) for its in rows if len(its)])[back][None]
        elif self.how == "gather":
            order = torch.empty_like(back).index_copy(0, back, torch.arange(len(back)))
            y = self.mix(x.gather(1, order[None, :, None].expand_as(x)))[:, back]
        elif self.how == "scatter":
            y = self.mix(torch.zeros_like(x).scatter(1, back[None, :, None].expand_as(x), x))[:, back]
        elif self.how == "flat":
            y = self.mix(torch.zeros_like(x[0]).index_copy(0, back, x[0])).index_select(0, back)[None]
        else:
            moved = torch.zeros_like(x)
            moved[:, back] = x
            y = self.mix(moved)[:, back]
        return self.head(y)


@pytest.mark.parametrize("how", ["sort", "experts", "gather", "scatter", "flat", "put"])
def test_an_order_that_another_batch_may_change(how):
    """Gradients would be taken for those of other samples there, and no trial of this batch shows it."""
    refuse(Ordering(how), "orders or picks positions", packed([s.clamp(max=20) for s in tokens()]))


def test_what_is_compiled_within_runs_as_it_is_written():
    model, samples = Block().double(), tokens()
    plain = Segmented(model, 0.5).backward(packed(samples))
    private = Segmented(model, 0.5)
    private.model.layer.compile(backend="eager")
    assert distance(plain, private.backward(packed(samples))) < 1e-9


def test_evaluation_takes_rows_of_any_kind():
    """No sample is clipped there, and nothing has to say where samples begin."""
    model = decoder("gpt2")
    private = Segmented(model, 0.5)
    private.backward(packed(tokens()))
    ids = torch.stack(tokens([4, 4]))
    with torch.no_grad():
        want = model.eval()(ids).logits
        private.wrapped.eval()
        assert torch.equal(private.wrapped(ids).logits, want)


def test_hooks_of_others_on_the_model():
    """What runs before its forward, as a hook of accelerate's does."""
    model = Block().double()
    model.register_forward_pre_hook(lambda module, args: None)
    private = Segmented(model, 0.5)
    hook = private.model.layer.register_forward_pre_hook(lambda module, args: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        private.backward(packed(tokens()))
    hook.remove()
    sums = private.backward(packed(tokens()))
    assert distance(sums, Segmented(model, 0.5).backward(packed(tokens()))) < 1e-9
