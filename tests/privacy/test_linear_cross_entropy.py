"""``linear_cross_entropy`` in private models: exact and within C, with stored logits and without."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpfast
from dpfast import head_losses
from dpfast.capture.forms import Factored, Instantiated
from dpfast.capture.recomputed import Recomputed
from dpfast.layers.head import can_recompute
from dpfast.losses import linear_cross_entropy
from dpfast.planning import logits, planner
from dpfast.refusals import LayoutError
from tests.helpers import BF16, F16, F32, F64, assert_sensitivity, make_private, run_fused, sums_of
from tests.privacy.heads import KEEPS, LM, B, D, T, V, added, batch, judge, small_chunks
from tests.privacy.judging import TIGHT, Private, refuse


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    small_chunks(monkeypatch)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("bias, tied", [(True, False), (False, True), (True, True)])
def test_exact(keep, dtype, bias, tied):
    model = LM(keep, bias, tied).to(dtype)
    run = judge(model, batch())
    assert run.norms[2] == 0
    if dtype == F64:
        judge(model, batch(), TIGHT)
    for size in (1, 0):
        judge(model, batch(size))
    assert run.wrapped.separation.proved and not run.wrapped.runs_by_sample


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_sample_moves_the_sum_by_no_more_than_c(keep, tied):
    assert_sensitivity(LM(keep, True, tied).double(), (batch(), None), added, TIGHT, loss_reduction="sum")


class Twice(LM):
    """Two losses of one head; ``other`` is how the second one is made."""

    def __init__(self, keep, other, tied):
        super().__init__(keep, True, tied)
        self.other = other

    def forward(self, ids, labels):
        hidden = self.hidden(ids)
        first = self.losses(hidden, labels)
        first_keep, self.keep = self.keep, self.other
        try:
            return first + self.losses(hidden.flip(1), labels)
        finally:
            self.keep = first_keep


@pytest.mark.parametrize("keeps", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_used_twice(keeps, tied):
    model = Twice(*keeps, tied).double()
    judge(model, batch())
    judge(model, batch(), TIGHT)


class Frozen(LM):
    def __init__(self, keep):
        super().__init__(keep)
        self.head.requires_grad_(False)


class HeadAlone(LM):
    def __init__(self, keep):
        super().__init__(keep)
        self.embedding.requires_grad_(False)
        self.body.requires_grad_(False)


class FrozenWeight(LM):
    def __init__(self, keep):
        super().__init__(keep)
        self.head.weight.requires_grad_(False)


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(D, V), nn.Linear(D, 2, bias=False), nn.Linear(2, V, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + 2 * self.up(self.down(x))


class WithLoRA(LM):
    """And what follows the head keeps its output: nobody may write over that."""

    def __init__(self, keep):
        super().__init__(keep)
        self.head = nn.Sequential(Adapted(), nn.Tanh())


class Checkpointed(LM):
    reentrant = False

    def forward(self, ids, labels):
        hidden = self.hidden(ids)
        return checkpoint(self.losses, hidden, labels, use_reentrant=self.reentrant)


class CheckpointedAgain(Checkpointed):
    reentrant = True


class Turned(LM):
    """The head gets the positions first: it is run with the samples along another dimension, or sample by sample."""

    def forward(self, ids, labels):
        hidden = self.hidden(ids).transpose(0, 1)
        if self.plain:
            hidden = hidden.transpose(0, 1)
            return self.losses(hidden, labels)
        hidden = hidden.contiguous().transpose(0, 1)
        return self.losses(hidden, labels)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(
    "kind",
    [Frozen, HeadAlone, FrozenWeight, WithLoRA, Checkpointed, CheckpointedAgain, Turned],
    ids=lambda k: k.__name__,
)
def test_models_of_other_kinds(keep, kind):
    model = kind(keep).double()
    judge(model, batch())
    assert_sensitivity(model, (batch(), None), added, TIGHT, loss_reduction="sum")


class BySample(LM):
    """One row more than there are positions: only vmap can tell whose they are."""

    def forward(self, ids, labels):
        rows = self.embedding(ids).reshape(-1, D)
        hidden = self.body(torch.cat([rows, torch.ones_like(rows[:1])]))[:-1]
        return self.losses(hidden.tanh().view(*ids.shape, D), labels)


@pytest.mark.parametrize("keep", KEEPS)
def test_sample_by_sample(keep):
    assert judge(BySample(keep).double(), batch()).wrapped.runs_by_sample


class Mixed(LM):
    def forward(self, ids, labels):
        hidden = self.hidden(ids)
        return self.losses(hidden - hidden.mean(0), labels)


class LabelsOfOthers(LM):
    def forward(self, ids, labels):
        return self.losses(self.hidden(ids), labels.roll(1, 0))


class ScaledByOthers(LM):
    """What a loss is multiplied by is in the backprops alone."""

    def forward(self, ids, labels):
        losses = self.losses(self.hidden(ids), labels)
        return losses * losses.detach().mean()


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", [Mixed, LabelsOfOthers, ScaledByOthers])
@pytest.mark.parametrize("trained", [True, False])
def test_samples_that_meet_are_refused(keep, kind, trained):
    """Also where the head alone is trained, and no other layer can tell of it."""
    model = kind(keep)
    if not trained:
        model.embedding.requires_grad_(False)
        model.body.requires_grad_(False)
    refuse(model.double(), batch(), None, added, "mixes samples", loss_reduction="sum")


@pytest.mark.parametrize("keep", KEEPS)
def test_not_a_number_stays_with_its_sample(keep):
    model, (ids, labels) = LM(keep).double(), batch()
    with torch.no_grad():
        model.embedding.weight[V - 1] = math.nan
    ids[0, 0] = V - 1
    with pytest.warns(RuntimeWarning, match="contributes exact zeros"):
        run = run_fused(model, ((ids, labels), None), added, 1.0, loss_reduction="sum")
    rest = run_fused(model, ((ids[1:], labels[1:]), None), added, 1.0, loss_reduction="sum")
    for name, summed in run.sums.items():
        torch.testing.assert_close(summed, rest.sums[name])


def test_not_a_number_where_nothing_counts():
    """Logits that are infinite at an ignored position: its weight is 0, and so is its gradient."""
    logits = torch.full((1, 1, V), math.inf, requires_grad=True)
    losses = head_losses._Stored.apply(logits, torch.tensor([[-1]]), False)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.item() == 0 and not gradient.any()


@pytest.mark.parametrize("keep", KEEPS)
def test_backwards_add_up(keep):
    """Two physical batches before a step."""
    model, (ids, labels) = LM(keep).double(), batch()
    whole = run_fused(model, ((ids, labels), None), added, TIGHT, loss_reduction="sum").sums
    wrapped, _, _ = make_private(model, max_grad_norm=TIGHT, loss_reduction="sum", size=B)
    for part in (slice(0, 2), slice(2, B)):
        wrapped(ids[part], labels[part]).sum().backward()
    for name, summed in sums_of(model).items():
        torch.testing.assert_close(summed, whole[name])


@pytest.mark.parametrize("keep", KEEPS)
def test_autocast(keep):
    inputs, model = batch(), LM(keep)
    exact = run_fused(model, (inputs, None), added, TIGHT, loss_reduction="sum").sums
    with torch.autocast("cpu", BF16):
        found = run_fused(model, (inputs, None), added, TIGHT, loss_reduction="sum").sums
    for name, summed in found.items():
        assert summed.dtype == F32
        assert (summed - exact[name]).norm() <= 0.03 * exact[name].norm()


def steps(step, twin, optimizer, inputs, count):
    for _ in range(count):
        optimizer.zero_grad()
        step(*(x.clone() for x in inputs))
    return sums_of(twin)


@pytest.mark.parametrize("keep", KEEPS)
def test_recorded(keep):
    model, inputs = LM(keep).double(), batch()
    want = run_fused(model, (inputs, None), added, TIGHT, loss_reduction="sum").sums
    wrapped, optimizer, _ = make_private(model, max_grad_norm=TIGHT, loss_reduction="sum", size=B)
    step = dpfast.graphed(wrapped, lambda model, *inputs: model(*inputs).sum())
    torch.testing.assert_close(steps(step, model, optimizer, inputs, 3), want)
    assert step.replays


def test_compiled():
    model, inputs = LM(False).double(), batch()
    want = run_fused(model, (inputs, None), added, TIGHT, loss_reduction="sum").sums
    wrapped, optimizer, _ = make_private(model, max_grad_norm=TIGHT, loss_reduction="sum", size=B)
    called = torch.compile(wrapped, backend="eager")
    torch.testing.assert_close(
        steps(lambda *inputs: called(*inputs).sum().backward(), model, optimizer, inputs, 3), want
    )


@pytest.mark.parametrize("keep", KEEPS)
def test_a_head_outside_of_the_models_forward_is_refused(keep):
    model, (ids, labels) = LM(keep), batch()
    wrapped, _, _ = make_private(model, loss_reduction="sum")
    wrapped(ids, labels)
    with pytest.raises(LayoutError, match="outside of the private model's forward"):
        linear_cross_entropy(torch.randn(B, T, D), model.head, labels, keep_logits=keep)


class Penalised(LM):
    def forward(self, ids, labels):
        hidden = self.hidden(ids)
        losses = self.losses(hidden, labels)
        (slope,) = torch.autograd.grad(losses.sum(), hidden, create_graph=True)
        return losses + slope.square().sum((1, 2))


def test_a_gradient_of_the_gradient():
    """Exact with stored logits; without, it is refused, with the way out."""
    judge(Penalised(True).double(), batch())
    with pytest.raises(LayoutError, match="keep the logits"):
        run_fused(Penalised(False).double(), (batch(), None), added, 1.0, loss_reduction="sum")


def test_free_memory_decides_and_the_choice_stays(monkeypatch):
    """Heads and looks at the samples do the same in every pass, and a run that goes on elsewhere does, too."""
    monkeypatch.setattr(logits, "SMALL", 0)
    forms, free = [], [0]
    monkeypatch.setattr(logits, "free_memory", lambda device: free[0])
    model = LM().double()
    private = Private(model, TIGHT, loss_reduction="sum")
    hooks = private.wrapped
    plain = hooks.clipped_sum.record_call

    def record(call, recorded):
        forms.extend(form for p, form in recorded if p is private.model.head.weight)
        plain(call, recorded)

    monkeypatch.setattr(hooks.clipped_sum, "record_call", record)
    stored = {Factored, Instantiated}
    for free[0], size, kinds in ((0, B, {Recomputed}), (1 << 40, B, {Recomputed}), (1 << 40, B - 1, stored)):
        forms.clear()
        ids, labels = batch(size)
        private.backward((ids, labels), None, added)
        assert forms and {type(form) for form in forms} <= kinds
    state = hooks.clipped_sum.planner.state_dict()
    planner.check_state(state)
    other = planner.Planner()
    other.load_state_dict(state)
    free[0] = 0
    assert other._logits == hooks.clipped_sum.planner._logits
    assert not other.stores_logits("head", B * T * V * 8, torch.device("cpu"))
    assert other.stores_logits("head", (B - 1) * T * V * 8, torch.device("cpu"))
    with pytest.raises(ValueError, match="no choice for logits"):
        planner.check_state({"plans": [], "logits": [("head", 1.5, True)]})


def test_explain_shows_the_head():
    inputs = batch()
    table = dpfast.explain(LM(False), {"ids": inputs[0], "labels": inputs[1]})
    assert any("head.weight" in line and "recompute" in line for line in table.splitlines())


def test_per_sample_gradients_can_be_had():
    run = run_fused(LM(False).double(), (batch(), None), added, 1e9, loss_reduction="sum", keep_grad_samples=True)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad_sample.sum(0), run.sums[name])


def test_rows_that_are_not_the_samples_keep_their_logits():
    model = LM(False)
    wrapped, _, _ = make_private(model, loss_reduction="sum")
    wrapped(*batch())
    tap = vars(model.head)["forward"].tap
    assert can_recompute(tap, torch.zeros(B, T, D))
    assert not can_recompute(tap, torch.zeros(2 * B, T, D))
    with wrapped.clipped_sum.setting(follows_rows=True):
        assert not can_recompute(tap, torch.zeros(B, T, D))
