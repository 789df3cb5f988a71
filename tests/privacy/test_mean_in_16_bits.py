"""A mean over the batch divides backprops by B: in 16 bits refused, wherever they have them; a sum, or our own mean,
is exact."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpfast
from dpfast.amp import GradScaler
from tests.helpers import BF16, F16, SLACK, distance, loader_of, make_private, sums_of

B, D, CLASSES = 6, 8, 5


def net(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, width), nn.ReLU(), nn.Linear(width, CLASSES))


def rows(n: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, D), torch.randint(CLASSES, (n,))


class Within(nn.Module):
    """``inside`` between float32 layers, in 16 bits by a cast or by autocasting of its own."""

    def __init__(self, inside: nn.Module, cast: bool):
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(D, D), inside, nn.Linear(D, CLASSES)
        self.cast = cast

    def forward(self, x):
        x = self.first(x)
        if self.cast:
            return self.last(self.inside(x.to(BF16)).float())
        with torch.autocast("cpu", BF16):
            x = self.inside(x)
        return self.last(x.float())


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, y):
        return F.cross_entropy(self.net(x).float(), y)


class Bare(nn.Module):
    """Parameters that no layer family serves."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(D, CLASSES))

    def forward(self, x):
        return (x @ self.matrix).float()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.first, self.net, self.reentrant = nn.Linear(D, D), net(), reentrant

    def forward(self, x):
        return checkpoint(self.net, self.first(x), use_reentrant=self.reentrant).float()


class SixteenBitsBelow(nn.Module):
    """A frozen 16-bit part that no gradient goes through."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(D, D).to(BF16).requires_grad_(False), nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.head(self.features(x.to(BF16)).float())


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.other = net(), nn.Linear(D, 3)

    def forward(self, x):
        return self.net(x), self.other(x).to(BF16)


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).requires_grad_(False)


def cross_entropy(out, y):
    return F.cross_entropy(out, y)


def trained(model, data, loss=cross_entropy, autocast=None, **kw):
    wrapped, *_ = make_private(model, size=len(data[0]), **kw)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        out = loss(wrapped(data[0]), data[1])
    out.backward()
    return wrapped


REFUSED = {
    "autocast": (net, dict(autocast=BF16)),
    "autocast in float16": (net, dict(autocast=F16)),
    "parameters": (lambda: nn.Sequential(net().to(BF16)), dict()),
    "parameters in float16": (lambda: nn.Sequential(net().to(F16)), dict()),
    "autocast of its own": (lambda: Within(nn.Linear(D, D), False), dict()),
    "frozen autocast of its own": (lambda: Within(frozen(nn.Linear(D, D), torch.float32), False), dict()),
    "a frozen part above what trains": (lambda: Within(frozen(nn.Linear(D, D), BF16), True), dict()),
    "bare parameters": (Bare, dict(autocast=BF16)),
    "checkpoint": (lambda: Checkpointed(False), dict(autocast=BF16)),
    "reentrant checkpoint": (lambda: Checkpointed(True), dict(autocast=BF16)),
    "a 16-bit output that counts": (
        TwoOutputs,
        dict(loss=lambda out, y: F.cross_entropy(out[0], y) + out[1].float().mean()),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_remedy(name):
    make, kw = REFUSED[name]
    model, (x, y) = make(), rows()
    dtype = next(p.dtype for p in model.parameters()) if "parameters" in name and "bare" not in name else x.dtype
    with pytest.raises(ValueError, match=r"loss_reduction='mean' with gradients of b?float16 .*loss_reduction='sum'"):
        trained(model, (x.to(dtype), y), **kw)
    assert not any(s.any() for s in sums_of(model).values()) and all(p.grad is None for p in model.parameters())


class Sometimes(nn.Module):
    """In 16 bits between its layers, in some forwards."""

    def __init__(self, in_16_bits):
        super().__init__()
        self.first, self.last, self.in_16_bits = nn.Linear(D, D), nn.Linear(D, CLASSES), iter(in_16_bits)

    def forward(self, x):
        x = self.first(x)
        return self.last((x.to(BF16) * 1.5).float() if not self.recurring or next(self.in_16_bits) else x)

    recurring = False


def test_refused_every_time():
    """A caller that goes on after a refusal is refused again; nothing of those batches is summed."""
    model, (x, y) = Sometimes([]), rows()
    wrapped, optimizer, _ = make_private(model, size=len(x))
    for _ in range(5):
        with pytest.raises(ValueError, match="gradients of bfloat16"):
            F.cross_entropy(wrapped(x), y).backward()
        assert not any(s.any() for s in sums_of(model).values())
        optimizer.zero_grad()


class Adapter(nn.Module):
    """Below a frozen part in 16 bits."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(D, D), frozen(nn.Linear(D, CLASSES), BF16)

    def forward(self, x):
        return self.frozen(self.first(x).to(BF16)).float()


@pytest.mark.parametrize("way", ["outside", "inside"])
def test_16_bits_within_a_compiled_graph(way):
    """The graph shows none of what is in it."""
    model, (x, y) = Adapter(), rows()
    wrapped, *_ = make_private(model, size=len(x))
    run = torch.compile(wrapped, backend="aot_eager") if way == "outside" else wrapped
    if way == "inside":
        wrapped.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="gradients of bfloat16"):
        F.cross_entropy(run(x), y).backward()


