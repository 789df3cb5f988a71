"""DistributedDataParallel: a step over several ranks is the step of one process on the union of their batches."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dpfast import PrivacyEngine
from dpfast.data.sampling import PoissonBatches
from dpfast.distributed.ranks import Ranks, Replicated, _buckets
from dpfast.refusals import RankLostError
from tests.integrations.processes import Processes

STEPS, N, PER_EPOCH, SEED = 6, 24, 8, 21


def data() -> TensorDataset:
    draw = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(N, 5, generator=draw), torch.randint(0, 3, (N,), generator=draw))


def collated(rows: list) -> tuple:
    """Opacus' loaders do this for empty batches."""
    x, y = data().tensors
    return (torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])) if rows else (x[:0], y[:0])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def private(rank: int, world_size: int, optimizer: str = "sgd", secure: bool = False, **options: Any) -> tuple:
    """``(engine, model, optimizer, loader)`` whose batches and noise are those of any other world size."""
    model = net()
    batches = PoissonBatches(N, PER_EPOCH, seed=SEED, rank=rank, world_size=world_size)
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        "own step": lambda p: torch.optim.RMSprop(p, lr=0.01),
    }[optimizer]
    engine = PrivacyEngine(accountant="rdp", secure_mode=secure)
    settings = dict(noise_multiplier=0.7, max_grad_norm=0.5, poisson_sampling=False)
    if not secure:
        settings["noise_generator"] = torch.Generator().manual_seed(5 + 100 * rank)  # rank 0's counts
    model, opt, loader = engine.make_private(
        module=DistributedDataParallel(model) if world_size > 1 else model,
        optimizer=make(model.parameters()),
        data_loader=DataLoader(data(), batch_sampler=batches, collate_fn=collated),
        **(settings | options),
    )
    return engine, model, opt, loader


def train(model: Any, optimizer: Any, batches: Any, data_set: TensorDataset, steps: int = STEPS) -> list:
    """Noisy gradients of each step, and the weights."""
    x, y = data_set.tensors
    seen = []
    for _, indices in zip(range(steps), batches, strict=False):
        F.cross_entropy(model(x[indices]), y[indices], reduction="sum").div(max(1, len(indices))).backward()
        optimizer.step()
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.zero_grad()
    return [*seen, torch.cat([p.detach().flatten() for p in model.parameters()])]


def train_rank(rank: int, world_size: int, kind: str, options: dict) -> list:
    engine, model, optimizer, loader = private(rank, world_size, kind, **options)
    found = train(model, optimizer, loader.batch_sampler, loader.dataset)
    return [*found, engine.accountant.history, optimizer.max_grad_norms]


ADAPTIVE = dict(
    clipping="adaptive",
    target_unclipped_quantile=0.5,
    clipbound_learning_rate=0.3,
    max_clipbound=10.0,
    min_clipbound=0.01,
    unclipped_num_std=2.0,
)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sgd", {}),
        ("adamw", {"clipping": "per_layer", "group_noise": "equal", "noise_correction": 1e-3}),
        ("own step", ADAPTIVE),
        ("sgd", ADAPTIVE | {"max_grad_norm": {"0": 0.2, "": 0.3}, "group_noise": "equal"}),
    ],
    ids=["sgd", "adamw, per layer", "adaptive, an optimizer without a fused update", "adaptive groups"],
)
def test_ranks_together_are_one_process(kind, options, ranks):
    alone = train_rank(0, 1, kind, options)
    together = ranks(train_rank, 3, kind, options)
    sizes = [len(PoissonBatches(N, PER_EPOCH, seed=SEED).logical_batch(k)) for k in range(STEPS)]
    assert min(sizes) < 3 < max(sizes)  # some shares are empty, some have several samples
    for found in together:
        assert not isinstance(found, Exception), found
        for got, other, want in zip(found[:-2], together[0][:-2], alone[:-2], strict=True):
            assert torch.equal(got, other)  # the ranks agree bit for bit
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert found[-2] == alone[-2]  # each step is accounted once
        assert found[-1] == pytest.approx(alone[-1], rel=1e-6)


