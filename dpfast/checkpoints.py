"""What an engine's checkpoint holds, how its file is written and read, and how it is taken over.

A file is written whole or not at all, for its owner alone, and read without running code that it may hold. It has no
key of the noise: a run that goes on from it draws a new one, since nobody can say that it will see the same batches.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from opacus.accountants import IAccountant
from opacus.optimizers import DPOptimizer

from dpfast.grad_sample import FusedHooks
from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.planner import check_state as check_plan

# In a checkpoint, beside Opacus' entries:
PLAN, THRESHOLDS, ASCENT = "plan_state_dict", "max_grad_norms", "ascent_state_dict"
NOISE_STATE = "noise_state_dict"  # once it was in every checkpoint; fine-tuning, which restores its batches, has it
ACCOUNTANT, OPTIMIZER = "privacy_accountant_state_dict", "optimizer_state_dict"

History = Sequence[tuple[float, float, int]]

# NumPy's numbers and arrays, which schedules and noise multipliers are made of.
_NUMPY: list[Any] = [
    *(np.dtype, np.ndarray, np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]),
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
]


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which comes to be at ``path`` when it is whole; only its owner can read it (mode 0600).

    What was there before stays if anything is raised.
    """
    target = Path(os.path.realpath(path))  # of a link the file that it names
    part = tempfile.NamedTemporaryFile("wb", dir=target.parent, prefix=f".{target.name}.", delete=False)  # noqa: SIM115
    try:
        with part as file:
            yield file  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())
        os.replace(part.name, target)
    except BaseException:
        Path(part.name).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the renaming too has to reach the disk
        folder = os.open(target.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Any, **kwargs: Any) -> Any:
    """``torch.load`` of tensors and plain Python (and NumPy's numbers): no file can run code.

    Raises:
        ValueError: the file holds an object of another class, which is named, or is no checkpoint at all.
    """
    if kwargs.pop("weights_only", True) is not True:
        raise ValueError(
            "torch_load_kwargs: weights_only=False would run whatever code the file holds: leave it out, and name "
            "classes of your own to torch.serialization.add_safe_globals"
        )
    allowed = torch.serialization.get_safe_globals()  # the caller's own, which must stay allowed
    with torch.serialization.safe_globals([item for item in _NUMPY if item not in allowed]):
        try:
            return torch.load(path, **kwargs, weights_only=True)
        except (pickle.UnpicklingError, EOFError, IndexError) as error:
            found = re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", str(error))
            if found is None:
                raise ValueError(f"{path!r} is no checkpoint that can be read ({type(error).__name__})") from error
            raise ValueError(
                f"the checkpoint holds {found[1] or found[2]}, which is neither a tensor nor plain Python, and may be "
                f"code: give torch.serialization.add_safe_globals that class, or leave it out of the checkpoint"
            ) from error


def write(path: Any, save: Any) -> None:
    """Have ``save(file)`` write a checkpoint to ``path``, which may be an open file, and see that it can be read.

    Raises:
        ValueError: :func:`read` would refuse it; what was at a ``path`` stays.
    """
    if hasattr(path, "write") or (os.path.exists(path) and not os.path.isfile(path)):  # such as /dev/null
        save(path)
        return
    with written(path) as file:
        save(file)
        file.flush()
        read(file.name, map_location="meta")  # "meta" reads no weights


def contents(module: Any, optimizer: DPOptimizer | None) -> dict[str, Any]:
    """What the fused mode adds to Opacus' entries."""
    found: dict[str, Any] = {}
    if isinstance(optimizer, FusedDPOptimizer):
        if optimizer.ascending.ascent is not None:
            found[ASCENT] = optimizer.ascending.state_dict()
        if optimizer.adaptive is not None:
            found[THRESHOLDS] = optimizer.max_grad_norms
    if isinstance(module, FusedHooks):
        found[PLAN] = module.book.planner.state_dict()
    return found


