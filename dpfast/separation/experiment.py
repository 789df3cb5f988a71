"""What running a model shows of whether it keeps samples apart, where a proof does not reach.

Half of the samples are replaced, which may change nothing of the other half: shapes and random numbers stay as they
are. And half of them are left out, which may change nothing of those that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dpfast.capture.forms import Form, sketch
from dpfast.capture.recorder import Recorder
from dpfast.capture.refusals import BypassError, listed
from dpfast.capture.trees import map_tensors, tensors
from dpfast.capture.value_branches import all_branches
from dpfast.separation import inputs as given
from dpfast.separation.draws import Draws
from dpfast.separation.followed import Followed
from dpfast.separation.order import OrderWatch
from dpfast.separation.passes import observed, own_random_numbers
from dpfast.separation.state import kept
from dpfast.separation.texts import left as left_behind

SAME = 1e-5  # relative: what a sample's rows may change by when only other samples do (rounding)

Sketches = dict[str, list[Tensor]]  # by layer: of each form, [B, n] numbers that tell whether a sample's has changed


class Experiment:
    """Passes of one model on one batch, and comparisons of what they record."""

    def __init__(
        self,
        run: Callable[..., Any],
        inputs: Any,
        recorder: Recorder,
        batch_dim: int,
        module: nn.Module,
        public: Callable[[str], bool] = lambda name: False,
    ):
        self.run, self.inputs, self.recorder, self.batch_dim, self.module = run, inputs, recorder, batch_dim, module
        self.public = public
        self.scales: dict[int, Tensor] = {}  # of the outputs, on the unchanged batch
        self.shapes: dict[int, torch.Size] = {}
        self.whole = 0  # samples of the unchanged batch

    @property
    def batch(self) -> int:
        return self.recorder.batch_size or 0

    def replaced(
        self, samples: Tensor, before: Sketches, left: dict[str, Tensor], seed: int, may_order: bool = False
    ) -> str:
        """Why replacing ``samples`` changes others; ``before`` and ``left`` are what the unchanged batch gave.

        ``may_order``: a proof has followed each row, wherever it went.
        """
        watch = OrderWatch(self.batch)
        now: dict[str, Tensor] = {}

        def changed(cotangents_of: Tensor | None) -> dict[str, Tensor]:
            after = self.sketches(inputs, seed, cotangents_of=cotangents_of, left=now, watch=watch)
            return {name: _changed_rows(before[name], after[name]) for name in after if name in before}

        inputs = given.replaced(self.inputs, samples, self.batch, self.batch_dim, self.recorder.input_axes)
        rows = changed(samples)
        mixed = _strangers(rows, samples)
        if mixed:  # a dimension of an output may merely have the batch's size: is it the inputs' doing?
            rows = changed(None)
            mixed -= {name for name in rows if bool(rows[name].any())} - _strangers(rows, samples)
        if mixed:
            return f"gradients of several samples meet in {listed(sorted(mixed))}"
        kept_before = {name for name in now if name in left and _equal(now[name], left[name])}
        if by_samples := [name for name in now if name not in kept_before and not self.public(name)]:
            return left_behind(by_samples)
        if watch.orders and not may_order:
            return "the model orders or picks samples, or rows of them, which may change which sample a row belongs to"
        reached = {name for name, where in rows.items() if bool(where.any())}
        self.recorder.verified |= {layout for layout in self.recorder.new_layouts if layout[0] in reached}
        return ""

    def halves(self, before: Sketches, draws: Draws, seed: int) -> tuple[str, str]:
        """Why half of the samples, alone, have other gradients; or why that could not be tried.

        First the shorter samples and then the longer ones: a model may go by the longest.
        """
        if given.may_be_offsets(self.inputs, self.batch):
            return "", "an input may say where samples begin in another one"
        order = given.by_length(self.inputs, self.batch, self.batch_dim)
        layouts = set(self.recorder.new_layouts)
        try:
            for keep in (order[: self.batch // 2], order[self.batch // 2 :]):
                if mixed := self._others_without(keep.sort().values, before, draws, seed):
                    return (
                        f"gradients depend on how many or which other samples there are, in {listed(sorted(mixed))}",
                        "",
                    )
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            return "", str(error).splitlines()[0] if str(error) else type(error).__name__
        finally:
            self.recorder.new_layouts = layouts
        return "", ""

    def _others_without(self, keep: Tensor, before: Sketches, draws: Draws, seed: int) -> set[str]:
        """Layers in which samples have other gradients where only those of ``keep`` are left."""
        fewer = given.kept_only(self.inputs, keep, self.batch, self.batch_dim, self.recorder.input_axes)
        with self.recorder.setting(batch_sizes=[len(keep)]), draws.playing(keep):
            after = self.sketches(fewer, seed, keep=keep)
        if after.keys() != before.keys():
            raise ValueError("other layers are reached where there are fewer samples")
        kept_rows = {name: [x[keep.to(x.device)] for x in before[name]] for name in after}
        return _other_sizes(kept_rows, after, rounding(self.recorder))

    def sketches(
        self,
        inputs: Any,
        seed: int,
        *,
        cotangents_of: Tensor | None = None,
        keep: Tensor | None = None,
        left: dict[str, Tensor] | None = None,
        follow: Followed | None = None,
        watch: OrderWatch | None = None,
    ) -> Sketches:
        """What a forward and backward records, by layer, in sketches.

        Random numbers follow from ``seed``, but for the output gradients of the samples ``cotangents_of``. Each output
        gradient depends on its element, as a loss's does: samples that meet linearly in an output (a mean over the
        batch taken off) would not be seen to change each other's gradients else. A scalar is a loss: its gradient is
        one number for the batch. ``left`` takes what the forward has written to in the model; ``follow`` is a proof
        that goes along, ``watch`` looks at the forward alone.
        """
        found: Sketches = {}

        def observe(name: str, form: Form, parameter: Any) -> None:
            with _disable_current_modes():
                if follow:
                    follow.sees(name, form)
                found.setdefault(name, []).append(sketch(form))

        args, kwargs = map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), inputs)
        with ExitStack() as stack:
            stack.enter_context(all_branches(lambda x: isinstance(x, Tensor)))
            stack.enter_context(observed(self.recorder, observe))
            stack.enter_context(own_random_numbers(seed))
            keeping = stack.enter_context(kept(self.module))
            if follow:
                follow.starts(args, kwargs)
                stack.enter_context(follow.following())
            with watch or nullcontext():
                outputs = [x for x in tensors(self.run(args, kwargs)) if x.requires_grad]
            with _disable_current_modes():  # these are nobody's random numbers
                if keep is None:
                    self.whole = self.batch
                if left is not None:
                    left.update(keeping.written())
                cotangents = [self._cotangent(k, x, cotangents_of, keep) for k, x in enumerate(outputs)]
                if follow:
                    follow.returns(outputs, cotangents)
            torch.autograd.backward(outputs, cotangents)
            if bypassed := self.recorder.bypassed:
                raise BypassError(bypassed, self.recorder.names[bypassed[0]])
        return found

    def _cotangent(self, k: int, output: Tensor, cotangents_of: Tensor | None, keep: Tensor | None) -> Tensor:
        """The gradient of the ``k``-th output."""
        if output.dim() == 0:
            part = 1.0 if keep is None or not self.recorder.loss_is_mean else len(keep) / self.whole
            return torch.full_like(output, part)
        d = self.batch_dim
        has_batch = output.dim() > d and output.shape[d] == (self.batch if keep is None else len(keep))
        shape = self.shapes.setdefault(k, output.shape)
        cotangent = _drawn(k, shape, output)  # drawn anew, not kept: outputs may be the largest of all tensors
        if keep is not None:
            if not has_batch:
                raise ValueError("an output has no batch dimension")
            cotangent = cotangent.index_select(d, keep.to(cotangent.device))
        cotangent *= self._sized(k, output.detach())
        if cotangents_of is not None and has_batch:
            theirs = _drawn(-1 - k, shape, output).index_select(d, cotangents_of.to(output.device))
            cotangent.index_copy_(d, cotangents_of.to(output.device), theirs)
        return cotangent

    def _sized(self, k: int, output: Tensor) -> Tensor:
        """``1 + output``, in units of what the ``k``-th output was on the unchanged batch."""
        wide = output.to(torch.promote_types(output.dtype, torch.float32), copy=True).nan_to_num_(0.0, 0.0, 0.0)
        scale = self.scales.setdefault(k, torch.linalg.vector_norm(wide) / max(1, wide.numel()) ** 0.5)
        return wide.div_(scale.clamp_min(1e-30)).clamp_(-8, 8).add_(1).to(output.dtype)


def _drawn(k: int, shape: torch.Size, like: Tensor) -> Tensor:
    """Random numbers, the ``k``-th and always the same."""
    generator = torch.Generator(like.device).manual_seed(k % (1 << 31))
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())


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


def _other_sizes(before: Sketches, after: Sketches, rounding: float) -> set[str]:
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


def rounding(recorder: Recorder) -> float:
    """What the model's arithmetic may make of another order of summation, relative."""
    dtypes = {p.dtype for p in recorder.names if p.is_floating_point()}
    for device in {p.device.type for p in recorder.names}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max([SAME, *(torch.finfo(dtype).eps ** 0.5 for dtype in dtypes)])


def _strangers(changed: dict[str, Tensor], samples: Tensor) -> set[str]:
    """Layers in which others than ``samples`` changed."""
    found = set()
    for name, rows in changed.items():
        others = rows.clone()
        others[samples.to(rows.device)] = False
        if bool(others.any()):
            found.add(name)
    return found
