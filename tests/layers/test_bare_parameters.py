"""Bare parameters that broadcast over the batch are served without vmap, and whatever else is done with one by vmap."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpfast.capture.graph_calls import INSIDE
from dpfast.capture.refusals import LayoutError
from dpfast.layers.broadcast import BareParameter
from dpfast.layers.generic import Generic
from tests.helpers import (
    BF16,
    F16,
    F32,
    F64,
    SLACK,
    assert_exact,
    check_layer,
    distance,
    make_private,
    mse,
    run_fused,
    sse,
    sums_of,
)
from tests.oracle import Verdict
from tests.privacy.judging import TIGHT, Private, examine

B, T, D = 3, 4, 6


@pytest.fixture
def vmaps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were run one sample at a time, each time that they were."""
    seen: list[str] = []
    call = Generic.__call__

    def counted(self: Generic, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self.module).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Generic, "__call__", counted)
    return seen


class Uses(nn.Module):
    """``use(x, p)`` between two linear layers, ``x [B, T, D]``."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor], *shape: int, into: int = D):
        super().__init__()
        self.one, self.two = nn.Linear(4, D), nn.Linear(into, 2)
        self.p = nn.Parameter(torch.rand(shape) + 0.5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.use(self.one(x).tanh(), self.p))


def rows(batch: int = B, length: int = T) -> Tensor:
    return torch.randn(batch, length, 4)


def cat(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([token, x], 1)


def added_in_place(x: Tensor, p: Any) -> Tensor:
    y = x * 1
    y += p
    return y.mul_(p)


def multiplied(x: Tensor, p: Any) -> Tensor:
    for each in p:
        x = x * each
    return x


SERVED: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "expand": (lambda x, p: cat(x, p.expand(len(x), -1, -1)), (1, 1, D)),
    "expand by a tuple": (lambda x, p: cat(x, p.expand((x.shape[0], 2, D))), (1, 1, D)),
    "expand from fewer dimensions": (lambda x, p: cat(x, p.expand(x.size(0), 2, -1)), (D,)),
    "expand_as": (lambda x, p: x * p.expand_as(x), (T, D)),
    "broadcast_to": (lambda x, p: x + torch.broadcast_to(p, x.shape), (1, T, D)),
    "repeat": (lambda x, p: cat(x, p.repeat(len(x), 2, 1)), (1, 1, D)),
    "repeat from fewer dimensions": (lambda x, p: x + p.repeat(len(x), T, 1), (D,)),
    "repeat by itself first": (lambda x, p: x + p.repeat(1, T, 1), (1, 1, D)),
    "expand by itself first": (lambda x, p: x + p.expand(-1, T, -1), (1, 1, D)),
    "add": (lambda x, p: x + p, (1, T, D)),
    "added to": (lambda x, p: p + x, (T, D)),
    "sub": (lambda x, p: (x - p) * (p - x), (D,)),
    "mul": (lambda x, p: torch.mul(x, p), (D,)),
    "div": (lambda x, p: x / p + 1 / p * x, (1, 1, D)),
    "divided": (lambda x, p: p / (2 + x), (1, D)),
    "in place": (added_in_place, (T, D)),
    "a scalar": (lambda x, p: x * p.exp() / (1 + p), ()),
    "of one element": (lambda x, p: x * p, (1,)),
    "channels": (lambda x, p: (x.transpose(1, 2).unsqueeze(3) * p).squeeze(3).transpose(1, 2), (1, D, 1, 1)),
    "sliced": (lambda x, p: x + p[:, : x.shape[1]] + p[:, -1:], (1, T + 2, D)),
    "indexed": (lambda x, p: x * p[1] + p[None, 0, ..., :], (2, D)),
    "iterated": (multiplied, (2, D)),
    "reshaped": (lambda x, p: x + p.view(T, -1).unsqueeze(0) + p.reshape(-1, D).flatten(0).view(1, T, D), (T * D,)),
    "permuted": (lambda x, p: x + p.permute(1, 0) + p.transpose(-1, 0), (D, T)),
    "squeezed": (lambda x, p: x * p.squeeze(0) + p.squeeze() + p.squeeze(-3), (1, 1, D)),
    "by element": (lambda x, p: x * p.sigmoid() + F.softplus(p) * torch.tanh(x) - (-p) ** 2 * x, (D,)),
    "numbers": (lambda x, p: x * (2 * p - 1) / (3 - p / 5) + p.clamp(min=0.7), (D,)),
    "of another dtype": (lambda x, p: x * p.to(x.dtype) + p.to(dtype=x.dtype) / 2, (D,)),
    "what is asked of it": (lambda x, p: x + p[: p.shape[0] - 1, : p.size(1)].view(p.numel() // D - 1, D), (T + 1, D)),
}


class Everything(nn.Module):
    """All uses, or some, one after the other."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, D), nn.Linear(D, 2)
        self.each = [SERVED[name] for name in names or SERVED]
        self.ps = nn.ParameterList([torch.rand(shape) + 0.5 for _, shape in self.each])

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        for (use, _), p in zip(self.each, self.ps, strict=True):
            x = (x + use(x, p)[:, :T]).tanh()
        return self.two(x).sum(1)


