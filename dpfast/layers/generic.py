"""The generic path: a module (or the whole model) runs one sample at a time under ``torch.func.vmap``.

Every sample gets its own copy of the module's bare parameters (no memory: an expanded view), so autograd itself
yields their per-sample gradients; layers with a path of their own inside are tapped as always. What is shared by
all samples and what is not cannot be confused, whatever the shapes: vmap tracks it through every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass, tree_flatten, tree_unflatten

from dpfast.layers.base import Layer
from dpfast.layers.forms import Form, Instantiated
from dpfast.layers.tap import Call, LayoutError, Recorder, Tap

ONE_BY_ONE = (
    "A physical batch of one is exact for any model: make_private(..., max_physical_batch_size=1) and "
    "BatchMemoryManager(max_physical_batch_size=1)"
)


class Copies(Layer):
    """A parameter, once for every sample: ``[*shape]`` → ``[B, *shape]``; ``g_i`` is what flows back into copy i."""

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        return params[0].expand(len(x), *params[0].shape)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form]]:
        yield 0, Instantiated(G)


class Generic:
    """Runs ``module`` under vmap, with copies of ``parameters`` (found anywhere below it) for every sample."""

    def __init__(self, module: nn.Module, parameters: Mapping[nn.Parameter, str], recorder: Recorder, batch_dim: int):
        self.module = module
        self.parameters = dict(parameters)
        self.recorder = recorder
        self.batch_dim = batch_dim
        self._shared: set[int] = set()  # positions of tensor inputs once seen without a batch dimension

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward(*args, **kwargs)``, sample by sample, outputs stacked again along the batch dimension."""
        leaves, structure = flatten((args, kwargs))
        batch = self.recorder.batch_size
        if batch is None:
            batch = next(x.shape[self.batch_dim] for x in leaves if isinstance(x, Tensor) and x.dim() > self.batch_dim)
        if batch == 0:
            return forward(*args, **kwargs)
        self.recorder.start_forward()
        batched = [i for i, leaf in enumerate(leaves) if self._has_batch(i, leaf, batch)]
        token = torch.zeros(batch, device=next(self.module.parameters()).device)
        trained = {p: name for p, name in self.parameters.items() if p.requires_grad}
        copies = [self._copies(p, name, token) for p, name in trained.items()]
        outputs: list[Any] = []

        def one_sample(token: Tensor, copies: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
            for index, x in zip(batched, inputs, strict=True):
                leaves[index] = x.unsqueeze(self.batch_dim)
            inside_args, inside_kwargs = tree_unflatten(leaves, structure)
            with (
                _inside(self.recorder, token),
                _swapped(self.module, dict(zip(trained, copies, strict=True))),
            ):
                outputs.extend(flatten(forward(*inside_args, **inside_kwargs)))
            return [leaf for leaf in outputs[0] if isinstance(leaf, Tensor)]

        inputs = [leaves[index].movedim(self.batch_dim, 0) for index in batched]
        try:
            stacked = torch.func.vmap(one_sample, randomness="different")(token, copies, inputs)
        except RuntimeError as error:
            if isinstance(error, LayoutError) or "vmap" not in str(error):
                raise
            raise LayoutError(
                f"{type(self.module).__name__} runs one sample at a time, for its parameters "
                f"{sorted(self.parameters.values())} that no layer family serves, and vmap cannot run it: {error} "
                f"{ONE_BY_ONE}"
            ) from error
        results = iter([self._batch_again(x) for x in stacked])
        found, out_structure = outputs
        return tree_unflatten([next(results) if isinstance(x, Tensor) else x for x in found], out_structure)

    def _copies(self, p: nn.Parameter, name: str, token: Tensor) -> Tensor:
        tap = Tap(self.recorder, Copies(), name)
        return tap(token, p)

    def _has_batch(self, index: int, leaf: Any, batch: int) -> bool:
        if not isinstance(leaf, Tensor) or leaf.dim() <= self.batch_dim:
            return False
        if leaf.shape[self.batch_dim] != batch:
            self._shared.add(index)
        return index not in self._shared

    def _batch_again(self, x: Tensor) -> Tensor:
        """``[B, *one sample's output]`` as the module would have returned it for the batch."""
        if x.dim() == 1:
            raise ValueError(
                "a model that has to run sample by sample returned a scalar, which stands for the whole batch: "
                "return per-sample outputs or logits and compute the loss outside of the model"
            )
        dim = self.batch_dim
        if x.dim() > 1 + dim and x.shape[1 + dim] == 1:
            return x.squeeze(1 + dim).movedim(0, dim)
        return x.flatten(0, 1)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """``tree_flatten`` that also looks into dataclasses (their class is made known to torch's pytrees)."""
    leaves, structure = tree_flatten(tree)
    unknown = {type(leaf) for leaf in leaves if is_dataclass(leaf) and not isinstance(leaf, type)}
    if not unknown:
        return leaves, structure
    for cls in unknown:
        register_dataclass(cls)
    return flatten(tree)


@contextmanager
def _inside(recorder: Recorder, token: Tensor) -> Iterator[None]:
    recorder.token = token
    try:
        yield
    finally:
        recorder.token = None


@contextmanager
def _swapped(module: nn.Module, copies: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """``module`` with each parameter replaced by its copies, wherever below it the parameter stands."""
    places = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None and p in copies
    ]
    try:
        for owner, name, p in places:
            owner._parameters[name] = copies[p]  # type: ignore[assignment]
        yield
    finally:
        for owner, name, p in places:
            owner._parameters[name] = p
