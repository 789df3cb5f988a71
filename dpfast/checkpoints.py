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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from opacus.accountants import IAccountant
from opacus.optimizers import DPOptimizer

from dpfast.accounting.runs import ACCOUNTANT, RUNS, by_run, joined
from dpfast.data.unit import Unit
from dpfast.model.private_model import FusedHooks
from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.planning.planner import check_state as check_plan
from dpfast.refusals import CheckpointError

# In a checkpoint, beside Opacus' entries:
PLAN, THRESHOLDS, ASCENT = "plan_state_dict", "max_grad_norms", "ascent_state_dict"
NOISE_SCALES = "noise_scales"  # of the groups, where they have noise of their own
NOISE_STATE = "noise_state_dict"  # once it was in every checkpoint; fine-tuning, which restores its batches, has it
OPTIMIZER = "optimizer_state_dict"
UNIT = "unit"  # what ε is for

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
        raise CheckpointError(
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
                raise CheckpointError(f"{path!r} is no checkpoint that can be read ({type(error).__name__})") from error
            raise CheckpointError(
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


def contents(module: Any, optimizer: DPOptimizer | None, accountant: IAccountant, unit: Unit) -> dict[str, Any]:
    """What is added to Opacus' entries."""
    found: dict[str, Any] = {RUNS: by_run(accountant), UNIT: unit.state_dict()}
    if isinstance(optimizer, FusedDPOptimizer):
        if optimizer.ascending.ascent is not None:
            found[ASCENT] = optimizer.ascending.state_dict()
        if optimizer.adaptive is not None:
            found[THRESHOLDS] = optimizer.max_grad_norms
        if optimizer.clipping.shares is not None:
            found[NOISE_SCALES] = optimizer.noise_scales
    if isinstance(module, FusedHooks):
        found[PLAN] = module.clipped_sum.planner.state_dict()
    return found


def unit_of(held: dict[str, Any], mine: Unit | None) -> Unit:
    """What the ε of a checkpoint's steps is for, which is taken out of it; a checkpoint that says nothing is of rows.

    ``mine`` is what the engine's is for: where both are the same, how many rows of a user a step takes stays the
    engine's.

    Raises:
        ValueError: the checkpoint's is another one, or malformed.
    """
    state = held.pop(UNIT, {})
    try:
        theirs = Unit(**state)
    except TypeError as error:
        raise CheckpointError(f"{UNIT}={state!r}: what ε is for was expected ({error})") from error
    if mine is not None and not mine.is_like(theirs):
        raise CheckpointError(
            f"the checkpoint's ε is for {theirs}, and this engine's for {mine}: no ε holds for both. Call make_private "
            f"with the units= that the run was trained with"
        )
    return mine or theirs


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
        RuntimeError: the weights do not fit the model, which may have taken some; nothing else is changed.
    """
    fused = optimizer if isinstance(optimizer, FusedDPOptimizer) else None
    for name in ("module_state_dict", ACCOUNTANT):
        if name not in held:
            raise CheckpointError(f"the checkpoint has no {name}: it is none of a private engine")
    counted = joined(accountant, {**dict(held[ACCOUNTANT] or {}), RUNS: held.pop(RUNS, None)})
    state = held.get(OPTIMIZER, {})
    if optimizer is not None and len(state) > 0:
        _check_groups(optimizer, state)
    if fused is not None:
        fused.ascending.check_state(held.get(ASCENT))
    if PLAN in held:
        check_plan(held[PLAN])
    thresholds = held.get(THRESHOLDS)
    adapts = fused is not None and fused.adaptive is not None and thresholds is not None
    if adapts:
        assert fused is not None
        groups = len(fused.max_grad_norms)
        if not (isinstance(thresholds, list) and len(thresholds) == groups and all(map(_is_number, thresholds))):
            raise CheckpointError(
                f"{THRESHOLDS}={thresholds!r}: finite positive numbers were expected, a list of {groups}"
            )

    module.load_state_dict(held["module_state_dict"], **(module_load_dict_kwargs or {}))
    counted.take_over()
    held.pop(OPTIMIZER, None)
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
    for each in (fused, _optimizer_of(module)):
        if each is not None:
            each.noise.renew()
    if fused is not None:
        fused.ascending.load_state_dict(held.pop(ASCENT, None))
        if fused.adaptive is not None and THRESHOLDS in held:
            fused.clipping.thresholds = list(held.pop(THRESHOLDS))
        mine = None if fused.clipping.shares is None else fused.noise_scales
        theirs = held.pop(NOISE_SCALES, None)
        if (mine is None) != (theirs is None) or (mine and not _alike(mine, theirs)):
            warnings.warn(
                f"the checkpoint's groups had noise scaled by {theirs or 'one number'}, and this optimizer's have "
                f"{mine or 'one number'}, which it keeps: give make_private the same group_noise to go on as before",
                stacklevel=3,
            )
    if isinstance(module, FusedHooks) and PLAN in held:
        module.clipped_sum.planner.load_state_dict(held.pop(PLAN))
    return held


def _check_groups(optimizer: DPOptimizer, state: Any) -> None:
    """What torch refuses when it loads the state, before anything is loaded."""
    mine = [len(group["params"]) for group in optimizer.param_groups]
    given = state.get("param_groups") if isinstance(state, Mapping) else None
    theirs = [len(group["params"]) for group in given] if isinstance(given, list) else given
    if mine != theirs:
        raise CheckpointError(
            f"{OPTIMIZER}: its groups have {theirs} parameters, and those of this optimizer {mine}: make the optimizer "
            f"of the same parameters"
        )


def _optimizer_of(module: Any) -> FusedDPOptimizer | None:
    """The private optimizer of ``module``, be it given or not: its noise must not go on either."""
    known = module.clipped_sum.optimizer if isinstance(module, FusedHooks) else None
    return None if known is None else known()


def _alike(mine: list[float], theirs: Any) -> bool:
    same = isinstance(theirs, list) and len(theirs) == len(mine) and all(map(_is_number, theirs))
    return same and all(map(math.isclose, mine, theirs))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