@pytest.mark.parametrize("use, shape", SERVED.values(), ids=SERVED)
def test_served_where_it_is_used(use, shape, vmaps):
    """Exact for three samples, for one and for none."""
    model, x = Uses(use, *shape).double(), rows().double()
    y = torch.randn(copy.deepcopy(model)(x).shape, dtype=F64)
    for batch in (B, 1, 0):
        assert_exact(model, (x[:batch],), y[:batch], mse)
    assert not vmaps


@pytest.mark.parametrize("length", [B, 1])
@pytest.mark.parametrize("name", ["expand", "add", "sliced", "mul"])
def test_as_many_positions_as_samples(name, length, vmaps):
    """Or one of them: what broadcasts over the batch is not taken for what broadcasts over positions."""
    use, shape = SERVED[name]
    shape = tuple(length if size == T else size for size in shape)
    check_layer(Uses(use, *shape), (rows(B, length),), F64, empty=False)
    assert not vmaps


def test_all_uses_are_within_the_sensitivity(vmaps):
    examine(Everything(), (rows(),), targets(), mse)
    assert not vmaps


UNSERVED: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "matmul": (lambda x, p: x @ p, (D, D)),
    "matmul from the left": (lambda x, p: p @ x, (T, T)),
    "linear": (lambda x, p: F.linear(x, p), (D, D)),
    "picked by a tensor": (lambda x, p: x + p[torch.arange(T)], (T + 1, D)),
    "cat": (lambda x, p: x + torch.cat([p, p], 2), (1, 1, D // 2)),
    "beside a buffer": (lambda x, p: x + p * torch.linspace(0, 1, T, dtype=x.dtype).unsqueeze(1), (D,)),
    "beside itself": (lambda x, p: x * (p * p), (D,)),
    "softmax": (lambda x, p: x * p.softmax(0), (D,)),
    "reduced": (lambda x, p: x * (p - p.mean()), (D,)),
    "positions first": (lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1), (1, D)),
    "positions first, of each": (lambda x, p: (x.transpose(0, 1) * p).transpose(0, 1), (T, 1, D)),
    "all rows at once": (lambda x, p: (x.flatten(0, 1) * p).view_as(x), (D,)),
    "interpolated": (lambda x, p: x + F.interpolate(p, size=D), (1, T, D // 2)),
    "einsum": (lambda x, p: torch.einsum("btd,d->btd", x, p), (D,)),
    "where": (lambda x, p: torch.where(x > 0, p, x), (D,)),
    "a method that tensors lack": (
        lambda x, p: x * getattr(p, "gain", p.detach) if hasattr(p, "gain") else x @ p,
        (D, D),
    ),
    "looked at for its kind": (lambda x, p: x * p if isinstance(p, Tensor) else x - 1, (D,)),
}


@pytest.mark.parametrize("use, shape", UNSERVED.values(), ids=UNSERVED)
def test_all_else_is_served_by_vmap(use, shape, vmaps):
    x = rows().double()
    assert_exact(Uses(use, *shape).double(), (x,), torch.randn(B, T, 2).double(), mse)
    assert vmaps


# With as many positions as samples, the number of rows does not tell that they are not the samples.
AMBIGUOUS: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "positions first": (lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1), (1, 1, D)),
    "positions first, by feature": (lambda x, p: (x.transpose(0, 1) * p).transpose(0, 1), (D,)),
    "expanded to positions": (lambda x, p: x + p.expand(x.shape[1], -1), (1, D)),
    "expanded to positions first": (lambda x, p: x + p.expand(x.shape[1], 1, -1).transpose(0, 1), (1, 1, D)),
    "repeated for positions": (lambda x, p: x * p.repeat(x.shape[1], 1), (D,)),
    "beside a buffer": (lambda x, p: x + p * torch.linspace(0, 1, B, dtype=x.dtype).unsqueeze(1), (D,)),
    "one copy for all": (lambda x, p: x + p.expand(len(x), -1, -1)[0], (1, 1, D)),
    "copies in another order": (lambda x, p: x * p.expand(len(x), -1, -1).flip(0), (1, 1, D)),
    "copies moved on by one": (lambda x, p: x * p.expand(len(x), -1, -1).roll(1, 0), (1, 1, D)),
    "a mean of copies": (lambda x, p: x + p.expand(len(x), -1, -1).mean(0), (1, 1, D)),
}


