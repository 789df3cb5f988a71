"""Poisson sampling as a pure function of seed and step: resumable anywhere, and one logical batch for all ranks."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import opacus.utils.batch_memory_manager
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from dpfast.ranks import Ranks


class PoissonBatches(Sampler[list[int]]):
    """Batches of indices; each sample is in each batch with probability ``sample_rate``, independently.

    Every rank draws the whole logical batch from the common seed and takes each ``world_size``-th of its samples: the
    union over the ranks is the very batch that a single process draws, whatever the number of ranks, the ranks' shares
    differ by one sample at most, and no rank skips a step because its share is empty. (Opacus' sampler splits the
    data set instead, skips empty shares, which leaves the other ranks waiting, and draws the same positions on all
    ranks if these are seeded alike.)

    Args:
        num_samples: size of the data set.
        steps_per_epoch: ``1 / sample_rate``.
        seed: up to 128 bits; the same on all ranks.
        rank, world_size: whose share this is.

    Attributes:
        step: the number of the next batch, counted from the beginning of training; set it to resume. With workers that
            prefetch, it is ahead of what training has seen.
    """

    def __init__(self, num_samples: int, steps_per_epoch: int, *, seed: int, rank: int = 0, world_size: int = 1):
        if num_samples < 1 or steps_per_epoch < 1:
            raise ValueError(f"num_samples={num_samples}, steps_per_epoch={steps_per_epoch}: both must be at least 1")
        if not 0 <= seed < 1 << 128:
            raise ValueError(f"seed={seed}: give an integer of at most 128 bits that is not negative")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks count from 0")
        self.num_samples, self.steps_per_epoch, self.seed = num_samples, steps_per_epoch, seed
        self.rank, self.world_size = rank, world_size
        self.step = 0

    @property
    def sample_rate(self) -> float:
        """Probability of each sample to be in a batch."""
        return 1 / self.steps_per_epoch

    def logical_batch(self, step: int) -> list[int]:
        """Indices of the whole batch of ``step``, over all ranks, in order."""
        words = np.random.SeedSequence(self.seed, spawn_key=(step,))
        draws = np.random.Generator(np.random.Philox(words)).random(self.num_samples)
        return np.flatnonzero(draws < self.sample_rate).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's shares, to the end of the epoch that :attr:`step` is in."""
        end = (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch
        while self.step < end:
            self.step += 1
            yield self.logical_batch(self.step - 1)[self.rank :: self.world_size]

    def __len__(self) -> int:
        return self.steps_per_epoch

    def physical_batches(self, step: int, size: int) -> list[list[int]]:
        """This rank's share of ``step`` in parts of at most ``size`` samples: as many, at least one, on every rank."""
        whole = self.logical_batch(step)
        largest = -(-len(whole) // self.world_size)
        parts = np.array_split(np.array(whole[self.rank :: self.world_size], dtype=int), max(1, -(-largest // size)))
        return [part.tolist() for part in parts]


class BatchMemoryManager(opacus.utils.batch_memory_manager.BatchMemoryManager):
    """Opacus' ``BatchMemoryManager``, under which all ranks run equally many physical batches, some of them empty.

    A model after ``fully_shard`` needs that: its ranks gather parameters together in every forward and backward. For
    any other loader than one that is shared out over ranks it is Opacus' own.
    """

    def __enter__(self) -> DataLoader:
        _abandon(self.optimizer)
        batches = self.data_loader.batch_sampler
        if not isinstance(batches, PoissonBatches):
            return super().__enter__()
        return with_batches(self.data_loader, _Physical(batches, self.max_physical_batch_size, self.optimizer))


class _Physical(Sampler[list[int]]):
    def __init__(self, batches: PoissonBatches, size: int, optimizer: Any):
        self.batches, self.size, self.optimizer = batches, size, optimizer

    def __iter__(self) -> Iterator[list[int]]:
        _abandon(self.optimizer)
        first = self.batches.step
        for step, _ in enumerate(self.batches, first):
            *others, last = self.batches.physical_batches(step, self.size)
            for part in others:
                self.optimizer.signal_skip_step(True)
                yield part
            self.optimizer.signal_skip_step(False)
            yield last


def _abandon(optimizer: Any) -> None:
    """What a loop that was left half-way has summed must not be added to; Opacus' own optimizers keep it."""
    if hasattr(optimizer, "abandon"):
        optimizer.abandon()


def shared_out(loader: DataLoader, ranks: Ranks, secure: bool) -> DataLoader:
    """The Poisson loader of one process, of the same sample rate, as this rank's share of common batches.

    The seed is rank 0's: of the operating system if ``secure``, else from the loader's generator or torch's global one.
    """
    if secure:
        seed = secrets.randbits(128)
    else:
        words = torch.randint(0, 1 << 32, (4,), generator=loader.generator).tolist()
        seed = sum(word << 32 * k for k, word in enumerate(words))
    batches = PoissonBatches(
        len(loader.dataset),  # type: ignore[arg-type]
        len(loader),
        seed=ranks.from_rank(0, seed),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return with_batches(loader, batches)


def with_batches(loader: DataLoader, batches: Sampler[list[int]]) -> DataLoader:
    """A loader like ``loader`` with other batches."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def check_shares(loader: DataLoader, ranks: Ranks, poisson_sampling: bool) -> None:
    """Refuse batches that hold a sample on two ranks: it would move the sum twice. Called by all ranks.

    Raises:
        ValueError: with the remedy, on all ranks where they disagree.
    """
    batches, sampler = loader.batch_sampler, loader.sampler
    size = len(loader.dataset)  # type: ignore[arg-type]
    share: tuple[int, int] | None = None  # whose it is
    drawn: tuple[int, ...] = (size, len(loader))  # and of what: that must be the same on all ranks
    if isinstance(batches, PoissonBatches):
        share = (batches.rank, batches.world_size)
        drawn = (batches.num_samples, batches.steps_per_epoch, batches.seed, batches.step)
    elif ranks.world_size > 1 and not poisson_sampling:
        if not isinstance(sampler, DistributedSampler) or not (size % ranks.world_size == 0 or sampler.drop_last):
            raise ValueError(
                "data_loader with poisson_sampling=False on several ranks: a sample must be on one rank only. Give it "
                "a torch.utils.data.DistributedSampler with drop_last=True (which repeats none), or use "
                "poisson_sampling=True"
            )
        share = (sampler.rank, sampler.num_replicas)
        drawn = (size, len(loader), sampler.seed, sampler.epoch, sampler.shuffle)
    wrong = share not in (None, (ranks.rank, ranks.world_size))
    digest = hashlib.blake2b(repr(drawn).encode(), digest_size=6).digest()
    rows = ranks.gathered([float(int.from_bytes(digest, "little")), float(wrong)])
    if wrong:
        assert share is not None
        raise ValueError(
            f"data_loader: its batches are the share of rank {share[0]} of {share[1]}, and this is rank {ranks.rank} "
            f"of {ranks.world_size}"
        )
    if any(row[1] for row in rows):
        raise ValueError("data_loader: on another rank its batches are not that rank's share")
    if len({row[0] for row in rows}) > 1:
        raise ValueError(
            "data_loader: the ranks' batches are no shares of the same one, so that a sample may be on two ranks: give "
            "the sampler the same seed, and the same step or epoch, and the loader the same data and batch size on all"
        )


def system_generator() -> Any:
    """A generator for sampling batches that no seed repeats."""
    if importlib.util.find_spec("torchcsprng") is not None:
        return importlib.import_module("torchcsprng").create_random_device_generator("/dev/urandom")
    return twister([secrets.randbits(32) for _ in range(624)])


def twister(words: Sequence[int]) -> torch.Generator:
    """A generator with all 624 words of its state given: ``manual_seed`` takes only 32 bits."""
    generator = torch.Generator()
    state = generator.get_state()
    state[24 : 24 + 8 * 624] = torch.tensor(words, dtype=torch.int64).view(torch.uint8)  # after a header of 24 bytes
    generator.set_state(state)
    return generator
