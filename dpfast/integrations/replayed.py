"""What a resumed run has to see again, to the bit: batches with their random transforms, and the very same data."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from dpfast.integrations.distributed import full

# What a run's seed is used for, beside its batches.
TRANSFORMS, MODEL = 1, 2
MOST_ROWS = 1 << 14  # of a data set of one's own that is read whole, to tell it from another


class Rows(list[int]):
    """The indices of one batch, the number of its step, and the unit of each row where units are drawn."""

    step: int
    units: list[int] | None

    def __init__(self, rows: list[int], step: int, units: list[int] | None = None):
        super().__init__(rows)
        self.step, self.units = step, units

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), self.step, self.units)


class Replayed(Dataset):
    """Collated batches that are a function of seed, step and rank, whatever process makes them.

    That holds for what samples and collator draw from the global generators of Python, NumPy and torch; generators of
    their own are theirs to repeat.

    Args:
        data: the samples.
        collate_fn: from a list of samples, and the unit of each or None, to a batch.
        seed, rank: of the run.
    """

    def __init__(self, data: Any, collate_fn: Callable[[list[Any], list[int] | None], Any], seed: int, rank: int):
        self.data, self.collate_fn, self.seed, self.rank = data, collate_fn, seed, rank

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: Rows) -> Any:
        """The batch of ``rows``."""
        with seeded(self.seed, TRANSFORMS, rows.step, self.rank):
            fetch = getattr(self.data, "__getitems__", None)
            samples = fetch(list(rows)) if fetch else [self.data[k] for k in rows]
            return self.collate_fn(samples, rows.units)


def whole(batch: Any) -> Any:
    """The ``collate_fn`` for what :class:`Replayed` has collated."""
    return batch


def seed_all(seed: int, *place: int) -> None:
    """Set the global generators of Python, NumPy and torch to a function of ``seed`` and ``place``."""
    words = [int(word) for word in np.random.SeedSequence(seed, spawn_key=place).generate_state(4)]
    random.seed(words[0] << 32 | words[1])
    np.random.seed(words[2])
    torch.manual_seed((words[3] << 32 | words[2]) >> 1)


@contextmanager
def seeded(seed: int, *place: int) -> Iterator[None]:
    """:func:`seed_all`, taken back at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        seed_all(seed, *place)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)


def digest_of(data: Any, collate_fn: Callable[[list[Any]], Any] = whole) -> str | None:
    """What tells a data set from every other; None where nothing does, or where it is not the same when asked twice.

    Of the library ``datasets`` it is the fingerprint. Of anything else all samples are read, if they are at most
    :data:`MOST_ROWS` or lie in memory, and of numbers, text, arrays and tensors. Whoever draws from a generator of
    their own, in a sample or in ``collate_fn``, gives another answer the second time.
    """
    inner = data
    while isinstance(inner, Subset):
        inner = inner.dataset
    in_memory = isinstance(inner, list | tuple | TensorDataset)
    fingerprint = getattr(data, "_fingerprint", None)
    if fingerprint is None and len(data) > MOST_ROWS and not in_memory:
        return None
    few = [data[k] for k in range(min(4, len(data)))]
    collated = {_digest(_Collated(few, collate_fn)) for _ in range(2)}
    found = {_digest(data) for _ in range(1 if in_memory else 2)} if fingerprint is None else {str(fingerprint)}
    return found.pop() if len(found) == len(collated) == 1 and None not in collated else None


class _Collated:
    """One item: the batch of ``samples``, collated when it is asked for."""

    def __init__(self, samples: list[Any], collate_fn: Callable[[list[Any]], Any]):
        self.samples, self.collate_fn = samples, collate_fn

    def __len__(self) -> int:
        return 1

    def __getitem__(self, k: int) -> Any:
        return self.collate_fn(copy.deepcopy(self.samples))


def _digest(items: Any) -> str | None:
    """Of all ``items``, as they are when the generators are seeded."""
    found = hashlib.blake2b(digest_size=16)
    with seeded(0):
        told = all(_tell(found, items[k]) for k in range(len(items)))
    return found.hexdigest() if told else None


def fingerprint(model: nn.Module) -> str:
    """A hash of the parameters' names, shapes and dtypes, and of the values of those that stay frozen.

    Of a sharded model all ranks have to ask together.
    """
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(repr((name, tuple(p.shape), str(p.dtype), p.requires_grad)).encode())
        if not p.requires_grad:
            found.update(_value(p))
    return found.hexdigest()


def weights_digest(model: nn.Module, trained: Iterable[Tensor]) -> str:
    """A hash of the values of the parameters that train. Of a sharded model all ranks have to ask together.

    Args:
        trained: all that the optimizer has, those too that are frozen for some of the steps.
    """
    found, among = hashlib.sha256(), set(trained)
    for name, p in model.named_parameters():
        if p in among:
            found.update(repr((name, str(p.dtype))).encode() + _value(p))
    return found.hexdigest()


def _value(p: Tensor) -> bytes:
    return repr(torch.hash_tensor(full(p.detach())).view(torch.int64).item()).encode()


def _tell(found: Any, item: Any) -> bool:
    """Whether ``item`` is of a kind whose value can be told; it is then in the hash ``found``."""
    if isinstance(item, Mapping):
        found.update(f"mapping {len(item)} ".encode())
        return all(_tell(found, name) and _tell(found, value) for name, value in item.items())
    if isinstance(item, list | tuple):
        found.update(f"sequence {len(item)} ".encode())
        return all(_tell(found, part) for part in item)
    if isinstance(item, Tensor):
        item = item.detach().cpu().contiguous()
        found.update(f"{item.dtype} {tuple(item.shape)} ".encode())
        found.update(item.reshape(-1).view(torch.uint8).numpy().tobytes())
        return True
    if isinstance(item, np.ndarray) and item.dtype.hasobject:
        return _tell(found, item.tolist())
    if isinstance(item, np.ndarray | np.generic):
        found.update(f"{item.dtype} {item.shape} ".encode() + item.tobytes())
        return True
    if item is None or isinstance(item, bool | int | float | complex | str | bytes):
        found.update(f"{type(item).__name__} {item!r} ".encode())
        return True
    return False
