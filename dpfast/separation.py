"""Does every layer keep the samples of a batch apart? Shown by running the model, not assumed.

The model runs forward and backward on the batch, and again with one sample replaced by another one and given another
output gradient: in every layer that sample's rows may change, and no other's. Then it runs on half of the batch, which
may change no gradient of a sample that is left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from opacus.layers import dp_rnn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.layers.forms import Form, sketch
from dpfast.layers.recorder import BypassError, Recorder
from dpfast.layers.shift import Shift
from dpfast.planner import KeepSides
from dpfast.trees import map_tensors, tensors

SAME = 1e-5  # relative: what a sample's rows may change by when only another sample does (rounding)


def why_mixed(
    run: Callable[..., Any], args: Any, kwargs: Any, recorder: Recorder, batch_dim: int, module: nn.Module
) -> str:
    """Why samples are not kept apart, or an empty string; layouts that were seen to be clean become verified.

    Layers that the replaced sample does not reach are tried with a few others, and stay unverified if none does.
    """
    check = _Check(run, recorder, batch_dim)
    verified = set(recorder.verified)
    with torch.random.fork_rng(), recorder.setting(shift=_off_zero(recorder)):
        before = check.sketches((args, kwargs))  # the layers' rows may tell which of several sizes is the batch's
        batch = recorder.batch_size
        if batch is None:
            return f"the batch size may be any of {recorder.batch_sizes}"
        if batch < 2:
            return ""
        for sample in dict.fromkeys((batch - 1, 0, batch // 2, 1)):
            if why := check.sample((args, kwargs), sample, before):
                return why
            if recorder.new_layouts <= recorder.verified:
                break
        if why := "" if recorder.ranks.sharded else check.halves((args, kwargs), before, module):
            recorder.verified = verified
        return why


def _off_zero(recorder: Recorder) -> Shift:
    """Parameters that are all zero (gates, LoRA's B) take small values: they may be what samples will meet through."""
    if recorder.shift.in_use or recorder.ranks.sharded:
        return recorder.shift
    draw = torch.Generator().manual_seed(0)
    shift = Shift()
    zero = [p for p in recorder.names if p.requires_grad and p.numel() and not bool(p.detach().any())]
    shift.set({p: 0.05 * torch.randn(p.shape, generator=draw).to(p) for p in zero})
    shift.start_forward()
    return shift


def unvarying(inputs: Any, batch: int, batch_dim: int, among: Container[int] | None = None) -> set[int]:
    """Which tensors (``among`` these) are the same for all samples of the batch: what they do, no check shows."""
    same = set()
    for k, x in enumerate(tensors(inputs)):
        d = _axis(x, batch, batch_dim)
        if d is not None and (among is None or k in among):
            rows = x.detach().movedim(d, 0)
            if bool((rows == rows[:1]).all()):
                same.add(k)
    return same


def try_backward(run: Callable[..., Any], args: Any, kwargs: Any, recorder: Recorder, batch_dim: int) -> None:
    """A forward and backward that leave no trace: raises what a real one would."""
    with torch.random.fork_rng():
        _Check(run, recorder, batch_dim).sketches((args, kwargs))


class _Check:
    def __init__(self, run: Callable[..., Any], recorder: Recorder, batch_dim: int):
        self.run, self.recorder, self.batch_dim = run, recorder, batch_dim
        self.scales: dict[int, Tensor] = {}  # of the outputs, on the unchanged batch
        self.shapes: dict[int, torch.Size] = {}
        self.draws = False  # the last forward drew random numbers

    @property
    def batch(self) -> int:
        return self.recorder.batch_size or 0

    def sample(self, inputs: Any, sample: int, before: dict[str, list[Tensor]]) -> str:
        """Why ``sample`` is not kept apart from the others; ``before`` is what the unchanged batch gave."""

        def changed(cotangent_of: int | None) -> dict[str, Tensor]:
            after = self.sketches(replaced, cotangent_of, watch)
            return {name: _changed_rows(before[name], after[name]) for name in after if name in before}

        replaced = _replace_sample(inputs, self.batch, self.batch_dim, sample)
        watch = _OrderWatch(self.batch)
        rows = changed(sample)
        mixed = _strangers(rows, sample)
        if mixed:  # a dimension of an output may merely have the batch's size: is it the inputs' doing?
            rows = changed(None)
            mixed -= {name for name in rows if bool(rows[name].any())} - _strangers(rows, sample)
        if mixed:
            return f"gradients of several samples meet in {', '.join(sorted(mixed))}"
        if watch.orders:
            return "the model orders or picks samples, or rows of them, which may change which sample a row belongs to"
        reached = {name for name, where in rows.items() if bool(where.any())}
        self.recorder.verified |= {layout for layout in self.recorder.new_layouts if layout[0] in reached}
        return ""

    def halves(self, inputs: Any, before: dict[str, list[Tensor]], module: nn.Module) -> str:
        """Why half of the samples, alone, have other gradients; ``before`` is what the whole batch gave.

        First the shorter samples and then the longer ones: a model may go by the longest. What cannot be run on half of
        this batch (sizes that are written down, random numbers even in evaluation) tells nothing.
        """
        order = _by_length(inputs, self.batch, self.batch_dim)
        if order is None:
            return ""
        layouts = set(self.recorder.new_layouts)
        try:
            with _in_evaluation(module) if self.draws else nullcontext():
                if self.draws:
                    before = self.sketches(inputs)
                    if self.draws:
                        return ""
                for keep in (order[: self.batch // 2], order[self.batch // 2 :]):
                    if mixed := self._others_without(inputs, keep.sort().values, before):
                        names = ", ".join(sorted(mixed))
                        return f"gradients depend on how many or which other samples there are, in {names}"
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            pass
        finally:
            self.recorder.new_layouts = layouts
        return ""

    def _others_without(self, inputs: Any, keep: Tensor, before: dict[str, list[Tensor]]) -> set[str]:
        """Layers in which samples have other gradients where only those of ``keep`` are left."""

        def rest(x: Tensor) -> Tensor:
            d = 0 if x.dim() == 1 and len(x) == self.batch else _axis(x, self.batch, self.batch_dim)
            return x if d is None else x.detach().index_select(d, keep.to(x.device)).requires_grad_(x.requires_grad)

        fewer = map_tensors(rest, inputs)
        with self.recorder.setting(batch_sizes=[len(keep)]):
            after = self.sketches(fewer, keep=keep)
        if after.keys() != before.keys():
            return set()
        kept = {name: [x[keep.to(x.device)] for x in before[name]] for name in after}
        return _other_sizes(kept, after, _rounding(self.recorder))

    def sketches(
        self,
        inputs: Any,
        cotangent_of: int | None = None,
        watch: _OrderWatch | None = None,
        keep: Tensor | None = None,
    ) -> dict[str, list[Tensor]]:
        """What a forward and backward records, by layer, in sketches ``[B, n]``.

        Random numbers are the same in every call, but for the output gradient of sample ``cotangent_of``. Each output
        gradient depends on its element, as a loss's does: samples that meet linearly in an output (a mean over the
        batch taken off) would not be seen to change each other's gradients else.
        """
        found: dict[str, list[Tensor]] = {}

        def observe(name: str, form: Form) -> None:
            found.setdefault(name, []).append(sketch(form))

        args, kwargs = map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), inputs)
        with observed(self.recorder, observe):
            torch.manual_seed(0)
            state = _random_state()
            with watch or nullcontext():
                outputs = [x for x in tensors(self.run(args, kwargs)) if x.requires_grad]
            self.draws = any(not torch.equal(x, y) for x, y in zip(state, _random_state(), strict=True))
            cotangents = []
            for k, output in enumerate(outputs):
                has_batch = output.dim() > self.batch_dim and output.shape[self.batch_dim] == self.batch
                shape = self.shapes.setdefault(k, output.shape)
                cotangent = _drawn(k, shape, output)  # drawn anew, not kept: outputs may be the largest of all tensors
                if keep is not None:
                    if not has_batch:
                        raise ValueError("an output without a batch dimension")
                    cotangent = cotangent.index_select(self.batch_dim, keep.to(cotangent.device))
                cotangent *= self._sized(k, output.detach())
                if cotangent_of is not None and has_batch:
                    mine = cotangent.select(self.batch_dim, cotangent_of)
                    mine.copy_(_drawn(-1 - k, mine.shape, output))
                cotangents.append(cotangent)
            torch.autograd.backward(outputs, cotangents)
            if bypassed := self.recorder.bypassed:
                raise BypassError(bypassed, self.recorder.names[bypassed[0]])
        return found

    def _sized(self, k: int, output: Tensor) -> Tensor:
        """``1 + output``, in units of what the ``k``-th output was on the unchanged batch."""
        wide = output.to(torch.promote_types(output.dtype, torch.float32), copy=True).nan_to_num_(0.0, 0.0, 0.0)
        scale = self.scales.setdefault(k, torch.linalg.vector_norm(wide) / max(1, wide.numel()) ** 0.5)
        return wide.div_(scale.clamp_min(1e-30)).clamp_(-8, 8).add_(1).to(output.dtype)


def _drawn(k: int, shape: torch.Size, like: Tensor) -> Tensor:
    """Random numbers, the ``k``-th and always the same."""
    generator = torch.Generator(like.device).manual_seed(k % (1 << 31))
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _axis(x: Tensor, batch: int, batch_dim: int) -> int | None:
    """Along which dimension an input has the samples."""
    if x.dim() < 2 and not x.is_floating_point():
        return None
    return next((d for d in (batch_dim, 0) if x.dim() > d and x.shape[d] == batch), None)


def _by_length(inputs: Any, batch: int, batch_dim: int) -> Tensor | None:
    """Samples by a vector of lengths or a mask, the shortest first; None if a vector may be offsets."""
    lengths = torch.zeros(batch)
    for x in tensors(inputs):
        if x.is_floating_point() or x.is_complex():
            continue
        x, d = x.detach(), _axis(x, batch, batch_dim)
        if x.dim() == 1 and len(x) == batch:
            if not bool(x[0]) and bool((x[1:] >= x[:-1]).all()):
                return None
            lengths = lengths + x.float().cpu()
        elif d is not None and bool(((x == 0) | (x == 1)).all()):
            lengths = lengths + x.movedim(d, 0).reshape(batch, -1).float().mean(1).cpu()
    return lengths.argsort(stable=True)


def _replace_sample(inputs: Any, batch: int, batch_dim: int, sample: int) -> Any:
    """``inputs`` with ``sample`` replaced by the first one that differs from it, in most of the tensors.

    A tensor in which that one does not differ takes the first that does. One-dimensional integers stay: offsets and
    lengths have a meaning that another sample's would break.
    """

    def others(x: Tensor) -> set[int]:
        d = _axis(x, batch, batch_dim)
        if d is None:
            return set()
        rows = x.detach().movedim(d, 0)
        return {k for k in range(batch) if not torch.equal(rows[k], rows[sample])}

    differing = [others(x) for x in tensors(inputs)]
    most = max(range(batch), key=lambda k: sum(k in its for its in differing))
    left = iter(differing)

    def replace(x: Tensor) -> Tensor:
        its = next(left)
        if not its:
            return x
        d = _axis(x, batch, batch_dim)
        assert d is not None
        twin = x.detach().clone()
        twin.select(d, sample).copy_(x.detach().select(d, most if most in its else min(its)))
        return twin.requires_grad_(x.requires_grad)

    return map_tensors(replace, inputs)


def _changed_rows(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """``[B]``: which samples' sketches differ by more than rounding, in units of their own and of the middle sample's.

    Not of the largest: what reaches the others is nothing beside one that is a million times larger.
    """
    if [x.shape for x in before] != [x.shape for x in after]:
        return torch.ones(after[0].shape[0], dtype=torch.bool, device=after[0].device)
    differs = torch.zeros(after[0].shape[0], dtype=torch.bool, device=after[0].device)
    for x, y in zip(before, after, strict=True):
        size = torch.maximum(x.abs(), y.abs())
        own = size.unflatten(1, (-1, 3)).amax(-1).repeat_interleave(3, 1)
        scale = torch.maximum(own, size.sort(0).values[len(size) // 2])
        differs |= ((x - y).abs() > SAME * scale).any(1)
    return differs


def _other_sizes(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]], rounding: float) -> set[str]:
    """Layers in which any sample's sketch differs by more than ``rounding``: other sizes are summed in another order.

    A gradient that cancels (of a bias before a norm) is rounding and no more: it counts beside those of its layer, and
    beside a hundredth of the largest.
    """

    def sizes(x: Tensor) -> Tensor:  # of activations, and last of gradients
        return x.unflatten(1, (-1, 3))[..., 2]

    largest = {name: max(float(sizes(x)[:, -1].max()) for x in forms) for name, forms in before.items()}
    least = 0.01 * max(largest.values(), default=0.0)
    found = set()
    for name, forms in before.items():
        if [x.shape for x in forms] != [x.shape for x in after[name]]:
            continue
        for x, y in zip(forms, after[name], strict=True):
            x, y = sizes(x), sizes(y)
            scale = x.maximum(y)
            scale[:, -1] = scale[:, -1].clamp_min(max(largest[name] if x.shape[1] == 1 else 0.0, least))
            if bool(((x - y).abs() > rounding * scale).any()):
                found.add(name)
    return found


def _rounding(recorder: Recorder) -> float:
    """What the model's arithmetic may make of another order of summation, relative."""
    dtypes = {p.dtype for p in recorder.names if p.is_floating_point()}
    for device in {p.device.type for p in recorder.names}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max([SAME, *(torch.finfo(dtype).eps ** 0.5 for dtype in dtypes)])


def _random_state() -> list[Tensor]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]


def _strangers(changed: dict[str, Tensor], sample: int) -> set[str]:
    """Layers in which other samples than ``sample`` changed."""
    return {
        name for name, rows in changed.items() if bool(rows.any()) and rows.nonzero().flatten().tolist() != [sample]
    }


def same(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Equal up to rounding, in the mean square of each tensor."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return False
    for x, y in zip(expected, found, strict=True):
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return False
            continue
        allowed = 64 * torch.finfo(x.dtype).eps if x.dtype.itemsize > 2 else 0.05
        x, y = (side.detach().double().nan_to_num() for side in (x, y))
        if float((x - y).norm()) > allowed * (float(x.norm()) + 1e-12):
            return False
    return True


class _OrderWatch(TorchDispatchMode):
    """Notices what orders or picks samples, or rows of them, but for PyTorch's own packed sequences.

    Such a model may keep the samples in place in one batch and not in the next, which no check of one batch shows.
    """

    SORTING = (torch.ops.aten.sort, torch.ops.aten.argsort, torch.ops.aten.topk)
    PICKING = (torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._unique2)

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.orders = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._orders(func.overloadpacket, args) and not _inside_packing():
            self.orders = True
        return func(*args, **(kwargs or {}))

    def _orders(self, op: Any, args: Any) -> bool:
        def of_batch(x: Any) -> bool:
            return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == self.batch

        def has_rows(x: Any) -> bool:
            return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] > 0 and x.shape[0] % self.batch == 0

        if op in self.SORTING:
            return of_batch(args[0]) and args[0].dim() == 1
        if op in self.PICKING:
            return has_rows(args[0])
        if op is torch.ops.aten.index_select:
            return args[1] == 0 and of_batch(args[0]) and of_batch(args[2])
        if op is torch.ops.aten.index:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool and has_rows(x) for x in indices):
                return True
            one = len(args[1]) == len(indices) == 1
            return one and of_batch(args[0]) and args[0].dim() > 1 and of_batch(indices[0]) and indices[0].dim() == 1
        return False


