"""Poisson batches of units: each user is in a batch with the same probability, with some or all of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpfast.data.sampling import PoissonBatches
from dpfast.data.units import Units


class UserBatches(PoissonBatches):
    """Batches of all rows of drawn units; each unit is in each batch with probability ``sample_rate``, independently.

    Of a unit with more rows than the cap, so many are taken, drawn anew in each step without replacement: by the
    unit's own random numbers, which do not depend on the other units. A batch lists a unit's rows one after the other,
    units with few rows first. A unit is whole in one physical batch and on one rank. What is said of
    :class:`~dpfast.data.sampling.PoissonBatches` holds with units in the place of samples.

    Args:
        units: see :class:`~dpfast.data.units.Units`.
        steps_per_epoch, seed, rank, world_size, sample_rate: see ``PoissonBatches``.
    """

    def __init__(self, units: Units, steps_per_epoch: int, *, seed: int, **kwargs: Any):
        super().__init__(len(units), steps_per_epoch, seed=seed, **kwargs)
        self.units = units
        self.unit = units.unit
        self._unit_of = {index: unit for unit, rows in enumerate(units.rows) for index in rows}

    @property
    def copies(self) -> int:
        """Rows that each index has in a batch."""
        return self.units.copies

    @property
    def num_rows(self) -> int:
        """Rows of a batch with all units."""
        return self.copies * sum(min(len(rows), self.units.most) for rows in self.units.rows)

    def unit_of(self, index: Any) -> int:
        """The number of the unit that a row of the data set is of."""
        return self._unit_of[index]

    def logical_units(self, step: int) -> list[list[Any]]:
        """The rows of each unit in the batch of ``step``, over all ranks; every index as often as it has rows."""
        drawn = [self._rows(step, unit) for unit in super().logical_batch(step)]
        return [[index for index in rows for _ in range(self.copies)] for rows in sorted(drawn, key=len)]

    def logical_batch(self, step: int) -> list[Any]:
        """Indices of all rows of ``step``, over all ranks."""
        return _joined(self.logical_units(step))

    def __iter__(self) -> Iterator[list[Any]]:
        """This rank's shares, to the end of the epoch that :attr:`step` is in."""
        end = (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch
        while self.step < end:
            self.step += 1
            yield _joined(self.logical_units(self.step - 1)[self.rank :: self.world_size])

    def physical_batches(self, step: int, size: int) -> list[list[Any]]:
        """This rank's share of ``step`` in parts of at most ``size`` rows, of whole units: as many on every rank."""
        drawn = self.logical_units(step)
        shares = [packed(drawn[rank :: self.world_size], size) for rank in range(self.world_size)]
        parts = max(1, *map(len, shares))
        mine = shares[self.rank]
        return [*mine, *([] for _ in range(parts - len(mine)))]

    def check_fits(self, name: str, size: int) -> None:
        """Refuse physical batches that a unit does not fit into.

        Raises:
            ValueError: names the argument.
        """
        if self.units.largest > size:
            raise ValueError(
                f"{name}={size}: a unit has {self.units.largest} rows in a batch, and is never split: give at least "
                f"{self.units.largest}, or make_private a smaller rows_per_unit= or augmentations="
            )

    def _rows(self, step: int, unit: int) -> list[Any]:
        rows, most = self.units.rows[unit], self.units.most
        if len(rows) <= most:
            return rows
        words = np.random.SeedSequence(self.seed, spawn_key=(step, unit))
        taken = np.random.Generator(np.random.Philox(words)).choice(len(rows), most, replace=False)
        return [rows[k] for k in sorted(taken.tolist())]


def _joined(units: Sequence[list[Any]]) -> list[Any]:
    return [index for rows in units for index in rows]


def packed(units: Sequence[list[Any]], size: int) -> list[list[Any]]:
    """Whole units in their order, in as many batches as it takes."""
    parts: list[list[Any]] = []
    for rows in units:
        if not parts or len(parts[-1]) + len(rows) > size:
            parts.append([])
        parts[-1] += rows
    return parts
