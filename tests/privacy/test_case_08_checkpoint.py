"""Case 8, gradient checkpointing: use_reentrant True and False, of some blocks, of all, of the whole."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.helpers import F32, F64, assert_exact, assert_sensitivity, make_private, mse, sums_of, token_loss
from tests.oracle import Verdict
from tests.zoo import TinyGPT

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.gate = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x + self.gate * self.out(torch.tanh(self.fc(self.norm(x))))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, which: set):
        super().__init__()
        self.first, self.blocks, self.last = (
            nn.Linear(4, 4),
            nn.ModuleList(Block() for _ in range(3)),
            nn.Linear(4, 2),
        )
        self.reentrant, self.which = reentrant, which

    def forward(self, x):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=self.reentrant) if i in self.which else block(x)
        return self.last(x)


@REENTRANT
@pytest.mark.parametrize("which", [{1}, {0, 1, 2}, {0, 2}], ids=["middle", "all", "outer"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_blocks(dtype, which, reentrant):
    model = Checkpointed(reentrant, which).to(dtype)
    x, y = torch.randn(4, 5, 4, dtype=dtype), torch.randn(4, 5, 2, dtype=dtype)
    assert_exact(model, (x,), y, mse)
    if dtype == F64:
        assert_sensitivity(model, ((x,), y), mse, 0.05)


@REENTRANT
def test_shared_block(reentrant):
    """One block checkpointed three times: its uses meet in one norm."""
    model = Checkpointed(reentrant, {0, 1, 2}).double()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    assert_exact(model, (torch.randn(4, 5, 4, dtype=F64),), torch.randn(4, 5, 2, dtype=F64), mse)


@REENTRANT
def test_nested(reentrant):
    class Nested(Checkpointed):
        def forward(self, x):
            x = checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)
            return self.last(x)

        def inner(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            return x

    x, y = torch.randn(4, 5, 4, dtype=F64), torch.randn(4, 5, 2, dtype=F64)
    assert_exact(Nested(reentrant, set()).double(), (x,), y, mse)


@REENTRANT
def test_sequential(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(4, 4), nn.Sequential(*[Block() for _ in range(4)])

        def forward(self, x):
            return checkpoint_sequential(self.body, 2, self.first(x), use_reentrant=reentrant)

    x, y = torch.randn(4, 5, 4, dtype=F64), torch.randn(4, 5, 4, dtype=F64)
    assert_exact(Net().double(), (x,), y, mse)


@REENTRANT
def test_the_whole_model_from_outside(reentrant):
    """``checkpoint(model, x)`` in the user's loop; the re-entrant one needs an input that requires grad."""
    model = Checkpointed(reentrant, set()).double()
    twin = copy.deepcopy(model)
    wrapped, optimizer, _ = make_private(model, max_grad_norm=0.05)
    for n in (4, 3):
        x, y = torch.randn(n, 5, 4, dtype=F64), torch.randn(n, 5, 2, dtype=F64)
        verdict = Verdict(twin, (x,), y, mse, 0.05)
        x.requires_grad_(reentrant)
        mse(checkpoint(wrapped, x, use_reentrant=reentrant), y).backward()
        verdict.check_norms(wrapped.per_sample_gradient_norms)
        verdict.check_sums(sums_of(model))
        optimizer.step()
        optimizer.zero_grad()


@REENTRANT
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_across_a_checkpoint(tied, reentrant):
    """The head is in the outer backward, the embedding behind the inner one."""

    class Mixed(TinyGPT):
        def forward(self, ids):
            h = self.tok(ids) + self.wpe(torch.arange(ids.shape[1])[None])
            h = checkpoint(lambda h: h + self.out(torch.tanh(self.fc(self.norm(h)))), h, use_reentrant=reentrant)
            return self.head(h)

    ids, targets = torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    assert_exact(Mixed(tied=tied).double(), (ids,), targets, token_loss)


@REENTRANT
def test_dropout_is_drawn_once(reentrant):
    """The recomputed forward repeats the masks, so the norms are those of the loss that was seen."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mid, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            h = checkpoint(lambda h: self.drop(torch.tanh(self.mid(h))), self.first(x), use_reentrant=reentrant)
            return self.last(h)

    model = Dropping().double()
    x, y = torch.randn(1, 4, dtype=F64), torch.randn(1, 2, dtype=F64)
    wrapped, _, _ = make_private(model, max_grad_norm=1e9)
    torch.manual_seed(7)
    mse(wrapped(x), y).backward()
    sums = sums_of(model)
    wrapped.to_standard_module()
    torch.manual_seed(7)
    model.zero_grad()
    mse(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(sums[name], p.grad)
