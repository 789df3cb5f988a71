"""Batches for Lightning: empty ones, and those that have with them whose each sample is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpfast.integrations.replayed import Rows


class WithUnits(NamedTuple):
    """A batch, and ``[B]`` the number of the user that each of its samples is of."""

    batch: Any
    units: Tensor


class OfUsers(Dataset):
    """Collated batches of users, each with its :class:`WithUnits`."""

    def __init__(self, data: Any, collate_fn: Callable[[list[Any]], Any]):
        self.data, self.collate_fn = data, collate_fn

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: Rows) -> WithUnits:
        """The batch of ``rows``."""
        fetch = getattr(self.data, "__getitems__", None)
        samples = fetch(list(rows)) if fetch else [self.data[k] for k in rows]
        return WithUnits(self.collate_fn(samples), torch.tensor(rows.units, dtype=torch.int64))


class Collate:
    """An empty batch, which no ``collate_fn`` takes, is an empty list."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]):
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        return self.collate_fn(samples) if samples else []
