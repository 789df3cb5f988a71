"""The suites of ``python -m dpfast bench``: what each measures, prints and draws.

Each is a module with three functions. ``run(record, options)`` measures what the record does not have yet, saves it
after every measurement, and returns whether all of dpfast was right; ``report(data)`` is the record in Markdown;
``draw(data, stem)`` writes the plots to ``stem`` + a name and returns their paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """What a user can choose."""

    device: torch.device
    seconds: float  # of the suite's timing loops, in all
    small: bool = False  # tiny sizes, which show that everything runs
    models: tuple[str, ...] = ()  # names; none: all that the device has by default
    methods: tuple[str, ...] = ()
