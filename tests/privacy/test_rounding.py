"""Certified norms against float64: the squared norm and its bound are never less than the truth.

Each op of ``dpfast.reference`` that gives a norm is tried on inputs whose rounding has a structure: constants drift
all one way, alternating signs cancel, heavy tails hide small terms, tiny numbers underflow and huge ones overflow.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn

from dpfast import reference
from dpfast.capture.forms import EmbeddingRows, Factored, Instantiated
from dpfast.clipping.sums_of_forms import combine, squared_norm
from dpfast.planning.planner import Planner
from tests.helpers import BF16, F32, F64, SLACK
from tests.privacy.judging import Private

N = 2  # samples
SIZES = [(1, 1, 1), (1, 150, 3), (3, 7, 190), (16, 100, 100), (40, 1000, 2), (129, 40, 130), (300, 16, 16)]


def structured(kind: str, T: int, d: int, p: int) -> tuple[Tensor, Tensor]:
    """Activations ``[N, T, d]`` and backprops ``[N, T, p]``."""
    A, G = torch.randn(N, T, d), torch.randn(N, T, p)
    c, e = (torch.rand(2) * 3 + 0.3).tolist()
    alternating = (torch.arange(T) % 2 * 2.0 - 1).view(1, T, 1)
    return {
        "gauss": lambda: (A, G),
        "heavy tails": lambda: (A * torch.randn(N, T, d).exp() ** 4, G * torch.randn(N, T, p).exp() ** 4),
        "constant": lambda: (torch.full_like(A, c), torch.full_like(G, e)),
        "one position of many": lambda: (A, G * (torch.arange(T) == T // 2).view(1, T, 1)),
        "alternating": lambda: (c + 1e-3 * A, alternating * e + 1e-4 * G),
        "alternating exactly": lambda: (torch.full_like(A, c), alternating * torch.full_like(G, e)),
        "alternating, tiny rest": lambda: (c + 1e-6 * A, alternating * e + 1e-6 * G),
        "small": lambda: (A * 1e-12, G * 1e-4),
        "underflow": lambda: (torch.full_like(A, 1e-23), torch.full_like(G, 1e18)),
        "subnormal": lambda: (torch.full_like(A, 3e-20), torch.full_like(G, 1e-2)),
        "underflow of backprops": lambda: (torch.full_like(A, 1e18), torch.full_like(G, 1e-23)),
        "overflow": lambda: (torch.full_like(A, 1e19), torch.full_like(G, 1e19)),
        "all zero": lambda: (torch.zeros_like(A), torch.zeros_like(G)),
    }[kind]()


KINDS = [
    "gauss", "heavy tails", "constant", "one position of many", "alternating", "alternating exactly",
    "alternating, tiny rest", "small", "underflow", "subnormal", "underflow of backprops", "overflow", "all zero",
]  # fmt: skip


def certifies(got: tuple[Tensor, Tensor], truth: Tensor) -> None:
    """``squared + bound >= truth`` for every sample; a norm that is not finite drops its sample."""
    squared, bound = got
    assert squared.dtype == bound.dtype == F64
    assert squared.shape == bound.shape == truth.shape
    total = squared + bound
    assert not bool((bound < 0).any())
    short = total.isfinite() & (total < truth)
    assert not bool(short.any()), f"certified {total.tolist()}, truth {truth.tolist()}"


def exact_product(A: Tensor, G: Tensor) -> Tensor:
    return torch.einsum("b...tp,b...td->b...pd", G.double(), A.double()).flatten(1).square().sum(1)


everywhere = pytest.mark.parametrize("kind", KINDS)
sizes = pytest.mark.parametrize(("T", "d", "p"), SIZES)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@everywhere
@sizes
def test_matrix_products(T, d, p, kind, dtype):
    A, G = (side.to(dtype).unsqueeze(1) for side in structured(kind, T, d, p))
    op = reference.one_position_squared_norm if T == 1 else reference.ghost_squared_norm
    certifies(op(A, G), exact_product(A, G))


@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("d", [1000, 4096, 16384])
def test_long_products_of_constants(T, d):
    """Equal terms drift all one way, lane by lane."""
    for _ in range(4):
        A, G = (side.unsqueeze(1) for side in structured("constant", T, d, 64))
        op = reference.one_position_squared_norm if T == 1 else reference.ghost_squared_norm
        certifies(op(A, G), exact_product(A, G))


@everywhere
@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True), (2, True)])
def test_convolutions(kind, groups, transposed):
    x, _ = structured(kind, 4, 12, 1)
    weight = (
        torch.zeros(4, 6, 3) if transposed and groups == 1 else torch.zeros(4, (6 if transposed else 4) // groups, 3)
    )
    geometry = reference.Geometry((1,), (1,), (1,), transposed, (0,), groups)
    _, G = structured(kind, 12, 1, 6 if transposed else 4)
    G = G.transpose(1, 2).contiguous()
    truth = reference.convolution_grad_samples(x.double(), G.double(), weight.double(), geometry, N)
    certifies(reference.convolution_squared_norm(x, G, weight, geometry, N), truth.flatten(1).square().sum(1))


@everywhere
@pytest.mark.parametrize("rows", [1, 3, 50])
@sizes
def test_embedding_rows(T, d, p, rows, kind):
    ids = torch.randint(rows, (N, T))
    G = structured(kind, T, d, 1)[0] if "of backprops" not in kind else structured(kind, T, 1, d)[1]
    truth = torch.zeros(N, rows, d, dtype=F64).scatter_add_(1, ids.unsqueeze(-1).expand(G.shape), G.double())
    certifies(reference.embedding_squared_norm(ids, G), truth.flatten(1).square().sum(1))


@everywhere
@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000, 10**5])
def test_written_out(n, kind):
    samples = structured(kind, 1, n, 1)[0].squeeze(1)
    certifies(reference.squared_norm(samples), samples.double().square().sum(1))


def written(form, rows: int, d: int) -> Tensor:
    if isinstance(form, Instantiated):
        return form.samples.double().reshape(N, rows, d)
    if isinstance(form, EmbeddingRows):
        table = torch.zeros(N, rows, d, dtype=F64)
        return table.scatter_add_(1, form.ids.unsqueeze(-1).expand(form.G.shape), form.G.double())
    return torch.einsum("bgtv,bgtd->bvd", form.G.double(), form.A.double())


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_ties_that_nearly_cancel(scale, eps):
    """A table as embedding, as head and written out: any two of them each other's opposite, up to ``eps``."""
    for _ in range(8):
        T, d, V = (int(torch.randint(1, 40, ())) for _ in range(3))
        ids = torch.randint(V, (N, T))
        E = torch.randn(N, T, d) * scale
        onehot = torch.zeros(N, T, V).scatter_(2, ids.unsqueeze(-1), 1.0)
        near = E * (1 + eps * torch.randn_like(E))
        table = torch.zeros(N, V, d).scatter_add_(1, ids.unsqueeze(-1).expand(E.shape), near)
        forms = {
            1: (EmbeddingRows(ids, E, V), EmbeddingRows(ids, -near, V)),
            2: (Factored(E.unsqueeze(1), onehot.unsqueeze(1), V), Factored(-near.unsqueeze(1), onehot.unsqueeze(1), V)),
            3: (Instantiated(table), Instantiated(-table)),
        }
        for one, other in itertools.product(forms, forms):
            # what is written out here is released as it is stored
            pair = combine([forms[one][0], forms[other][1]], Planner(), "table")
            truth = sum(written(form, V, d) for form in pair).square().sum((1, 2))
            certifies(squared_norm(pair), truth)


