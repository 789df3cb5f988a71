"""Units of several rows: which rows of a data set are of one user, and how many of them a step takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from dpfast.capture.segments import PACKED
from dpfast.data.public_numbers import Public, batch_size_of, drawn_from
from dpfast.data.row_order import check_order
from dpfast.data.sampling import PoissonBatches, check_expected_batch_size, check_sample_rate
from dpfast.data.unit import ROW, Unit


@dataclass(frozen=True)
class Asked:
    """What ``make_private`` is asked for; see there."""

    units: Any
    rows_per_unit: int | None
    augmentations: int


@dataclass(frozen=True)
class Units:
    """All units that batches are drawn from.

    Attributes:
        rows: the indices of each unit's rows in the data set.
        most: how many of them a step takes.
        copies: how often each is taken, one copy after the other.
        column: by which rows are of one unit; see :class:`dpfast.data.unit.Unit`.
    """

    rows: list[list[Any]]
    most: int
    copies: int = 1
    column: str | None = ""

    def __post_init__(self) -> None:
        indices = [index for rows in self.rows for index in rows]
        if not self.rows or not all(self.rows) or len({*indices}) < len(indices):
            raise ValueError("units: each needs a row at least, and no row may be of two of them")
        for name, value in (("rows_per_unit", self.most), ("augmentations", self.copies)):
            if not is_count(value):
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unit(self) -> Unit:
        """What one of them is."""
        return ROW if self.column is None else Unit(column=self.column, most=self.most)

    @property
    def largest(self) -> int:
        """The most rows that a unit has in a batch."""
        return self.copies * min(self.most, max(map(len, self.rows)))


def asked_for(
    units: Any, rows_per_unit: Any, augmentations: Any, *, poisson_sampling: bool, rand_on_empty: bool, alone: bool
) -> Asked | None:
    """The arguments of ``make_private``, if they ask for units that are not single rows.

    Raises:
        ValueError: names the argument.
    """
    if isinstance(units, str) and units == PACKED:
        _check_packed(rows_per_unit, augmentations, rand_on_empty, alone)
        return None
    if not is_count(augmentations):
        raise ValueError(f"augmentations={augmentations!r}: give a whole number of at least 1")
    if units is None and rows_per_unit is not None:
        raise ValueError(f"rows_per_unit={rows_per_unit!r} without units=: say which rows are of one unit")
    if units is None and augmentations == 1:
        return None
    name = f"augmentations={augmentations}" if units is None else "units="
    if units is not None and not is_count(rows_per_unit):
        raise ValueError(
            f"rows_per_unit={rows_per_unit!r}: with units= give the most rows that a step takes of a unit, a whole "
            f"number of at least 1 that was chosen without looking at the data"
        )
    if not poisson_sampling:
        raise ValueError(
            f"{name} with poisson_sampling=False: a unit's rows would be spread over batches, each of which is "
            f"accounted for as if the others had none of it; use poisson_sampling=True, which draws whole units"
        )
    if rand_on_empty:
        raise ValueError(f"{name} with rand_on_empty=True: a random row is of no unit; leave rand_on_empty out")
    if alone:
        raise ValueError(
            f"{name} with max_physical_batch_size=1: a unit's rows have to be in one backward pass; leave "
            f"max_physical_batch_size out, and split batches with BatchMemoryManager"
        )
    return Asked(units, None if units is None else int(rows_per_unit), int(augmentations))


def _check_packed(rows_per_unit: Any, augmentations: Any, rand_on_empty: bool, alone: bool) -> None:
    """Units are samples, drawn and counted as ever; what does not go with rows that hold several."""
    refused = {
        f"rows_per_unit={rows_per_unit!r}": rows_per_unit is not None,
        f"augmentations={augmentations!r}": augmentations != 1,
        "rand_on_empty=True": rand_on_empty,
        "max_physical_batch_size=1": alone,
    }
    if given := [name for name, is_given in refused.items() if is_given]:
        raise ValueError(
            f"{given[0]} with units={PACKED!r}: a unit is one sample, and a packed row holds several; leave it out"
        )


def is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1


def public_numbers_of_units(
    loader: DataLoader, asked: Asked, expected_batch_size: int | float | None, sample_rate: float | None
) -> tuple[Public, Units]:
    """The run's public numbers, all in units, and the units to draw from.

    Raises:
        ValueError: units that cannot be told, or a loader that cannot be sampled from; nothing is changed.
    """
    if getattr(loader, "public", None) is not None or isinstance(loader.batch_sampler, PoissonBatches):
        raise ValueError(
            "units=, augmentations=: data_loader is Poisson-sampled already, and keeps its batches; give the one that "
            "it was made of"
        )
    if expected_batch_size is not None:
        check_expected_batch_size(expected_batch_size)
    if sample_rate is not None:
        check_sample_rate(sample_rate)
    indices = drawn_from(loader, sample_rate is not None)
    check_order(loader.collate_fn, loader.dataset, indices)
    if isinstance(asked.units, Units):
        units = asked.units
    elif asked.units is None:
        units = Units([[index] for index in indices], 1, asked.augmentations, None)
    else:
        assert asked.rows_per_unit is not None
        rows = rows_by_id(ids_of(asked.units, loader.dataset, indices), indices)
        column = asked.units if isinstance(asked.units, str) else ""
        units = Units(rows, asked.rows_per_unit, asked.augmentations, column)
    size = batch_size_of(loader)
    if sample_rate is not None:
        return Public(sample_rate, max(1, round(1 / sample_rate)), expected_batch_size or size), units
    if size is None:
        raise ValueError(
            "data_loader: it does not say how many units its batches have: give sample_rate= and expected_batch_size="
        )
    steps = len(units) // size if loader.drop_last else math.ceil(len(units) / size)
    if not steps:
        raise ValueError(
            f"data_loader: it has no batches: {len(units)} units are fewer than its batch size {size}, which counts "
            f"units, and drop_last"
        )
    return Public(1 / steps, steps, expected_batch_size or size), units


def rows_by_id(ids: Sequence[Any], indices: Sequence[Any]) -> list[list[Any]]:
    """The indices of each id, ids in the order in which they appear."""
    rows: dict[Any, list[Any]] = {}
    for id_, index in zip(ids, indices, strict=True):
        rows.setdefault(id_, []).append(index)
    return [*rows.values()]


def ids_of(units: Any, dataset: Any, indices: Sequence[Any]) -> list[Any]:
    """The unit's id of each of ``indices``, from a column's name or one id for each sample of ``dataset``.

    Raises:
        ValueError: there are none, or too few, or some would not tell units apart.
    """
    if isinstance(units, str):
        return checked_ids(_column(units, dataset, indices))
    if hasattr(units, "tolist"):
        units = units.tolist()
    if not isinstance(units, Sequence) or isinstance(units, bytes):
        raise ValueError(
            f"units={units!r}: give an id for each sample of the data set, in a list or a tensor, or the name of the "
            f"column (the key) in which samples have theirs"
        )
    if isinstance(dataset, Mapping):
        raise ValueError("units= as a list: the data set names its samples; give the key in which samples have ids")
    if len(units) != len(dataset):
        raise ValueError(f"units: {len(units)} ids, and the data set has {len(dataset)} samples; give each one id")
    return checked_ids([units[index] for index in indices])


def _column(name: str, dataset: Any, indices: Sequence[Any]) -> list[Any]:
    while isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, (list, tuple)):
        if name not in columns:
            raise ValueError(f"units={name!r}: the data set has no such column; it has {list(columns)}")
        if hasattr(dataset, "with_format"):  # the format may leave the column out, as nothing to train on
            dataset = dataset.with_format(None)
        column = dataset[name]
        column = column.tolist() if hasattr(column, "tolist") else list(column)
        return [column[index] for index in indices]
    ids = []
    for index in indices:
        sample = dataset[index]
        if not isinstance(sample, Mapping) or name not in sample:
            has = f"the keys {list(sample)}" if isinstance(sample, Mapping) else f"is a {type(sample).__name__}"
            raise ValueError(
                f"units={name!r}: sample {index!r} has no such key; it {'has ' if 'keys' in has else ''}{has}. Give "
                f"the ids of all samples in a list"
            )
        ids.append(sample[name])
    return ids


def checked_ids(ids: Sequence[Any]) -> list[Any]:
    """Ids as they are compared.

    Raises:
        ValueError: some would not tell units apart.
    """
    plain = [_plain(value, place) for place, value in enumerate(ids)]
    kinds = {"number" if isinstance(value, (bool, int, float)) else type(value).__name__ for value in plain}
    if len(kinds) > 1:
        raise ValueError(
            f"units: ids of several kinds ({', '.join(sorted(kinds))}), by which one user may have several, as 7 and "
            f"'7': give ids of one kind"
        )
    return plain


def _plain(value: Any, place: int) -> Any:
    """An id that is equal to itself and to another one of its unit."""
    try:
        if hasattr(value, "item"):  # of a tensor or an array
            value = value.item()
        if isinstance(value, tuple):
            return tuple(_plain(part, place) for part in value)
        hash(value)
        told = value is not None and bool(value == value) and type(value).__hash__ is not object.__hash__
    except (TypeError, ValueError, RuntimeError):
        told = False
    if not told:
        raise ValueError(
            f"units: {value!r} (number {place}) is no id: rows that have none, or one that only equals itself, would "
            f"be units of their own. Give each row the id of its unit, as a number or a text"
        )
    return value