def test_16_bits_beside_a_checkpoint():
    """What is computed again within the backward is no new forward."""
    wrapped, *_ = make_private(net(), size=B)
    x, y = rows()
    again = checkpoint(wrapped, x.clone().requires_grad_(), use_reentrant=True)
    with torch.autocast("cpu", BF16):
        out = wrapped(x)
    with pytest.raises(ValueError, match="gradients of bfloat16"):
        F.cross_entropy(out.float() + 1e-3 * again, y).backward()


def test_16_bits_that_come_later():
    """A branch that the first forward did not take is seen at forwards 2, 4, 8 and so on; after that, each time."""
    model, (x, y) = Sometimes([False] * 3 + [True] * 9), rows()
    wrapped, optimizer, _ = make_private(model, size=len(x))
    wrapped(x)  # and its checks, which run the model too
    model.recurring, refused = True, []
    for _ in range(9):
        try:
            F.cross_entropy(wrapped(x), y).backward()
            refused.append(False)
        except ValueError:
            refused.append(True)
        optimizer.zero_grad()
    assert refused[-4:] == [True] * 4 and not refused[0]


TRAINED = {
    "float32": (net, dict()),
    "float64": (lambda: net().double(), dict()),
    "no gradient through 16 bits": (SixteenBitsBelow, dict()),
    "a 16-bit output that does not count": (TwoOutputs, dict(loss=lambda out, y: F.cross_entropy(out[0], y))),
    "a sum": (
        net,
        dict(autocast=BF16, loss_reduction="sum", loss=lambda out, y: F.cross_entropy(out, y, reduction="sum")),
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_exact_trains(name):
    make, kw = TRAINED[name]
    model, (x, y) = make(), rows()
    trained(model, (x.double() if name == "float64" else x, y), **kw)
    assert any(s.any() for s in sums_of(model).values())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_batch_of_one_trains(dtype):
    """1/1 rounds nothing, whatever came before."""
    model = net()
    wrapped, optimizer, _ = make_private(model, size=1)
    for _ in range(3):
        x, y = rows(1)
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(wrapped(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loss_inside_of_the_model():
    model, (x, y) = WithLoss(), rows()
    wrapped, *_ = make_private(model, size=B)
    with torch.autocast("cpu", BF16):
        loss = wrapped(x, y)
    with pytest.raises(ValueError, match="loss_reduction='sum'"):
        loss.backward()
    wrapped(x, y).backward()
    assert any(s.any() for s in sums_of(model).values())


def test_an_evaluation_in_16_bits_leaves_nothing_behind():
    """A forward whose gradient nobody asks for does not count, nor one that was refused."""
    model, (x, y) = net(), rows()
    wrapped, optimizer, _ = make_private(model, size=B)
    for backward in (False, True):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16):
            out = cross_entropy(wrapped(x), y)
        if backward:
            with pytest.raises(ValueError, match="loss_reduction='sum'"):
                out.backward()
        cross_entropy(wrapped(x), y).backward()
    assert any(s.any() for s in sums_of(model).values())


def test_the_model_is_the_users_own_again_after_cleanup():
    model, (x, y) = net(), rows()
    wrapped, *_ = make_private(model, size=B)
    wrapped.cleanup()
    assert not model._forward_hooks
    with torch.autocast("cpu", BF16):
        cross_entropy(model(x), y).backward()


def scaled_mean(wrapped, optimizer, x, y):
    """torch's mean, as :class:`GradScaler` has it; a power of two changes nothing of the fault."""
    scaler = GradScaler(optimizer, 2.0**10, device="cpu")
    scaler.scale(cross_entropy(wrapped(x), y)).backward()


def test_a_scaled_mean_is_refused_too():
    model, (x, y) = net(), rows()
    wrapped, optimizer, _ = make_private(model, size=B)
    with torch.autocast("cpu", F16), pytest.raises(ValueError, match="loss_reduction='sum'"):
        scaled_mean(wrapped, optimizer, x, y)


C = 0.05


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("way", ["sum", "our mean"])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "random"])
@pytest.mark.parametrize("many", [7, 256, 1024])
def test_one_sample_moves_the_sum_by_at_most_C(many, alike, way, dtype):
    """The issue's model, 20-32-10, with the two remedies of the refusal.

    Of 1024 sums in float32 the last digit is 1e-4 C: see :class:`dpfast.clipping.clipped_sum.ClippedSum`.
    """
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))
    options = dict(noise_multiplier=0.0, max_grad_norm=C, poisson_sampling=False, data_loader=loader_of(many))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, criterion = dpfast.PrivacyEngine(), nn.CrossEntropyLoss(reduction="sum" if way == "sum" else "mean")
    wrapped, _, criterion, _ = engine.make_private(
        module=model,
        optimizer=optimizer,
        criterion=criterion,
        grad_sample_mode="ghost",
        loss_reduction=criterion.reduction,
        **options,
    )
    x, y = torch.randn(many, 20), torch.randint(10, (many,))
    if alike:
        x, y = x[:1].expand(many, 20).contiguous(), y[:1].expand(many).contiguous()
    sums = []
    for start in (0, 1):
        for p in model.parameters():
            p.summed_grad = None
        with torch.autocast("cpu", dtype):
            loss = criterion(wrapped(x[start:]), y[start:])
        loss.backward()
        sums.append(copy.deepcopy(sums_of(model)))
    moved = distance(*sums) / C
    assert 0 < moved <= SLACK + many * 2.0**-23