@pytest.mark.parametrize("use, shape", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_rows_that_only_look_like_samples(use, shape, vmaps):
    try:
        check_layer(Uses(use, *shape), (rows(B, B),), F64, empty=False)
    finally:
        assert vmaps


@pytest.mark.parametrize("use", [lambda x, p: p.expand(x.shape[1], -1), lambda x, p: p * torch.ones(B, 1)])
def test_a_table_that_is_returned(use):
    """A loss that computes with it, for every sample, would move all rows of it by each."""
    model = Uses(lambda x, p: x * p, 1, D)
    model.forward = lambda x: (model.two(model.one(x) * model.p), use(x, model.p))
    private, *_ = make_private(model, size=B)
    with pytest.raises(LayoutError, match="one sample at a time"):
        private(rows(B, B))


class Vision(nn.Module):
    """A small vision transformer as they are written: a class token, positions and scales of the residual branches."""

    def __init__(self, again: Callable[..., Tensor] | None = None, depth: int = 1):
        super().__init__()
        self.patch = nn.Linear(4, D)
        self.cls = nn.Parameter(torch.randn(1, 1, D))
        self.pos = nn.Parameter(torch.randn(1, T + 1, D))
        self.blocks = nn.ModuleList(Scaled() for _ in range(depth))
        self.head = nn.Linear(D, 2)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), self.patch(x)], 1) + self.pos
        for block in self.blocks:
            x = block(x) if self.again is None else self.again(block, x)
        return self.head(x[:, 0])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(D, D)
        self.gamma = nn.Parameter(torch.rand(D))
        self.shift = nn.ParameterList([torch.randn(D), torch.randn(())])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.mix(self.norm(x).mean(1, keepdim=True) + self.shift[0]) * self.shift[1].exp()


def targets(batch: int = B) -> Tensor:
    return 2 * torch.randn(batch, 2)


def test_a_vision_transformer(vmaps):
    examine(Vision(depth=2), (rows(),), targets(), mse)
    assert not vmaps


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_precision(dtype, vmaps):
    """Exact to the dtype's rounding; and the sum of one sample's contribution is within C however it is rounded."""
    model, x, y = Vision().to(dtype), rows().to(dtype), targets().to(dtype)
    assert_exact(model, (x,), y, mse)
    bound = Verdict(model, (x,), y, sse).max_grad_norm
    for i in range(B):
        alone = run_fused(model, ((x[i : i + 1],), y[i : i + 1]), sse, bound, loss_reduction="sum")
        nothing = {name: torch.zeros_like(total) for name, total in alone.sums.items()}
        assert distance(alone.sums, nothing) <= bound * SLACK
    assert not vmaps


@pytest.mark.parametrize("again", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints(again, vmaps):
    """What a checkpoint computes again in the backward finds the same stand-ins."""
    model = Vision(lambda block, x: checkpoint(block, x, use_reentrant=again))
    examine(model, (rows(),), targets(), mse)
    assert not vmaps


def test_autocast(vmaps):
    """A parameter without dimensions decides no dtype, though its copies have one."""
    seen: list[torch.dtype] = []

    def use(x: Tensor, p: Any) -> Tensor:
        out = x * p.exp()
        seen.append(out.dtype)
        return out + x

    model = Uses(use)
    private, *_ = make_private(model, size=B, loss_reduction="sum")
    with torch.autocast("cpu", dtype=BF16):
        loss = sse(private(rows().to(BF16)).float(), torch.randn(B, T, 2))
    loss.backward()
    assert seen[-1] == BF16 and model.p.summed_grad is not None and not vmaps


class Shared(nn.Module):
    """One parameter in two modules, used twice in one of them; a child reads its parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Scaled(), Scaled()
        self.two.gamma = self.one.gamma
        self.head, self.gain = nn.Linear(D, 2), nn.Parameter(torch.rand(D))
        self.borrows = [self.two]

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x) * self.borrows[0].gamma) * self.gain
        return self.head(x + self.one.shift[0]).sum(1)


def test_tied_and_borrowed(vmaps):
    examine(Shared(), (torch.randn(B, T, D),), targets(), mse)
    assert not vmaps


class Queries(nn.Module):
    """A parameter that goes through a layer before it meets the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.proj, self.head = nn.Parameter(torch.randn(1, T, 4)), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.proj(self.queries)).sum(1))