def _inside_packing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename in (torch.nn.utils.rnn.__file__, dp_rnn.__file__):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Forwards within have no dropout and leave no trace: in buffers, random state, or a checkpoint around them."""
    dropping = (torch.nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
    dropped = [m for m in module.modules() if isinstance(m, dropping) and m.training]
    for m in dropped:
        m.training = False
    try:
        with untouched_buffers(module), torch.random.fork_rng(), _own_saved_tensors():
            yield
    finally:
        for m in dropped:
            m.training = True


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _own_saved_tensors() -> Any:
    """Keeps a checkpoint around the model from counting what is saved within."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)


@contextmanager
def without_autocast(module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The arguments of forwards within, which compute in the dtype of the parameters: two ways to compute the same
    differ by no more than their rounding."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        yield args, kwargs
        return
    with torch.autocast(device, enabled=False):
        yield map_tensors(lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))


@contextmanager
def untouched_buffers(module: nn.Module) -> Iterator[None]:
    """Forwards within leave the model's buffers as they were."""
    before = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    try:
        yield
    finally:
        restore(before)


@torch.no_grad()
def restore(before: Mapping[Tensor, Tensor]) -> None:
    """Give buffers their values back."""
    for buffer, value in before.items():
        if not torch.equal(buffer, value):  # a copy would invalidate what a graph has saved of it
            buffer.copy_(value)


@contextmanager
def observed(recorder: Recorder, observe: Any) -> Iterator[None]:
    """The backward passes within show their forms, as the layers made them, to ``observe`` and change nothing.

    Not even a pass around them.
    """
    pass_around = recorder.suspend()
    try:
        with recorder.setting(observer=observe, planner=KeepSides(), bypassed=[]), _own_saved_tensors():
            yield
    finally:
        recorder.resume(pass_around)