def test_what_sums_of_several_forms_err_by_adds_up():
    """Forms that point the same way: each one's sum may err beside the whole length of the others."""
    ids = torch.arange(3).repeat(N, 1)
    rows = EmbeddingRows(ids, torch.rand(N, 3, 4) + 0.1, 3)
    written = Instantiated(rows.instantiate().samples.clone())
    A = torch.eye(3).repeat(N, 1, 1)[:, None]
    forms = [Factored(rows.G[:, None], A, 3), rows, written]  # Σ_t e_t g_tᵀ: the same rows
    for some in ([forms[0], rows], [rows, written], [forms[0], written], forms):
        pairs = [form.squared_norm() for form in some]
        longest = sum((squared + bound).sqrt() for squared, bound in pairs)
        squared, bound = squared_norm(some)
        assert (squared + bound >= longest.square() * (1 - 1e-12)).all()
        assert (bound <= 1e-4 * squared).all()


@pytest.mark.parametrize(("a", "g"), [(1e-23, 1e18), (1e-24, 1e18), (3e-24, 1e17), (1e18, 1e-23)])
@pytest.mark.parametrize(("T", "d"), [(1, 100), (8, 100), (8, 30)])
def test_a_layer_whose_products_underflow(T, d, a, g):
    """Within C in float32, though a²·g² is no float32 number."""
    bound = T * d * a * g / 10
    private = Private(nn.Linear(d, d, bias=False), bound, loss_reduction="sum")
    x = torch.full((1, T, d), a)
    sums = private.backward((x,), None, lambda out, _: (out * g).sum())
    assert sum(s.double().square().sum() for s in sums.values()).sqrt().item() <= bound * SLACK


