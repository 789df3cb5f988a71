"""Whether ``collate_fn`` keeps the order of its samples: units are known by it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from dpfast.capture.trees import tensors
from dpfast.capture.which_samples import keys
from dpfast.refusals import UnitsError

TRIED = 16  # samples


def check_order(collate_fn: Callable[[list[Any]], Any], dataset: Any, indices: Sequence[Any]) -> None:
    """Collate some samples of ``indices`` in their order, and the other way round.

    What shows is an order that follows from the samples, as where texts are sorted by their length.

    Raises:
        ValueError: rows stand in another order than samples.
    """
    if collate_fn is default_collate:
        return
    count = min(TRIED, len(indices))
    samples = [dataset[indices[k * len(indices) // count]] for k in range(count)]
    try:
        forth, back = (tensors(collate_fn(copy.deepcopy(some))) for some in (samples, list(reversed(samples))))
    except Exception as error:
        raise ValueError(
            f"data_loader: {count} samples could not be collated: {type(error).__name__}: {error}"
        ) from error
    for one, other in zip(forth, back, strict=False):
        if not one.dim() or one.shape != other.shape or one.layout != torch.strided:
            continue
        along = [(keys(one, k), keys(other, k)) for k in range(min(2, one.dim())) if one.shape[k] == count]
        kept = any(mine == theirs[::-1] for mine, theirs in along)  # in the dimension that samples have
        for mine, theirs in along:
            if not kept and sorted(mine) == sorted(theirs):
                raise UnitsError(
                    "units=, augmentations=: collate_fn does not keep the order of its samples, as one does not that "
                    "sorts them by length: it could not be told which unit a row is of. Leave them in their order "
                    "(pack_padded_sequence has enforce_sorted=False), or sort inside of the model's forward"
                )
