"""Other answers to what Python asks of tensors, so that a pass takes the branches that it has not taken."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dpfast.separation.labels import Drawn, Label

Answer = Callable[[Label, Any], Any]
# The word of a Mersenne Twister's state from which it makes 0xffffffff; from 0 it makes 0.
ONES = 0x12DD9BB3


def of_chance(high: bool) -> Answer:
    """The least or the greatest number that may be drawn, and the other side of a comparison with one."""

    def answer(label: Label, value: Any) -> Any:
        if not isinstance(label, Drawn):
            return value
        if isinstance(value, bool):
            return not value
        return type(value)(high) if isinstance(value, int) else (1 - 2.0**-24 if high else 0.0)

    return answer


def of_samples(high: bool) -> Answer:
    """Another value of what depends on samples."""

    def answer(label: Label, value: Any) -> Any:
        if label is None or isinstance(label, Drawn):
            return value
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return value + 1 if high else max(0, value - 1)
        return 1e3 * (abs(value) + 1) * (1 if high else -1)

    return answer


@contextmanager
def extreme_draws(high: bool) -> Iterator[None]:
    """Python's and numpy's global random numbers within are all as small, or as large, as they can be."""
    words = [ONES if high else 0] * 624
    random.setstate((3, (*words, 0), None))
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), 0, 0, 0.0))
    yield
