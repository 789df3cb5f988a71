"""Losses and gradients of logits in chunks; those of a head that stores no logits are within their bounds."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast import ops
from dpfast.ops import matmul
from dpfast.reference import cross_entropy, recomputed_head
from tests.helpers import BF16, F16, F32, F64

B, T, D, V = 3, 7, 5, 40
DTYPES = [F64, F32, BF16, F16]


def chunks(monkeypatch, elements, classes):
    for module in (cross_entropy, recomputed_head):
        monkeypatch.setattr(module, "CHUNK", elements)
    monkeypatch.setattr(recomputed_head, "LEAST_CLASSES", classes)


def targets():
    found = torch.randint(0, V, (B, T))
    found[1, 2:] = ops.IGNORED
    return found


@pytest.mark.parametrize("elements", [1, V, 3 * V, T * V + 1, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("over", [False, True])
def test_losses_and_gradients_of_logits(monkeypatch, elements, dtype, over):
    chunks(monkeypatch, elements, 1)
    logits, target, weights = 3 * torch.randn(B, T, V), targets(), torch.rand(B, T)
    weights[0, 0], target[2, 0] = 0, 0
    logits = logits.to(dtype)
    wide = logits.double().clone().requires_grad_()
    want = F.cross_entropy(wide.transpose(1, 2), target, ignore_index=ops.IGNORED, reduction="none")
    (gradient,) = torch.autograd.grad(want, wide, weights.double())
    losses, normalisers = ops.token_losses(logits, target)
    wide_dtype = F64 if dtype == F64 else F32
    assert losses.dtype == normalisers.dtype == wide_dtype
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-5, atol=1e-5)
    counted = weights.to(wide_dtype).masked_fill(target == ops.IGNORED, 0)
    G = ops.logit_gradient(logits, target, normalisers, counted, over)
    assert (G.data_ptr() == logits.data_ptr()) == over and G.dtype == dtype
    error = torch.finfo(dtype).eps if dtype != F64 else 1e-12
    torch.testing.assert_close(G.double(), gradient, rtol=4 * max(error, 1e-6), atol=1e-6)
    assert not G[1, 2:].any() and not G[0, 0].any()


def sides(dtype, scale=1.0, bias=True):
    x, weight = (scale * torch.randn(B, T, D)).to(dtype), torch.randn(V, D).to(dtype)
    b = torch.randn(V).to(dtype) if bias else None
    target = targets()
    losses, normalisers = ops.head_losses(x, weight, b, target)
    weights = torch.rand(B, T, dtype=losses.dtype).masked_fill(target == ops.IGNORED, 0)
    return losses, ops.HeadSides(x, weight, b, target, normalisers, weights)


@pytest.mark.parametrize("classes", [7, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_without_logits(monkeypatch, dtype, bias, classes):
    chunks(monkeypatch, 1, classes)
    losses, its = sides(dtype, bias=bias)
    x, weight = (side.double().clone().requires_grad_() for side in (its.x, its.weight))
    b = None if its.bias is None else its.bias.double()
    want = F.cross_entropy(F.linear(x, weight, b).transpose(1, 2), its.targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-6, atol=1e-6)
    (gx,) = torch.autograd.grad(want, x, its.weights.double(), retain_graph=True)
    found = ops.head_backward(its, True, True, bias)
    assert found.gx.dtype == dtype
    rough = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(found.gx.double(), gx, rtol=4 * rough, atol=rough)
    samples = []
    for k in range(B):
        weights = torch.zeros(B, T, dtype=F64).index_copy(0, torch.tensor([k]), its.weights[k : k + 1].double())
        samples.append(torch.autograd.grad(want, weight, weights, retain_graph=True)[0])
    norms = torch.stack(samples).square().sum((1, 2))
    assert ((found.squared - norms).abs() <= found.bound).all()
    assert (found.bound <= (1e-10 if dtype == F64 else 1e-4) * norms).all()
    factors = torch.tensor([0.5, 0.0, 2.0])
    summed = ops.head_clipped_sum(its, factors)
    torch.testing.assert_close(summed.double(), 0.5 * samples[0] + 2 * samples[2], rtol=1e-5, atol=1e-5)
    G = ops.head_gradient(its)
    torch.testing.assert_close(torch.einsum("btv,btd->bvd", G.double(), its.x.double()), torch.stack(samples), **NEAR)
    if bias:
        torch.testing.assert_close(found.bias, G.sum(1))


NEAR = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_gradient_made_again_is_within_its_bound(monkeypatch, dtype, scale):
    """By products of other shapes, also where logits are large; and so is what one sample adds to the sum."""
    _, its = sides(dtype, scale)
    first, squared = ops.head_gradient(its), ops.head_backward(its, False, True, False)
    chunks(monkeypatch, 1, 3)
    for k in range(B):
        one = its._replace(**{n: getattr(its, n)[k : k + 1] for n in ("x", "targets", "normalisers", "weights")})
        again = ops.head_gradient(one)
        energies = again.double().square().sum(2)
        off = (again.double() - first[k : k + 1].double()).norm(dim=2)
        assert (off <= recomputed_head.slips(one, energies)).all()
        added = ops.head_clipped_sum(one, torch.ones(1)).double().square().sum()
        assert added <= squared.squared[k] + squared.bound[k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_cross_term_with_a_tied_embedding(dtype, bias):
    _, its = sides(dtype, bias=bias)
    ids, E = torch.randint(0, V, (B, 4)), torch.randn(B, 4, D).to(dtype)
    its.targets[0, 0] = ids[0, 0]
    term, bound = ops.head_embedding_cross_term(its, ids, E)
    G = ops.head_gradient(its).double()
    gathered = torch.gather(G, 2, ids.unsqueeze(1).expand(-1, T, -1))
    want = torch.einsum("bsd,btd,bst->b", its.x.double(), E.double(), gathered)
    assert ((term - want).abs() <= bound).all() and bound.max() < 1e-3


@pytest.mark.parametrize("most", [1, 600, 1 << 26])
def test_large_backprops_are_copied_a_few_at_a_time(monkeypatch, most):
    """In 16 bits, of which the sums are made in float32: the same as at once."""
    A, G = torch.randn(B, 1, T, D).to(BF16), torch.randn(B, 1, T, V).to(BF16)
    factors = torch.tensor([1.0, 0.0, 0.5])
    whole = ops.ghost_squared_norm(A, G), ops.clipped_weight_gradient(A, G, factors)
    monkeypatch.setattr(matmul, "MOST_COPIED", most)
    with Seen() as seen:
        parts = ops.ghost_squared_norm(A, G), ops.clipped_weight_gradient(A, G, factors)
    torch.testing.assert_close(parts, whole)
    assert seen.samples == ([B] if most > 600 else [1] * B)


class Seen(TorchDispatchMode):
    """How many samples each call of the op that makes ghost norms is given."""

    def __init__(self):
        super().__init__()
        self.samples = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.dpfast.ghost_stats.default:
            self.samples.append(len(args[2]))
        return func(*args, **(kwargs or {}))
