"""The numbers of a run that everyone may know, and the samples that its batches are drawn from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dpfast.data.sampling import PoissonBatches, check_expected_batch_size, check_sample_rate
from dpfast.refusals import LoaderError, RepeatedSampleError

NO_REPLACEMENT = "draw without replacement, or leave the sampler out and use poisson_sampling=True"


@dataclass(frozen=True)
class Public:
    """What sampler, accountant and update all go by.

    Attributes:
        sample_rate: probability of a sample to be in a batch.
        steps: batches of an epoch.
        expected_batch_size: what the update divides by; None where nobody said.
    """

    sample_rate: float
    steps: int
    expected_batch_size: int | float | None

    @classmethod
    def of(
        cls, loader: DataLoader, expected_batch_size: int | float | None = None, sample_rate: float | None = None
    ) -> Public:
        """Those of ``loader``, unless they are given.

        Raises:
            ValueError: a number that is none, or that the loader does not go by; a loader without a length.
        """
        if expected_batch_size is not None:
            check_expected_batch_size(expected_batch_size)
        if sample_rate is not None:
            check_sample_rate(sample_rate)
        batches: Any = loader.batch_sampler
        known = getattr(loader, "public", None)
        own = known.sample_rate if known is not None else getattr(batches, "sample_rate", None)
        if own is not None and sample_rate is not None and sample_rate != own:
            raise ValueError(f"sample_rate={sample_rate!r}: data_loader is Poisson-sampled already, at {own!r}")
        if expected_batch_size is None:
            expected_batch_size = known.expected_batch_size if known is not None else batch_size_of(loader)
        if sample_rate is not None and own is None:
            return cls(sample_rate, max(1, round(1 / sample_rate)), expected_batch_size)
        steps = _length(loader)
        if not steps:
            raise LoaderError(
                "data_loader has no batches: its data set or its sampler's subset is empty, or has fewer samples than "
                "a batch, and drop_last"
            )
        return cls(1 / steps if own is None else own, steps, expected_batch_size)


def _length(loader: DataLoader) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise LoaderError(
            f"data_loader: how many batches it has is not known ({error}), and with it the sample rate: give "
            f"sample_rate=, or a data set and a sampler that have a length"
        ) from error


def batch_size_of(loader: DataLoader) -> int | None:
    """Of all ranks together; None if the loader does not say."""
    batches: Any = loader.batch_sampler
    size = loader.batch_size if loader.batch_size is not None else getattr(batches, "batch_size", None)
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        base = sampler_of(loader)
        return size * (base.num_replicas if isinstance(base, DistributedSampler) else 1)
    if isinstance(batches, PoissonBatches) or hasattr(batches, "sample_rate"):  # that is all they were told
        return max(1, batches.num_samples // len(batches))
    return None


def sampler_of(loader: DataLoader) -> Any:
    """What the batches of ``loader`` are made of; the batch sampler itself if that cannot be told."""
    batches: Any = loader.batch_sampler
    if batches is None:
        return loader.sampler
    plain = isinstance(batches, BatchSampler) and type(batches).__iter__ is BatchSampler.__iter__
    return batches.sampler if plain else batches


def check_fixed(loader: DataLoader) -> None:
    """Refuse fixed batches that are known to hold a sample more than once; others are looked at as they are drawn.

    Raises:
        ValueError: names the sampler.
    """
    sampler = sampler_of(loader)
    name = type(sampler).__name__
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)):
        if sampler.replacement:
            raise RepeatedSampleError(
                f"data_loader: its {name} draws with replacement, and would put a sample into a batch more than once, "
                f"where it counts as often: {NO_REPLACEMENT}"
            )
        if isinstance(sampler, RandomSampler) and sampler.num_samples > len(sampler.data_source):
            raise RepeatedSampleError(
                f"data_loader: its {name} draws {sampler.num_samples} of {len(sampler.data_source)} samples, and would "
                f"put some into a batch more than once: {NO_REPLACEMENT}"
            )
    indices = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    batched = isinstance(indices, (list, tuple)) and any(
        isinstance(each, (list, tuple)) or getattr(each, "ndim", 0) for each in indices
    )
    if isinstance(indices, (list, tuple)) and not batched:
        _check_once(list(indices), name)
        check_inside(list(indices), loader.dataset, name)


def drawn_from(loader: DataLoader, sample_rate_given: bool = False) -> Sequence[Any]:
    """The samples that Poisson batches are drawn from: those that the loader's own sampler would give in an epoch.

    A sampler that is not one of torch's is gone through once.

    Raises:
        ValueError: names a loader that has no such samples, or whose sampler means something else.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise LoaderError(
            f"data_loader: its data set {type(loader.dataset).__name__} is an IterableDataset, whose samples cannot be "
            f"drawn by their index: use a map-style data set"
        )
    if loader.batch_sampler is None:
        raise LoaderError(
            "data_loader has batch_size=None: its data set gives whole batches, and Poisson sampling draws samples: "
            "give the loader a batch size"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    sampler = sampler_of(loader)
    name = type(sampler).__name__
    if isinstance(sampler, WeightedRandomSampler):
        raise LoaderError(
            f"data_loader: its {name} draws some samples more often than others, and under Poisson sampling all have "
            f"the same rate: leave the sampler out, or weight the loss per sample"
        )
    if type(sampler) is DistributedSampler:
        return range(size)
    if type(sampler) in (SequentialSampler, RandomSampler):
        whole = len(sampler.data_source)
        if whole > size:
            raise LoaderError(
                f"data_loader: its {name} is longer ({whole}) than its data set ({size}): give it the same"
            )
        if len(sampler) != whole and not sample_rate_given:
            raise LoaderError(
                f"data_loader: its {name} draws {len(sampler)} of {whole} samples in an epoch, so that the number of "
                f"batches says nothing of the sample rate: give sample_rate= and expected_batch_size=, or leave "
                f"num_samples out"
            )
        return range(whole)
    if hasattr(sampler, "sample_rate") and hasattr(sampler, "num_samples"):  # of Opacus
        return range(sampler.num_samples)
    one_by_one = sampler if sampler is not loader.batch_sampler else itertools.chain.from_iterable(sampler)
    if isinstance(sampler, SubsetRandomSampler):
        one_by_one = sampler.indices
    indices = [int(i) if hasattr(i, "item") else i for i in itertools.islice(one_by_one, size + 1)]
    if len(indices) > size:
        raise LoaderError(
            f"data_loader: its {name} is longer than its data set of {size} samples: give each of them once"
        )
    if not indices:
        raise LoaderError(f"data_loader has no batches: its {name} gives no samples")
    _check_once(indices, name)
    check_inside(indices, loader.dataset, name)
    return sorted(indices) if all(isinstance(i, int) for i in indices) else indices


def check_inside(indices: Sequence[Any], dataset: Any, name: str) -> None:
    """Refuse indices by which a sample may have several names, as 7 and -1 of 8, or 0, "0" and 0.2.

    Raises:
        ValueError: names the index.
    """
    numbers = [i for i in indices if isinstance(i, int)]
    if isinstance(dataset, Mapping):  # it has names of its own for its samples
        return
    if len(numbers) < len(indices) and (numbers or any(isinstance(i, float) for i in indices)):
        other = next(i for i in indices if not isinstance(i, int))
        raise LoaderError(
            f"data_loader: its {name} gives {other!r}: a sample's index is a whole number, for all samples"
        )
    size = len(dataset) if hasattr(dataset, "__len__") and not hasattr(dataset, "keys") else None
    if outside := [i for i in numbers if i < 0 or (size is not None and i >= size)]:
        has = "no samples before the first" if size is None else f"samples 0 to {size - 1}"
        raise LoaderError(f"data_loader: its {name} gives {outside[0]}, and its data set has {has}")


def _check_once(indices: list[Any], name: str) -> None:
    if len(set(indices)) < len(indices):
        raise RepeatedSampleError(
            f"data_loader: its {name} gives a sample more than once in an epoch, and it would count as often: "
            f"{NO_REPLACEMENT}"
        )
