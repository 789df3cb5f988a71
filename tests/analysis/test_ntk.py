"""The kernel against Jacobians one sample at a time, the paper's properties, and dL/dt against finite differences."""

import copy

import pytest
import torch
from opacus.layers import DPLSTM
from torch import nn
from torch.func import functional_call, jacrev

from dpfast.analysis.functional import Problem
from dpfast.analysis.ntk import (
    FALLING,
    FULL_RANK,
    NOT_NEGATIVE,
    QUADRATIC,
    REAL,
    SYMMETRIC,
    convergence_report,
    ntk,
)
from dpfast.clipping.thresholds import Clipping
from dpfast.engine import PrivacyEngine

CE = nn.CrossEntropyLoss()
ALL = (SYMMETRIC, REAL, NOT_NEGATIVE, FULL_RANK, QUADRATIC, FALLING)


def small():
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 2)
    )


@pytest.fixture
def batch():
    return torch.randn(10, 5), torch.randint(0, 3, (10,))


def jacobian(model, x):
    """``[n, c, P]``, one sample and one output at a time."""
    model = model.double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    rows = []
    for one in x.double():
        found = jacrev(lambda p, one=one: functional_call(model, p, (one.unsqueeze(0),)).reshape(-1))(params)
        rows.append(torch.cat([value.flatten(1) for value in found.values()], 1))
    return torch.stack(rows)


@pytest.mark.parametrize("make", [small, convolutional])
def test_kernel_is_the_jacobian_times_its_transpose(make, batch):
    model = make()
    kernel = ntk(model, batch[0])
    J = jacobian(model, batch[0]).flatten(0, 1)
    torch.testing.assert_close(kernel.H, J @ J.T)
    assert next(model.parameters()).dtype == torch.float64  # jacobian()'s doing: ntk() leaves the model alone


def test_kernels_of_groups_add_up(batch):
    model = small()
    names = [name for name, _ in model.named_parameters()]
    kernel = ntk(model, batch[0], group_of={name: r for r, name in enumerate(names)})
    assert kernel.groups == tuple((name,) for name in names)
    torch.testing.assert_close(kernel.H, ntk(model, batch[0]).H)
    J = jacobian(model, batch[0]).flatten(0, 1)
    first = J[:, : 5 * 40]
    torch.testing.assert_close(kernel.kernels[0], first @ first.T)


def test_in_pieces_as_in_one(batch, monkeypatch):
    model = small()
    whole = ntk(model, batch[0]).H
    monkeypatch.setattr("dpfast.analysis.ntk.AT_ONCE", 1)
    torch.testing.assert_close(ntk(model, batch[0]).H, whole)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_norms_and_factors_are_those_of_training(batch, clipping):
    """Against the per-sample norms and the clipped sum of the fused mode, C = 0.5."""
    model = small()
    report = convergence_report(model, CE, *batch, max_grad_norm=0.5, clipping=clipping)
    gradients = Problem(model, CE, *batch)
    found = gradients.sample_gradients(gradients.start)
    squared = torch.stack([g.flatten(1).square().sum(1) for g in found.values()])
    groups = squared if clipping == "per_layer" else squared.sum(0, keepdim=True)
    torch.testing.assert_close(report.norms, groups.sqrt())
    summed = {
        name: torch.einsum("n,n...->...", report.factors[r if clipping == "per_layer" else 0], g)
        for r, (name, g) in enumerate(found.items())
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = torch.utils.data.DataLoader(list(zip(*batch, strict=True)), batch_size=10)
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        clipping=clipping,
        poisson_sampling=False,
    )
    CE(private(batch[0]), batch[1]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.summed_grad.double(), summed[name], rtol=1e-4, atol=1e-5)


def test_without_clipping_everything_holds(batch):
    for C in (None, 1e6):
        report = convergence_report(small(), CE, *batch, max_grad_norm=C)
        assert all(report.holds(name) for name in ALL)
        assert all(one.guaranteed for one in report.properties)


@pytest.mark.parametrize("function", ["abadi", "automatic", "normalised", "psac"])
def test_flat_clipping_keeps_eigenvalues_and_loses_the_quadratic_form(batch, function):
    model = small()
    batch = (batch[0] * torch.logspace(-1, 1, 10).unsqueeze(1), batch[1])  # so that factors are far apart
    report = convergence_report(model, CE, *batch, max_grad_norm=0.1, clipping_fn=function)
    assert (report.holds(SYMMETRIC), report.holds(QUADRATIC)) == (False, False)
    assert report.holds(REAL) and report.holds(NOT_NEGATIVE) and report.holds(FULL_RANK)
    kernel = ntk(model, batch[0])
    plain = torch.linalg.eigvals(kernel.clipped(report.factors))  # as a general matrix, without the similarity
    assert float(plain.imag.abs().max()) <= 1e-10 * float(plain.real.max())
    assert float(plain.real.min()) > 0
    torch.testing.assert_close(plain.real.sort().values, report.eigenvalues.real.sort().values, rtol=1e-7, atol=1e-9)
    assert report.smallest_symmetric < 0


def test_zero_one_factors_are_singular_once_a_sample_is_dropped(batch):
    model = small()
    norms = convergence_report(model, CE, *batch, max_grad_norm=None).norms[0].sort().values
    for dropped in range(4):
        C = float(norms[-dropped - 1]) * (1 + 1e-9)
        report = convergence_report(model, CE, *batch, max_grad_norm=C, clipping_fn="global")
        assert report.dropped == dropped
        assert report.rank_unclipped == 30
        assert report.rank == 3 * (10 - dropped)
        assert report.holds(FULL_RANK) == (dropped == 0)
        assert report.holds(NOT_NEGATIVE) and report.holds(REAL)


