"""What a step asks of a device: the operators that it dispatches, and those for which the host waits.

Both are counts, which no load of the machine changes. An operator of a compiled library or of Triton counts once,
whatever it launches.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WARM_UP, COUNTED = 2, 3  # steps
ROOT, TORCH = Path(__file__).resolve().parent.parent, str(Path(torch.__file__).parent)

aten = torch.ops.aten
# What launches nothing, beside the views that a schema tells: memory that is not written to, and a view without a sign.
SILENT = {
    aten.empty,
    aten.empty_like,
    aten.empty_permuted,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
}
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # what comes out hangs on values
WAITING = {aten.lift_fresh, aten._linalg_check_errors}  # and these have no such tag
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPYING = {aten._to_copy, aten.copy_}
TAKEN_OVER = {Tensor.cpu: "cpu", Tensor.tolist: "tolist"}  # what no dispatch shows on a CPU


class Dispatched(TorchDispatchMode):
    """Counts of what is dispatched while it is entered, by operator, and of what makes the host wait for ``device``.

    A wait is an operator whose outcome the host must know (``item``, ``bool(tensor)``, ``nonzero``, ``unique``, a mask
    as an index), a tensor made of numbers of Python's (``torch.tensor(list)``), a copy between two kinds of device that
    is not ``non_blocking``, ``cpu()`` and ``tolist()``. On a CPU it is what would make the host wait, were all tensors
    on a GPU. Seen are calls from Python and from autograd, not what compiled code does inside of an operator.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.operators: Counter[str] = Counter()  # views and memory that is not written to are left out
        self.waits: Counter[tuple[str, str]] = Counter()  # by operator and place, the line that asked for it
        self._taken_over = _TakenOver(self.waits)

    def __enter__(self) -> Dispatched:
        if self.device.type == "cpu":
            self._taken_over.__enter__()
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        if self.device.type == "cpu":
            self._taken_over.__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, counts, may_wait = _about(func)
        if counts:
            self.operators[name] += 1
        if may_wait and self._waits(func, args, kwargs, result):
            self.waits[name, _place()] += 1
        return result

    @property
    def waits_by_operator(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for (operator, _), times in self.waits.items():
            found[operator] += times
        return dict(sorted(found.items()))

    def _waits(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> bool:
        packet, given = func.overloadpacket, list(_tensors(args, kwargs))
        kinds = {x.device.type for x in given}
        if self.device.type not in kinds | {x.device.type for x in _tensors(result)}:
            return False
        if packet in COPYING:
            without = kwargs.get("non_blocking", packet is aten.copy_ and args[2:] == (True,))
            return len(kinds | {result.device.type}) > 1 and not without
        if packet in INDEXING:  # a mask that is filled with one number needs no places
            masks = any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
            return masks and (len(args) < 3 or args[2].numel() != 1)
        return True


@functools.cache
def _about(func: Any) -> tuple[str, bool, bool]:
    """An operator's name, whether it counts as one, and whether it may make the host wait."""
    packet = func.overloadpacket
    may_wait = packet in (*COPYING, *INDEXING, *WAITING) or not READING.isdisjoint(func.tags)
    return str(packet), not func.is_view and packet not in SILENT, may_wait


class _TakenOver(TorchFunctionMode):
    """Counts of what takes a tensor's values over to the host and dispatches nothing where they are there."""

    def __init__(self, waits: Counter[tuple[str, str]]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in TAKEN_OVER:
            self.waits[TAKEN_OVER[func], _place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The line outside of torch that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename == __file__ or _is_torch(frame.f_code.co_filename)):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{frame.f_lineno}"


def _is_torch(name: str) -> bool:
    return name.startswith(TORCH) or name.startswith("<")


def _tensors(*given: Any) -> Iterator[Tensor]:
    return (x for x in tree_iter(given) if isinstance(x, Tensor))


def count(step: Callable[[], object], device: torch.device) -> Dispatched:
    """What a step dispatches when all that is made once is there.

    dpfast looks at the model again in a few steps (see :mod:`dpfast.separation.schedule`), and when depends on time. Of
    three steps in a row one at least is without: the one with the fewest operators.
    """
    for _ in range(WARM_UP):
        step()
    found = []
    for _ in range(COUNTED):
        with Dispatched(device) as seen:
            step()
        found.append(seen)
    return min(found, key=lambda seen: seen.operators.total())
