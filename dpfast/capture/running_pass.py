"""What the running backward pass is: one that trains, or ``torch.autograd.grad``, which trains nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

_is_whole = torch.autograd.Variable._execution_engine.is_checkpoint_valid


def is_whole() -> bool:
    """Whether ``backward()`` runs for all that the loss depends on: not ``torch.autograd.grad``, nor for some inputs.

    Only such a pass may run a reentrant checkpoint again, so the engine keeps count of it.
    """
    return _is_whole()


def arrives(parameter: Tensor) -> bool:
    """Whether the gradient of ``parameter`` is for training; ``torch.autograd.grad`` hands it to the caller instead."""
    if transforms():  # torch.func.grad: it returns what it is asked for, too
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # the engine's word for a gradient that torch.autograd.grad has asked for
        return False


def transforms() -> list[TransformType]:
    """The transforms of ``torch.func`` that the running code is inside of."""
    return [interpreter.key() for interpreter in get_interpreter_stack() or []]


@contextmanager
def unseen(what: str) -> Iterator[None]:
    """Within, operators are hidden from whoever watches or changes them, as they are nobody's values.

    Raises:
        RuntimeError: a trace of the step is being made, which would take ``what`` for constants.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(f"{what} follow from values of the batch")
    with _disable_current_modes():
        yield


def trains(parameters: Iterable[Tensor]) -> bool:
    """Whether the running pass may leave a gradient in any of ``parameters``."""
    return is_whole() or any(p.requires_grad and arrives(p) for p in parameters)
