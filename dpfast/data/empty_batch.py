"""Batches without samples, which Poisson sampling draws now and then."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dpfast.refusals import CollateError


class CollateOrEmpty:
    """``collate`` for batches with samples; what it returns, emptied, for one without.

    What has a batch is found by collating a sample of the data set once and twice: sizes and lengths that differ are
    the batch's. Nothing of the sample is left in it but the other sizes.

    Args:
        collate: from a list of samples to a batch of tensors, arrays, strings and numbers, nested in mappings, tuples,
            lists or dataclasses.
        dataset, index: where a sample is.
        rand_on_empty: a row of random values in place of no rows, as in Opacus.

    Raises:
        ValueError: from a call without samples: ``collate`` fails on a single sample, or makes something that cannot
            be emptied.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], dataset: Any, index: Any, rand_on_empty: bool = False):
        self.wrapped_collator_fn, self.dataset, self.index = collate, dataset, index
        self.rand_on_empty = rand_on_empty

    def __call__(self, samples: list[Any]) -> Any:
        if samples or getattr(self.wrapped_collator_fn, "takes_none", False):
            return self.wrapped_collator_fn(samples)
        try:
            sample = self.dataset[self.index]
            once, twice = (self.wrapped_collator_fn([copy.deepcopy(sample) for _ in range(n)]) for n in (1, 2))
        except Exception as error:
            raise CollateError(
                f"data_loader: a batch of one sample could not be made, and Poisson sampling draws such batches: "
                f"{type(error).__name__}: {error}"
            ) from error
        return self._emptied(once, twice)

    def _emptied(self, once: Any, twice: Any) -> Any:
        rows = int(self.rand_on_empty)
        if isinstance(once, (Tensor, np.ndarray)):
            shape = [rows if n != m else n for n, m in zip(once.shape, twice.shape, strict=True)]
            if isinstance(once, Tensor):
                return torch.randint(0, 2, shape, device=once.device).to(once.dtype) if rows else once.new_zeros(shape)
            return np.random.randint(0, 2, shape).astype(once.dtype) if rows else np.zeros(shape, once.dtype)
        if isinstance(once, str):
            return ""
        if isinstance(once, Mapping):
            changed = {key: self._emptied(value, twice[key]) for key, value in once.items()}
            if type(once) is dict:
                return changed
            twin: Any = copy.copy(once)
            for key, value in changed.items():
                twin[key] = value
            return twin
        if isinstance(once, (list, tuple)) and not isinstance(once, PackedSequence):
            if len(once) != len(twice):  # a list of samples
                return type(once)(self._cleared(value) for value in once[:rows])
            changed_items = [self._emptied(a, b) for a, b in zip(once, twice, strict=True)]
            return type(once)(*changed_items) if hasattr(once, "_fields") else type(once)(changed_items)
        if is_dataclass(once) and not isinstance(once, type):
            twin = copy.copy(once)
            for item in fields(once):
                value = self._emptied(getattr(once, item.name), getattr(twice, item.name))
                object.__setattr__(twin, item.name, value)
            return twin
        return self._cleared(once)

    def _cleared(self, value: Any) -> Any:
        """Something without a batch, with nothing of the sample."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return None if value is None else type(value)()
        if isinstance(value, (Tensor, np.ndarray, Mapping, list, tuple)) and not isinstance(value, PackedSequence):
            return self._emptied(value, value)
        raise CollateError(
            f"data_loader: collate_fn returned a {type(value).__name__}, of which no batch without samples can be made "
            f"as Poisson sampling draws them: return tensors, arrays, strings or numbers, in dicts, tuples or lists"
        )
