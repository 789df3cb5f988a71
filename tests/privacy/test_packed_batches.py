"""Batches of packed rows: samples are drawn, counted and split, and packed after that."""

import pytest
import torch
from torch.utils.data import DataLoader

import dpfast
from dpfast.data.packed import Packed
from dpfast.losses import causal_lm_loss, segment_cross_entropy
from tests.helpers import distance, engine_of, make_private, sums_of
from tests.privacy.packed import Segmented, packed, tokens
from tests.privacy.test_packed import Block, decoder

LENGTHS = [3, 5, 1, 4, 2, 6, 3, 2]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def private(samples, collate=None, lr=0.0, model=None, **kw):
    model = Block().double() if model is None else model
    engine = engine_of()
    loader = DataLoader(samples, batch_size=4, collate_fn=collate or Packed(max_length=8))
    options = dict(units="packed", poisson_sampling=True, data_loader=loader, loss_reduction="sum", engine=engine)
    return model, engine, *make_private(model, lr=lr, max_grad_norm=0.5, **(options | kw))


def backward(wrapped, batch):
    logits = wrapped(batch["input_ids"], position_ids=batch["position_ids"])
    segment_cross_entropy(logits, batch["input_ids"], position_ids=batch["position_ids"]).backward()


def test_poisson_sampling_draws_and_counts_samples():
    """Empty batches among them."""
    _, engine, wrapped, optimizer, loader = private(
        tokens(LENGTHS), lr=0.1, sample_rate=0.15, expected_batch_size=1, noise_multiplier=1.0
    )
    sizes = []
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            backward(wrapped, batch)
            optimizer.step()
            sizes.append(int((batch["position_ids"] == 0).sum()))
            assert len(wrapped.per_sample_gradient_norms) == sizes[-1]
    assert 0 in sizes and len({*sizes}) > 2
    assert engine.accountant.history == [(1.0, 0.15, len(sizes))]


def test_physical_batches_never_split_a_sample():
    samples = tokens(LENGTHS)
    model, _, wrapped, optimizer, loader = private(samples, sample_rate=1.0, expected_batch_size=8)
    parts = []
    with dpfast.BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as physical:
        for batch in physical:
            parts.append(int((batch["position_ids"] == 0).sum()))
            backward(wrapped, batch)
            if len(parts) == 3:
                sums = {f"model.model.{name}": s for name, s in sums_of(model).items()}
            optimizer.step()
    assert parts[:3] == [3, 3, 2]
    wrapped.cleanup()
    assert distance(sums, Segmented(model, 0.5).backward(packed(samples))) < 1e-9


def test_rows_that_were_packed_before_they_were_drawn():
    """Their samples come and go together, for which the accountant has no word."""
    rows = [torch.cat(tokens([3, 4], seed)) for seed in range(6)]

    def collate(batch):
        ids = torch.stack(batch) if batch else torch.zeros(0, 7, dtype=torch.int64)
        return {"input_ids": ids, "position_ids": torch.tensor([0, 1, 2, 0, 1, 2, 3]).expand_as(ids).clone()}

    model, _, wrapped, _, loader = private(rows, collate, sample_rate=1.0, expected_batch_size=6)
    with pytest.raises(ValueError, match="6 samples, and the packed rows have 12 segments"):
        backward(wrapped, next(iter(loader)))
    assert not any(s.any() for s in sums_of(model).values())


def test_batches_from_elsewhere():
    _, _, wrapped, _, _ = private(tokens(LENGTHS))
    with pytest.raises(ValueError, match="which samples of the loader"):
        backward(wrapped, Packed(8)(tokens([3, 2])))


def test_one_backward_of_two_rows_of_batches():
    _, _, wrapped, _, _ = private(tokens(LENGTHS), poisson_sampling=False)
    one, other = (Packed(8)(tokens(lengths)) for lengths in ([3, 2], [2, 3]))
    losses = [
        segment_cross_entropy(
            wrapped(**{k: b[k] for k in ("input_ids", "position_ids")}), b["input_ids"], position_ids=b["position_ids"]
        )
        for b in (one, other)
    ]
    with pytest.raises(ValueError, match="packed in other ways"):
        sum(losses).backward()


def test_one_backward_of_two_batches_that_are_packed_alike():
    """Segment k of both would be clipped as one."""
    model, _, wrapped, _, loader = private(tokens([3, 2, 3, 2, 3, 2, 3, 2]), poisson_sampling=False)
    batches = list(loader)
    with pytest.raises(ValueError, match="two forwards, and nothing shows"):
        sum(segment_losses(wrapped, batch).sum() for batch in batches).backward()
    assert not any(s.any() for s in sums_of(model).values())


def segment_losses(wrapped, batch):
    logits = wrapped(batch["input_ids"], position_ids=batch["position_ids"])
    return segment_cross_entropy(logits, batch["input_ids"], position_ids=batch["position_ids"])


