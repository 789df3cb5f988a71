"""Where a training step takes its gradients, if not at the weights themselves: at the weights plus a shift."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction


class Shift:
    """What is added to each parameter in the forwards and backwards of training.

    Guarantee: parameters are only ever read. Layers compute with *points*, ``parameter + shift``, that are made anew
    from the parameters at every training forward of the model; so the shift is the same for all physical batches of a
    logical batch, holds for weights that were changed or loaded in between, and nothing has to be undone: ``eval()``,
    ``state_dict`` and whatever runs after an exception see the weights. The sum is float32 (float64 for float64) and is
    rounded to the parameter's dtype once. A parameter that is frozen by the time of the forward is not shifted.
    """

    def __init__(self) -> None:
        self.in_use = False  # an ascent steers this run, be there a shift yet or not
        self.shifts: dict[nn.Parameter, Tensor] = {}
        self._points: dict[nn.Parameter, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether any parameter is shifted."""
        return bool(self.shifts)

    def set(self, shifts: Mapping[nn.Parameter, Tensor]) -> None:
        """Shift by these from now on."""
        self.shifts, self._points = dict(shifts), {}

    def start_forward(self) -> None:
        """The parameters may have changed: make the points of this forward and its backward."""
        self._points = {}
        if not self.shifts:
            return
        trained = [p for p in self.shifts if p.requires_grad]
        with torch.no_grad():
            for p, point in zip(trained, added(trained, [self.shifts[p] for p in trained]), strict=True):
                self._points[p] = point

    def at(self, params: Sequence[Any]) -> Sequence[Any]:
        """What to compute with in place of ``params``."""
        return [self._points.get(p, p) for p in params] if self._points else params

    @contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[None]:
        """The points stand in ``module`` and below it in place of the parameters, for code without gradients."""
        with swapped(module.modules(), self._points):
            yield


def added(params: Sequence[Tensor], shifts: Sequence[Tensor]) -> Sequence[Tensor]:
    """``params + shifts``, summed in the wider dtype and rounded to the parameter's."""
    params = [p.detach() for p in params]
    if any(p.dtype != shift.dtype for p, shift in zip(params, shifts, strict=True)):
        return [(p + shift).to(p.dtype) for p, shift in zip(params, shifts, strict=True)]
    return torch._foreach_add(params, list(shifts))


@contextmanager
def swapped(owners: Iterable[nn.Module], tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Parameters of ``owners`` replaced by the tensors given for them."""
    places = [
        (owner, name, p) for owner in owners for name, p in owner._parameters.items() if p is not None and p in tensors
    ]
    try:
        for owner, name, p in places:
            owner._parameters[name] = tensors[p]  # type: ignore[assignment]
        yield
    finally:
        for owner, name, p in places:
            owner._parameters[name] = p
        for owner in {owner for owner, _, _ in places}:
            if isinstance(owner, nn.RNNBase):
                owner._init_flat_weights()  # it keeps a list of them, which followed


def inside_checkpoint() -> bool:
    """Whether a reentrant checkpoint runs this forward, without gradients, to be run again in the backward."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False
