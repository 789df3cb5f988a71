"""What stands in for a module's ``forward``: the layer's tap, the generic path, or the module's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.recorder import OUTSIDE, Recorder, running_backward
from dpfast.capture.shift import Shift
from dpfast.capture.tap import Tap
from dpfast.capture.trees import map_tensors, tensors
from dpfast.layers import Layer
from dpfast.layers.derived import Source
from dpfast.layers.generic import Generic
from dpfast.layers.overridden import Overridden
from dpfast.refusals import SamplesMeetError
from dpfast.separation import aside, kept, same, without_autocast
from dpfast.separation.state import Kept


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
    """Whether a forward of ``module`` may lead to gradients of its parameters."""
    if not torch.is_grad_enabled():
        return False
    for p in module._parameters.values():
        if p is not None and p.requires_grad:
            return True
    return bool(module._modules) and any(p.requires_grad for p in module.parameters())


class LayerForward(Forward):
    """A layer that its family serves."""

    def __init__(self, module: nn.Module, layer: Layer, tap: Tap):
        super().__init__(module)
        self.layer, self.tap = layer, tap
        self._own = dict(module._parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.tap.recorder
        if recorder.ranks.sharded:
            recorder.link(self.module._parameters, self._own)
        if recorder.paused or not trains(self.module):
            return self.untapped(recorder, *args, **kwargs)
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
        if covered or recorder.paused or not torch.is_grad_enabled() or not self.generic.trains:
            return self.untapped(recorder, *args, **kwargs)
        signature = tuple(x.dim() for x in tensors((args, kwargs)))
        if recorder.verifies and recorder.batch_size != 1 and signature not in self._compared:
            self._compare(args, kwargs)
            self._compared.add(signature)
        return self.generic(self.plain, *args, **kwargs)

    def _compare(self, args: Any, kwargs: Any) -> None:
        """The module must compute the same sample by sample as on the batch."""
        recorder = self.generic.recorder
        full = without_autocast(self.module, args, kwargs)
        with aside(self.module), recorder.setting(shift=Shift()), full as (args, kwargs):
            with recorder.setting(paused=True), kept(self.module):
                expected = tensors(self.plain(*args, **kwargs))
            found = tensors(self.generic(self.plain, *args, **kwargs))
        if not same(expected, found):
            raise SamplesMeetError(f"{type(self.module).__name__} computes something else on one sample at a time")


class DerivedForward(Forward):
    """A ``ParametrizationList``: the running sample's copy of its tensor, where a module above has made copies."""

    def __init__(self, module: nn.Module, source: Source, recorder: Recorder):
        super().__init__(module)
        self.source, self.recorder = source, recorder

    def __call__(self) -> Any:
        return self.untapped(self.recorder) if self.source.current is None else self.source.current


def lend(model: nn.Module, inner: Forward | None, by_sample: Generic, parameters: Sequence[nn.Parameter]) -> bool:
    """Have ``parameters``, which were seen to be used past their taps, served by copies for every sample.

    They are made by the innermost generic module that holds all owners of a parameter, and by ``by_sample``, which
    runs the whole model; ``inner`` is the model's own forward as a layer. If that was not enough, the next call goes
    further. False: nothing is left to try.
    """
    first: dict[nn.Module, nn.Parameter] = {}  # of an owner's parameters: the others go with it
    for parameter in parameters:
        owner = next(m for m in model.modules() if any(p is parameter for p in m._parameters.values()))
        first.setdefault(owner, parameter)
    return any([_lend(model, inner, by_sample, parameter) for parameter in first.values()])


def _lend(model: nn.Module, inner: Forward | None, by_sample: Generic, parameter: nn.Parameter) -> bool:
    owners = [module for module in model.modules() if any(p is parameter for p in module._parameters.values())]
    forwards = [inner, *(vars(module).get("forward") for module in model.modules())]
    generics = [forward for forward in forwards if isinstance(forward, GenericForward)]
    alone = vars(owners[0]).get("forward")
    lent = False
    if len(owners) == 1 and isinstance(alone, LayerForward) and isinstance(alone.layer, Overridden):
        alone.remove()
        names = {p: by_sample.recorder.names[p] for p in owners[0].parameters(recurse=False)}
        generic = Generic(owners[0], names, by_sample.recorder, by_sample.batch_dim)
        generic.owners.append(owners[0])
        GenericForward(owners[0], generic).install()
        lent = True
    for forward in sorted(generics, key=lambda forward: len(list(forward.module.modules()))):
        if not lent and forward.generic.lend(parameter, owners):
            lent = True
            forward._compared = set()
    lent = by_sample.lend(parameter, owners) or lent
    for owner in owners:
        own = vars(owner).get("forward")
        if isinstance(own, LayerForward) and owner in by_sample.owners:
            own.remove()
    return lent


def on_nobody(run: Callable[[Any, Any], Any], args: Any, kwargs: Any, batch_dim: int, module: nn.Module) -> Any:
    """``run(args, kwargs)`` on a batch of no samples, which not all code computes with.

    If it fails, it runs on a row of zeros, and the outputs are emptied: a scalar is 0. No layer records anything, and
    no buffer keeps anything of the row that nobody has given.
    """
    keeping = Kept(module)
    try:
        with keeping:
            return run(args, kwargs)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        keeping.restore()

    def one(x: Tensor) -> Tensor:
        if x.dim() <= batch_dim or x.shape[batch_dim]:
            return x
        return x.new_zeros([*x.shape[:batch_dim], 1, *x.shape[batch_dim + 1 :]])

    def none(x: Tensor) -> Tensor:
        return x.narrow(batch_dim, 0, 0) if x.dim() > batch_dim else x.masked_fill(x.new_ones(()).bool(), 0)

    with kept(module):
        out = run(*map_tensors(one, (args, kwargs)))
    return map_tensors(none, out)