def take_over(
    held: dict[str, Any],
    *,
    accountant: IAccountant,
    module: Any,
    optimizer: DPOptimizer | None,
    module_load_dict_kwargs: Mapping[str, Any] | None = None,
    **schedulers: Any,
) -> dict[str, Any]:
    """Load what a checkpoint holds into the objects of a run; what is left of it is returned, as in Opacus.

    Raises:
        ValueError: an entry is malformed or of another kind of run; nothing is changed.
    """
    fused = optimizer if isinstance(optimizer, FusedDPOptimizer) else None
    for name in ("module_state_dict", ACCOUNTANT):
        if name not in held:
            raise ValueError(f"the checkpoint has no {name}: it is none of a private engine")
    history = history_after(accountant, held[ACCOUNTANT])
    if fused is not None:
        fused.ascending.check_state(held.get(ASCENT))
    if PLAN in held:
        check_plan(held[PLAN])
    thresholds = held.get(THRESHOLDS)
    adapts = fused is not None and fused.adaptive is not None and thresholds is not None
    if adapts and not (isinstance(thresholds, list) and len(thresholds) == 1 and _is_number(thresholds[0])):
        raise ValueError(f"{THRESHOLDS}={thresholds!r}: a list of one finite positive number was expected")

    module.load_state_dict(held["module_state_dict"], **(module_load_dict_kwargs or {}))
    accountant.history = history
    state = held.pop(OPTIMIZER, {})
    if optimizer is not None and len(state) > 0:
        optimizer.load_state_dict(state)
    elif (optimizer is not None) != (len(state) > 0):
        given = "" if optimizer is not None else "not "
        warnings.warn(f"{OPTIMIZER} has {len(state)} items but optimizer is {given}provided.", stacklevel=3)
    for name, scheduler in schedulers.items():
        state = held.pop(f"{name}_state_dict", {})
        if scheduler is not None and len(state) > 0:
            scheduler.load_state_dict(state)
    held.pop(NOISE_STATE, None)  # a key that other batches have met, or will
    if fused is not None:
        fused.noise.renew()
        fused.ascending.load_state_dict(held.pop(ASCENT, None))
        if fused.adaptive is not None and THRESHOLDS in held:
            (fused.max_grad_norm,) = held.pop(THRESHOLDS)
    if isinstance(module, FusedHooks) and PLAN in held:
        module.book.planner.load_state_dict(held.pop(PLAN))
    return held


def history_after(accountant: IAccountant, state: Any) -> list[tuple[float, float, int]]:
    """The accountant's history when a checkpoint's state has been loaded: every step that either of them has.

    Steps with which both begin are the same ones. What was released after the checkpoint was written cannot be taken
    back: a run that is rolled back has these steps, and those that it takes again.

    Raises:
        ValueError: ``state`` is malformed, or of another accountant.
    """
    if not isinstance(state, Mapping) or not {"history", "mechanism"} <= set(state):
        raise ValueError(f"{ACCOUNTANT}: a mapping with a history and a mechanism was expected")
    if state["mechanism"] != accountant.mechanism():
        raise ValueError(
            f"{ACCOUNTANT}: it is of accountant={state['mechanism']!r}, and this engine has "
            f"accountant={accountant.mechanism()!r}: make the engine with the other one"
        )
    held = []
    for entry in state["history"]:
        fits = isinstance(entry, tuple | list) and len(entry) == 3 and all(map(_is_number_or_zero, entry))
        if not fits or entry[2] != int(entry[2]):
            raise ValueError(f"{ACCOUNTANT}: {entry!r} is no (noise multiplier, sample rate, steps)")
        held.append((float(entry[0]), float(entry[1]), int(entry[2])))
    mine = [(float(sigma), float(rate), int(steps)) for sigma, rate, steps in accountant.history]
    both = _joined(mine, held)
    if (lost := _steps(mine) - _steps(held)) > 0:
        warnings.warn(
            f"load_checkpoint: this engine has accounted for {lost} steps more than the checkpoint; they stay "
            f"accounted for, as what they released cannot be taken back",
            stacklevel=4,
        )
    if accountant.mechanism() == "gdp" and len(both) > 1:
        raise ValueError(
            f"{ACCOUNTANT}: with the steps of this engine there would be {len(both)} noise multipliers or sample "
            f"rates, and accountant='gdp' takes one: use 'prv' or 'rdp', or a new engine"
        )
    return both


def _joined(mine: History, held: History) -> list[tuple[float, float, int]]:
    rest = [*held]
    for sigma, rate, steps in mine:  # the steps at their beginning that both have
        common = 0
        if rest and rest[0][:2] == (sigma, rate):
            common = min(steps, rest[0][2])
            rest[0] = (sigma, rate, rest[0][2] - common)
            rest = rest[not rest[0][2] :]
        if common < steps:
            break
    both: list[tuple[float, float, int]] = []
    for sigma, rate, steps in (*mine, *rest):
        if both and both[-1][:2] == (sigma, rate):
            steps += both.pop()[2]
        both.append((sigma, rate, steps))
    return both


def _steps(history: History) -> int:
    return sum(steps for *_, steps in history)


def _is_number(value: Any) -> bool:
    return _is_number_or_zero(value) and value > 0


def _is_number_or_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
