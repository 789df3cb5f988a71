"""Modules whose bare parameters only broadcast over the batch, which run as they are written, without vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpfast.capture.recorder import Recorder
from dpfast.capture.shift import Shift
from dpfast.capture.traced_tap import TracedTap
from dpfast.capture.trees import tensors
from dpfast.layers.broadcast import BareParameter, Broadcast, stand_ins
from dpfast.layers.generic import Generic
from dpfast.model.forwards import GenericForward
from dpfast.separation import aside, kept, own_random_numbers, same, without_autocast


class BareParameters:
    """The modules of a model that are ``served`` so, until something else is done with a parameter of theirs.

    A stand-in is found before the parameter that it stands for as an instance's plain attribute is: ``parameters()``
    and ``state_dict()`` have the parameter all the while.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.served: list[BareForward] = []
        self.stands = False
        self._stood: list[tuple[dict[str, Any], str, BareParameter]] = []
        self.worked = False  # a forward has come to its end like this
        self._compared: set[tuple[int, ...]] = set()  # numbers of dimensions of inputs that were compared

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "stands": False,
            "_stood": [],
        }  # a copy that a forward makes is of a model that does not run

    @contextmanager
    def standing(self, backward: bool = False) -> Iterator[None]:
        """Within, they stand in for all parameters that are trained, where gradients are taken or in a ``backward``."""
        recorder = self.recorder
        idle = not self.served or recorder.paused or recorder.token is not None or recorder.batch_size == 0
        if self.stands or idle or not (backward or torch.is_grad_enabled()):
            yield
            return
        stood = self._stood = [
            (vars(module), name, bare)
            for forward in self.served
            for module, name, bare in forward.places
            if bare.parameter.requires_grad and module._parameters.get(name) is bare.parameter
        ]
        try:
            self.stands = True
            for held, name, bare in stood:
                held[name] = bare
            yield
        finally:
            if self._stood is stood:
                self.leave()

    def leave(self) -> None:
        """The modules have their parameters again; a backward pass that raised has left that to whoever comes next."""
        for held, name, _ in self._stood:
            held.pop(name, None)
        self._stood, self.stands = [], False

    def computes_the_same(self, run: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether the model does with stand-ins what it does without: its code may ask of what kind they are.

        It is tried once for inputs of as many dimensions each.
        """
        signature = tuple([x.dim() for x in tensors((args, kwargs))])
        if signature in self._compared:
            return True
        full = without_autocast(module, args, kwargs)
        with aside(module), self.recorder.setting(shift=Shift()), full as inputs:
            with self.recorder.setting(paused=True), kept(module), own_random_numbers(0):
                expected = tensors(run(*inputs))
            with own_random_numbers(0):
                found = tensors(run(*inputs))
        if not same(expected, found):
            return False
        self._compared.add(signature)
        return True

    def check(self, out: Any) -> None:
        """What a forward returned has no stand-in in it; one that was used otherwise has raised, and been caught."""
        for bare in stand_ins(out):
            raise bare.unserved("the model returns it")
        for forward in self.served:
            if forward.unserved:
                raise forward.places[0][2].unserved("what it raised was caught")
        self.worked = True

    def give_up(self, every: bool = False) -> bool:
        """Have vmap serve the modules that need it, others of their kind, and what is below; False if none is left."""
        kinds = {type(forward.module) for forward in self.served if every or forward.unserved}
        below = {m for forward in self.served if type(forward.module) in kinds for m in forward.module.modules()}
        gone = [forward for forward in self.served if forward.module in below]
        for forward in gone:
            forward.served = False
            self.served.remove(forward)
        self.worked = self.worked and not gone
        return bool(gone)


class BareForward(GenericForward):
    """A module with parameters of its own that may merely broadcast over the batch."""

    def __init__(self, module: nn.Module, generic: Generic, bare: BareParameters, names: Mapping[nn.Parameter, str]):
        super().__init__(module, generic)
        self.bare = bare
        self.served, self.unserved = True, False
        taps: dict[nn.Parameter, TracedTap] = {}
        self.places: list[tuple[nn.Module, str, BareParameter]] = []
        for holder in (module, *(m for m in module.children() if type(m).forward is nn.Module.forward)):
            for name, p in holder._parameters.items():
                if p is not None and p in names:
                    tap = taps.setdefault(p, TracedTap(generic.recorder, Broadcast(), names[p]))
                    self.places.append((holder, name, BareParameter(self, tap, p)))
        bare.served.append(self)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what stands for a parameter is of the copied one, whose own copy is a parameter."""
        return {
            **vars(self),
            "places": [(holder, name, bare.tap, bare.parameter) for holder, name, bare in self.places],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.places = [(holder, name, BareParameter(self, tap, p)) for holder, name, tap, p in state["places"]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.bare.stands and self.served:
            return self.plain(*args, **kwargs)
        return self.beside(*args, **kwargs)

    def beside(self, *args: Any, **kwargs: Any) -> Any:
        """The same where nothing stands in yet, in a checkpoint that computes again; or the generic path."""
        recorder = self.generic.recorder
        if not self.served or recorder.token is not None or recorder.paused or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        with self.bare.standing():
            return self.plain(*args, **kwargs)