@pytest.mark.parametrize("scale", [1e19, 1e30])
def test_a_layer_whose_norm_overflows(scale):
    """Within C, or exact zeros: the square of the norm is no float32 number."""
    private = Private(nn.Linear(4, 3, bias=False), 1.0, loss_reduction="sum")
    sums = private.backward((torch.full((1, 4), scale),), None, lambda out, _: out.sum() * 1e3)
    total = sum(s.double().square().sum() for s in sums.values()).sqrt().item()
    assert total == total
    assert total <= SLACK


@pytest.mark.parametrize("width", [1000, 10**5])
def test_a_wide_embedding_row_of_constants(width):
    """Within C in float32, whatever the constant is."""
    bound = 1e-3
    private = Private(nn.Embedding(3, width), bound, loss_reduction="sum")
    for c in (torch.rand(6) + 0.5).tolist():
        sums = private.backward((torch.zeros(1, 1, dtype=torch.long),), c, lambda out, c: (out * c).sum())
        assert sums["model.weight"].double().norm().item() <= bound * SLACK


UNLUCKY = 1.0000036954811478  # its square, added up again and again, is rounded the same way for long


@pytest.mark.parametrize("n", [64, 128, 192, 256, 320, 384, 1000])
@pytest.mark.parametrize("T", [8, 32, 96])
def test_products_of_equal_terms(T, n):
    """Of any length: a matrix product adds up some hundred of them in one go."""
    for value in (UNLUCKY, 1.0000017881377445, 0.1, 1.1):
        A = torch.full((1, 1, T, n), value)
        truth = (T * A[0, 0, 0, 0].double() ** 2) ** 2 * n * n
        certifies(reference.ghost_squared_norm(A, A), truth.view(1))
        h = torch.full((1, n, 4), value)
        term, bound = reference.factored_times_grad_samples(torch.ones(1, 1, T, 4), A, h)
        assert abs(term - T * n * 4 * A[0, 0, 0, 0].double() ** 2) <= bound


@pytest.mark.parametrize("way", ["ghost", "instantiate"])
@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(1, 1, bias=False), (20_000, 1)),
        (nn.Linear(4, 4, bias=False), (10_000, 4)),
        (nn.Linear(192, 192, bias=False), (32, 192)),
        (nn.Linear(192, 192, bias=False), (192, 192)),
        (nn.Conv2d(1, 1, 1, bias=False), (1, 60, 60)),
        (nn.Conv2d(192, 192, 1, bias=False), (192, 3, 3)),
    ],
    ids=["one column", "four columns", "wide", "wide and long", "pixels", "wide pixels"],
)
def test_what_is_summed_is_rounded_too(layer, shape, way):
    """The norm's own rounding is not all: a contribution is a float32 sum over positions."""
    for value in (UNLUCKY, 1.0000017881377445, 0.1):
        for bound in (1.0, 1.3):
            private = Private(nn.Sequential(layer), bound, loss_reduction="sum", plan={"0": way})
            sums = private.backward((torch.full((1, *shape), value),), value, lambda out, c: (out * c).sum())
            assert sum(s.double().square().sum() for s in sums.values()).sqrt().item() <= bound * SLACK
