"""What a forward leaves behind in a model: it must not depend on the samples, for it is released without noise."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

PLAIN = (int, float, bool, str, type(None))
Numbers = list[dict[str, Any]]  # by module, in their order, and by attribute
OWN = set(vars(nn.Module()))  # a module's registries of parameters, buffers, hooks


class Kept(TorchDispatchMode):
    """Copies a parameter or buffer before it is first written to; :meth:`restore` puts everything back, and numbers,
    flags and texts that modules have as attributes.

    Attributes:
        written: names of what was written to, with the values that it was given.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        named = [*module.named_parameters(), *module.named_buffers()]
        self._held = {
            name: (x, x.detach())
            for name, x in named
            if not is_traceable_wrapper_subclass(x) and x.layout is torch.strided
        }
        self._names: dict[int, list[str]] = {}
        for name, (_, x) in self._held.items():
            self._names.setdefault(_storage(x), []).append(name)
        self._owners = {name: (m, dict(m._buffers)) for name, m in module.named_modules() if m._buffers}
        self._copies: dict[str, Tensor] = {}
        self._plain = [(m, _plain(vars(m))) for m in module.modules()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for k, name in written_arguments(func):
            given = args[k] if k < len(args) else kwargs.get(name)
            for x in given if isinstance(given, (list, tuple)) else [given]:
                self._keep(x)
        return func(*args, **kwargs)

    def _keep(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            return
        for name in self._names.get(_storage(x), ()):
            if name not in self._copies:
                self._copies[name] = self._held[name][1].clone()

    def written(self) -> dict[str, Tensor]:
        """What was written to, or replaced by another tensor, as it is now."""
        found = {name: self._held[name][1].clone() for name in self._copies}
        for name, (x, before) in self._held.items():
            if x.data_ptr() != before.data_ptr() or x.shape != before.shape:
                found[name] = x.detach().clone()
        for prefix, (module, buffers) in self._owners.items():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer is not buffers.get(key):
                    found[f"{prefix}.{key}" if prefix else key] = buffer.detach().clone()
        return found

    def numbers(self) -> Numbers:
        """Numbers, flags and texts that modules have as attributes now."""
        return [_plain(vars(module)) for module, _ in self._plain]

    def put(self, numbers: Numbers) -> None:
        """Have modules hold what :meth:`numbers` of an earlier forward was."""
        for (module, _), values in zip(self._plain, numbers, strict=True):
            vars(module).update(values)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for module, buffers in self._owners.values():
            module._buffers.clear()
            module._buffers.update(buffers)
        for x, before in self._held.values():
            if x.data_ptr() != before.data_ptr() or x.shape != before.shape:
                x.data = before
        for name, copy in self._copies.items():
            x = self._held[name][0]
            if not torch.equal(x, copy):  # a copy would invalidate what a graph has saved of it
                x.copy_(copy)
        self._copies = {}
        for module, attributes in self._plain:
            now = vars(module)
            now.update({name: value for name, value in attributes.items() if type(now.get(name)) in PLAIN})


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts among a module's attributes: counters and flags that its forward may set."""
    return {name: value for name, value in attributes.items() if type(value) in PLAIN}


@cache
def written_arguments(func: Any) -> list[tuple[int, str]]:
    """Place and name of each argument that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(k, x.name) for k, x in arguments if x.alias_info is not None and x.alias_info.is_write]


def _storage(x: Tensor) -> int:
    if x.layout is not torch.strided:
        return 0
    return x.untyped_storage()._cdata


@contextmanager
def kept(module: nn.Module) -> Iterator[Kept]:
    """Forwards within leave the model's parameters and buffers as they were."""
    keeping = Kept(module)
    try:
        with keeping:
            yield keeping
    finally:
        keeping.restore()


def attributes(module: nn.Module) -> dict[str, list[Tensor]]:
    """Tensors that modules hold as plain attributes, by name, also in lists, tuples and dicts."""
    found: dict[str, list[Tensor]] = {}
    for prefix, child in module.named_modules():
        for key, value in vars(child).items():
            if key in OWN:
                continue
            held = _in_containers(value)
            if held:
                found[f"{prefix}.{key}" if prefix else key] = held
    return found


def _in_containers(value: Any, depth: int = 3) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if depth == 0 or not isinstance(value, (list, tuple, deque, set)):
        return []
    return [x for each in value for x in _in_containers(each, depth - 1)]
