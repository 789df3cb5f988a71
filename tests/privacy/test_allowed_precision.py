"""Within C, and for every batch size alike, whatever the user has allowed in the products of the model."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfast import ops, reference
from dpfast.reference.precision import full_precision
from tests.helpers import SLACK, distance
from tests.privacy.coarse import SETTINGS, Coarse, allowed, coarsely
from tests.privacy.judging import Private

V = 1 + 2.0**-8 + 2.0**-15  # rounded up in bfloat16 and in tf32
D = 8


class Tied(nn.Module):
    """One table as embedding and as head: rows, and a matrix product, of one parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, D)
        self.head = nn.Linear(D, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


class Bare(nn.Module):
    """A parameter that no family serves: samples run under vmap."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        return x @ self.matrix


def convolution(plan, *args, **kw):
    return lambda: (nn.Sequential(nn.Conv2d(*args, **kw)), torch.randn(1, args[0], 6, 6), {"0": plan})


MODELS = {
    "one position": lambda: (nn.Linear(D, 6), torch.randn(1, D), None),
    "wide, one position": lambda: (nn.Linear(6, D), torch.randn(1, 6), None),
    "ghost": lambda: (nn.Sequential(nn.Linear(D, 6)), torch.randn(1, 5, D), {"0": "ghost"}),
    "written out": lambda: (nn.Sequential(nn.Linear(D, 6)), torch.randn(1, 5, D), {"0": "instantiate"}),
    "convolution": convolution("ghost", 3, 4, 3),
    "convolution, written out": convolution("instantiate", 3, 4, 3),
    "convolution, groups": convolution("ghost", 4, 4, 3, groups=2, padding=1),
    "convolution of its whole input": convolution("ghost", 3, 4, 6),
    "transposed": lambda: (nn.ConvTranspose1d(3, 4, 3), torch.randn(1, 3, 6), None),
    "group norm": lambda: (nn.GroupNorm(2, 4), torch.randn(1, 4, 20), None),
    "layer norm": lambda: (nn.LayerNorm(D), torch.randn(1, 5, D), None),
    "embedding": lambda: (nn.Embedding(12, D), torch.randint(12, (1, 5)), None),
    "tied": lambda: (Tied(), torch.randint(12, (1, 5)), None),
    "bare": lambda: (Bare(), torch.randn(1, 5, D), None),
    "several layers": lambda: (
        nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, D), nn.Tanh(), nn.Linear(D, 4)),
        torch.randn(1, D),
        None,
    ),
}


def weigh(out, target):
    return (out * target).sum()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", MODELS)
def test_one_sample_of_many_alike(name):
    """B of the same sample, for every B from 1 to 24: the coarse kernel is chosen from B = 17 on."""
    with coarsely("medium" if "conv" not in name else "generic bf16") as coarse:
        model, x, plan = MODELS[name]()
        with torch.no_grad():
            target = 30 * torch.randn_like(model(x))
        private = Private(model, 1.0, loss_reduction="sum", plan=plan)
        before = None
        for B in range(1, 25):
            rows = [side.expand(B, *side.shape[1:]).contiguous() for side in (x, target)]
            sums = private.backward((rows[0],), rows[1], weigh)
            if before is not None:
                moved = distance(sums, before)
                assert moved <= SLACK, f"from B = {B - 1} to {B} the clipped sum moved by {moved} C"
            before = sums
        assert coarse.count == 0


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("setting", ["medium", "generic bf16", "generic tf32"])
@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(64, 16, bias=False), (64,)),
        (nn.Linear(64, 16, bias=False), (3, 64)),
        (nn.Conv2d(16, 16, 1, bias=False), (16, 2, 2)),
        (nn.Conv2d(16, 16, 2, bias=False), (16, 2, 2)),
        (nn.Conv1d(16, 16, 1, bias=False, groups=2), (16, 4)),
        (nn.GroupNorm(2, 4), (4, 20)),
    ],
    ids=["one position", "positions", "1 x 1", "whole input", "groups", "group norm"],
)
def test_a_contribution_that_is_rounded_up(layer, shape, setting):
    """One sample of the batch has a gradient; all that it is made of would be rounded up."""
    C = 1e-3
    for way in ("ghost", "instantiate"):
        private = Private(nn.Sequential(layer), C, loss_reduction="sum", plan={"0": way})
        x = torch.zeros(4, *shape)
        x[0] = V
        with coarsely(setting, smallest=1):
            sums = private.backward((x,), V, lambda out, v: (out[:1] * v).sum())
        moved = sum(s.double().square().sum() for s in sums.values()).sqrt().item()
        assert 0.99 * C <= moved <= C * SLACK, f"{way}: {moved / C} C"


def test_without_an_emulator():
    """The issue's own figures, for processors that have such products."""
    C = 1e-3
    with allowed("medium"):
        private = Private(nn.Linear(256, 64, bias=False), C, loss_reduction="sum")
        x = torch.zeros(64, 256)
        x[0] = V
        (total,) = private.backward((x,), V, lambda out, v: out.sum() * v).values()
    assert total.double().norm() <= C * SLACK


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "op",
    [
        lambda A, G: reference.grad_samples(A, G),
        lambda A, G: reference.ghost_squared_norm(A, G)[0],
        lambda A, G: reference.clipped_weight_gradient(A, G, torch.rand(3)),
        lambda A, G: reference.clipped_weight_gradient(A.expand(3, 2, 5, D), G.expand(3, 2, 5, 4), torch.rand(3)),
        lambda A, G: reference.factored_times_grad_samples(A, G, torch.randn(3, 4, D))[0],
        lambda A, G: reference.embedding_cross_term(torch.randint(4, (3, 5)), torch.randn(3, 5, D), A, G)[0],
        lambda A, G: reference.weighted_sum(A[:, 0, 0], torch.rand(3)),
        lambda A, G: reference.channel_sums(A[:, 0], A[:, 0], torch.randn(3, 1), torch.rand(3, 1))[0],
        lambda A, G: reference.convolution_weight_gradient(
            A[:, 0], A[:, 0, :, :6], torch.randn(5, 5, 3), reference.Geometry((1,), (0,), (1,), False, (0,), 1)
        ),
    ],
)
def test_no_product_of_the_reference_is_coarse(op, setting):
    A, G = torch.randn(3, 1, 5, D), torch.randn(3, 1, 5, 4)
    with coarsely(setting, smallest=1) as coarse:
        op(A, G)
    assert coarse.count == 0


