"""What stands in for a module's ``forward``: the layer's tap, the generic path, or the whole model's entry."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.layers import Layer
from dpfast.layers.forms import Form, sketch
from dpfast.layers.generic import ONE_BY_ONE, Generic
from dpfast.layers.tap import LayoutError, Recorder, Tap
from dpfast.trees import map_tensors, packed_sequences, tensors

logger = logging.getLogger(__name__)
SAME = 1e-5  # relative: what a sample's rows may change by when only another sample does (rounding)


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
        self._compared: set[tuple[int, ...]] = set()  # numbers of dimensions of inputs that were compared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.generic.recorder
        # Inside of another generic module, whose copies cover this one's parameters.
        covered = recorder.token is not None
        if covered or recorder.paused or not torch.is_grad_enabled() or not self._trains():
            return self.plain(*args, **kwargs)
        signature = tuple(x.dim() for x in tensors((args, kwargs)))
        if recorder.verifies and recorder.batch_size != 1 and signature not in self._compared:
            self._compare(args, kwargs)
            self._compared.add(signature)
        return self.generic(self.plain, *args, **kwargs)

    def _compare(self, args: Any, kwargs: Any) -> None:
        """The module must compute the same sample by sample as on the batch."""
        recorder = self.generic.recorder
        with _aside(self.module):
            with _set(recorder, paused=True):
                expected = tensors(self.plain(*args, **kwargs))
            found = tensors(self.generic(self.plain, *args, **kwargs))
        if not _same(expected, found):
            raise LayoutError(f"{type(self.module).__name__} computes something else on one sample at a time")

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
                    f"but got inputs of {self.recorder.batch_sizes}: iterate over "
                    f"BatchMemoryManager(max_physical_batch_size=1)"
                )
        return self.plain(*args, **kwargs)


class ModelForward(Forward):
    """The model's entry: learns the batch size, and makes sure that every gradient belongs to one sample.

    No layer is trusted in a layout (its input's number of dimensions, and what its rows are taken for) before a check
    has shown that it keeps the samples apart there: see :meth:`_check`. A model that fails, or in which a layer's rows
    cannot be the samples', is run sample by sample under vmap, if that computes the same; else it is refused.
    """

    def __init__(
        self, module: nn.Module, inner: Forward | None, by_sample: Generic, batch_dim: int, one_by_one: bool = False
    ):
        super().__init__(module)
        self.inner = inner
        self.by_sample = by_sample
        self.recorder = by_sample.recorder
        self.batch_dim = batch_dim
        self.one_by_one = one_by_one
        self.runs_by_sample = False
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
        if recorder.paused or recorder.inside or recorder.token is not None or not _trains(self.module):
            return self._run(args, kwargs)
        self._guard_parameters()
        recorder.evaluating = not self.module.training and recorder.needs_model
        if recorder.evaluating:
            with _set(recorder, paused=True):
                return self._run(args, kwargs)
        if recorder.verifies:
            self._refuse_batch_statistics()
        sizes = input_sizes(args, kwargs, self.batch_dim)
        recorder.batch_sizes = [size for size in sizes if size != 1] or sizes[:1]
        one = self.one_by_one and 1 in sizes
        if one:
            recorder.batch_sizes = [1]
        recorder.start_forward()
        with _set(recorder, inside=True):
            out = self._run_checked(args, kwargs)
        if one and len(sizes) > 1 and any(1 not in x.shape[:2] for x in tensors(out)):
            raise ValueError(
                f"inputs of sizes {sizes} are no batch of one: use BatchMemoryManager(max_physical_batch_size=1)"
            )
        batch = recorder.batch_size
        for x in tensors(out):
            if x.requires_grad:  # the outermost backward comes by here before any checkpoint's inner one
                x.register_hook(partial(_opens, recorder, batch))
        return out

    def _run_checked(self, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        recorder.new_layouts = set()
        try:
            out = self._run(args, kwargs)
        except LayoutError as error:
            self._switch_to_samples(str(error), args, kwargs)
            return self._run(args, kwargs)
        except RuntimeError as error:
            if not any(rows == "shared" for _, _, rows in recorder.new_layouts):
                raise
            # Copies of what all samples share have a batch dimension, which the model's code may not expect.
            self._switch_to_samples(f"inputs shared by all samples do not fit ({error})", args, kwargs)
            return self._run(args, kwargs)
        if recorder.verifies and not self.runs_by_sample and recorder.new_layouts and recorder.batch_size != 1:
            if recorder.batch_size is None:
                raise LayoutError(
                    f"the batch size cannot be told from the inputs of {type(self.module).__name__} (sizes "
                    f"{recorder.batch_sizes} along the batch dimension): pass tensors with the batch first"
                )
            with _set(recorder, new_layouts=set()), _untouched_buffers(self.module):
                why = self._check(args, kwargs)
            if why:
                self._switch_to_samples(why, args, kwargs)
                return self._run(args, kwargs)
        return out

    def _run(self, args: Any, kwargs: Any) -> Any:
        if self.runs_by_sample and not self.recorder.paused and torch.is_grad_enabled() and self.recorder.token is None:
            return self.by_sample(self.plain, *args, **kwargs)
        return (self.inner or self.plain)(*args, **kwargs)

    def _guard_parameters(self) -> None:
        """Autograd must never reach a parameter past its tap: see :meth:`Recorder.record_whole`."""
        for p in self.recorder.names:
            if p.requires_grad and p not in self._guards:
                self._guards[p] = p.register_hook(partial(_past_the_tap, self.recorder, p))

    def _refuse_batch_statistics(self) -> None:
        for name, module in self.module.named_modules():
            if normalises_over_batch(module):
                raise ValueError(
                    f"{name} ({type(module).__name__}) normalises every sample by the others in its batch: call eval() "
                    f"on it, or replace it with opacus.validators.ModuleValidator.fix(model)"
                )

    def _check(self, args: Any, kwargs: Any) -> str:
        """Why samples are not kept apart, or an empty string; layouts that were seen to be clean become verified.

        The model runs forward and backward on the batch, and again with one sample replaced by another one and given
        another output gradient: in every layer, that sample's rows may change, and no other's. Layers that the sample
        does not reach are tried with a few others, and stay unverified if none does.
        """
        recorder, batch = self.recorder, self.recorder.batch_size or 0
        if batch < 2:
            return ""
        with torch.random.fork_rng():
            before = self._sketches((args, kwargs), batch)
            for sample in dict.fromkeys((batch - 1, 0, batch // 2, 1)):
                if why := self._check_sample(args, kwargs, batch, sample, before):
                    return why
                if recorder.new_layouts <= recorder.verified:
                    break
        return ""

    def _check_sample(self, args: Any, kwargs: Any, batch: int, sample: int, before: dict[str, list[Tensor]]) -> str:
        def changed(inputs: Any, cotangent_of: int | None) -> dict[str, Tensor]:
            after = self._sketches(inputs, batch, cotangent_of)
            return {name: _changed_rows(before[name], after[name]) for name in after if name in before}

        replaced = _replace_sample((args, kwargs), batch, self.batch_dim, sample)
        with _OrderWatch(batch) as watch:
            rows = changed(replaced, sample)
        mixed = _strangers(rows, sample)
        if mixed:  # a dimension of an output may merely have the batch's size: is it the inputs' doing?
            rows = changed(replaced, None)
            mixed -= {name for name in rows if bool(rows[name].any())} - _strangers(rows, sample)
        if mixed:
            return f"gradients of several samples meet in {', '.join(sorted(mixed))}"
        if watch.sorts:
            return "the model sorts along the batch dimension, which may change which sample a row belongs to"
        reached = {name for name, where in rows.items() if bool(where.any())}
        self.recorder.verified |= {layout for layout in self.recorder.new_layouts if layout[0] in reached}
        return ""

    def _sketches(self, inputs: Any, batch: int, cotangent_of: int | None = None) -> dict[str, list[Tensor]]:
        """What a forward and backward records, by layer, in sketches ``[B, n]``.

        Random numbers are the same in every call, but for the output gradient of sample ``cotangent_of``.
        """
        found: dict[str, list[Tensor]] = {}

        def observe(name: str, form: Form) -> None:
            found.setdefault(name, []).append(sketch(form))

        args, kwargs = map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), inputs)
        with observed(self.recorder, observe):
            torch.manual_seed(batch)
            outputs = [x for x in tensors(self._run(args, kwargs)) if x.requires_grad]
            cotangents = []
            for output in outputs:
                cotangent, other = torch.randn_like(output), torch.randn_like(output)
                if cotangent_of is not None and output.dim() > self.batch_dim and output.shape[self.batch_dim] == batch:
                    cotangent.select(self.batch_dim, cotangent_of).copy_(other.select(self.batch_dim, cotangent_of))
                cotangents.append(cotangent)
            torch.autograd.backward(outputs, cotangents)
        return found

    def _switch_to_samples(self, why: str, args: Any, kwargs: Any) -> None:
        """Run by sample from now on, provided that this computes the same function."""
        recorder = self.recorder
        if not recorder.verifies:
            raise LayoutError(why)
        hint = (
            f"{why}, so it cannot be told which gradient is whose. Inputs that all samples share (position ids, "
            f"masks) may have shape [1, ...]; layers must see the batch along one dimension"
        )
        if recorder.batch_size is None:
            raise LayoutError(f"{hint}. {ONE_BY_ONE}")
        try:
            with _aside(self.module):
                with _set(recorder, paused=True):
                    expected = tensors(self._run(args, kwargs))
                self.runs_by_sample = True
                found = tensors(self._run(args, kwargs))
            self.runs_by_sample = _same(expected, found)
        except Exception as error:
            self.runs_by_sample = False
            raise LayoutError(
                f"{hint}. Running the model sample by sample failed too ({error}). {ONE_BY_ONE}"
            ) from error
        if not self.runs_by_sample:
            raise LayoutError(
                f"{hint}. Run sample by sample, the model computes something else: its forward mixes samples (a mean "
                f"over the batch), depends on the batch size, or draws random numbers. {ONE_BY_ONE}"
            )
        logger.warning("%s is run sample by sample from now on: %s", type(self.module).__name__, why)


def normalises_over_batch(module: nn.Module) -> bool:
    """Whether ``module``, as it stands, uses statistics of the batch."""
    batch_norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    instance_norm = isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
    return batch_norm and not instance_norm and (module.training or module.running_mean is None)


def input_sizes(args: Any, kwargs: Any, batch_dim: int) -> list[int]:
    """The sizes along the batch dimension of the inputs with most dimensions: which of them is the batch's?"""
    if packed := packed_sequences((args, kwargs)):
        return [int(packed[0].batch_sizes[0])]
    given = [x for x in tensors((args, kwargs)) if x.dim()]
    most = max((x.dim() for x in given), default=0)
    sizes = [x.shape[batch_dim if x.dim() > max(batch_dim, 1) else 0] for x in given if x.dim() == most]
    return list(dict.fromkeys(sizes))


def _opens(recorder: Recorder, batch: int | None, gradient: Tensor) -> None:
    recorder.open(batch)


def _past_the_tap(recorder: Recorder, p: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None:
        recorder.record_whole(p, gradient)


def _replace_sample(inputs: Any, batch: int, batch_dim: int, sample: int) -> Any:
    """``inputs`` with ``sample`` replaced by the first one that differs from it.

    One-dimensional integers stay: offsets and lengths have a meaning that another sample's would break.
    """

    def axis(x: Tensor) -> int | None:
        if x.dim() < 2 and not x.is_floating_point():
            return None
        return next((d for d in (batch_dim, 0) if x.dim() > d and x.shape[d] == batch), None)

    given = [(x.detach(), d) for x in tensors(inputs) if (d := axis(x)) is not None]
    others = (k for k in range(batch) for x, d in given if not torch.equal(x.select(d, k), x.select(d, sample)))
    other = next(others, None)

    def replace(x: Tensor) -> Tensor:
        d = axis(x)
        if d is None or other is None:
            return x
        twin = x.detach().clone()
        twin.select(d, sample).copy_(x.detach().select(d, other))
        return twin.requires_grad_(x.requires_grad)

    return map_tensors(replace, inputs)


def _changed_rows(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """``[B]``: which samples' sketches differ by more than rounding."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return torch.ones(after[0].shape[0], dtype=torch.bool, device=after[0].device)
    differs = torch.zeros(after[0].shape[0], dtype=torch.bool, device=after[0].device)
    for x, y in zip(before, after, strict=True):
        scale = torch.maximum(x.abs(), y.abs()).amax(0, keepdim=True)
        differs |= ((x - y).abs() > SAME * scale).any(1)
    return differs


def _strangers(changed: dict[str, Tensor], sample: int) -> set[str]:
    """Layers in which other samples than ``sample`` changed."""
    return {
        name for name, rows in changed.items() if bool(rows.any()) and rows.nonzero().flatten().tolist() != [sample]
    }


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Equal up to rounding, in the mean square and everywhere."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return False
    for x, y in zip(expected, found, strict=True):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
            continue
        x, y = (side.detach().double().nan_to_num() for side in (x, y))
        allowed = 64 * torch.finfo(expected[0].dtype).eps if expected[0].dtype.itemsize > 2 else 0.05
        if float((x - y).norm()) > allowed * (float(x.norm()) + 1e-12):
            return False
    return True


class _OrderWatch(TorchDispatchMode):
    """Notices sorting along a dimension of the batch's size, but for that of PyTorch's own packed sequences."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.sorts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort, torch.ops.aten.topk):
            x = args[0]
            if x.dim() and x.shape[0] == self.batch and (x.dim() == 1) and not _inside_packing():
                self.sorts = True
        return func(*args, **(kwargs or {}))


def _inside_packing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.nn.utils.rnn.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextmanager
def _set(recorder: Recorder, **values: Any) -> Iterator[None]:
    """Attributes of ``recorder`` for the time within."""
    before = {name: getattr(recorder, name) for name in values}
    for name, value in values.items():
        setattr(recorder, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(recorder, name, value)


@contextmanager
def _aside(module: nn.Module) -> Iterator[None]:
    """Forwards within have no dropout and leave no trace: in buffers, random state, or a checkpoint around them."""
    dropping = (torch.nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
    dropped = [m for m in module.modules() if isinstance(m, dropping) and m.training]
    for m in dropped:
        m.training = False
    try:
        with _untouched_buffers(module), torch.random.fork_rng(), _own_saved_tensors():
            yield
    finally:
        for m in dropped:
            m.training = True


def _own_saved_tensors() -> Any:
    """Keeps a checkpoint around the model from counting what is saved within."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@contextmanager
def _untouched_buffers(module: nn.Module) -> Iterator[None]:
    """Forwards within leave the model's buffers as they were."""
    before = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


@contextmanager
def observed(recorder: Recorder, observe: Any) -> Iterator[None]:
    """The backward passes within show their forms to ``observe`` and change nothing, not even a pass around them."""
    pass_around = recorder.suspend()
    recorder.observer = observe
    try:
        with _own_saved_tensors():
            yield
    finally:
        recorder.observer = None
        recorder.resume(pass_around)
