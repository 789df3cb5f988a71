"""Loaders that tell the private models of the samples they give."""

from __future__ import annotations

import copy
import logging
import secrets
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader, IterableDataset, Sampler

from dpfast.capture.which_samples import Samples
from dpfast.data.empty_batch import CollateOrEmpty
from dpfast.data.public_numbers import Public, check_fixed, check_inside, drawn_from
from dpfast.data.sampling import PoissonBatches
from dpfast.data.units import Asked, Units, public_numbers_of_units
from dpfast.data.user_batches import UserBatches
from dpfast.distributed.ranks import Ranks
from dpfast.refusals import RepeatedSampleError

logger = logging.getLogger(__name__)


def drawn_samples(batches: Any, dataset: Any, indices: Sequence[Any], loop: Any = None) -> Samples:
    """The samples of a batch that ``batches`` has drawn, with their units where it draws units."""
    if not isinstance(batches, UserBatches):
        return Samples.given(dataset, indices, loop)
    units = [batches.unit_of(index) for index in indices]
    return Samples.given(dataset, indices, loop, units, batches.copies)


def distinct(batch: Any, dataset: Any, copies: int = 1) -> list[Any]:
    """The indices of a batch, which samplers give as lists, arrays or tensors of numbers, or lists of tensors.

    ``copies`` is how often each is there, one after the other.

    Raises:
        ValueError: one is there twice, or is none of a sample of ``dataset``.
    """
    if hasattr(batch, "tolist"):
        batch = batch.tolist()
    indices = [index.item() if hasattr(index, "item") else index for index in batch]
    if len(set(indices)) * copies < len(indices):
        raise RepeatedSampleError(
            f"data_loader: its sampler has put a sample into a batch more than once ({indices}), where it would count "
            f"as often. Use one that draws without replacement, or poisson_sampling=True"
        )
    check_inside(indices, dataset, "sampler")
    return indices


def arguments_of(loader: DataLoader) -> dict[str, Any]:
    """What a loader with other batches takes over from ``loader``."""
    names = (
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
        "generator",
        "prefetch_factor",
        "persistent_workers",
    )
    return {name: getattr(loader, name) for name in names}


class Watcher(Protocol):
    """What hears of a loader's batches, such as a clipped sum: ``batches.give`` each one, and ``batches.end_whole``."""

    batches: Any


class Watchers:
    """Those that hear of a loader's batches; a copy of the loader has none."""

    def __init__(self) -> None:
        self.heard_by: weakref.WeakSet[Watcher] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class WatchedLoader(DataLoader):
    """Mixed into a loader: each batch that is handed out is told to the private models, by its samples' indices."""

    watchers: Watchers
    _drawn: deque[list[Any]]

    @property
    def _index_sampler(self) -> Any:
        return _Noting(self.batch_sampler, self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        drawn = self._drawn = deque()
        ended: list[bool] = []
        try:
            for batch in super().__iter__():
                if drawn:  # a loader class of the user's own may draw elsewhere: nothing is known of its samples
                    samples = drawn_samples(self.batch_sampler, self.dataset, drawn.popleft(), ended)
                    for each in self.watchers.heard_by:
                        each.batches.give(samples, batch)
                yield batch
            for each in self.watchers.heard_by:
                each.batches.end_whole()
        finally:
            ended.append(True)


class _Noting(Sampler[list[Any]]):
    """The batches of ``batches``, refused if one has a sample twice, noted in the order in which they are drawn."""

    def __init__(self, batches: Any, loader: WatchedLoader):
        self.batches, self.dataset = batches, loader.dataset
        # An iterator keeps this: a loader in a cycle with it would keep persistent workers until it is collected.
        self.loader = weakref.ref(loader)

    def __iter__(self) -> Iterator[list[Any]]:
        loader = self.loader()
        assert loader is not None  # it is what asks
        return self._draw(loader._drawn)

    def _draw(self, drawn: deque[list[Any]]) -> Iterator[list[Any]]:
        for batch in self.batches:
            indices = distinct(batch, self.dataset, getattr(self.batches, "copies", 1))
            drawn.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.batches)


