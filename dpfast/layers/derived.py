"""Tensors that modules compute from parameters alone: weight norm, spectral norm, orthogonality, pruning, and so on.

Such a tensor is made once for the batch, outside of vmap: what its code does to buffers (power iteration) it does
once, as without privacy. Every sample then has a copy of the tensor, and ``g_i`` of each parameter is what the copy's
gradient is pulled back to, one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dpfast.capture.forms import Form, Instantiated
from dpfast.capture.recorder import Recorder
from dpfast.capture.refusals import ONE_BY_ONE
from dpfast.capture.shift import swapped
from dpfast.capture.tap import Call
from dpfast.capture.traced_tap import TracedTap
from dpfast.layers.base import Layer
from dpfast.refusals import SamplesMeetError


class FromParameters(Layer):
    """A tensor made from parameters, once for every sample: ``[*shape]`` → ``[B, *shape]``; ``spec`` is its source."""

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        source: Source = call.spec
        own = [p.detach().requires_grad_(q.requires_grad) for p, q in zip(params, source.parameters, strict=True)]
        with torch.enable_grad(), _kept():
            value = source.value(dict(zip(source.parameters, own, strict=True)))
        source.check_alone(value, own)
        call.saved = (value, *own)
        return value.detach().expand(len(x), *value.shape)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form]]:
        value, *own = call.saved
        wanted = [own[i] for i in needed]
        by_sample = [torch.autograd.grad(value, wanted, g, retain_graph=True, allow_unused=True) for g in G]
        for i, rows in zip(needed, zip(*by_sample, strict=True), strict=True):
            if rows[0] is not None:
                yield i, Instantiated(torch.stack(rows))


class Source:
    """What makes such a tensor: its parameters, trained or not, and the modules that have them."""

    def __init__(self, owner: nn.Module, name: str, parameters: Mapping[nn.Parameter, str]):
        self.owner, self.name = owner, name
        self.parameters = dict(parameters)
        self.current: Tensor | None = None  # the running sample's copy, under vmap

    @property
    def trains(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    def value(self, parameters: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The tensor, made from what stands in for the parameters."""
        with swapped(self.owner.modules(), parameters):
            return self.made()

    def made(self) -> Tensor:
        raise NotImplementedError

    def copies(self, recorder: Recorder, token: Tensor, ran: bool) -> Tensor:
        """``[B, *shape]``; ``ran`` says that a hook of the owner has run for this forward."""
        return TracedTap(recorder, FromParameters(), self.name)(token, *self.parameters, spec=self)

    @contextmanager
    def standing(self, value: Tensor) -> Iterator[None]:
        """Within, ``value`` is the tensor that the model's code finds."""
        before, self.current = self.current, value
        try:
            yield
        finally:
            self.current = before

    def check_alone(self, value: Tensor, own: Sequence[Tensor]) -> None:
        """Its graph ends at its parameters: gradients that flow elsewhere would be lost."""
        known, seen, todo = {id(p) for p in own}, set(), [value.grad_fn]
        while todo:
            node: Any = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable") and id(node.variable) not in known:
                raise SamplesMeetError(
                    f"{self.name!r} is computed from more than the parameters {sorted(self.parameters.values())}, so "
                    f"its gradient cannot be told apart by sample. {ONE_BY_ONE}"
                )
            todo += [following for following, _ in node.next_functions]


class Parametrized(Source):
    """A tensor under :mod:`torch.nn.utils.parametrize`; ``owner`` is its ``ParametrizationList``."""

    def made(self) -> Tensor:
        return type(self.owner).forward(self.owner)  # type: ignore[attr-defined]


class Hooked(Source):
    """A tensor that a forward pre-hook sets: the older ``weight_norm`` and ``spectral_norm``, and pruning."""

    def __init__(self, owner: nn.Module, prefix: str, key: int, hook: Any):
        self.key, self.hook = key, hook
        self.attribute = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        full = f"{prefix}.{self.attribute}" if prefix else self.attribute
        own = {p: name for name, p in owner.named_parameters(prefix, recurse=False)}
        super().__init__(owner, full, {p: name for p, name in own.items() if name.startswith(f"{full}_")})
        self._iterates = False

    def copies(self, recorder: Recorder, token: Tensor, ran: bool) -> Tensor:
        self._iterates = self.owner.training and not ran
        return super().copies(recorder, token, ran)

    def made(self) -> Tensor:
        if isinstance(self.hook, BasePruningMethod):
            return self.hook.apply_mask(self.owner)
        if isinstance(self.hook, SpectralNorm):
            return self.hook.compute_weight(self.owner, do_power_iteration=self._iterates)
        return self.hook.compute_weight(self.owner)

    @contextmanager
    def standing(self, value: Tensor) -> Iterator[None]:
        hooks, before = self.owner._forward_pre_hooks, vars(self.owner).get(self.attribute)
        kept = dict(hooks)
        hooks.pop(self.key)
        setattr(self.owner, self.attribute, value)
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, before)
            hooks.clear()
            hooks.update(kept)


def sources_of(root: nn.Module) -> list[Source]:
    """All such tensors of a model."""
    found: list[Source] = []
    for prefix, module in root.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            found.append(Parametrized(module, prefix, {p: name for name, p in module.named_parameters(prefix)}))
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
                found.append(Hooked(module, prefix, key, hook))
    return found


@contextmanager
def standing(sources: Sequence[Source], values: Sequence[Tensor]) -> Iterator[None]:
    """Within, the ``values`` are what the ``sources`` make, and ``parametrize.cached()`` keeps none of them."""
    with ExitStack() as stack:
        for source, value in zip(sources, values, strict=True):
            stack.enter_context(source.standing(value))
        enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            yield
        finally:
            parametrize._cache_enabled = enabled


def _kept() -> Any:
    """What the graph needs is kept as it is: later forwards may change buffers, and no checkpoint counts it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x)
