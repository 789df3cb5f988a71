"""Layers with a grad sampler of the user's own, registered by ``opacus.grad_sample.register_grad_sampler``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from dpfast.capture.forms import Form, Instantiated
from dpfast.capture.recorder import Recorder
from dpfast.capture.shift import swapped
from dpfast.capture.tap import Call
from dpfast.capture.traced_tap import TracedTap
from dpfast.capture.trees import tensors
from dpfast.layers.base import Layer
from dpfast.model.forwards import Forward, trains
from dpfast.refusals import GradSamplerError, InputChangedError

Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


def own_sampler(module: nn.Module) -> Sampler | None:
    """The sampler that somebody but Opacus and dpfast has registered for the class of ``module``."""
    sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(module))
    if sampler is None or sampler.__module__.partition(".")[0] in ("opacus", "dpfast"):
        return None
    return sampler


class SampledForward(Forward):
    """Runs ``module`` as it is, and has ``sampler`` make the per-sample gradients of its own parameters.

    They are clipped and summed as all others, and the looks at the samples try whether gradient i is of sample i alone.
    Where the loss is a mean, backprops have its divisor, which Opacus takes out before it calls a sampler: one that is
    linear in them, as gradients are, does not see the difference.
    """

    def __init__(self, module: nn.Module, sampler: Sampler, recorder: Recorder, name: str, batch_dim: int):
        super().__init__(module)
        self.sampler, self.recorder, self.name, self.batch_dim = sampler, recorder, name, batch_dim

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.recorder
        if recorder.paused or not trains(self.module):
            return self.untapped(recorder, *args, **kwargs)
        if recorder.token is not None:
            raise GradSamplerError(
                f"layer {self.name!r} has a grad sampler of its own, {self.sampler.__qualname__}, and is a part of "
                f"what runs one sample at a time: take the sampler out of GradSampleHooks.GRAD_SAMPLERS; the layer is "
                f"then served without it"
            )
        params = [p for p in self.module._parameters.values() if p is not None]
        values = [p.detach() for p in recorder.shift.at(params)]
        with swapped([self.module], dict(zip(params, values, strict=True))):
            out = self.plain(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise GradSamplerError(
                f"layer {self.name!r} returns {type(out).__name__}, and its grad sampler is called with the gradient "
                f"of one tensor: return a tensor, or take the sampler out of GradSampleHooks.GRAD_SAMPLERS"
            )
        dim = self.batch_dim
        activations = [x.detach().movedim(dim, 0) if x.dim() > dim else x.detach() for x in tensors(args)]
        layer = _Output(self, activations, params)
        return TracedTap(recorder, layer, self.name, dim)(out, *params)


class _Output(Layer):
    """The layer's output as it is; the sampler is called with what flows back into it."""

    def __init__(self, of: SampledForward, activations: list[Tensor], params: list[nn.Parameter]):
        self.of, self.activations, self.params = of, activations, params
        self.versions = [x._version for x in activations]

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        return x.clone()

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        return G

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form]]:
        if [x._version for x in self.activations] != self.versions:
            raise InputChangedError(
                f"the input of layer {self.of.name!r} was modified in place after its forward (as in x += layer(x)), "
                f"and its grad sampler {self.of.sampler.__qualname__} computes with it: leave the input as it was"
            )
        found = self.of.sampler(self.of.module, self.activations, G)
        for k in needed:
            samples = found.get(self.params[k])
            if samples is None or samples.shape != (call.batch, *params[k].shape):
                given = "none" if samples is None else f"one of shape {list(samples.shape)}"
                raise GradSamplerError(
                    f"the grad sampler {self.of.sampler.__qualname__} of layer {self.of.name!r} was to return "
                    f"per-sample gradients of shape {[call.batch, *params[k].shape]} for a parameter, and returned "
                    f"{given}"
                )
            yield k, Instantiated(samples.detach())