def watched(loader: DataLoader, watcher: Watcher) -> DataLoader:
    """A shallow copy of ``loader`` that tells ``watcher`` of its batches; the loader itself if it is such a copy.

    A loader that does not make batches of samples is returned as it is.
    """
    if isinstance(loader, WatchedLoader):
        loader.watchers.heard_by.add(watcher)
        return loader
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return loader
    twin = copy.copy(loader)
    name = type(loader).__name__
    if twin.num_workers and not getattr(twin, "in_order", True):
        logger.warning("data_loader: in_order=False is not kept, as batches are known by the order they are drawn in")
        twin.in_order = True
    twin.__class__ = type(name, (WatchedLoader, type(loader)), {"__module__": __name__})
    vars(twin).update(watchers=Watchers(), _iterator=None)
    return watched(twin, watcher)


class PoissonSampler(UniformWithReplacementSampler):
    """Opacus' Poisson sampler, of some of the samples and with as many steps as it is told."""

    def __init__(self, indices: Sequence[Any], sample_rate: float, steps: int, generator: Any):
        super().__init__(num_samples=len(indices), sample_rate=sample_rate, generator=generator, steps=steps)
        self.indices = indices

    def __iter__(self) -> Iterator[list[Any]]:
        for positions in super().__iter__():
            yield [self.indices[k] for k in positions]


class PoissonLoader(WatchedLoader, DPDataLoader):
    """Opacus' ``DPDataLoader``, of the samples and at the rate that it is told."""

    def __init__(self, loader: DataLoader, batches: Any, public: Public, collate: CollateOrEmpty, generator: Any):
        self.sample_rate, self.distributed, self.public = public.sample_rate, False, public
        self.watchers = Watchers()
        arguments = arguments_of(loader) | {"collate_fn": collate, "generator": generator}
        DataLoader.__init__(self, loader.dataset, batch_sampler=batches, **arguments)


def public_numbers(
    loader: DataLoader,
    poisson_sampling: bool,
    expected_batch_size: int | float | None = None,
    sample_rate: float | None = None,
    asked: Asked | None = None,
) -> tuple[Public, Sequence[Any] | Units | None]:
    """The run's public numbers, and what to draw Poisson batches from; None if those of ``loader`` are to be used.

    All that needs a sample rate or a number of steps takes it from here: sampler, accountant, update, and the search
    for a noise multiplier. Where units are ``asked`` for, all of them count units.

    Raises:
        ValueError: a number that is none, or a loader that cannot be sampled from; nothing is changed.
    """
    if asked is not None:
        return public_numbers_of_units(loader, asked, expected_batch_size, sample_rate)
    private = isinstance(loader, PoissonLoader) or isinstance(loader.batch_sampler, PoissonBatches)
    drawn = drawn_from(loader, sample_rate is not None) if poisson_sampling and not private else None
    public = Public.of(loader, expected_batch_size, sample_rate)
    if drawn is None and not private:
        check_fixed(loader)
    return public, drawn


def poisson_loader(
    loader: DataLoader,
    drawn: Sequence[Any] | Units,
    public: Public,
    *,
    secure_generator: Any = None,
    rand_on_empty: bool = False,
    ranks: Ranks,
) -> PoissonLoader:
    """What is ``drawn`` of ``loader``'s data set, samples or units, each in each batch with the same probability.

    On several ranks it gives this rank's share of common batches, whose seed is rank 0's: of the operating system if
    there is a ``secure_generator``, else from the loader's generator or torch's global one.

    Raises:
        ValueError: no batch without samples can be made.
    """
    first = drawn.rows[0][0] if isinstance(drawn, Units) else drawn[0]
    collate = CollateOrEmpty(loader.collate_fn, loader.dataset, first, rand_on_empty)
    collate([])
    generator = secure_generator or loader.generator
    if ranks.world_size == 1 and not isinstance(drawn, Units):
        batches: Any = PoissonSampler(drawn, public.sample_rate, public.steps, generator)
        return PoissonLoader(loader, batches, public, collate, generator)
    seed = secrets.randbits(128)
    if secure_generator is None:
        words = torch.randint(0, 1 << 32, (4,), generator=loader.generator).tolist()
        seed = sum(word << 32 * k for k, word in enumerate(words))
    share: dict[str, Any] = dict(
        seed=ranks.from_rank(0, seed), rank=ranks.rank, world_size=ranks.world_size, sample_rate=public.sample_rate
    )
    if isinstance(drawn, Units):
        batches = UserBatches(drawn, public.steps, **share)
    else:
        indices = None if isinstance(drawn, range) else drawn
        batches = PoissonBatches(len(drawn), public.steps, indices=indices, **share)
    return PoissonLoader(loader, batches, public, collate, generator)