def test_the_switches_are_turned_back_after_an_error_and_by_the_last_thread():
    started, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision(torch.device("cpu")):
            started.set()
            go_on.wait(10)

    with allowed("medium"):
        with pytest.raises(RuntimeError, match="shape"):
            ops.clipped_weight_gradient(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 5, 4), torch.ones(2))
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        thread = threading.Thread(target=other)
        thread.start()
        started.wait(10)
        with full_precision(torch.device("cpu")):  # where the other one has turned them already
            go_on.set()
            thread.join()
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_on_a_gpu_the_older_switch_follows():
    """torch refuses to multiply there where ``get_float32_matmul_precision`` and ``fp32_precision`` disagree."""
    for setting in ("medium", "high", "generic tf32"):
        with allowed(setting), full_precision(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert not torch.backends.cuda.matmul.allow_tf32


def test_frozen_parts_and_the_users_own_products_stay_as_allowed():
    with coarsely("medium", smallest=1) as coarse:
        model, x, _ = MODELS["one position"]()
        private = Private(model, 1.0, loss_reduction="sum")
        private.backward((x,), None, lambda out, _: out.sum())
        assert coarse.count == 0
        F.linear(x, torch.randn(3, D))
        assert coarse.count == 1


def test_the_emulator_is_coarse():
    """Without the ops' own care a contribution would be above C."""
    A, G = torch.full((1, 64), V), torch.full((1, 16), V)
    with Coarse(1) as mode, allowed("medium"):
        total = (G.t() @ A).double().norm()
    assert mode.count == 1 and total > (A.double().norm() * G.double().norm()) * 1.003