@pytest.mark.parametrize("batch", [B, T])
def test_through_a_layer(batch):
    examine(Queries(), (rows(batch),), targets(batch), mse)


class Unlike(nn.Module):
    """Two modules with bare parameters, of which vmap is to serve one alone, with a third inside."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.one, self.head = nn.Parameter(torch.randn(T, D)), Product(), nn.Linear(D, 2)
        self.first = nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(self.first(x) + self.pos)).sum(1)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(D, D)), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.w)


def test_vmap_serves_those_that_need_it(vmaps):
    examine(Unlike(), (rows(),), targets(), mse)
    assert set(vmaps) == {"Product"}


class Swallows(nn.Module):
    """It goes on without the parameter if anything is the matter with it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = x @ self.w
        except Exception:
            x = x * 2
        return self.head(x)


def test_an_exception_that_is_caught(vmaps):
    examine(Swallows(), (torch.randn(B, 4),), targets(), mse)
    assert vmaps


class Branches(nn.Module):
    """What is done with the parameter is told from outside."""

    def __init__(self, *uses: Callable[[Tensor, Any], Tensor], shape: tuple[int, ...] = (1, D)):
        super().__init__()
        self.one, self.two = nn.Linear(4, D), nn.Linear(D, 2)
        self.p = nn.Parameter(torch.randn(shape))
        self.uses, self.now = uses, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.uses[self.now](self.one(x).tanh(), self.p)).sum(1)


LATER = {
    "matmul": (lambda x, p: x + x @ p.transpose(0, 1), True),
    "expanded to positions": (lambda x, p: x + p.expand(x.shape[1], -1), True),
    "positions first": (lambda x, p: (x.transpose(0, 1) * p.unsqueeze(0)).transpose(0, 1), True),
    "one copy for all": (lambda x, p: x + p.expand(len(x), -1)[0], True),
    "another way": (lambda x, p: x * p, False),
}


@pytest.mark.parametrize("use, needs_vmap", LATER.values(), ids=LATER)
@pytest.mark.parametrize("first", [B, 1])
def test_a_later_branch(use, needs_vmap, first, vmaps):
    """Another use, in a batch that happens to have as many positions as samples, is checked as the first one was."""
    model = Branches(lambda x, p: x + p, use).double()
    private = Private(model, TIGHT)
    private.backward((rows(first, B).double(),), targets(first).double(), mse)
    assert not vmaps
    for now in (1, 0, 1):
        private.model.now = model.now = now
        exact(model, private, rows(B, B), targets())
    assert bool(vmaps) == needs_vmap


def test_a_use_seen_in_a_batch_of_one_is_checked_in_another(vmaps):
    """A batch of one shows nothing of the samples."""
    model = Branches(lambda x, p: x + p, LATER["one copy for all"][0]).double()
    private = Private(model, TIGHT)
    for now, batch in ((1, 1), (0, B), (1, B)):
        private.model.now = model.now = now
        exact(model, private, rows(batch, B), targets(batch))
    assert vmaps


def stood_in(model: nn.Module) -> bool:
    return any(isinstance(value, BareParameter) for module in model.modules() for value in vars(module).values())


def test_the_module_has_its_parameters_all_the_while():
    """``parameters()`` and ``state_dict()`` in the forward, and all of it afterwards, after one that raised too."""
    model = Uses(lambda x, p: x + p, D)
    private, *_ = make_private(model, size=B)
    held, found = dict(model.named_parameters()), []

    def use(x: Tensor, p: Any) -> Tensor:
        assert all(q is held[name] for name, q in model.named_parameters())
        assert model.state_dict()["p"].data_ptr() == held["p"].data_ptr()
        found.append(type(p))
        return (x + p) / fine[0]

    model.use, fine = use, [1]
    private(rows()).sum().backward()
    assert found[-1] is BareParameter and model.p is held["p"] and not stood_in(model)
    fine.clear()
    with pytest.raises(IndexError):
        private(rows())
    assert found[-1] is BareParameter and model.p is held["p"] and not stood_in(model)
    fine.append(1)
    with torch.no_grad():
        private(rows())
    assert found[-1] is nn.Parameter
    private.eval()(rows())
    assert found[-1] is nn.Parameter


