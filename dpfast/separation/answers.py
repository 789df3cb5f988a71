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


def of_samples(nth: int) -> list[Answer]:
    """Other answers to the ``nth`` question about samples, each for a pass of its own."""

    def one(other: Callable[[Any], Any]) -> Answer:
        asked = iter(range(1 << 30))

        def answer(label: Label, value: Any) -> Any:
            if label is None or isinstance(label, Drawn) or next(asked) != nth:
                return value
            return not value if isinstance(value, bool) else type(value)(other(value))

        return answer

    return [one(lambda value: 1e3 * (abs(value) + 1)), one(lambda value: 0 if value else -1e3)]


@contextmanager
def extreme_draws(high: bool) -> Iterator[None]:
    """Python's and numpy's global random numbers within are all as small, or as large, as they can be."""
    words = [ONES if high else 0] * 624
    random.setstate((3, (*words, 0), None))
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), 0, 0, 0.0))
    yield
