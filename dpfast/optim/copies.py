"""Copies of a private optimizer: they clip, account and add noise as it does, from a noise key of their own."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any

from opacus.accountants import IAccountant

# What a scheduler has wrapped around the original's step would step the original.
_NOT_COPIED = ("step",)


def copied(optimizer: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(optimizer)``: steps of the copy are told to the same accountant.

    Copied together with its model (``copy.deepcopy((model, optimizer))``), it is the copied model's. By itself it has
    copies of the parameters, and no forward of the original reaches it. A logical batch that is under way stays with
    the original.

    Raises:
        TypeError: the optimizer is one of several ranks'.
    """
    _refuse_ranks(optimizer)
    made = object.__new__(type(optimizer))
    memo[id(optimizer)] = made
    for name, value in vars(optimizer).items():
        if name not in _NOT_COPIED:
            vars(made)[name] = copy.deepcopy(value, memo)
    _connect(made)
    return made


def pickled(optimizer: Any) -> tuple[Any, ...]:
    """For ``pickle``: what comes out has an accountant of its own, with the history that this one has now."""
    _refuse_ranks(optimizer)
    state = {name: value for name, value in vars(optimizer).items() if name not in _NOT_COPIED}
    accounting = state.pop("accounting")
    accountant = accountant_of(accounting)
    if accounting is not None and accountant is None:
        raise TypeError("a private optimizer whose step hook for accounting is no accountant's cannot be pickled")
    rate = None if accountant is None else inspect.getclosurevars(accounting).nonlocals["sample_rate"]
    return _unpickled, (type(optimizer), state, accountant, rate)


def _unpickled(kind: type, state: dict[str, Any], accountant: IAccountant | None, sample_rate: float) -> Any:
    made: Any = object.__new__(kind)
    vars(made).update(state)
    made.accounting = None if accountant is None else accountant.get_optimizer_hook_fn(sample_rate=sample_rate)
    _connect(made)
    return made


def _connect(made: Any) -> None:
    """The copied sums are those of the copied optimizer, and a new logical batch begins."""
    made.clipped_sum.optimizer = weakref.ref(made)
    made.clipped_sum.shift = made.ascending.shift
    made._is_last_step_skipped = made.stepped = False
    made.clipped_sum.drop()


def _refuse_ranks(optimizer: Any) -> None:
    if optimizer.ranks.world_size > 1:
        raise TypeError(
            "a private optimizer of several ranks cannot be copied or pickled: keep its state_dict(), and give a copy "
            "of the model and a new optimizer to make_private"
        )


def accountant_of(hook: Any) -> Any:
    """The accountant that ``hook`` is of, if its ``get_optimizer_hook_fn`` has made it."""
    if getattr(hook, "__qualname__", None) != f"{IAccountant.get_optimizer_hook_fn.__qualname__}.<locals>.hook_fn":
        return None
    return inspect.getclosurevars(hook).nonlocals["self"]
