"""A group that is whole is summed in the middle of a backward pass: the same sums, and its memory is free below."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import dpfast
from dpfast.clipping import early
from dpfast.clipping.functions import PSAC, Abadi, AutoS, AutoV, Global
from tests.helpers import F64, assert_sensitivity, make_private, run_fused, sums_of
from tests.privacy.heads import KEEPS, LM, B, added, batch, judge
from tests.privacy.judging import TIGHT

GROUPS = {"embedding": 0.02, "body": 0.03, "head": 0.05}
OF = dict(loss_reduction="sum", clipping="per_layer")
C = sum(c**2 for c in GROUPS.values()) ** 0.5


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    monkeypatch.setattr(early, "LEAST", 0)


def without(monkeypatch, *args, **kw):
    """The same run, clipped at the end of the pass."""
    with monkeypatch.context() as patch:
        patch.setattr(early, "LEAST", 1 << 60)
        return run_fused(*args, **kw)


@pytest.fixture
def summed(monkeypatch):
    """Names of the parameters that were summed early."""
    found, plain = [], early.summed_up

    def summed_up(recorded, setting, padding):
        found.extend(setting.names[p] for p in recorded)
        return plain(recorded, setting, padding)

    monkeypatch.setattr("dpfast.clipping.clipped_sum.summed_up", summed_up)
    return found


@pytest.mark.parametrize("keep", KEEPS)
def test_exact_and_within_c(keep, summed):
    model = LM(keep).double()
    groups = {name: name.partition(".")[0] for name, _ in model.named_parameters()}
    judge(model, batch(), GROUPS, groups, clipping="per_layer")
    assert summed == ["head.weight", "head.bias", "body.weight", "body.bias", "embedding.weight"]
    assert_sensitivity(model, (batch(), None), added, GROUPS, C, **OF)


def test_a_norm_for_each_parameter(summed, monkeypatch):
    model, inputs = LM().double(), batch()
    found = run_fused(model, (inputs, None), added, TIGHT, **OF)
    assert len(summed) == 5
    want = without(monkeypatch, model, (inputs, None), added, TIGHT, **OF)
    torch.testing.assert_close(found.sums, want.sums, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("function", [Abadi(), AutoS(), AutoV(), PSAC(), Global(), Global(3.0)], ids=repr)
def test_as_at_the_end_of_the_pass(function, monkeypatch, summed):
    """A global threshold is shared out among all groups."""
    model, inputs = LM().double(), batch()
    kw = OF | dict(clipping_fn=function)
    found = run_fused(model, (inputs, None), added, GROUPS, **kw)
    assert "head.weight" in summed
    want = without(monkeypatch, model, (inputs, None), added, GROUPS, **kw)
    torch.testing.assert_close(found.sums, want.sums, rtol=1e-12, atol=1e-15)
    assert torch.equal(found.norms, want.norms)


@pytest.mark.parametrize("grouped", [True, False])
def test_backprops_of_the_head_are_free_below_it(grouped, monkeypatch):
    """When the layer below runs its backward, nobody has G of the head any more; under flat clipping it is kept."""
    model = LM(True).double()
    seen, alive = [], []
    norm = GROUPS if grouped else 1.0
    clipping = "per_layer" if grouped else "flat"
    kw = dict(loss_reduction="sum", clipping=clipping, plan={"": "ghost"})
    wrapped, _, _ = make_private(model, max_grad_norm=norm, **kw)
    losses = wrapped(*batch())
    recorder = wrapped.clipped_sum
    plain = type(recorder).record_call

    def record_call(call, forms):
        if call.tap.name == "head":
            seen.extend(StorageWeakRef(form.G.untyped_storage()) for p, form in forms if p is model.head.weight)
        else:
            alive.append(not seen[0].expired())
        plain(recorder, call, forms)

    recorder.record_call = record_call
    losses.sum().backward()
    assert alive == [not grouped] * 2


class Twice(LM):
    def forward(self, ids, labels):
        hidden = self.hidden(ids)
        return self.losses(hidden, labels) + self.losses(hidden.flip(1), labels)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_head_that_is_used_twice_waits(keep, summed):
    model = Twice(keep).double()
    groups = {name: name.partition(".")[0] for name, _ in model.named_parameters()}
    judge(model, batch(), GROUPS, groups, clipping="per_layer")
    assert not any(name.startswith("head") for name in summed)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_tied_head_waits(keep, summed):
    model = LM(keep, True, tied=True).double()
    groups = {name: name.partition(".")[0] for name, _ in model.named_parameters()}
    judge(model, batch(), GROUPS, groups, clipping="per_layer")
    assert "embedding.weight" not in summed


def test_two_forwards_of_one_backward_wait(summed):
    model, inputs = LM().double(), batch()
    want = run_fused(model, (inputs, None), lambda out, _: 3 * out.sum(), GROUPS, **OF).sums
    summed.clear()
    wrapped, _, _ = make_private(model, max_grad_norm=GROUPS, **OF)
    (wrapped(*inputs).sum() + 2 * wrapped(*inputs).sum()).backward()
    assert not summed
    torch.testing.assert_close(sums_of(model), want)


def test_a_use_that_nobody_could_foresee_is_refused_once(summed):
    """Of a sum that is made; the next pass clips at its end."""
    model, inputs = LM().double(), batch()
    want = run_fused(model, (inputs, None), added, GROUPS, **OF).sums
    wrapped, optimizer, _ = make_private(model, max_grad_norm=GROUPS, **OF)
    recorder = wrapped.clipped_sum
    wrapped(*inputs).sum().backward()
    optimizer.zero_grad()
    losses = wrapped(*inputs)
    plain = recorder.record_call

    def twice(call, forms):
        plain(call, forms)
        if call.tap.name == "head":
            plain(call, forms)

    recorder.record_call = twice
    with pytest.raises(ValueError, match=r"'head.weight' was used once more.*run the forward and the backward of this"):
        losses.sum().backward()
    assert not any(summed.any() for summed in sums_of(model).values())
    del recorder.record_call
    for _ in range(2):
        optimizer.zero_grad()
        summed.clear()
        wrapped(*inputs).sum().backward()
        torch.testing.assert_close(sums_of(model), want)
    assert summed == ["body.weight", "body.bias", "embedding.weight"]


def test_a_threshold_that_changes_within_a_pass_is_refused():
    model = LM().double()
    wrapped, _, _ = make_private(model, max_grad_norm=GROUPS, **OF)
    losses = wrapped(*batch())
    plain = wrapped.clipped_sum.record_call

    def lowered(call, forms):
        plain(call, forms)
        wrapped.clipped_sum.clipping.sensitivity = 0.01

    wrapped.clipped_sum.record_call = lowered
    with pytest.raises(ValueError, match="max_grad_norm was changed within a backward pass"):
        losses.sum().backward()
    assert not any(summed.any() for summed in sums_of(model).values())


def test_a_sample_that_is_not_a_number_is_in_no_sum():
    model, (ids, labels) = LM().double(), batch()
    with torch.no_grad():
        model.embedding.weight[-1] = float("nan")
    ids[0, 0] = len(model.embedding.weight) - 1
    with pytest.warns(RuntimeWarning, match="contributes exact zeros"):
        found = run_fused(model, ((ids, labels), None), added, GROUPS, **OF)
    rest = run_fused(model, ((ids[1:], labels[1:]), None), added, GROUPS, **OF)
    torch.testing.assert_close(found.sums, rest.sums)
    assert len(found.norms) == B and found.norms.dtype == F64


@pytest.mark.parametrize("keep", KEEPS)
def test_a_recorded_step_clips_at_its_end(keep, summed):
    """Its thresholds are those of each call."""
    model, inputs = LM(keep).double(), batch()
    halved = {name: norm / 2 for name, norm in GROUPS.items()}
    want = run_fused(model, (inputs, None), added, halved, **OF).sums
    wrapped, optimizer, _ = make_private(model, max_grad_norm=GROUPS, **OF)
    step = dpfast.graphed(wrapped, lambda model, *inputs: model(*inputs).sum())
    for scale in (1, 1, 0.5):
        optimizer.zero_grad()
        summed.clear()
        wrapped.clipped_sum.clipping.sensitivity = scale * C
        step(*(x.clone() for x in inputs))
    assert step.replays and not summed
    torch.testing.assert_close(sums_of(model), want)
