"""Poisson sampling as a pure function of seed and step: resumable anywhere, and one logical batch for all ranks."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import math
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from dpfast.data.unit import ROW
from dpfast.distributed.ranks import Ranks
from dpfast.refusals import RanksError


class PoissonBatches(Sampler[list[int]]):
    """Batches of indices; each sample is in each batch with probability ``sample_rate``, independently.

    Every rank draws the whole logical batch from the common seed and takes each ``world_size``-th of its samples: the
    union over the ranks is the very batch that a single process draws, whatever the number of ranks, the ranks' shares
    differ by one sample at most, and no rank skips a step because its share is empty. (Opacus' sampler splits the
    data set instead, skips empty shares, which leaves the other ranks waiting, and draws the same positions on all
    ranks if these are seeded alike.)

    Args:
        num_samples: size of the data set.
        steps_per_epoch: how many batches an epoch has.
        seed: up to 128 bits; the same on all ranks.
        rank, world_size: whose share this is.
        sample_rate: ``1 / steps_per_epoch`` if None.
        indices: the samples to draw from, ``num_samples`` of them; all of the data set if None.

    Attributes:
        step: the number of the next batch, counted from the beginning of training; set it to resume. With workers that
            prefetch, it is ahead of what training has seen.
        unit: what is drawn.
    """

    unit = ROW

    def __init__(
        self,
        num_samples: int,
        steps_per_epoch: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sample_rate: float | None = None,
        indices: Sequence[Any] | None = None,
    ):
        if num_samples < 1 or steps_per_epoch < 1:
            raise ValueError(f"num_samples={num_samples}, steps_per_epoch={steps_per_epoch}: both must be at least 1")
        if not 0 <= seed < 1 << 128:
            raise ValueError(f"seed={seed}: give an integer of at most 128 bits that is not negative")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: ranks count from 0")
        self.num_samples, self.steps_per_epoch, self.seed = num_samples, steps_per_epoch, seed
        if sample_rate is not None:
            check_sample_rate(sample_rate)
        if indices is not None and len(indices) != num_samples:
            raise ValueError(f"indices: {len(indices)} of them, and num_samples={num_samples}")
        self.rank, self.world_size = rank, world_size
        self.indices, self._rate = indices, sample_rate
        self.step = 0

    @property
    def sample_rate(self) -> float:
        """Probability of each sample to be in a batch."""
        return 1 / self.steps_per_epoch if self._rate is None else self._rate

    def logical_batch(self, step: int) -> list[Any]:
        """Indices of the whole batch of ``step``, over all ranks, in order."""
        words = np.random.SeedSequence(self.seed, spawn_key=(step,))
        draws = np.random.Generator(np.random.Philox(words)).random(self.num_samples)
        drawn = np.flatnonzero(draws < self.sample_rate).tolist()
        return drawn if self.indices is None else [self.indices[k] for k in drawn]

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
        return split(whole[self.rank :: self.world_size], max(1, -(-largest // size)))


def split(indices: Sequence[Any], parts: int) -> list[list[Any]]:
    """``indices`` in so many parts, whose sizes differ by one at most."""
    least, larger = divmod(len(indices), parts)
    bounds = [k * least + min(k, larger) for k in range(parts + 1)]
    return [list(indices[begin:end]) for begin, end in itertools.pairwise(bounds)]


def check_shares(loader: DataLoader, ranks: Ranks, poisson_sampling: bool, to_draw: tuple[Any, ...] = ()) -> None:
    """Refuse batches that hold a sample on two ranks: it would move the sum twice. Called by all ranks.

    ``to_draw`` is what Poisson batches are to be drawn by, and must be the same on all.

    Raises:
        ValueError: with the remedy, on all ranks where they disagree.
    """
    batches, sampler = loader.batch_sampler, loader.sampler
    if ranks.world_size == 1 and not isinstance(batches, PoissonBatches):
        return
    size = len(loader.dataset)  # type: ignore[arg-type]
    share: tuple[int, int] | None = None  # whose it is
    drawn: tuple[float, ...] = (size, len(loader))  # and of what: that must be the same on all ranks
    if isinstance(batches, PoissonBatches):
        share = (batches.rank, batches.world_size)
        drawn = (batches.num_samples, batches.steps_per_epoch, batches.sample_rate, batches.seed, batches.step)
        to_draw = (*to_draw, getattr(batches, "units", None))
    elif ranks.world_size > 1 and not poisson_sampling:
        if not isinstance(sampler, DistributedSampler) or not (size % ranks.world_size == 0 or sampler.drop_last):
            raise RanksError(
                "data_loader with poisson_sampling=False on several ranks: a sample must be on one rank only. Give it "
                "a torch.utils.data.DistributedSampler with drop_last=True (which repeats none), or use "
                "poisson_sampling=True"
            )
        share = (sampler.rank, sampler.num_replicas)
        drawn = (size, len(loader), sampler.seed, sampler.epoch, sampler.shuffle)
    wrong = share not in (None, (ranks.rank, ranks.world_size))
    digest = hashlib.blake2b(repr((drawn, to_draw)).encode(), digest_size=6).digest()
    rows = ranks.gathered([float(int.from_bytes(digest, "little")), float(wrong)])
    if wrong:
        assert share is not None
        raise RanksError(
            f"data_loader: its batches are the share of rank {share[0]} of {share[1]}, and this is rank {ranks.rank} "
            f"of {ranks.world_size}"
        )
    if any(row[1] for row in rows):
        raise RanksError("data_loader: on another rank its batches are not that rank's share")
    if len({row[0] for row in rows}) > 1:
        raise RanksError(
            "data_loader: the ranks' batches are no shares of the same one, so that a sample may be on two ranks: give "
            "the sampler the same seed, and the same step or epoch, and the loader the same data and batch size on all"
        )


def check_sample_rate(value: Any) -> None:
    """Refuse what is no probability above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 < value <= 1:
        raise ValueError(
            f"sample_rate={value!r}: give the probability of a sample to be in a batch, above 0 and up to 1"
        )


def check_expected_batch_size(value: Any) -> None:
    """Refuse what cannot be divided by."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 < value < math.inf:
        raise ValueError(f"expected_batch_size={value!r}: give a positive finite number of samples")


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
