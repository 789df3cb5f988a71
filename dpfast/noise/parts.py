"""The noise of one step, of parts of the parameters whose standard deviations differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpfast.ops import Noise


def only(parameter: Any) -> int:
    """The part of a parameter where all get one noise."""
    return 0


@dataclass(frozen=True)
class StepNoise:
    """Of each part the noise, with key and step in common, and which part a parameter is of."""

    parts: Sequence[Noise]
    part_of: Callable[[Any], int] = only
