"""Which run has taken which of the steps that an accountant has counted.

A checkpoint may come back to the run that wrote it and has gone on since, or go to another run; and two runs may go on
from one checkpoint. A step of one run is counted once, however often it comes back. Steps of two runs are two, however
alike they are. What was released cannot be taken back, so that no step is ever forgotten.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from opacus.accountants import IAccountant

from dpfast.distributed.ranks import Ranks
from dpfast.noise.stream import this_process
from dpfast.refusals import CheckpointError

ACCOUNTANT = "privacy_accountant_state_dict"
RUNS = "runs"  # in an accountant's state, beside Opacus' entries

Steps = tuple[float, float, int]  # noise multiplier, sample rate, how many
History = Sequence[Steps]


@dataclass
class Runs:
    """Those that an accountant has counted steps of: others, in the order of its history, and then its own."""

    token: str = field(default_factory=lambda: secrets.token_hex(16))
    others: dict[str, list[Steps]] = field(default_factory=dict)
    process: tuple[int, int] = field(default_factory=this_process)
    seen: list[Steps] = field(default_factory=list)  # of its own, when it was asked last

    @property
    def own(self) -> str:
        """The name of the run that goes on here; a forked process is another one."""
        here = this_process()
        return self.token if here == self.process else "-".join(map(str, (self.token, *here)))

    def steps(self, history: History) -> dict[str, list[Steps]]:
        """The steps of each run."""
        rest = [*history]
        for theirs in self.others.values():
            common, rest = _split(rest, theirs)
            if _total(common) < _total(theirs):
                self._replaced()
                return {self.own: [*history]}
        if _total(_split(rest, self.seen)[0]) < _total(self.seen):
            self._replaced()
        self.seen = rest
        return {**self.others, self.own: rest}

    def _replaced(self) -> None:
        """The history was replaced by hand: what is counted from now on is another run's."""
        self.token, self.process, self.others, self.seen = secrets.token_hex(16), this_process(), {}, []


# A copy of an accountant is not in it: all its steps are taken for those of another run, as nobody knows which are.
_runs: WeakKeyDictionary[IAccountant, Runs] = WeakKeyDictionary()


def _of(accountant: IAccountant) -> Runs:
    return _runs.setdefault(accountant, Runs())


def shared_by(ranks: Ranks, accountant: IAccountant) -> None:
    """The run of ``accountant`` has one name on all ranks, whose steps are the same."""
    if ranks.world_size > 1:
        runs = _of(accountant)
        runs.token, runs.process = ranks.from_rank(0, runs.own), this_process()


def by_run(accountant: IAccountant) -> list[list[Any]]:
    """Each run's name and steps, for a checkpoint."""
    return [[name, steps] for name, steps in _of(accountant).steps(accountant.history).items() if steps]


def state_of(accountant: IAccountant) -> dict[str, Any]:
    """The accountant's state, for a checkpoint."""
    return {**accountant.state_dict(), RUNS: by_run(accountant)}


@dataclass(frozen=True)
class Joined:
    """What an accountant will have counted when a checkpoint's state is loaded."""

    accountant: IAccountant
    history: list[Steps]
    others: dict[str, list[Steps]]

    def take_over(self) -> None:
        """Load it."""
        self.accountant.history = self.history
        runs = _of(self.accountant)
        runs.others, runs.seen = self.others, []


def joined(accountant: IAccountant, state: Any) -> Joined:
    """Every step that either ``accountant`` or a checkpoint's ``state`` has counted.

    The state of a run that did not note who it was, as Opacus' own, is that of another run.

    Raises:
        ValueError: ``state`` is malformed, or of another accountant; nothing is changed.
    """
    held = _checked(accountant, state)
    own = _of(accountant).own
    mine = _of(accountant).steps([_as_steps(entry) for entry in accountant.history])
    all_of = {name: _longer(mine.get(name, []), held.get(name, [])) for name in (*mine, *held)}
    of_own = all_of.pop(own, [])
    history = _merged(steps for each in (*all_of.values(), of_own) for steps in each)
    if (more := _total(history) - sum(map(_total, held.values()))) > 0:
        warnings.warn(
            f"this engine has accounted for {more} steps more than the checkpoint; they stay accounted for, as what "
            f"they released cannot be taken back",
            stacklevel=4,
        )
    if accountant.mechanism() == "gdp" and len(history) > 1:
        raise CheckpointError(
            f"{ACCOUNTANT}: with the steps of this engine there would be {len(history)} noise multipliers or sample "
            f"rates, and accountant='gdp' takes one: use 'prv' or 'rdp', or a new engine"
        )
    return Joined(accountant, history, all_of)


def _checked(accountant: IAccountant, state: Any) -> dict[str, list[Steps]]:
    if not isinstance(state, Mapping) or not {"history", "mechanism"} <= set(state):
        raise CheckpointError(f"{ACCOUNTANT}: a mapping with a history and a mechanism was expected")
    if state["mechanism"] != accountant.mechanism():
        raise CheckpointError(
            f"{ACCOUNTANT}: it is of accountant={state['mechanism']!r}, and this engine has "
            f"accountant={accountant.mechanism()!r}: make the engine with the other one"
        )
    history = [_as_steps(entry) for entry in state["history"]]
    named = state.get(RUNS) or [[f"unknown-{secrets.token_hex(16)}", history]]
    if not all(isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], str) for each in named):
        raise CheckpointError(f"{ACCOUNTANT}: {RUNS}={named!r}: a list of names with their steps was expected")
    held = {name: [_as_steps(entry) for entry in steps] for name, steps in named}
    if len(held) < len(named) or _merged(s for steps in held.values() for s in steps) != _merged(history):
        raise CheckpointError(f"{ACCOUNTANT}: its {RUNS} have other steps than its history")
    return held


def _as_steps(entry: Any) -> Steps:
    fits = isinstance(entry, tuple | list) and len(entry) == 3 and all(map(_is_number, entry))
    if not fits or entry[2] != int(entry[2]):
        raise CheckpointError(f"{ACCOUNTANT}: {entry!r} is no (noise multiplier, sample rate, steps)")
    return float(entry[0]), float(entry[1]), int(entry[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _split(history: History, beginning: History) -> tuple[list[Steps], list[Steps]]:
    """The steps with which both begin, and those of ``history`` that come after them."""
    common: list[Steps] = []
    rest = [*history]
    for sigma, rate, steps in beginning:
        both = min(steps, rest[0][2]) if rest and rest[0][:2] == (sigma, rate) else 0
        if both:
            common.append((sigma, rate, both))
            rest[0] = (sigma, rate, rest[0][2] - both)
            rest = rest[not rest[0][2] :]
        if both < steps:
            break
    return common, rest


def _longer(mine: History, held: History) -> list[Steps]:
    """The steps of one run, of which one list or the other may lack the last ones."""
    return _merged([*mine, *_split(held, mine)[1]])


def _merged(history: Iterable[Steps]) -> list[Steps]:
    """The same with as few entries as there can be."""
    merged: list[Steps] = []
    for sigma, rate, steps in history:
        if merged and merged[-1][:2] == (sigma, rate):
            steps += merged.pop()[2]
        if steps:
            merged.append((sigma, rate, steps))
    return merged


def _total(history: History) -> int:
    return sum(steps for *_, steps in history)
