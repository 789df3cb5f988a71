"""What stands in for a module's ``forward``: the layer's tap, the generic path, or the module's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.layers import Layer
from dpfast.layers.generic import Copies, Generic
from dpfast.layers.shift import Shift, swapped
from dpfast.layers.tap import OUTSIDE, LayoutError, Recorder, Tap, running_backward
from dpfast.separation import aside, same
from dpfast.trees import tensors


class Forward:
    """An instance's forward, replaced and given back; the signature shown is the module's own."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.previous = vars(module).get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.previous or partial(type(self.module).forward, self.module))

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def untapped(self, recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; shifted where a training forward runs it without gradients, as checkpoints do."""
        within = recorder.inside or running_backward() != OUTSIDE
        if recorder.shift and within and not recorder.paused and not torch.is_grad_enabled():
            with recorder.shift.in_place_of(self.module):
                return self.plain(*args, **kwargs)
        return self.plain(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def install(self) -> None:
        self.module.forward = self  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        if self.previous is not None:
            self.module.forward = self.previous  # type: ignore[method-assign]
        else:
            vars(self.module).pop("forward", None)


def trains(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


class LayerForward(Forward):
    """A layer that its family serves."""

    def __init__(self, module: nn.Module, layer: Layer, tap: Tap):
        super().__init__(module)
        self.layer, self.tap = layer, tap
        self._own = dict(module._parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.tap.recorder.ranks.sharded:
            self.tap.recorder.link(self.module._parameters, self._own)
        if self.tap.recorder.paused or not trains(self.module):
            return self.untapped(self.tap.recorder, *args, **kwargs)
        return self.layer.run(self.module, self.tap, *args, **kwargs)


class GenericForward(Forward):
    """A module with parameters that only vmap can serve."""

    def __init__(self, module: nn.Module, generic: Generic):
        super().__init__(module)
        self.generic = generic
        self._compared: set[tuple[int, ...]] = set()  # numbers of dimensions of inputs that were compared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.generic.recorder
        # Inside of another generic module, whose copies cover this one's parameters.
        covered = recorder.token is not None
        if covered or recorder.paused or not torch.is_grad_enabled() or not self._trains():
            return self.untapped(recorder, *args, **kwargs)
        signature = tuple(x.dim() for x in tensors((args, kwargs)))
        if recorder.verifies and recorder.batch_size != 1 and signature not in self._compared:
            self._compare(args, kwargs)
            self._compared.add(signature)
        return self.generic(self.plain, *args, **kwargs)

    def _compare(self, args: Any, kwargs: Any) -> None:
        """The module must compute the same sample by sample as on the batch."""
        recorder = self.generic.recorder
        with aside(self.module), recorder.setting(shift=Shift()):
            with recorder.setting(paused=True):
                expected = tensors(self.plain(*args, **kwargs))
            found = tensors(self.generic(self.plain, *args, **kwargs))
        if not same(expected, found):
            raise LayoutError(f"{type(self.module).__name__} computes something else on one sample at a time")

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.generic.parameters)


class UnservedForward(Forward):
    """A module of a model that is trained one sample at a time: the ordinary gradient is the per-sample gradient."""

    def __init__(self, module: nn.Module, name: str, recorder: Recorder):
        super().__init__(module)
        self.name, self.recorder = name, recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recorder.paused or not trains(self.module):
            return self.untapped(self.recorder, *args, **kwargs)
        self.recorder.start_forward()
        if self.recorder.batch_size not in (0, 1):
            raise ValueError(
                f"module {self.name!r} ({type(self.module).__name__}) is trained at a physical batch of one, "
                f"but got inputs of {self.recorder.batch_sizes}: iterate over "
                f"BatchMemoryManager(max_physical_batch_size=1)"
            )
        if not self.recorder.shift.in_use or self.recorder.batch_size == 0:
            return self.plain(*args, **kwargs)
        with swapped(self._owners(), self._copies()):
            return self.plain(*args, **kwargs)

    def _owners(self) -> Iterator[nn.Module]:
        """The module and, below it, what has parameters but no forward, such as a ``ParameterList``."""
        yield self.module
        for child in self.module.modules():
            if type(child).forward is nn.Module.forward:
                yield child

    def _copies(self) -> dict[nn.Parameter, Tensor]:
        """The one sample's shifted copy of every trained parameter; the gradient is recorded where it was made."""
        copies = {}
        for p in (p for owner in self._owners() for p in owner._parameters.values()):
            if p in self.recorder.names and p.requires_grad and p not in copies:
                tap = Tap(self.recorder, Copies(), self.recorder.names[p])
                copies[p] = tap(torch.zeros(1, device=p.device), p).squeeze(0)
        return copies
