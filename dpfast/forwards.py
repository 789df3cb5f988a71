"""What stands in for a module's ``forward``: the layer's tap, the generic path, or the whole model's entry."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map_only

from dpfast.layers import Layer
from dpfast.layers.forms import Form
from dpfast.layers.generic import ONE_BY_ONE, Generic, flatten
from dpfast.layers.tap import LayoutError, Recorder, Tap, running_backward

MOST_OUTPUTS = 4  # differentiable outputs of the model that the verification runs a backward from


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def install(self) -> None:
        self.module.forward = self  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        if self.previous is not None:
            self.module.forward = self.previous  # type: ignore[method-assign]
        else:
            vars(self.module).pop("forward", None)


def _trains(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


class LayerForward(Forward):
    """A layer that its family serves."""

    def __init__(self, module: nn.Module, layer: Layer, tap: Tap):
        super().__init__(module)
        self.layer, self.tap = layer, tap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.tap.recorder.paused or not _trains(self.module):
            return self.plain(*args, **kwargs)
        return self.layer.run(self.module, self.tap, *args, **kwargs)


class GenericForward(Forward):
    """A module with parameters that only vmap can serve."""

    def __init__(self, module: nn.Module, generic: Generic):
        super().__init__(module)
        self.generic = generic

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.generic.recorder
        # Inside of another generic module, whose copies cover this one's parameters.
        covered = recorder.token is not None
        if covered or recorder.paused or not torch.is_grad_enabled() or not self._trains():
            return self.plain(*args, **kwargs)
        return self.generic(self.plain, *args, **kwargs)

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.generic.parameters)


class UnservedForward(Forward):
    """A module of a model that is trained one sample at a time: the ordinary gradient is the per-sample gradient."""

    def __init__(self, module: nn.Module, name: str, recorder: Recorder):
        super().__init__(module)
        self.name, self.recorder = name, recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.recorder.paused and _trains(self.module):
            self.recorder.start_forward()
            if self.recorder.batch_size not in (0, 1):
                raise ValueError(
                    f"module {self.name!r} ({type(self.module).__name__}) is trained at a physical batch of one, "
                    f"but got {self.recorder.batch_size}: iterate over BatchMemoryManager(max_physical_batch_size=1)"
                )
        return self.plain(*args, **kwargs)


class ModelForward(Forward):
    """The model's entry: learns the batch size, and makes sure that every gradient belongs to one sample.

    Before a layer is trusted in a layout (its number of dimensions, and whether its rows are the samples) for the
    first time, the model runs forward and backward once more from the last sample's outputs alone: no other sample's
    rows may see a gradient. If some do, or a layer's rows cannot be the samples', the model is run sample by sample
    under vmap, if that gives the same outputs; else it is refused.
    """

    def __init__(
        self, module: nn.Module, inner: Forward | None, by_sample: Generic, recorder: Recorder, batch_dim: int
    ):
        super().__init__(module)
        self.inner = inner
        self.by_sample = by_sample
        self.recorder = recorder
        self.batch_dim = batch_dim
        self.runs_by_sample = False
        self.verifies = True
        self._checked = False
        self._guards: dict[nn.Parameter, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_guards": {}}  # hooks stay with the parameters that they are on

    def remove(self) -> None:
        super().remove()
        for guard in self._guards.values():
            guard.remove()
        self._guards = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.recorder
        if recorder.paused or recorder.token is not None or not _trains(self.module):
            return self._run(args, kwargs)
        self._guard_parameters()
        recorder.evaluating = not self.module.training and self.verifies
        if recorder.evaluating:
            with _paused(recorder):
                return self._run(args, kwargs)
        recorder.batch_sizes = batch_sizes(args, kwargs, self.batch_dim)
        recorder.new_layouts = set()
        recorder.start_forward()
        if running_backward() != -1:  # recomputed by a checkpoint around the whole model
            return self._run(args, kwargs)
        try:
            out = self._run(args, kwargs)
        except LayoutError as error:
            self._switch_to_samples(str(error), args, kwargs)
            return self._run(args, kwargs)
        if self._needs_check():
            if wrong := self._mixed_layers(args, kwargs):
                self._switch_to_samples(f"gradients of several samples meet in {', '.join(wrong)}", args, kwargs)
                return self._run(args, kwargs)
            self._checked = True
            recorder.confirm_layouts()
        return out

    def _run(self, args: Any, kwargs: Any) -> Any:
        if self.runs_by_sample and not self.recorder.paused and torch.is_grad_enabled() and self.recorder.token is None:
            return self.by_sample(self.plain, *args, **kwargs)
        return (self.inner or self.plain)(*args, **kwargs)

    def _guard_parameters(self) -> None:
        """Autograd must never reach a parameter past its tap: see :meth:`Recorder.record_whole`."""
        for p in self.recorder.names:
            if p.requires_grad and p not in self._guards:
                self._guards[p] = p.register_hook(partial(self._past_the_tap, p))

    def _past_the_tap(self, p: nn.Parameter, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.recorder.record_whole(p, gradient)

    def _needs_check(self) -> bool:
        batch = self.recorder.batch_size
        if not self.verifies or self.runs_by_sample:
            return False
        return (batch or 0) > 1 and (not self._checked or bool(self.recorder.new_layouts))

    def _mixed_layers(self, args: Any, kwargs: Any) -> list[str]:
        """Parameters that see gradients of several samples, or of another one, when one sample's output has one."""
        recorder, batch = self.recorder, self.recorder.batch_size
        assert batch is not None
        found: list[dict[str, Tensor]] = []

        def observe(uses: dict[nn.Parameter, list[Form]]) -> None:
            found.append(
                {
                    recorder.names[p]: torch.stack([form.touched() for form in forms if form.batch == batch]).any(0)
                    for p, forms in uses.items()
                }
            )

        args, kwargs = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), (args, kwargs))
        with observed(recorder, observe), torch.random.fork_rng():
            outputs = [x for x in tensors(self._run(args, kwargs)) if x.requires_grad]
            for output in outputs[:MOST_OUTPUTS]:
                dim = next((d for d in (self.batch_dim, 0) if d < output.dim() and output.shape[d] == batch), None)
                if dim is not None:
                    cotangent = torch.zeros_like(output)
                    cotangent.select(dim, batch - 1).normal_()
                    output.backward(cotangent, retain_graph=True)
        mixed = [_strangers(touched) for touched in found]
        # A dimension of an output that merely has the batch's size shows mixing that is not there: a layer is at
        # fault only if every output that reaches it says so.
        names = {name for strangers in mixed for name in strangers}
        return sorted(n for n in names if all(n in mixed[k] for k, touched in enumerate(found) if n in touched))

    def _switch_to_samples(self, why: str, args: Any, kwargs: Any) -> None:
        """Run by sample from now on, provided that this computes the same function."""
        hint = (
            f"{why}, so it cannot be told which gradient is whose. Inputs that all samples share (position ids, "
            f"masks) may have shape [1, ...]; layers must see the batch along one dimension"
        )
        modes = {module: module.training for module in self.module.modules()}
        try:
            self.module.eval()
            with _paused(self.recorder):
                expected = tensors(self._run(args, kwargs))
            self.runs_by_sample = True
            found = tensors(self._run(args, kwargs))
        except Exception as error:
            self.runs_by_sample = False
            raise LayoutError(
                f"{hint}. Running the model sample by sample failed too ({error}). {ONE_BY_ONE}"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not _same(expected, found):
            self.runs_by_sample = False
            raise LayoutError(
                f"{hint}. Run sample by sample, the model computes something else: its forward mixes samples (a mean "
                f"over the batch, batch statistics) or depends on the batch size. {ONE_BY_ONE}"
            )


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def batch_sizes(args: Any, kwargs: Any, batch_dim: int) -> list[int]:
    """The sizes that the inputs leave open as the batch size, first tensor first."""
    leaves = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence))[0]
    for leaf in leaves:
        if isinstance(leaf, PackedSequence):
            return [int(leaf.batch_sizes[0])]
    sizes = [
        leaf.shape[batch_dim if leaf.dim() > batch_dim else 0]
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.dim()
    ]
    return list(dict.fromkeys(sizes))


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    if [x.shape for x in expected] != [x.shape for x in found]:
        return False
    for x, y in zip(expected, found, strict=True):
        if x.is_floating_point():
            slack = (
                1e3
                * torch.finfo(x.dtype).eps
                * (1 + float(x.detach().abs().nan_to_num(0, 0, 0).amax() if x.numel() else 0))
            )
            if not torch.allclose(x, y, rtol=0, atol=slack, equal_nan=True):
                return False
        elif not torch.equal(x, y):
            return False
    return True


def _strangers(touched: dict[str, Tensor]) -> set[str]:
    """Names whose touched samples (bool ``[B]`` each) are not the one sample that the others saw, whichever it is."""
    votes = sum(rows.long() for rows in touched.values() if int(rows.sum()) == 1)
    allowed = torch.zeros(0) if isinstance(votes, int) else torch.nn.functional.one_hot(votes.argmax(), len(votes))
    return {
        name
        for name, rows in touched.items()
        if int(rows.sum()) > 1 or (rows.any() and len(allowed) and not bool(allowed[rows].all()))
    }


@contextmanager
def _paused(recorder: Recorder) -> Iterator[None]:
    """Within, layers run their own forward, untapped."""
    recorder.paused = True
    try:
        yield
    finally:
        recorder.paused = False


@contextmanager
def observed(recorder: Recorder, observe: Any) -> Iterator[None]:
    """The backward passes within show their forms to ``observe`` and change nothing; saved tensors stay here.

    The identity hooks keep a checkpoint around the model from counting what is saved within.
    """
    recorder.observer = observe
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            yield
    finally:
        recorder.observer = None
        recorder.take()