def test_a_copy_has_its_own(vmaps):
    private, *_ = make_private(Vision(), size=B)
    private(rows()).sum().backward()
    for p in private.parameters():
        p.summed_grad = None
    other = copy.deepcopy(private)
    other(rows()).sum().backward()
    assert all(total.any() for total in sums_of(other).values())
    assert not any(total.any() for total in sums_of(private).values()) and not vmaps


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(4, 2), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Any:
        return self.lin(x) * self.scale, {"scale": self.scale.exp()}


def test_a_parameter_that_is_returned():
    """It is not what a sample gives, and a loss would compute with it past all layers."""
    private, *_ = make_private(Returns(), size=B)
    with pytest.raises(LayoutError, match="one sample at a time"):
        private(torch.randn(B, 4))


def test_frozen(vmaps):
    model = Vision()
    model.cls.requires_grad_(False)
    model.blocks[0].gamma.requires_grad_(False)
    examine(model, (rows(),), targets(), mse)
    assert not vmaps


def test_random_numbers(vmaps):
    """Dropout of a sum with a parameter is drawn once a sample and position, as without privacy."""
    model = Uses(lambda x, p: F.dropout(x + p, 0.5) * 2, T, D)
    private, *_ = make_private(model, size=B)
    mse(private(rows()), torch.randn(B, T, 2)).backward()
    assert not vmaps and private.per_sample_gradient_norms.isfinite().all()


TRACED = ("expand", "repeat", "sub", "in place", "a scalar", "numbers")


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs were compiled in the test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled(graphs, vmaps):
    """What a compiler calls by other names is in one graph, and exact there, for batches of any size."""
    model = Everything(*TRACED).double()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, backend="aot_eager", dynamic=True)
    for batch in (B, B + 1):
        exact(model, private, rows(batch), targets(batch))
    assert graphs() == 1 and not vmaps


@pytest.mark.compiles
def test_a_part_of_the_graph(graphs, vmaps):
    """Inductor has the copies among its own operators, and hands their gradients over at the graph's end."""
    model = Linear()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, dynamic=False)
    with torch._inductor.config.patch("aot_inductor.debug_compile", True):  # less time in the C++ compiler
        for _ in range(3):
            exact(model, private, torch.randn(B, 4), targets(), F32)
    assert private.wrapped.clipped_sum.compiled == dict.fromkeys(("one", "two", "p"), INSIDE)
    assert graphs() == 1 and not vmaps


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.p = nn.Linear(4, D), nn.Linear(D, 2), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) + self.p)


def test_compiled_blocks_in_checkpoints(graphs, vmaps):
    """A block that is compiled finds the stand-ins too when a checkpoint computes it again."""
    model = Vision(lambda block, x: checkpoint(block, x, use_reentrant=False)).double()
    private = Private(model, TIGHT)
    private.model.blocks[0].compile(backend="aot_eager")
    for _ in range(2):
        exact(model, private, rows(), targets())
        assert not stood_in(private.model)
    assert graphs() == 1 and not vmaps


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:  # type: ignore[override]
        raise ZeroDivisionError


def test_a_compiled_backward_that_raises(graphs):
    """No stand-in is left, and the next batch is exact."""
    model = Vision().double()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, backend="aot_eager", dynamic=False)
    exact(model, private, rows(), targets())
    with pytest.raises(ZeroDivisionError):
        Failing.apply(private.wrapped(rows().double())).sum().backward()
    assert not stood_in(private.model)
    out = private.wrapped(rows().double())
    out.register_hook(lambda G: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    gc.collect()
    assert not stood_in(private.model)
    exact(model, private, rows(), targets())


@pytest.mark.parametrize("name", ["matmul", "one copy for all"])
def test_a_later_branch_of_a_compiled_model(name, graphs, vmaps):
    model = Branches(lambda x, p: x + p, LATER[name][0]).double()
    private = Private(model, TIGHT)
    private.wrapped = torch.compile(private.wrapped, backend="aot_eager", dynamic=False)
    for now in (0, 1, 0, 1):
        private.model.now = model.now = now
        exact(model, private, rows(B, B), targets())
    assert vmaps


def exact(model: nn.Module, private: Private, x: Tensor, y: Tensor, dtype: torch.dtype = F64) -> None:
    """The clipped sums of a further batch."""
    batch = (x.to(dtype),), y.to(dtype), mse
    Verdict(model, *batch, TIGHT).check_sums(
        {name.removeprefix("model."): total for name, total in private.backward(*batch).items()}
    )
