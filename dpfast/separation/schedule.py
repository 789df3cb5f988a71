"""When a model that was found to keep samples apart is looked at again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

SHARE = 0.01  # of a run's time, that later checks may take
RUN = 1000  # steps that a run is thought to have at least


class Schedule:
    """At steps 2, 4, 8 and so on; later where the checks so far have taken their share of the run's time."""

    def __init__(self) -> None:
        self.steps = 0
        self._next = 2
        self._spent = 0.0
        self._longest = 0.0
        self._apart = 0.0  # seconds since the first step that were no step's: all checks
        self._began = 0.0

    def due(self) -> bool:
        """Count a step; whether a check is due in it."""
        self.steps += 1
        if self.steps == 1:
            self._began = perf_counter()
        return self._is_due(self.steps)

    def near(self) -> bool:
        """Whether a check will be due in the next step."""
        return self._is_due(self.steps + 1)

    def _is_due(self, steps: int) -> bool:
        if steps == 1 or steps < self._next:
            return False
        step = (perf_counter() - self._began - self._apart) / (steps - 1)
        return self._spent + self._longest <= SHARE * step * max(RUN, steps)

    @contextmanager
    def checking(self, again: bool = True) -> Iterator[None]:
        """A check runs within; ``again``: a later one, whose time counts, as there may be many of them."""
        began = perf_counter()
        try:
            yield
        finally:
            seconds = perf_counter() - began
            self._apart += seconds
            if again:
                self._spent += seconds
                self._longest = max(self._longest, seconds)
                while self._next <= self.steps:
                    self._next *= 2
