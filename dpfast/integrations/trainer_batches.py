"""The Poisson batches of a run of ``DPTrainer``: of samples, or of the users that a column of its data names."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset

from dpfast.data.sampling import PoissonBatches
from dpfast.data.units import Units, ids_of, rows_by_id
from dpfast.data.user_batches import UserBatches
from dpfast.integrations.replayed import Rows


class _OfARun:
    """Those of a run of :attr:`total` steps: none past its end, where the Trainer would take one more if it resumes."""

    total: int = sys.maxsize
    step: int

    def __iter__(self) -> Iterator[Rows]:
        for batch in super().__iter__():  # type: ignore[misc]
            if self.step > self.total:
                return
            yield Rows(batch, self.step - 1, self._units(batch))

    def _units(self, batch: list[Any]) -> list[int] | None:
        return None


class SampleBatches(_OfARun, PoissonBatches):
    """Batches of samples."""


class UsersBatches(_OfARun, UserBatches):
    """Batches of all rows of users; each batch has the number of each row's user with it."""

    def _units(self, batch: list[Any]) -> list[int]:
        return [self.unit_of(index) for index in batch]


def users_of(data: Any, ids: Any, most: int) -> Units:
    """The users that a column of ``data`` names, or a list of ids; a step takes ``most`` rows of each.

    Raises:
        ValueError: there is no such column, or an id in it is none.
    """
    indices = range(len(data))
    column = ids if isinstance(ids, str) else ""
    return Units(rows_by_id(ids_of(ids, data, indices), indices), most, column=column)


def digest_of_users(users: Units) -> str:
    """Another one for every other way to share rows out among users."""
    return hashlib.blake2b(repr((users.rows, users.most)).encode(), digest_size=16).hexdigest()


class WithoutColumn(Dataset):
    """``data`` whose samples, mappings, have no ``column``: nothing that a model is to see."""

    def __init__(self, data: Any, column: str):
        self.data, self.column = data, column

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        sample = self.data[index]
        return {name: value for name, value in sample.items() if name != self.column}


def without_column(data: Any, column: str) -> Any:
    """``data`` without the column that names users."""
    if hasattr(data, "remove_columns"):  # of the library datasets
        return data.remove_columns([column]) if column in data.column_names else data
    return WithoutColumn(data, column) if isinstance(data[0], Mapping) else data
