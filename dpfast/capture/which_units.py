"""Which unit each row of a forward is of, where several rows are clipped as one.

A row that is taken for another unit's would let that unit contribute twice. So nothing is guessed here: rows are known
by where they lie in what the loader gave, or by their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dpfast.capture.which_samples import PADDING, ForwardPass, Samples, keys
from dpfast.refusals import UnitsError

UNKNOWN = (
    "make_private(units=...) or (augmentations=...): it cannot be told which unit the rows of this backward pass are "
    "of, so nothing of it was summed. Take the batch from the loader that make_private has returned, or from "
    "dpfast.BatchMemoryManager around it, and give the model its rows as they are, moved to a device at most. What "
    "changes values (normalising, augmenting), or picks and reorders rows, belongs into the data set, into collate_fn "
    "or into the model's forward"
)


def settle(forward: ForwardPass) -> None:
    """The forward runs: where its rows are known by their number alone, their values are to show that order."""
    if forward.counted and any(samples.units is not None for samples in forward.group):
        given = forward.group[0]
        as_many = len(forward.group) == 1 and forward.whole == len(given)
        forward.counted = not (as_many and _has_values_of(forward, given))


def units_of(passing: Iterable[ForwardPass]) -> list[Any]:
    """The unit of each row of a backward pass; None for a row that no sample is in.

    Raises:
        ValueError: nothing shows which these are.
    """
    found = [_units(forward) for forward in passing]
    if not found or None in found or any(rows != found[0] for rows in found):
        raise UnitsError(UNKNOWN)
    return found[0] or []


def _units(forward: ForwardPass) -> list[Any] | None:
    if forward.batch == 0:
        return []
    if forward.rows is None or forward.counted or not forward.group:
        return None
    owners = [owner for samples in forward.group for owner in samples.owners]
    if forward.whole != len(owners) or any(samples.units is None for samples in forward.group):
        return None
    return [None if owners[row][0] == PADDING else owners[row] for row in forward.rows]


def _has_values_of(forward: ForwardPass, samples: Samples) -> bool:
    """Whether some inputs have, row by row, the values that the loader gave, and none has them in another order.

    Rows that are alike in these inputs tell nothing of their order. If they are of several units, they have to be alike
    in all other inputs too: else those may be in any order. If all rows are alike, nothing is shown.
    """
    assert forward.rows is not None and samples.units is not None
    real = [k for k, row in enumerate(forward.rows) if row < len(samples.indices)]  # and not padding
    several = len({*samples.units}) > 1
    known: list[list[bytes]] = []  # the rows' values in inputs that the loader gave
    others: list[Sequence[Any]] = []  # and in those that it did not
    shown = False
    for given, dim in forward.given:
        x, pairs = given.unchanged(), []
        if x is None:  # written to since
            others.append(range(len(forward.rows)))
            continue
        for theirs in (held.unchanged() for held in samples.rows):
            if theirs is None or x.numel() * len(samples) != theirs.numel() * x.shape[dim]:
                continue
            for along in {0, dim}:  # a loader may have the batch first, and the model not
                if theirs.dim() > along and theirs.shape[along] == len(samples):
                    its = keys(theirs.to(x.dtype), along)
                    pairs.append((keys(x, dim), [its[row] for row in forward.rows]))
        same = next((mine for mine, its in pairs if mine == its), None)
        if same is not None:
            known.append(same)
            shown |= not several or len({same[k] for k in real}) > 1
        elif any(sorted(mine) == sorted(its) for mine, its in pairs):
            return False
        else:
            others.append(keys(x, dim))
    return shown and not (several and _alike_but_not_all_over(real, samples, forward.rows, known, others))


def _alike_but_not_all_over(
    real: Sequence[int],
    samples: Samples,
    rows: Sequence[int],
    known: Sequence[Sequence[Any]],
    others: Sequence[Sequence[Any]],
) -> bool:
    """Whether rows of two units are alike in what is ``known``, and not in all ``others``."""
    assert samples.units is not None
    found: dict[tuple[Any, ...], tuple[set[Any], set[Any]]] = {}
    for k in real:
        units, values = found.setdefault(tuple(column[k] for column in known), (set(), set()))
        units.add(samples.units[rows[k]])
        values.add(tuple(column[k] for column in others))
    return any(len(units) > 1 and len(values) > 1 for units, values in found.values())
