"""Case 5: a ghost norm that cancels. The contribution stays within C whatever the rounding does."""

import pytest
import torch
from torch import Tensor, nn

import dpfast
from dpfast.planning import planner
from dpfast.planning.unmeasured import CPU
from tests.helpers import F32, F64, SLACK, run_fused
from tests.oracle import Verdict

C = 0.05


def weighted(output: Tensor, target: Tensor) -> Tensor:
    """The backprops are ``target``."""
    return (output * target).sum()


def cancelling(B: int, d: int, p: int, T: int = 512, true_norm: float = 0.193) -> tuple[Tensor, Tensor]:
    """Backprops that alternate against activations that hardly change, up to a scale that they share.

    What is left of T products has a norm of ``true_norm``: less than the rounding of a ghost norm's T² terms.
    """
    u, v = torch.randn(B, 1, d, dtype=F64), torch.randn(B, 1, p, dtype=F64)
    scale = torch.rand(B, T, 1, dtype=F64) + 0.5
    a = ((u + 2e-5 * torch.randn(B, T, d, dtype=F64)) / scale).to(F32)
    g = v * torch.tensor([1.0, -1.0], dtype=F64).repeat(T // 2)[None, :, None] * scale
    left = torch.einsum("btp,btd->bpd", g, a.double()).flatten(1).norm(dim=1)
    return a, (g * (true_norm / left)[:, None, None]).to(F32)


def float32_ghost(a: Tensor, g: Tensor) -> Tensor:
    return ((a @ a.transpose(1, 2)) * (g @ g.transpose(1, 2))).sum((1, 2)).clamp(min=0).sqrt()


def assert_within(model: nn.Module, inputs: tuple, target: Tensor, bound: float = C) -> None:
    """Each sample alone: its exact gradient times the factor that was used, and the sum as it was released.

    The released sum may differ from the exact one by twice what PyTorch itself errs at this dtype.
    """
    for i in range(len(target)):
        one = (tuple(t[i : i + 1] for t in inputs), target[i : i + 1])
        verdict = Verdict(model, *one, weighted, bound)
        rounding = sum(t**2 for t in verdict.sum_tolerances().values()) ** 0.5
        sums = run_fused(model, one, weighted, bound, loss_reduction="sum").sums
        exact = {n: g[0] for n, g in verdict.grads.items()}
        norm = verdict.norms.item()
        along = sum((sums[n].double() * g).sum().item() for n, g in exact.items()) / norm if norm else 0.0
        assert along <= bound * SLACK + rounding, f"sample {i}: {along / bound} C along its gradient"
        total = sum(s.double().square().sum().item() for s in sums.values()) ** 0.5
        assert total <= bound * SLACK + rounding, f"sample {i}: {total / bound} C"


@pytest.mark.parametrize(("T", "d", "p"), [(512, 4, 4), (512, 64, 48), (512, 700, 650)])
def test_linear(T, d, p):
    a, g = cancelling(6, d, p, T)
    naive = float32_ghost(a, g)
    assert (naive < 0.193 / 2).any(), f"these inputs would not fool a plain ghost norm: {naive.tolist()}"
    assert_within(nn.Linear(d, p, bias=False), (a,), g)


@pytest.mark.parametrize("T", [16, 64])
def test_where_the_plan_takes_the_ghost_norm(monkeypatch, T):
    """Few positions and a wide layer: nothing else is as cheap, so it is the ghost norm that must not cancel.

    By rates that are the same on every machine, whatever it does beside.
    """
    monkeypatch.setattr(planner, "rates_of", lambda *_: CPU)
    model = nn.Linear(1000, 900, bias=False)
    a, g = cancelling(6, 1000, 900, T)
    naive = float32_ghost(a, g)
    assert (naive < 0.193 / 2).any(), f"these inputs would not fool a plain ghost norm: {naive.tolist()}"
    assert "ghost" in dpfast.explain(model, a)
    assert_within(model, (a,), g)
    sums = run_fused(model, ((a,), g), weighted, C, loss_reduction="sum").sums["weight"].double().flatten()
    each = torch.einsum("btp,btd->bpd", g.double(), a.double()).flatten(1)
    factors = torch.linalg.lstsq(each.T, sums).solution  # nearly orthogonal: read each factor off the sum
    rounding = Verdict(model, (a,), g, weighted, C).sum_tolerances()["weight"]
    assert (factors * each.norm(dim=1) <= C * SLACK + rounding).all(), (factors * each.norm(dim=1) / C).tolist()


def test_a_batch_of_them():
    """Together, as the plan for a larger batch may choose another way; each may move the sum by C."""
    a, g = cancelling(8, 64, 48)
    model = nn.Linear(64, 48, bias=False)
    sums = run_fused(model, ((a,), g), weighted, C, loss_reduction="sum").sums
    exact = Verdict(model, (a,), g, weighted, C)
    each = exact.grads["weight"].flatten(1)
    rounding = exact.sum_tolerances()["weight"]
    # the eight gradients are nearly orthogonal: read each sample's factor off the sum
    factors = torch.linalg.lstsq(each.T, sums["weight"].double().flatten()).solution
    assert (factors * exact.norms <= C * SLACK + rounding).all(), (factors * exact.norms / C).tolist()
    assert (factors > 0).all(), "a sample that is clipped is not dropped"


class Difference(nn.Module):
    """Two uses of one weight, almost each other's opposite: the cross-term cancels the two squares."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 12, bias=False)

    def forward(self, a, b):
        return self.lin(a) - self.lin(b)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 0.0])
def test_uses_that_cancel(gap):
    a = 100 * torch.randn(4, 64, 16)
    b = a + gap * torch.randn(4, 64, 16)
    assert_within(Difference(), (a, b), torch.randn(4, 64, 12))


class TiedDifference(nn.Module):
    """An embedding and a head of one table, pulling it in opposite directions."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(12, 12), nn.Linear(12, 12, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids, x):
        return self.emb(ids) - self.head(x)


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_embedding_and_head_that_cancel(gap):
    """emb gives Σ e_id gᵀ, the head Σ g xᵀ: with x nearly one-hot the two nearly cancel."""
    ids = torch.randint(12, (4, 200))
    onehot = torch.nn.functional.one_hot(ids, 12).float()
    x = onehot + gap * torch.randn(4, 200, 12)
    assert_within(TiedDifference(), (ids, x), 30 * onehot)


@pytest.mark.parametrize("d", [3, 40])
def test_convolution(d):
    """The same with positions that are pixels."""
    a, g = cancelling(4, d, 5)
    model = nn.Conv1d(d, 5, 1, bias=False)
    assert_within(model, (a.transpose(1, 2).contiguous(),), g.transpose(1, 2).contiguous())