def test_two_backwards_of_one_batch():
    _, _, wrapped, _, loader = private(tokens(LENGTHS), poisson_sampling=False)
    batch = next(iter(loader))
    backward(wrapped, batch)
    with pytest.raises(ValueError, match="second backward pass over samples"):
        backward(wrapped, {name: x.clone() for name, x in batch.items()})


def test_a_loop_that_reads_ahead_and_copies():
    """As one does that prefetches to a device: which of two batches a forward has got is told by values."""
    _, _, wrapped, optimizer, loader = private(tokens(LENGTHS), poisson_sampling=False, lr=0.1)
    ahead, before = iter(loader), None
    for batch in [*ahead, None]:
        batch, before = before, batch
        if batch is not None:
            backward(wrapped, {name: x.clone() for name, x in batch.items()})
            assert len(wrapped.per_sample_gradient_norms) == 4
            optimizer.step()
            optimizer.zero_grad()


def test_the_collator_of_transformers():
    """Empty batches among those that it makes, with lengths for flash attention beside positions."""
    collator = pytest.importorskip("transformers").DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    samples = [{"input_ids": sample.tolist()} for sample in tokens(LENGTHS)]
    options = dict(sample_rate=0.15, expected_batch_size=1, model=decoder("gpt2"))
    _, _, wrapped, optimizer, loader = private(samples, collator, **options)
    sizes = []
    for _ in range(2):
        for batch in loader:
            labels = batch.pop("labels")
            marks = {"cu_seqlens": batch["cu_seq_lens_q"], "position_ids": batch["position_ids"]}
            segment_cross_entropy(wrapped(**batch).logits, labels, **marks).backward()
            optimizer.step()
            optimizer.zero_grad()
            sizes.append(len(wrapped.per_sample_gradient_norms))
    assert 0 in sizes and len({*sizes}) > 1


def mean_loss(model, batch):
    logits = model(batch["input_ids"], position_ids=batch["position_ids"])
    return segment_cross_entropy(logits, batch["input_ids"], position_ids=batch["position_ids"], reduction="mean")


def over_tokens(model, batch):
    """A mean over all tokens of the batch."""
    logits = model(batch["input_ids"], position_ids=batch["position_ids"])
    return torch.nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])


@pytest.mark.parametrize("collate_fn", [None, Packed(8)])
def test_leaving_samples_out(collate_fn):
    samples = tokens([3, 5, 1, 4])
    batch = samples if collate_fn else packed(samples)
    options = dict(max_grad_norm=0.1, units="packed", collate_fn=collate_fn)
    report = dpfast.check_sensitivity(Block(), mean_loss, batch, **options)
    assert report.ok and report.left_out == 4 and 0 < report.largest_move <= 0.1 * (1 + 1e-4), report
    assert not dpfast.check_sensitivity(Block(), over_tokens, batch, **options).ok


def test_leaving_samples_out_of_a_model_that_mixes_them():
    class Scan(Block):
        def forward(self, input_ids, position_ids=None):
            return self.head(self.ids(input_ids).cumsum(1))

    report = dpfast.check_sensitivity(Scan(), mean_loss, packed(tokens([3, 5])), max_grad_norm=0.1, units="packed")
    assert not report.ok and "not kept apart" in report.cause
    with pytest.raises(ValueError, match="collate_fn="):
        dpfast.check_sensitivity(Scan(), mean_loss, tokens([3, 5]), max_grad_norm=0.1, units="packed")


def test_packing():
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": torch.tensor([8])}]
    batch = Packed(max_length=2)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 8]] and batch["labels"].tolist() == [[-100, 6, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0]]
    assert Packed(2)([])["input_ids"].shape == (1, 0)


@pytest.mark.parametrize("length", [0, 1.5, True, None])
def test_lengths_that_are_none(length):
    with pytest.raises(ValueError, match="max_length"):
        Packed(length)


@pytest.mark.parametrize("sample", [{"input_ids": []}, {"input_ids": [1, 2], "labels": [1]}, {"input_ids": [[1]]}])
def test_samples_that_cannot_be_packed(sample):
    with pytest.raises(ValueError, match="sample 0 of the batch"):
        Packed(4)([sample])


def test_the_loss():
    """Of each segment as of a row of its own; the first token of one is not predicted from the one before."""
    samples = tokens([4, 1, 3])
    logits = torch.randn(1, 8, 50, dtype=torch.float64, requires_grad=True)
    batch = packed(samples)
    labels = batch["input_ids"].clone()
    labels[0, 1] = -100
    found = segment_cross_entropy(logits, labels, position_ids=batch["position_ids"], reduction="none")
    alone = [causal_lm_loss(logits[:, a:b], labels[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 8))]
    torch.testing.assert_close(found, torch.stack(alone))
    mean = segment_cross_entropy(logits, labels, cu_seqlens=torch.tensor([0, 4, 5, 8]), reduction="mean")
    torch.testing.assert_close(mean, found.mean())
    (gradient,) = torch.autograd.grad(found[0], logits)
    assert not gradient[0, 3:].any()
    with pytest.raises(ValueError, match="position_ids="):
        segment_cross_entropy(logits, labels)
