"""The generic path: a module (or the whole model) runs one sample at a time under ``torch.func.vmap``.

Every sample gets its own copy of the module's bare parameters (no memory: an expanded view), so autograd itself
yields their per-sample gradients; layers with a path of their own inside are tapped as always. What is shared by
all samples and what is not cannot be confused, whatever the shapes: vmap tracks it through every operation.

A parameter that is used outside of the module that owns it (a Mamba mixer computes with its projection's bias) is
*borrowed*: it gets copies too, and its owner runs its own forward on them, untapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dpfast import layers
from dpfast.capture.forms import Form, Instantiated
from dpfast.capture.recorder import Recorder
from dpfast.capture.refusals import ONE_BY_ONE, listed
from dpfast.capture.shift import swapped
from dpfast.capture.tap import Call
from dpfast.capture.traced_tap import TracedTap
from dpfast.capture.trees import map_tensors, tensors
from dpfast.capture.value_branches import all_branches
from dpfast.layers.base import Layer
from dpfast.layers.derived import Source, standing
from dpfast.refusals import LayoutError, SamplesMeetError

EXPERTS = (
    "Experts that loop over those that the batch hits can do without: "
    "model.set_experts_implementation('batched_mm') in Transformers. "
)


class Copies(Layer):
    """A parameter, once for every sample: ``[*shape]`` → ``[B, *shape]``; ``g_i`` is what flows back into copy i."""

    def forward(self, call: Call, x: Tensor, *params: Any) -> Tensor:
        return params[0].expand(x.shape[0], *params[0].shape)

    def forms(
        self, call: Call, needed: Sequence[int], G: Tensor, x: Tensor, *params: Any
    ) -> Iterator[tuple[int, Form]]:
        yield 0, Instantiated(G)


class Generic:
    """Runs ``module`` under vmap, with copies of ``parameters`` (found anywhere below it) for every sample.

    ``whole_model`` is how the whole model reduces a loss that it returns over the batch; None for a part of it.
    ``sources`` make tensors from parameters alone, of which every sample gets a copy instead.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[nn.Parameter, str],
        recorder: Recorder,
        batch_dim: int,
        whole_model: str | None = None,
        sources: Sequence[Source] = (),
    ):
        self.module = module
        self.parameters = dict(parameters)
        # Where copies stand in for parameters: not in layers that are tapped, which have the very same parameter.
        self.owners = [owner for owner in module.modules() if layers.family(owner) is None]
        self.recorder = recorder
        self.batch_dim = batch_dim
        self.whole_model = whole_model
        self.sources = [source for source in sources if any(source.owner is owner for owner in module.modules())]
        self._plain_attention = False  # PyTorch's fused one fails under vmap
        self._batched: dict[tuple[int, int], bool] = {}  # which tensor inputs, of how many dimensions, have a batch

    @property
    def trains(self) -> bool:
        """Whether gradients of any parameter come from here."""
        return any(p.requires_grad for p in self.parameters) or any(source.trains for source in self.sources)

    def lend(self, parameter: nn.Parameter, owners: Sequence[nn.Module]) -> bool:
        """Make copies of ``parameter`` too, whose ``owners`` these are; False if it has them, or is used elsewhere.

        First for owners that have no tap, then for all: these are to run their own forward from now on.
        """
        if not set(owners) <= set(self.module.modules()):
            return False
        untapped = [owner for owner in owners if owner in self.owners]
        if untapped and parameter not in self.parameters:
            self.parameters[parameter] = self.recorder.names[parameter]
            return True
        self.owners += (tapped := [owner for owner in owners if owner not in untapped])
        for owner in tapped:
            self.parameters |= {p: self.recorder.names[p] for p in owner._parameters.values() if p is not None}
        return bool(tapped)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``forward(*args, **kwargs)``, sample by sample, outputs stacked again along the batch dimension."""
        recorder = self.recorder
        recorder.start_forward()
        given = tensors((args, kwargs))
        batch = recorder.batch_size
        if batch is None:
            batch = next((x.shape[self.batch_dim] for x in given if x.dim() > self.batch_dim), 0)
        if batch == 0:
            return forward(*args, **kwargs)
        batched = [self._has_batch(position, x, batch) for position, x in enumerate(given)]
        if not any(batched):
            raise LayoutError(f"{type(self.module).__name__} was called with nothing that has a batch of {batch}")
        token = torch.zeros(batch, device=next(self.module.parameters()).device)
        trained = {p: name for p, name in self.parameters.items() if p.requires_grad}
        copies = [TracedTap(recorder, Copies(), name)(token, p) for p, name in trained.items()]
        values = [source.copies(recorder, token, source.owner is self.module) for source in self.sources]
        if self.whole_model is not None:  # its inputs' samples are the model's: nothing to verify
            made = {*trained.values(), *(source.name for source in self.sources)}
            recorder.verified |= {layout for layout in recorder.new_layouts if layout[0] in made}
        results: list[Any] = []

        def one_sample(token: Tensor, copies: list[Tensor], values: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
            own, flags = iter(inputs), iter(batched)

            def one(x: Tensor) -> Tensor:
                return next(own).unsqueeze(self.batch_dim) if next(flags) else x

            args_, kwargs_ = map_tensors(one, (args, kwargs))
            own_copies = dict(zip(trained, copies, strict=True))
            derived = standing(self.sources, values)
            with recorder.setting(token=token), swapped(self.owners, own_copies), derived:
                results.append(forward(*args_, **kwargs_))
            return tensors(results[0])

        inputs = [x.movedim(self.batch_dim, 0) for x, has_batch in zip(given, batched, strict=True) if has_batch]

        def run() -> Any:
            results.clear()
            attention = sdpa_kernel(SDPBackend.MATH) if self._plain_attention else nullcontext()
            with all_branches(torch._C._functorch.is_batchedtensor), attention, _PaddedRows():
                return torch.func.vmap(one_sample, randomness="different")(token, copies, values, inputs)

        try:
            try:
                stacked = run()
            except RuntimeError as error:
                if self._plain_attention or "scaled_dot_product" not in str(error):
                    raise
                self._plain_attention = True
                stacked = run()
        except RuntimeError as error:
            of_vmap = "vmap" in str(error) or "atching rule" in str(error)
            if isinstance(error, LayoutError) or not of_vmap:
                raise
            raise SamplesMeetError(
                f"{type(self.module).__name__} runs one sample at a time, for its parameters "
                f"{listed(sorted(self.parameters.values()))} that no layer family serves, and vmap cannot run it: "
                f"{error} "
                f"{EXPERTS if any('expert' in name for name in self.parameters.values()) else ''}{ONE_BY_ONE}"
            ) from error
        whole = iter(stacked)
        return map_tensors(lambda _: self._batch_again(next(whole)), results[0])

    def _has_batch(self, position: int, x: Tensor, batch: int) -> bool:
        """Whether the ``position``-th tensor input has a batch dimension: the same in all calls."""
        has_batch = x.dim() > self.batch_dim and x.shape[self.batch_dim] == batch
        if batch > 1 and self._batched.setdefault((position, x.dim()), has_batch) != has_batch:
            raise LayoutError(
                f"an input of {type(self.module).__name__}, of shape {list(x.shape)}, has a batch dimension in some "
                f"calls only"
            )
        return has_batch

    def _batch_again(self, x: Tensor) -> Tensor:
        """``[B, *one sample's output]`` as the module would have returned it for the batch."""
        if x.dim() == 1:
            if self.whole_model is None:
                raise SamplesMeetError(
                    f"{type(self.module).__name__} returned a scalar, which stands for the whole batch"
                )
            return x.mean() if self.whole_model == "mean" else x.sum()  # a loss; compared with the model's own
        dim = self.batch_dim
        if x.dim() > 1 + dim and x.shape[1 + dim] == 1:
            return x.squeeze(1 + dim).movedim(0, dim)
        return x.flatten(0, 1)


class _PaddedRows(TorchFunctionMode):
    """Padding gets no gradient from an embedding table with copies: vmap forgets that there is a ``padding_idx``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding:
            return func(*args, **kwargs)

        def embedding(
            input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **named: Any
        ) -> Tensor:
            rows = F.embedding(input, weight, None, *rest, **named)
            if padding_idx is None:
                return rows
            padded = (input == padding_idx % len(weight)).unsqueeze(-1)
            return torch.where(padded, rows.detach(), rows)

        return embedding(*args, **kwargs)
