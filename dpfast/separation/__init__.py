"""Does every layer keep the samples of a batch apart? Proved from the operators, and tried; never assumed.

``check`` is the whole of it. ``proof`` follows operators by ``rules``, ``networks`` and ``indexing``, which give
``labels`` to tensors; ``trial`` tries an operator that has no rule; ``followed`` asks the proof about a private model,
and ``answers`` has it take other branches. ``experiment`` replaces samples and leaves them out, with the same
``draws``; ``segments_apart`` replaces samples of packed rows, and ``losses_apart`` checks losses without a backward.
``passes`` and ``state`` keep all of that from leaving a trace, and ``schedule`` says when it is repeated.
"""

from dpfast.separation.check import Check, Verdict
from dpfast.separation.draws import Draws
from dpfast.separation.followed import Followed
from dpfast.separation.inputs import kind, noisy, unvarying
from dpfast.separation.losses_apart import LossCheck
from dpfast.separation.passes import aside, observed, own_random_numbers, same, without_autocast
from dpfast.separation.segments_apart import SegmentsApart
from dpfast.separation.state import kept

__all__ = [
    "Check",
    "Draws",
    "Followed",
    "LossCheck",
    "SegmentsApart",
    "Verdict",
    "aside",
    "kept",
    "kind",
    "noisy",
    "observed",
    "own_random_numbers",
    "same",
    "unvarying",
    "without_autocast",
]
