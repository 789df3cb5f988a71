"""Forward and backward passes that leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dpfast.capture.recorder import Recorder
from dpfast.capture.trees import map_tensors
from dpfast.planning.planner import KeepSides
from dpfast.separation.state import kept


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Forwards within have no dropout and leave no trace: in buffers, random state, or a checkpoint around them."""
    dropping = (torch.nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
    dropped = [m for m in module.modules() if isinstance(m, dropping) and m.training]
    for m in dropped:
        m.training = False
    try:
        with kept(module), own_random_numbers(None), own_saved_tensors():
            yield
    finally:
        for m in dropped:
            m.training = True


def own_saved_tensors() -> Any:
    """Keeps a checkpoint around the model from counting what is saved within."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)


def seed_torch(seed: int) -> None:
    """As ``torch.manual_seed``; where there is no accelerator without what that does for each kind of them that there
    might be: it writes out the stack, which takes longer than a small model's forward, and keeps it for ever."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def own_random_numbers(seed: int | None) -> Iterator[None]:
    """Random numbers within, of torch, Python and numpy, follow from ``seed``; those outside go on as they would."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            if seed is not None:
                seed_torch(seed)
                random.seed(seed)
                np.random.seed(seed % (1 << 32))
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextmanager
def observed(recorder: Recorder, observe: Any) -> Iterator[None]:
    """The backward passes within show their forms, as the layers made them, to ``observe`` and change nothing.

    Not even a pass around them.
    """
    pass_around = recorder.suspend()
    try:
        with recorder.setting(observer=observe, planner=KeepSides(recorder.planner), bypassed=[]), own_saved_tensors():
            yield
    finally:
        recorder.resume(pass_around)


@contextmanager
def without_autocast(module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The arguments of forwards within, which compute in the dtype of the parameters: two ways to compute the same
    differ by no more than their rounding."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        yield args, kwargs
        return
    with torch.autocast(device, enabled=False):
        yield map_tensors(lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))


def same(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Equal up to rounding, in the mean square of each tensor."""
    with _disable_current_modes():  # our own comparison is no decision of the model's
        return _same(expected, found)


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    if [x.shape for x in expected] != [x.shape for x in found]:
        return False
    for x, y in zip(expected, found, strict=True):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
            continue
        allowed = 64 * torch.finfo(x.dtype).eps if x.dtype.itemsize > 2 else 0.05
        x, y = (side.detach().double().nan_to_num() for side in (x, y))
        if float((x - y).norm()) > allowed * (float(x.norm()) + 1e-12):
            return False
    return True
