"""Does a model keep the samples of a packed row apart? Tried: some segments are replaced, which may change no other.

Segments are numbered within their rows. For each binary digit of the numbers those with a 0 there are replaced, and
then those with a 1, so that for any two segments of a row there is a trial in which the one changes and the other may
not. Shapes and random numbers stay as they are. And some are left out, and the others put in reverse order, which may
change nothing of these: a sample's gradient must not depend on where in a row it stands, or beside how many others.

Forward and backward are compared position by position: what layers are given, what flows back into them, and what the
model returns. The proof from the operators follows rows, not positions within them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.capture.forms import EmbeddingRows, Factored, NormalisedSum, OuterProduct, PositionSum
from dpfast.capture.recomputed import Recomputed
from dpfast.capture.recorder import Recorder
from dpfast.capture.refusals import BypassError
from dpfast.capture.segments import LENGTHS, MARKS, PACKED, Segments, named
from dpfast.capture.trees import map_tensors, tensors
from dpfast.separation.experiment import rounding
from dpfast.separation.not_finite import not_finite, spoilt
from dpfast.separation.order import PositionWatch
from dpfast.separation.passes import aside, observed, own_random_numbers
from dpfast.separation.state import kept
from dpfast.separation.without_dropout import WithoutDropout

SAME = 1e-5  # relative: what a position may change by when only other segments do (rounding)
INTO, BACK, OUT = "what layer {} is given", "the gradient that flows back into layer {}", "what the model returns"

Seen = dict[tuple[str, int], Tensor]  # what was looked at, and the how manieth: [rows, length, n] of each position


class SegmentsApart:
    """Trials of one model on one packed batch, called by ``run(args, kwargs)``; ``forward`` has its signature."""

    def __init__(
        self,
        run: Callable[..., Any],
        forward: Callable[..., Any],
        inputs: Any,
        segments: Segments,
        recorder: Recorder,
        module: nn.Module,
        seed: int = 0,
        agreed: Callable[[str], str] = lambda why: why,
    ):
        """``agreed``: what all who make these trials together go by, where this one has found a reason, or none."""
        self.run, self.segments, self.recorder, self.module, self.seed = run, segments, recorder, module, seed
        self.agreed = agreed
        self.inputs = map_tensors(lambda x: x.view_as(x), inputs)  # labels may be the ids themselves
        given = named(forward, *self.inputs)
        self.marks = {id(x) for name, x in given.items() if name in MARKS or "mask" in name}
        self.marks |= {id(x) for x in tensors(self.inputs) if x.dtype == torch.bool}
        self.labels = id(given.get("labels"))
        self.watch = PositionWatch(segments.rows, segments.length)
        self.lengths = {id(x) for name, x in given.items() if name in LENGTHS}

    def why(self, digits: int | None = None) -> str:
        """Why segments are not kept apart; empty if nothing shows that they are not.

        ``digits``: how many of the numbers' digits are tried, others in other calls; all if None.
        """
        order = self._order()
        count = max(order, default=0).bit_length()
        chosen = range(count) if digits is None else [(self.seed + k) % count for k in range(min(digits, count))]
        if not count:
            return ""
        before = self._unchanged
        if self.watch.found:
            return self.agreed(
                f"units={PACKED!r}: the model orders or picks positions of packed rows by an index "
                f"({self.watch.found}), as a mixture of experts does. In another batch that may be another order, so "
                f"that it cannot be told which gradient is of which sample. Pad samples to rows of their own"
            )
        if elsewhere := self.agreed(""):
            return elsewhere
        for digit in chosen:
            for value in (0, 1):
                of_segment = torch.tensor([*((k >> digit & 1) == value for k in order), True])
                changing = of_segment[self.segments.numbers]  # padding may change too
                after = self._seen(self._replaced(changing))
                if changed := self.agreed(self._changed(before, after, ~changing & (self.segments.numbers >= 0))):
                    return changed
        return self._moved(order)

    def _moved(self, order: list[int]) -> str:
        """Why a segment's place in its row, or how many others are there, changes it; without dropout, which goes by
        places."""
        rows = self.segments.rows
        with aside(self.module), WithoutDropout():
            before = self._seen(self.inputs)
            # A gradient that cancels, as of keys where a sample is one token, is rounding and no more.
            sizes = {key: float(x.max()) for key, x in before.items()}
            most = max((size for key, size in sizes.items() if key[0].startswith("the gradient")), default=0.0)
            largest = {key: most if key[0].startswith("the gradient") else size for key, size in sizes.items()}
            for value in (0, 1) if rows == 1 else (None,):  # rows stay equally long
                index = self._reversed([value is None or k % 2 == value for k in order])
                if not index.shape[1]:
                    continue
                part = sum(value is None or k % 2 == value for k in order) / len(order)
                after = self._seen(self._picked(index), index, part)
                staying = self.segments.numbers.gather(1, index) >= 0
                found = ""
                for key in before.keys() & after.keys():
                    x, y = _at(before[key], index)[staying][:, 1:], after[key][staying][:, 1:]
                    scale = torch.maximum(x, y).amax(-1, keepdim=True).clamp_min(0.01 * largest[key])
                    if bool(((x - y).abs() > rounding(self.recorder) * scale).any()):
                        found = self._meet(
                            f"{key[0]} changes where the sample stands elsewhere in the row, or beside fewer others: "
                            f"give the model position_ids that begin at 0 in each sample"
                        )
                        break
                if found := self.agreed(found):
                    return found
        return ""

    def _reversed(self, kept: list[bool]) -> Tensor:
        """``[rows, n]``: the positions of what is ``kept`` of each row, the last segment first."""
        index = []
        for row, cuts in enumerate(self.segments.runs):
            starts = [sum(cuts[:k]) for k in range(len(cuts))]
            runs = [torch.arange(start, start + n) for start, n in zip(starts, cuts, strict=True)]
            numbers = [int(self.segments.numbers[row, start]) for start in starts]
            its = [run for run, number in zip(runs, numbers, strict=True) if number < 0 or kept[number]]
            index.append(torch.cat([torch.zeros(0, dtype=torch.int64), *reversed(its)]))
        return torch.stack(index)

    def _picked(self, index: Tensor) -> Any:
        """The inputs at these positions alone."""
        rows, length = self.segments.rows, self.segments.length
        owners = self.segments.numbers.gather(1, index)[0]

        def pick(x: Tensor) -> Tensor:
            if id(x) in self.lengths:
                cuts = [int(x.flatten()[0]), *(owners.diff().nonzero().flatten() + 1).tolist()]
                return x.new_tensor([*cuts, len(owners)])
            if x.dim() > 1 and x.shape[-2:] == (length, length) and id(x) in self.marks:  # a mask
                of_rows = [x[k : k + 1] for k in range(rows)] if len(x) == rows else [x]
                return torch.cat([its[..., i, :][..., i] for its, i in zip(of_rows, index, strict=False)])
            if x.shape[:2] == (rows, length):
                return _at(x, index)
            return _at(x, index[:1]) if x.shape[:2] == (1, length) else x

        return map_tensors(pick, self.inputs)

    def _changed(self, before: Seen, after: Seen, staying: Tensor) -> str:
        """What has changed at positions that were to stay, the earliest of the forward first."""
        if before.keys() != after.keys():
            return self._meet("other layers are reached where other segments are replaced")
        differs = []
        for key, x in before.items():
            y, where = after[key], staying.to(x.device)
            size = torch.maximum(x.abs(), y.abs())[where]
            scale = torch.maximum(size.amax(-1, keepdim=True), size.median() if len(size) else size.new_zeros(()))
            if bool(((x - y)[where].abs() > SAME * scale).any()):
                differs.append(key[0])
        found = dict.fromkeys(differs)
        forward = OUT in found or all(what != OUT for what, _ in before)  # Transformers' Conv1D has its sides swapped
        into = [what for what in found if what.startswith("what layer") and forward]
        if into:  # layers come in the order of the backward
            return self._meet(f"{into[-1]} changes where other samples of the row do")
        if OUT in found:
            return self._meet(f"{OUT} changes where other samples of the row do")
        if found:
            return self._meet(
                "gradients change where other samples of the row do, though what the model returns does not: as "
                "under a loss that the model averages over the tokens of the batch. Give the model no labels, and "
                "take dpfast.losses.segment_cross_entropy of its logits"
            )
        return ""

    def _meet(self, what: str) -> str:
        return (
            f"units={PACKED!r}: the samples of a packed row are not kept apart: {what}. Attention has to have a mask "
            f"by segments, and nothing else (convolutions, recurrence, pooling, state-space layers without seq_idx) "
            f"may look across positions"
        )

    def carries(self) -> bool:
        """Whether what is not finite in one segment reaches others of its row, in the forward or in the backward.

        Leaves of the model and gradients of what it returns are NaN at every other segment. ``0 · NaN`` is NaN, so that
        whatever multiplies by a mask carries it: attention that is written out, or computed again without segments.
        """
        order, before = self._order(), self._unchanged
        for value in (0, 1):
            bad = torch.tensor([*(k % 2 == value for k in order), False])[self.segments.numbers]
            try:
                with not_finite(self.module, bad):
                    after = self._seen(self.inputs, bad=bad)
                changed = self._changed(before, after, ~bad & (self.segments.numbers >= 0))
            except (RuntimeError, ValueError, IndexError, AssertionError, ArithmeticError) as error:
                changed = str(error) or "an error"  # of code that looks at values: nothing is shown
            if self.agreed(changed):
                return True
        return False

    @cached_property
    def _unchanged(self) -> Seen:
        return self._seen(self.inputs)

    def _order(self) -> list[int]:
        """The number of each segment within its row."""
        order = [0] * len(self.segments)
        for k, (row, _, _) in enumerate(self.segments.bounds):
            order[k] = order[k - 1] + 1 if k and self.segments.bounds[k - 1][0] == row else 0
        return order

    def _seen(self, inputs: Any, index: Tensor | None = None, part: float = 1.0, bad: Tensor | None = None) -> Seen:
        """What a forward and backward show; at the positions ``index``, which are a ``part`` of the segments.

        ``bad [rows, length]``: where gradients of what the model returns are NaN.
        """
        found: Seen = {}
        calls: dict[str, int] = {}

        def note(what: str, x: Tensor) -> None:
            rows, length = self.segments.rows, self.segments.length if index is None else index.shape[1]
            if x.numel() == 0 or x.dim() < 2 or x.shape[0] != rows or x.shape[1] % length:
                return
            number = calls[what] = calls.get(what, -1) + 1
            found[what, number] = _numbers(x.detach().reshape(rows, length, -1))

        def observe(name: str, form: Any, parameter: Any) -> None:
            given, back = _sides(form)
            for what, side in ((INTO, given), (BACK, back)):
                if side is not None:
                    note(what.format(repr(name)), side)

        args, kwargs = map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), inputs)
        with ExitStack() as stack:
            stack.enter_context(observed(self.recorder, observe))
            stack.enter_context(self.recorder.setting(by_position=True))
            stack.enter_context(own_random_numbers(self.seed))
            stack.enter_context(kept(self.module))
            with self.watch:
                outputs = [x for x in tensors(self.run(args, kwargs)) if x.requires_grad]
            for x in outputs:
                note(OUT, x)
            gradients = [self._cotangent(k, x, index, part) for k, x in enumerate(outputs)]
            torch.autograd.backward(outputs, gradients if bad is None else [spoilt(x, bad) for x in gradients])
            if bypassed := self.recorder.bypassed:
                raise BypassError(bypassed, self.recorder.names[bypassed[0]])
        return found

    def _replaced(self, changing: Tensor) -> Any:
        """The inputs with other tokens, or other numbers, where ``changing``."""
        draw = torch.Generator().manual_seed(self.seed)
        given = [x for x in tensors(self.inputs) if self._is_by_position(x)]
        several = any(not x.is_floating_point() and bool((x != x.flatten()[0]).any()) for x in given)

        def other(x: Tensor) -> Tensor:
            if not self._is_by_position(x):
                return x
            where = changing.to(x.device).reshape(*changing.shape, *[1] * (x.dim() - 2))
            if id(x) == self.labels:
                return torch.where(where, -100, x)
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=draw).to(x)
                return torch.where(where, noise * x.detach().std().nan_to_num(1.0).clamp_min(1e-3), x.detach())
            values = x.unique()
            if len(values) == 1:
                return x if several else torch.where(where, 1 - values.clamp(0, 1), x)
            place = torch.searchsorted(values, x.contiguous())
            step = torch.randint(1, len(values), x.shape, generator=draw).to(x.device)
            return torch.where(where, values[(place + step) % len(values)], x)

        return map_tensors(other, self.inputs)

    def _cotangent(self, k: int, output: Tensor, index: Tensor | None, part: float) -> Tensor:
        """The gradient of the ``k``-th output: random numbers, the same for a position wherever it is; of a loss 1."""
        rows, length = self.segments.rows, self.segments.length
        if output.dim() == 0:
            return torch.full_like(output, part if self.recorder.loss_is_mean else 1.0)
        draw = torch.Generator(output.device).manual_seed(k)
        if index is not None and output.shape[:2] != index.shape:
            owners = self.segments.numbers.gather(1, index).flatten().unique_consecutive()
            owners = owners[owners >= 0].to(output.device)
            if len(owners) == len(output):  # a loss of each segment
                shape = (len(self.segments), *output.shape[1:])
                return torch.randn(shape, generator=draw, dtype=output.dtype, device=output.device)[owners]
        if index is None or output.shape[:2] != index.shape:
            return torch.randn(output.shape, generator=draw, dtype=output.dtype, device=output.device)
        shape = (rows, length, *output.shape[2:])
        return _at(torch.randn(shape, generator=draw, dtype=output.dtype, device=output.device), index)

    def _is_by_position(self, x: Tensor) -> bool:
        return x.shape[:2] == (self.segments.rows, self.segments.length) and id(x) not in self.marks


def _sides(form: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a layer was given and what flows back into it, positions second."""
    if isinstance(form, OuterProduct):
        return form.A.unsqueeze(1), form.G.unsqueeze(1)
    if isinstance(form, Factored):
        return form.A.transpose(1, 2), form.G.transpose(1, 2)
    if isinstance(form, EmbeddingRows):
        return None, form.G
    if isinstance(form, PositionSum):
        return None, form.G
    if isinstance(form, NormalisedSum):
        return form.sides.x, form.sides.G
    if isinstance(form, Recomputed):
        return form.sides.x, form.sides.weights
    return None, None


def _numbers(x: Tensor) -> Tensor:
    """``[rows, length, 3]`` that tell whether anything of a position has changed."""
    x = x.double()
    return torch.stack([x.sum(-1), x.abs().sum(-1), x.square().sum(-1).sqrt()], -1).nan_to_num(0.0, 1e300, -1e300)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """``x [rows, length, *]`` at the positions ``index [rows, n]``."""
    index = index.to(x.device)
    return x[torch.arange(len(index), device=x.device)[:, None], index]
