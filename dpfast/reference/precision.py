"""Products in full float32, whatever the user has allowed in products of the model.

torch's switches (``set_float32_matmul_precision``, ``torch.backends.*.fp32_precision``, ``allow_tf32``) let a library
round both sides of a float32 product to tf32 or bfloat16. On a CPU it does so for some shapes only, so that one sample
more or less changes how all the others are rounded: no bound on a single sample's error covers that. What norms and
clipped sums are made of is therefore computed without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# By device: which of torch's switches its products and convolutions obey.
_OBEYED = {"cpu": (("mkldnn", "matmul"), ("mkldnn", "conv")), "cuda": (("cuda", "matmul"), ("cuda", "conv"))}
_FULL = ("none", "ieee")
_ALL = tuple(switch for switches in _OBEYED.values() for switch in switches)
_get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_set: Callable[[str, str, str], Any] = torch._C._set_fp32_precision_setter


class _Switches:
    """torch's switches are the process's, not a thread's: the first thread in turns them, the last turns them back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.held: dict[tuple[str, str], str] = {}
        self.older = "highest"

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.held = {switch: _get(*switch) for switch in _ALL}
                for switch in _ALL:
                    _set(*switch, "ieee")
                self.older = torch.get_float32_matmul_precision()
                if self.older != "highest":  # torch refuses to multiply where this one and the others disagree
                    torch.set_float32_matmul_precision("highest")
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside:
                return
            if self.older != "highest":
                torch.set_float32_matmul_precision(self.older)
            for switch, precision in self.held.items():
                _set(*switch, "none")
                if _get(*switch) != precision:  # else it is inherited from the switch above it, and stays so
                    _set(*switch, precision)


_switches = _Switches()


class full_precision:
    """Within, float32 products on ``device`` are made in float32; afterwards all is as it was, after an error too.

    It takes a microsecond where nothing else is allowed, which is torch's default on a CPU. Other threads' products are
    in float32 for that time as well.
    """

    __slots__ = ("device", "entered")

    def __init__(self, device: torch.device):
        self.device = device.type

    def __enter__(self) -> None:
        self.entered = needs_full_precision(self.device)
        if self.entered:
            _switches.enter()

    def __exit__(self, *error: Any) -> None:
        if self.entered:
            _switches.leave()


def alike_for_every_batch(x: Tensor, op: Callable[..., R], *args: Any) -> R:
    """``op(*args)`` of tensors where ``x`` is, for what a layer computes itself: in :class:`full_precision` on a CPU.

    There oneDNN takes a bfloat16 kernel for some batch sizes only, and each sample's own gradient would depend on how
    many others there are. On a GPU tf32 is of the device and the layer, and stays as the user wants it.
    """
    if not x.is_cpu or not needs_full_precision("cpu"):
        return op(*args)
    with full_precision(x.device):
        return op(*args)


def needs_full_precision(device: str) -> bool:
    """Whether a product on such a device may be made in less than float32, or another thread may turn that on again."""
    if device == "cpu":  # asked twice for each layer
        return _switches.inside > 0 or _get("mkldnn", "matmul") not in _FULL or _get("mkldnn", "conv") not in _FULL
    return _switches.inside > 0 or any([_get(*switch) not in _FULL for switch in _OBEYED.get(device, ())])


def in_full_precision(op: Callable[P, R]) -> Callable[P, R]:
    """``op``, whose first argument is a tensor, within :class:`full_precision`."""

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]
        with full_precision(x.device):
            return op(*args, **kwargs)

    return run