def noise_alone(rank: int, world_size: int) -> torch.Tensor:
    _, model, optimizer, _ = private(rank, world_size)
    return train(model, optimizer, [[]], data(), steps=1)[0]


def test_noise_is_the_same_bit_for_bit_at_any_world_size_and_added_once(ranks):
    """Nobody has a sample: what is left is the noise."""
    alone = noise_alone(0, 1)
    assert alone.abs().min() > 0
    for found in ranks(noise_alone, 3):
        assert torch.equal(found, alone)


def in_pieces(rank: int, world_size: int) -> torch.Tensor:
    """Opacus' memory manager: the ranks may have different numbers of physical batches."""
    _, model, optimizer, loader = private(rank, world_size)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as physical:
        for x, y in physical:
            loss = F.cross_entropy(model(x), y) if len(x) else model(x).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def opacus_loaders(rank: int) -> tuple:
    """Poisson sampling by the engine, from a loader as Opacus' examples have it."""
    torch.manual_seed(rank)
    model = net()
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=DistributedDataParallel(model),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    shares = []
    for x, y in loader:
        shares.append(x)
        (F.cross_entropy(model(x), y) if len(x) else model(x).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return shares, [p.detach() for p in model.parameters()], optimizer.expected_batch_size


def test_the_engine_shares_out_one_poisson_batch(ranks):
    found = ranks(opacus_loaders)
    shares, weights, expected = zip(*found, strict=True)
    assert set(expected) == {6} and {len(of_rank) for of_rank in shares} == {4}
    for others in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))
    whole = data().tensors[0].tolist()
    for step in zip(*shares, strict=True):
        rows = [whole.index(row) for share in step for row in share.tolist()]
        assert len(set(rows)) == len(rows)
        assert max(map(len, step)) - min(map(len, step)) <= 1


def test_opacus_memory_manager(ranks):
    alone = in_pieces(0, 1)
    for found in ranks(in_pieces, 3):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def secure(rank: int) -> torch.Tensor:
    _, model, optimizer, loader = private(rank, 3, secure=True)
    return train(model, optimizer, loader.batch_sampler, loader.dataset)[-1]


def test_secure_keys_are_common(ranks):
    one, *others = ranks(secure)
    assert all(torch.equal(one, other) for other in others)


def troubles(rank: int) -> list[str]:
    """Ranks that are not at the same step of the same run; a loader that gives a sample to both."""
    found = []

    def message(act: Any) -> None:
        try:
            act()
            found.append("")
        except ValueError as error:
            found.append(str(error))

    def step_with(change: Any) -> None:
        engine, model, optimizer, _ = private(rank, 3)
        change(optimizer)
        weights = [p.detach().clone() for p in model.parameters()]
        try:
            train(model, optimizer, [[rank]], data(), steps=1)
        finally:
            assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
            assert len(engine.accountant) == 0

    def skip_ahead(optimizer: Any) -> None:
        optimizer.noise.step += rank

    def other_key(optimizer: Any) -> None:
        optimizer.noise.load_state_dict({"step": 0, "key": (rank, *range(7)), "rounding_key": None})

    def less_noise(optimizer: Any) -> None:
        optimizer.noise_multiplier -= 0.1 * rank

    def other_batch(optimizer: Any) -> None:
        optimizer.expected_batch_size += rank

    def freeze_one(optimizer: Any) -> None:
        optimizer.param_groups[0]["params"][2 + rank % 2].requires_grad_(False)  # of the same size

    for change in (skip_ahead, other_key, less_noise, other_batch, freeze_one):
        message(lambda change=change: step_with(change))
    model = net()
    for poisson, loader in ((False, DataLoader(data(), batch_size=4)),):
        message(
            lambda poisson=poisson, loader=loader: PrivacyEngine().make_private(
                module=DistributedDataParallel(model),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=poisson,
            )
        )
    return found


