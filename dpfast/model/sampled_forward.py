"""Layers whose users say how their per-sample gradients are made.

By ``dpfast.register_layer``, whose rules are compared with autograd; or by Opacus' ``register_grad_sampler``, whose
samplers are called as Opacus would call them, and believed as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from dpfast.capture.forms import Factored, Form, OuterProduct, Waiting
from dpfast.capture.picked_rows import owners_of
from dpfast.capture.recorder import Recorder
from dpfast.capture.shift import swapped
from dpfast.capture.tap import Call
from dpfast.capture.traced_tap import TracedTap
from dpfast.capture.trees import tensors
from dpfast.layers.base import Layer
from dpfast.layers.own_rules import OwnRule, as_form, own_rule
from dpfast.model.forwards import Forward, trains
from dpfast.model.rule_check import RuleCheck, widened, wrong_shape
from dpfast.refusals import GradSamplerError, InputChangedError, RuleError


def own_sampler(module: nn.Module) -> OwnRule | None:
    """The sampler that somebody but Opacus and dpfast has registered in Opacus for the class of ``module``."""
    sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(module))
    if sampler is None or sampler.__module__.partition(".")[0] in ("opacus", "dpfast"):
        return None
    return sampler


Holders = list[tuple[str, nn.Module]]


def holders(module: nn.Module) -> Holders:
    """Where the parameters are that the rule for ``module`` serves; none if nobody has given a rule.

    In the module itself, and, for a registered rule, in children without a forward, such as a list of parameters.
    """
    if own_rule(module) is not None:
        return [("", module), *((n, m) for n, m in module.named_children() if type(m).forward is nn.Module.forward)]
    return [("", module)] if own_sampler(module) is not None else []


def owned(held: Holders) -> dict[str, nn.Parameter]:
    """The parameters that are there now, once each, with their names in the module."""
    found: dict[nn.Parameter, str] = {}
    for prefix, holder in held:
        for name, p in holder.named_parameters(prefix, recurse=False):
            found.setdefault(p, name)
    return {name: p for p, name in found.items()}


class SampledForward(Forward):
    """Runs ``module`` as it is, and has its user's rule make the per-sample gradients of its own parameters.

    They are clipped and summed as all others, and the looks at the samples try whether gradient i is of sample i alone.
    Where the loss is a mean, backprops have its divisor, which Opacus takes out before it calls a sampler: one that is
    linear in them, as gradients are, does not see the difference.
    """

    def __init__(self, module: nn.Module, recorder: Recorder, name: str, batch_dim: int):
        super().__init__(module)
        self.recorder, self.name, self.batch_dim = recorder, name or type(module).__name__, batch_dim
        rule, sampler = own_rule(module), own_sampler(module)
        self.rule: Callable[..., Any] = rule or sampler  # type: ignore[assignment]
        kind = "grad sampler" if rule is None else "rule"
        self.what = f"the {kind} {getattr(self.rule, '__qualname__', type(self.rule).__name__)} of layer {self.name!r}"
        self.without = (
            "take the sampler out of GradSampleHooks.GRAD_SAMPLERS; the layer is then served without it"
            if rule is None
            else "call remove() of what register_layer has returned; the layer is then served without a rule"
        )
        self.check = None if rule is None else RuleCheck(self)
        self.holders = holders(module)
        self._own = [dict(holder._parameters) for _, holder in self.holders]

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that the rule serves, by their names in the module."""
        return owned(self.holders)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            from dpfast.model import compiling

            return compiling.outside_graph(lambda _: self._call(args, kwargs))
        return self._call(args, kwargs)

    def _call(self, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        if recorder.ranks.sharded:
            for (_, holder), before in zip(self.holders, self._own, strict=True):
                recorder.link(holder._parameters, before)
        if recorder.paused or not trains(self.module):
            return self.untapped(recorder, *args, **kwargs)
        if recorder.token is not None:
            if self.check is not None:  # every sample's copies are in the places of the parameters
                return self.plain(*args, **kwargs)
            raise GradSamplerError(f"{self.what} is for a part of what runs one sample at a time: {self.without}")
        params = [*self.own().values()]
        values = [p.detach() for p in recorder.shift.at(params)]
        with self.holding(params, values):
            out = self.plain(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise RuleError(
                f"{self.what} is called with the gradient of one tensor, and the layer returns {type(out).__name__}: "
                f"return a tensor, or {self.without}"
            )
        if recorder.row_order is not None or (recorder.follows_rows and owners_of(out) is not None):
            raise GradSamplerError(
                f"{self.what} would be given rows in another order than the samples', as they are picked by values or "
                f"packed: {self.without}"
            )
        return TracedTap(recorder, _Output(self, args, kwargs, out), self.name, self.batch_dim)(out, *params)

    def holding(self, params: Sequence[Any], values: Sequence[Tensor]) -> Any:
        """Within, ``values`` are in the places of the module's own ``params``."""
        return swapped([holder for _, holder in self.holders], dict(zip(params, values, strict=True)))

    def samples_first(self, given: Any, rows: int, dim: int) -> list[Tensor]:
        """The tensors that the forward was called with, from batch dimension ``dim``; one row that all share for each.

        There are ``rows`` of them.
        """
        first = [x.detach().movedim(dim, 0) if x.dim() > dim else x.detach() for x in tensors(given)]
        return [x.expand(rows, *x.shape[1:]) if x.dim() > 1 and len(x) == 1 else x for x in first]

    def returned(self, activations: list[Tensor], G: Tensor, params: Sequence[Any], points: Sequence[Any]) -> list[Any]:
        """What the rule returns for each parameter, computed at ``points``; None where it returns nothing.

        16-bit numbers come as float32: nothing is rounded before the norm is taken, and factors of a product agree.
        """
        values = [widened(p.detach()) for p in points]
        versions = [x._version for x in (*activations, G)]
        with self.recorder.setting(paused=True), self.holding(params, values):
            found = self.rule(self.module, [widened(x) for x in activations], widened(G))
        if [x._version for x in (*activations, G)] != versions:
            raise RuleError(
                f"{self.what} writes to the activations or the backprops, with which others compute: return new tensors"
            )
        if not isinstance(found, Mapping):
            raise RuleError(f"{self.what} returned {type(found).__name__}, no dict {{parameter: per-sample gradients}}")
        of = {id(p): given for p, given in found.items()}
        return [of.get(id(value), of.get(id(p))) for p, value in zip(params, values, strict=True)]


class _Output(Layer):
    """The layer's output as it is; the rule is called with what flows back into it."""

    def __init__(self, of: SampledForward, args: Any, kwargs: Any, out: Tensor):
        self.of, self.given = of, (args, kwargs)
        self.versions = [x._version for x in tensors(self.given)]
        self.dim = of.batch_dim if out.dim() > 2 else 0  # [B, p] has no other, as in every layer
        self.least_dims = min(2, out.dim())  # type: ignore[misc]

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active():  # to be differentiated twice
            raise RuntimeError(f"{self.of.what} is for gradients of first order: {self.of.without}")
        return x.clone()

    def input_gradient(self, call: Call, G: Tensor, x: Tensor, *params: Any) -> Tensor:
        return G.view_as(G)  # to be differentiated again it may not be what was given

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form | Waiting]]:
        of = self.of
        if [x._version for x in tensors(self.given)] != self.versions:
            raise InputChangedError(
                f"the input of layer {of.name!r} was modified in place after its forward (as in x += layer(x)), "
                f"and {of.what} computes with it: leave the input as it was"
            )
        activations = of.samples_first(self.given, len(G), self.dim)
        returned = of.returned(activations, G, call.params, params)
        found = {k: as_form(returned[k], params[k], len(G), call.batch) for k in needed}
        for k, form in found.items():
            if form is None:
                raise RuleError(f"{of.what} {wrong_shape(returned[k], len(G), params[k])}")
        if of.check is not None:
            of.check.compare(self.given, self.dim, needed, G, call.params, params)
        for k, form in found.items():
            yield k, call.planned(form) if isinstance(form, (OuterProduct, Factored)) else form  # type: ignore[misc]
