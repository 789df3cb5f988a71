"""What forms keep until the pass ends: it is not changed in the meantime, it is not too much, and it is in float32."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpfast import ops
from dpfast.capture.forms import LEAST, MOST_WAITING, OuterProduct, PositionSum, forms_of, memory_of
from dpfast.clipping.clipped_sum import ClippedSum
from dpfast.clipping.sums_of_forms import clipped_sums
from dpfast.refusals import LayoutError
from tests.helpers import BF16, F32, assert_exact, make_private, mse, sse

B, T, D = 5, 4, 6


class Halved(torch.autograd.Function):
    """Its backward writes to the gradient that it is given, which torch's documentation forbids."""

    @staticmethod
    def forward(ctx, x):
        return x * 0.5

    @staticmethod
    def backward(ctx, G):
        return G.mul_(0.5)


class Branches(nn.Module):
    """A trained layer beside a branch without one; both get the same gradient, the branch after the layer."""

    def __init__(self, layer, branch):
        super().__init__()
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.layer, self.branch = layer, branch

    def forward(self, x):
        x = self.frozen(x).requires_grad_()
        beside = self.branch(x * 1.0)
        return beside + self.layer(x)


def with_hook(hook):
    def branch(x):
        if x.requires_grad:
            x.register_hook(hook)
        return x

    return branch


IN_PLACE = {
    "clips": with_hook(lambda g: g.mul_((0.1 / g.norm()).clamp(max=1.0))),
    "zeroes": with_hook(lambda g: g.zero_()),
    "a part": with_hook(lambda g: g[:1].neg_().new_empty(g.shape).copy_(g)),
    "custom": Halved.apply,
}
LAYERS = {
    "Linear": lambda: nn.Linear(D, D),
    "bias alone": lambda: bias_alone(),
    "weight alone": lambda: nn.Linear(D, D, bias=False),
    "LayerNorm": lambda: nn.LayerNorm(D),
}


def bias_alone():
    layer = nn.Linear(D, D)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize("shape", [(B, D), (B, T, D)], ids=["one position", "positions"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_gradient_that_is_changed_later_is_refused(change, layer, shape):
    """It would move the sum by more than C: the check of the samples, which keeps nothing for later, cannot see it."""
    wrapped, _, _ = make_private(Branches(LAYERS[layer](), IN_PLACE[change]), size=B)
    with pytest.raises(LayoutError, match=r"changed in place after the layer's backward.*return a new one"):
        for _ in range(2):
            wrapped(torch.randn(shape)).square().sum().backward()
    assert all(getattr(p, "summed_grad", None) is None for p in wrapped.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_hook_that_returns_a_new_one_is_not(layer):
    model = Branches(LAYERS[layer](), with_hook(lambda g: g * 0.5)).double()
    assert_exact(model, (torch.randn(B, T, D).double(),), torch.randn(B, T, D).double(), mse)


class Wide(nn.Module):
    """Small layers, each of which gets a slice of a wide gradient."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        for layer in self.layers:
            layer.weight.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x[..., 4:], layer(x[..., :4])], -1) * 0.5
        return x


class Again(nn.Module):
    """One normalisation, again and again."""

    def __init__(self, times):
        super().__init__()
        self.norm, self.times = nn.LayerNorm(16), times

    def forward(self, x):
        for _ in range(self.times):
            x = checkpoint(lambda x: x + torch.tanh(self.norm(x)), x, use_reentrant=False)
        return x


def kept_at_the_end(model, x, monkeypatch):
    """Bytes that the forms of a pass keep when it ends."""
    found = []
    close = ClippedSum.close

    def looking(self):
        forms = [form for forms in self._forms.values() for form in forms]
        storages = {y.untyped_storage()._cdata: y.untyped_storage().nbytes() for f in forms for y in f.kept()}
        found.append(sum(storages.values()))
        close(self)

    monkeypatch.setattr(ClippedSum, "close", looking)
    wrapped, optimizer, _ = make_private(model, size=len(x))
    for _ in range(2):  # in the first one layouts are not known yet, and nothing waits
        sse(wrapped(x), torch.zeros(())).backward()
        optimizer.zero_grad()
    return found[-1]


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_slice_of_a_large_gradient_does_not_wait(monkeypatch):
    x = torch.randn(8, 10, 4096)
    assert x.nbytes > LEAST > 8 * 10 * 4 * 4
    assert kept_at_the_end(Wide(30), x, monkeypatch) < 2 * x.nbytes


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_waits_is_written_out_when_it_is_much(monkeypatch):
    x = torch.randn(4, 400, 16)
    times = 2 * MOST_WAITING // (2 * x.nbytes)
    assert 2 * x.nbytes < LEAST
    assert kept_at_the_end(Again(times), x, monkeypatch) < 1.2 * MOST_WAITING


def test_forms_of_several_devices_go_apart():
    """The meta device stands in for a GPU."""
    here, there = (torch.randn(B, D, device=device) for device in ("cpu", "meta"))
    factors = [torch.rand(B), torch.rand(B, device="meta")]
    for order in ([0, 1], [1, 0]):
        forms = [OuterProduct(x, x, D) for x in (here, there)]
        parts = [(forms[k], factors[k]) for k in order]
        devices = {order[place]: summed.device.type for place, summed in clipped_sums(parts)}
        assert devices == {0: "cpu", 1: "meta"}
    waiting = [[PositionSum(x[:, None])] for x in (here, there)]
    assert [forms[0].samples.device.type for forms in forms_of(waiting)] == ["cpu", "meta"]


def test_a_large_product_leaves_the_small_ones_together(monkeypatch):
    calls = []
    given = ops.clipped_weight_gradients
    monkeypatch.setattr(
        ops, "clipped_weight_gradients", lambda sides, rows: calls.append(len(sides)) or given(sides, rows)
    )
    sizes = [D, 600, D]
    parts = [(OuterProduct(torch.randn(B, n), torch.randn(B, n), n), torch.rand(B)) for n in sizes]
    assert {place: summed.shape for place, summed in clipped_sums(parts)} == {k: (n, n) for k, n in enumerate(sizes)}
    if ops.is_native("weighted_products", torch.device("cpu")):
        assert sorted(calls) == [1, 2]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_backward_within_autocast_are_written_in_float32(compiled, monkeypatch):
    written = []
    instantiate = ops.grad_samples
    every = ops.all_grad_samples
    monkeypatch.setattr(ops, "grad_samples", lambda A, G: written.append(instantiate(A, G)) or written[-1])
    monkeypatch.setattr(ops, "all_grad_samples", lambda sides: written.extend(every(sides)) or written[-len(sides) :])
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    wrapped, _, _ = make_private(model, size=B, plan={"": "instantiate"})
    called = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    for _ in range(2):
        out = called(torch.randn(B, T, D))
        with torch.autocast("cpu", BF16):
            out.square().sum().backward()
        wrapped.zero_grad()
    assert written and {samples.dtype for samples, _ in written} == {F32}


def test_memory_of_a_view_is_that_of_all():
    assert memory_of(PositionSum(torch.randn(4, 3, 100)[..., :2])) == 4 * 4 * 3 * 100