def test_over_groups_eigenvalues_can_be_complex():
    """Two groups, C_1 and C_2 in opposite orders: ``H_1 C_1 + H_2 C_2`` need not be similar to a symmetric matrix."""
    from dpfast.analysis.ntk import NTK, _report

    torch.manual_seed(0)
    halves = torch.randn(2, 6, 2, dtype=torch.float64)
    kernel = NTK(halves @ halves.mT + 1e-3 * torch.eye(6).double(), 6, 1, (("a",), ("b",)))
    v = torch.randn(6, dtype=torch.float64)
    found = []
    for seed in range(50):
        torch.manual_seed(seed)
        factors = torch.rand(2, 6, dtype=torch.float64) ** 4
        found.append(_report("groups", kernel, v, factors, factors, 1.0).holds(REAL))
    assert not all(found)
    flat = NTK(kernel.H.unsqueeze(0), 6, 1, (("a", "b"),))
    assert _report("flat", flat, v, factors[:1], factors[:1], 1.0).holds(REAL)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", ["0", "2"]])
@pytest.mark.parametrize("function", ["abadi", "global", "automatic"])
def test_loss_derivative_is_a_finite_difference(batch, clipping, function):
    """Along ``w − h Σ_i C_i g_i``, h small, in the parameters' space."""
    model = small()
    report = convergence_report(model, CE, *batch, max_grad_norm=3.0, clipping=clipping, clipping_fn=function)
    problem = Problem(model, CE, *batch)
    how = {
        "flat": lambda: Clipping.flat(3.0),
        "per_layer": lambda: Clipping.per_layer(3.0, problem.trainable),
    }.get(str(clipping), lambda: Clipping.equal_shares(3.0, ["0", "2"], problem.trainable))()
    direction = {
        name: torch.einsum("n,n...->...", report.factors[how.group_of(problem.trainable[name])], g)
        for name, g in problem.sample_gradients(problem.start).items()
    }

    def loss(h):
        at = {name: p - h * direction[name] for name, p in problem.start.items()}
        return float(problem.losses(problem.outputs(at)).sum())

    h = 1e-5
    assert report.loss == pytest.approx(loss(0))
    assert report.loss_derivative == pytest.approx((loss(h) - loss(-h)) / (2 * h), rel=1e-6)
    assert report.loss_derivative != 0


def test_report_tells_all(batch):
    text = str(convergence_report(small(), CE, *batch, max_grad_norm=0.1))
    for name in ALL:
        assert name in text
    assert "flat clipping, Abadi()" in text


def test_a_private_model_and_frozen_parameters(batch):
    model = small()
    model[0].weight.requires_grad_(False)
    kernel = ntk(model, batch[0])
    assert kernel.groups == (("0.bias", "2.weight", "2.bias"),)
    loader = torch.utils.data.DataLoader(list(zip(*batch, strict=True)), batch_size=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    private, _, _ = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    torch.testing.assert_close(ntk(private, batch[0]).H, kernel.H)
    assert model.training


def test_what_would_not_fit_is_refused(batch):
    with pytest.raises(ValueError, match=r"10 samples × 3 outputs, 363 parameters .* take 0\.000\d+ GiB.*1e-06 GiB"):
        ntk(small(), batch[0], memory_limit=1e-6)
    with pytest.raises(ValueError, match=r"would take \d\.\d+e\+\d+ GiB"):
        ntk(small(), torch.zeros(1, 5).expand(1_000_000, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_grad_norm=-1.0), "max_grad_norm=-1.0"),
        (dict(max_grad_norm=float("nan")), "max_grad_norm=nan"),
        (dict(clipping="layers"), "clipping='layers'"),
        (dict(clipping_fn="abady"), "clipping_fn='abady'"),
        (dict(memory_limit=-1), "memory_limit=-1"),
        (dict(targets=torch.zeros(9).long()), "targets: 9 for 10 samples"),
        (dict(inputs=torch.zeros(0, 5), targets=torch.zeros(0).long()), r"inputs of shape \[0, 5\]"),
    ],
)
def test_refused(batch, change, message):
    given = dict(inputs=batch[0], targets=batch[1], max_grad_norm=1.0) | change
    with pytest.raises(ValueError, match=message):
        convergence_report(small(), CE, given.pop("inputs"), given.pop("targets"), **given)


class Last(nn.Module):
    """A recurrent net's last output."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def test_what_vmap_cannot_run_is_refused():
    x = torch.randn(4, 6, 5)
    with pytest.raises(ValueError, match=r"vmap cannot run it .* opacus\.layers\.DPLSTM"):
        ntk(Last(nn.LSTM), x)
    kernel = ntk(Last(DPLSTM), x)
    assert float(torch.linalg.eigvalsh(kernel.H)[0]) > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_other_models():
    """Tokens, attention and statistics of a batch, which are the running ones here."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.block = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.block(self.table(x)).mean(1)

    images = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    for model, x in ((Tokens(), torch.randint(0, 11, (5, 4))), (images, torch.randn(5, 1, 6))):
        twin = copy.deepcopy(model).eval()
        J = jacobian(twin, x) if x.is_floating_point() else None
        kernel = ntk(model, x)
        assert kernel.H.shape == (kernel.samples * kernel.outputs,) * 2
        assert model.training
        if J is not None:
            torch.testing.assert_close(kernel.H, J.flatten(0, 1) @ J.flatten(0, 1).T)


def test_nothing_to_train_is_refused(batch):
    with pytest.raises(ValueError, match="no parameter has requires_grad"):
        ntk(small().requires_grad_(False), batch[0])