def test_ranks_that_disagree_are_refused_before_anything_is_used(ranks):
    for found in ranks(troubles):
        step, key, multiplier, batch, trained, shared = found
        assert "the expected batch size differs between the ranks: [3.0, 4.0, 5.0]" in batch
        assert "the set of parameters that train differs between the ranks." in trained
        assert "the noise's step differs between the ranks: [0.0, 1.0, 2.0]" in step
        assert "the noise's key differs between the ranks." in key
        assert "noise_multiplier differs" in multiplier
        assert "a sample must be on one rank only" in shared


def overlapping(rank: int) -> list[str]:
    """Batches that would hold a sample on two ranks in one step."""

    def sampled(world_size: int = 3, of_rank: int = rank, **options: Any) -> DataLoader:
        sampler = DistributedSampler(data(), world_size, of_rank, drop_last=True, **options)
        return DataLoader(data(), batch_size=2, sampler=sampler)

    def poisson(seed: int, step: int = 0) -> DataLoader:
        batches = PoissonBatches(N, PER_EPOCH, seed=seed, rank=rank, world_size=3)
        batches.step = step
        return DataLoader(data(), batch_sampler=batches)

    found = []
    for loader in (sampled(), sampled(1, 0), sampled(seed=rank), poisson(7 + rank), poisson(7, step=rank)):
        model = net()
        try:
            PrivacyEngine(accountant="rdp").make_private(
                module=DistributedDataParallel(model),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                poisson_sampling=False,
            )
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_sample_is_on_one_rank_only(ranks):
    for own, whole, *others in ranks(overlapping):
        assert own == ""
        assert "are the share of rank 0 of 1" in whole
        assert len(others) == 3 and all("a sample may be on two ranks" in message for message in others)


def private_twice(rank: int) -> tuple:
    """The model that make_private has returned, with a new optimizer."""
    engine, model, *_ = private(rank, 3)
    torch.manual_seed(1)
    model, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=6),
        noise_multiplier=0.7,
        max_grad_norm=0.5,
    )
    return optimizer.ranks.world_size, train(model, optimizer, [[rank]], data(), steps=1)


def test_a_model_made_private_again_still_has_its_ranks(ranks):
    """Else each rank would add the same noise to a sum of its own, which lays their differences bare."""
    one, *others = ranks(private_twice)
    for world_size, seen in [one, *others]:
        assert world_size == 3
        assert all(torch.equal(got, want) for got, want in zip(seen, one[1], strict=True))


def dies(rank: int) -> Any:
    _, model, optimizer, _ = private(rank, 2)
    train(model, optimizer, [[0], [1]], data(), steps=2)
    if rank == 1:
        os._exit(0)
    train(model, optimizer, [[2]], data(), steps=1)


def test_a_rank_that_dies_ends_the_step_with_a_clear_error(tmp_path):
    pair = Processes(tmp_path, 2)
    (error,) = pair(dies, answers=1)
    pair.end()
    assert isinstance(error, RankLostError)
    assert "start all ranks again from the last checkpoint" in str(error)


def test_buckets_hold_what_fits_in_order():
    big, small = torch.zeros(8 << 20), torch.zeros(10)
    sums = {"a": small, "b": big, "c": small.double(), "d": small, "e": small}
    assert [list(bucket) for bucket in _buckets(sums)] == [["a"], ["b"], ["c"], ["d", "e"]]


def test_shares_of_a_poisson_batch():
    whole = PoissonBatches(1000, 10, seed=SEED)
    sizes = [len(batch) for batch in whole]
    assert len(sizes) == 10 and min(sizes) > 60 and max(sizes) < 140 and len(set(sizes)) > 3
    for step in range(10):
        shares: list[int] = []
        for rank in range(3):
            one = PoissonBatches(1000, 10, seed=SEED, rank=rank, world_size=3)
            one.step = step
            shares += next(iter(one))
        assert sorted(shares) == whole.logical_batch(step)
    assert whole.logical_batch(0) != whole.logical_batch(10)
    assert issubclass(Replicated, Ranks) and Ranks().most(3) == 3
