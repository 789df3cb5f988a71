"""Models with bare parameters: precision, checkpoints, ties, branches that come later, and what is left behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpfast.layers.broadcast import BareParameter
from dpfast.refusals import LayoutError
from tests.helpers import BF16, F16, F32, F64, SLACK, assert_exact, distance, make_private, mse, run_fused, sse, sums_of
from tests.layers.test_bare_parameters import B, D, T, Uses, rows, targets
from tests.oracle import Verdict
from tests.privacy.judging import TIGHT, Private, examine


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


def exact(model: nn.Module, private: Private, x: Tensor, y: Tensor, dtype: torch.dtype = F64) -> None:
    """The clipped sums of a further batch."""
    batch = (x.to(dtype),), y.to(dtype), mse
    Verdict(model, *batch, TIGHT).check_sums(
        {name.removeprefix("model."): total for name, total in private.backward(*batch).items()}
    )


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


class Copying(nn.Module):
    """Keeps a copy of what it is given by ``what`` in its first forward."""

    def __init__(self, what: Callable[..., Any]):
        super().__init__()
        self.mix, self.gamma, self.what = nn.Linear(4, 2), nn.Parameter(torch.rand(4) + 0.5), what
        self.first: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            self.first = [copy.deepcopy(self.what(self))]
        return self.mix(x * self.gamma).mean(1)


@pytest.mark.parametrize("what", [lambda m: m.gamma, lambda m: m.mix, lambda m: m], ids=["parameter", "layer", "model"])
def test_a_copy_that_a_forward_makes(what):
    """It is of parameters, and of nothing that the looks at the samples are in the middle of."""
    private = examine(Copying(what), (rows(),), targets(), mse)
    model = private.model.to(F64)
    made = model.first[0]
    if made is not None and isinstance(made, nn.Module):
        assert [type(p) for p in made.parameters()] == [nn.Parameter] * len(list(made.parameters()))
        assert not any(isinstance(x, BareParameter) for m in made.modules() for x in vars(m).values())
    else:
        assert type(made) is nn.Parameter and torch.equal(made, model.gamma) and made is not model.gamma


def test_a_copied_model_trains_by_itself():
    """One that a forward of the original has made, in the middle of a look."""
    private = Private(Copying(lambda m: m), TIGHT)
    private.backward((rows(),), targets(), mse)
    made = private.model.first[0]
    for _ in range(2):
        made.first = [None]
        made.zero_grad()
        mse(made(rows(3)), targets(3)).backward()
    assert all(torch.isfinite(p).all() for p in made.parameters())
