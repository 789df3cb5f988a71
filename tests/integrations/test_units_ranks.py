"""Users on several ranks: each is whole on one of them, and a step is the step of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dpfast import BatchMemoryManager, PrivacyEngine
from dpfast.data.packed import Packed
from dpfast.data.sampling import PoissonBatches
from dpfast.data.units import Units
from dpfast.data.user_batches import UserBatches
from dpfast.losses import segment_cross_entropy

ROWS = [[0], [1, 2], [3], [4, 5, 6, 7], [8, 9], [10, 11, 12], [13], [14, 15]]


def data() -> TensorDataset:
    draw = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(16, 5, generator=draw), torch.randn(16, 3, generator=draw))


def collated(rows: list) -> tuple:
    x, y = data().tensors
    return (torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])) if rows else (x[:0], y[:0])


def train_rank(rank: int, world_size: int, kind: str) -> list:
    """The weights after three steps."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    if world_size > 1:
        model = DistributedDataParallel(model) if kind == "replicated" else fully_shard(model)
    batches = UserBatches(Units(ROWS, 3), 3, seed=4, sample_rate=0.6, rank=rank, world_size=world_size)
    model, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data(), batch_sampler=batches, collate_fn=collated),
        noise_multiplier=0.7,
        max_grad_norm=0.5,
        loss_reduction="sum",
        noise_generator=torch.Generator().manual_seed(5),
    )
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as parts:
        for x, y in parts:
            (model(x) - y).square().mean(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_ranks_together_are_one_process(kind, ranks):
    alone = train_rank(0, 1, kind)
    for found in ranks(train_rank, 3, kind):
        assert not isinstance(found, Exception), found
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def disagreeing(rank: int) -> str:
    """The ranks have other users."""
    model = nn.Linear(5, 3)
    batches = UserBatches(Units([*ROWS[:-1], [14 + rank % 2]], 3), 3, seed=4, rank=rank, world_size=3)
    try:
        PrivacyEngine(accountant="rdp").make_private(
            module=DistributedDataParallel(model),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data(), batch_sampler=batches),
            noise_multiplier=0.7,
            max_grad_norm=0.5,
        )
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_users_are_refused(ranks):
    found = ranks(disagreeing)
    assert all("no shares of the same" in text for text in found), found


class Sums(nn.Module):
    """Each position by itself: samples of a packed row do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.ids(input_ids))


def packed_rank(rank: int, world_size: int, kind: str, build: Any = Sums, rate: float = 0.6, bad: float = 1.0) -> list:
    """The weights after three steps over packed rows; ``bad`` is a factor in the loss of the longest sample."""
    torch.manual_seed(0)
    model: Any = build()
    if world_size > 1:
        model = DistributedDataParallel(model) if kind == "replicated" else fully_shard(model)
    samples = [torch.arange(n) % 9 for n in (3, 5, 2, 8, 4, 6, 2, 7)]
    batches = PoissonBatches(8, 3, seed=4, sample_rate=rate, rank=rank, world_size=world_size)
    model, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(samples, batch_sampler=batches, collate_fn=Packed(8)),
        noise_multiplier=0.7,
        max_grad_norm=0.5,
        loss_reduction="sum",
        noise_generator=torch.Generator().manual_seed(5),
        units="packed",
    )
    for batch in loader:
        logits = model(batch["input_ids"], batch["position_ids"])
        logits = logits * torch.where(batch["input_ids"] == 7, bad, 1.0)[..., None]
        segment_cross_entropy(logits, batch["labels"], position_ids=batch["position_ids"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]


class Attends(Sums):
    """A head that is tied to the embedding, and attention by segments, which dpfast runs sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.ids.weight
        self.qkv, self.norm = nn.Linear(6, 18), nn.LayerNorm(6)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.ids(input_ids)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        of = (position_ids == 0).cumsum(1)
        mask = (of[:, :, None] == of[:, None]).tril().unsqueeze(1)
        return self.head(x + nn.functional.scaled_dot_product_attention(q, k, v, mask).squeeze(1))


class Recomputes(nn.Module):
    """Attention that is computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Attends()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, input_ids, position_ids, use_reentrant=False)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
@pytest.mark.parametrize("build, rate", [(Sums, 0.6), (Attends, 0.6), (Attends, 0.1), (Recomputes, 0.1)])
def test_packed_rows_of_ranks_together_are_those_of_one_process(build, rate, kind, ranks):
    """Each rank packs its share; at the lower rate most of them have no sample."""
    alone = packed_rank(0, 1, kind, build, rate)
    for found in ranks(packed_rank, 3, kind, build, rate):
        assert not isinstance(found, Exception), found
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


class Meets(Sums):
    """Each position is given the sum of all before it."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.ids(input_ids).cumsum(1))


class Carries(Attends):
    """Attention that is written out: its mask is a product with zeros."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.ids(input_ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        of = (position_ids == 0).cumsum(1)
        scores = (q @ k.transpose(1, 2)).masked_fill(of[:, :, None] != of[:, None], -torch.inf)
        return self.head(x + torch.softmax(scores, 2) @ v)


@pytest.mark.parametrize("build, why", [(Meets, "not kept apart"), (Carries, "not finite")])
def test_what_one_rank_sees_of_packed_rows_all_ranks_of_a_sharded_model_refuse(build, why, ranks):
    """No rank waits for another one."""
    found = ranks(packed_rank, 3, "sharded", build, 1.0, torch.inf)
    assert all(isinstance(one, Exception) and why in str(one) for one in found), found


class Switches(Meets):
    """Positions meet where it is asked to mix them."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, mix: bool = False) -> torch.Tensor:
        return super().forward(input_ids, position_ids) if mix else self.head(self.ids(input_ids))


def refusals(rank: int, build: Any, rows: list, calls: list) -> list[str]:
    """What each forward of a sharded model is refused for; ``rows`` has a ``seq_idx`` or position ids for each rank."""
    torch.manual_seed(0)
    batches = PoissonBatches(8, 3, seed=4, rank=rank, world_size=3)
    model = fully_shard(build())
    model, _, _ = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader([torch.arange(5)] * 8, batch_sampler=batches, collate_fn=Packed(8)),
        noise_multiplier=0.7,
        max_grad_norm=0.5,
        units="packed",
    )
    found = []
    for more in calls:
        positions = torch.tensor(rows[rank])
        try:
            model(torch.arange(positions.numel()).view_as(positions) % 9, position_ids=positions, **more)
            found.append("")
        except (ValueError, RuntimeError) as error:
            found.append(str(error))
    return found


ALONE, TWO = [[0, 1, 2]], [[0, 0, 1]]  # one sample in a row, and two


@pytest.mark.parametrize(
    ("build", "rows", "calls", "refused"),
    [
        (Meets, [ALONE, TWO, ALONE], [{}] * 4, [True] * 4),  # again and again
        (Meets, [ALONE * 3, TWO, ALONE * 3], [{}], [True]),  # a trial on three rows of one sample would show nothing
        (Switches, [TWO, TWO, TWO], [{}, {}, dict(mix=True)], [False, False, True]),  # called in another way
        (Sums, [ALONE, ALONE, [[1, 2, 3]]], [{}], [True]),  # it cannot be told where samples begin, on one rank
    ],
    ids=["raised", "most", "kind", "unmarked"],
)
def test_trials_of_ranks_together(build, rows, calls, refused, ranks):
    """What one of them sees all of them are told of, and none is left waiting."""
    for found in ranks(refusals, build, rows, calls):
        assert [bool(text) for text in found] == refused, found
