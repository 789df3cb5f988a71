"""The whole private step between backward and noise, on one page: norms → factors → clipped sum.

During a backward pass every tapped layer hands its per-sample gradients, in the cheapest form, to the
:class:`ClippedSum`; when the pass ends it computes each sample's norm over all parameters (or per group), turns
norms into clipping factors, adds ``Σ_i factor_i · g_i`` to each parameter's ``summed_grad`` and is empty again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpfast.capture.forms import Form, Summed, Waiting
from dpfast.capture.graph_calls import GraphCalls
from dpfast.capture.mean_in_16_bits import refusal
from dpfast.capture.recorder import Recorder, between_passes
from dpfast.capture.segments import PACKED
from dpfast.capture.shift import Shift
from dpfast.capture.which_samples import ForwardPass, leaves_gradients
from dpfast.capture.which_units import UNKNOWN, units_of
from dpfast.clipping.at_once import Ended, end_at_once
from dpfast.clipping.closing import Factors, Scales, Setting, factors_of, weighted, whole_forms
from dpfast.clipping.early import EarlySums, summed_up
from dpfast.clipping.grad_samples import gradients, keep_grad_sample
from dpfast.clipping.samples_once import Batches
from dpfast.clipping.segments import check_finite, check_samples, clipped_segments, refused_together
from dpfast.clipping.sums_of_forms import clipped_sums
from dpfast.clipping.thresholds import Clipping
from dpfast.clipping.units import Alike, clipped_units, kinds_of, mean_gradients
from dpfast.distributed.ranks import Ranks, local
from dpfast.ops import compute_dtype, index_of
from dpfast.refusals import MeanIn16BitsError, PassChangedError, SecondBackwardError, UnitsError

if TYPE_CHECKING:
    from dpfast.capture.tap import Call

ANOTHER_GRAPH = (
    "one backward pass went through a compiled graph of the model and through more of it, as none before has: two "
    "forwards, or a part that the graph does not have. Nothing of it was summed. From now on such a pass is clipped at "
    "its end: run the forward and the backward of this batch again"
)


class ClippedSum(Recorder):
    """Per-sample gradients of one backward pass, closed into clipped sums when it ends.

    Guarantee: in every backward pass a sample's contribution to the concatenation of all ``summed_grad`` is at most
    ``clipping.sensitivity`` in L2, the rounding of its norm and of its own terms included, for any values of
    activations and backprops, and whatever torch allows in products (see :mod:`dpfast.reference.precision`). Where
    :attr:`by_unit` is set, read "unit" for "sample": the mean gradient of its rows is clipped as one. A sample
    whose norm is not finite, or of such a size that its product with a factor is no float32 number, contributes exact
    zeros; it is counted in :attr:`nonfinite_samples` and warned of once. (Of several groups one may be summed before
    the others' norms are known, see :mod:`dpfast.clipping.early`: a sample lost in those is in its sum, clipped.)

    Not covered are units in the last place of the sum. It is one float32 number an element, so that leaving one of B
    samples out moves it by up to ``1 + 2⁻²² · B`` times the sensitivity where all gradients point one way, and by
    nearly 1 for others. (Seen among 4096 samples that are all alike: 1.00006 for random numbers, 1.0005 where all
    elements are equal too. A sum in float64 that is rounded to float32 at its end moves as much, so that more exact
    products would not help.) A mean over the batch inside of the loss, which is multiplied out again, rounds a float32
    backprop by as much; one of 16 bits, far more, and is refused: see :mod:`dpfast.capture.mean_in_16_bits`. Where the
    model's own operators, frozen layers among them, round differently for another batch size, it is the sample's
    gradient that changes, not its clipping.

    Args:
        names: every parameter of the model, with the name that messages use.
        clipping: thresholds and groups.
        loss_reduction: ``"mean"`` if the loss is averaged over the batch (every backprop then carries 1/B, which
            is multiplied out), ``"sum"`` if it is not.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], clipping: Clipping, loss_reduction: str = "mean"):
        super().__init__(names)
        self.index = {p: k for k, p in enumerate(names)}  # in the noise stream
        self.clipping = clipping
        self.loss_is_mean = loss_reduction == "mean"
        self.loss_scale = 1.0  # what the loss is multiplied by besides (a power of two): see dpfast.amp
        self.tracked: set[nn.Parameter] | None = None  # None: all; else those of the optimizer
        self.optimizer: Callable[[], Any] | None = None  # a weak reference to it
        self.accumulation_allowed = True
        self.batches = Batches()
        self.counts_unclipped = False  # adaptive clipping wants to know
        self.keeps_grad_samples = False  # in ``p.grad_sample``, as Opacus does
        self.units: Sequence[Any] | None = None  # of each row, or packed sample, where no loader tells
        self.start_logical_batch()
        self.per_sample_gradient_norms: Tensor | None = None
        self._ended: Ended | None = None  # what a compiled graph's end has summed in the running pass
        self.early = EarlySums()
        self._alone_no_more = False  # a pass had forms besides those of such a graph: none ends at once again
        self._lost: Tensor | None = None  # how many, where they are counted
        self._counted = 0  # passes
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "optimizer": None,
            "shift": Shift(),
            "ranks": Ranks(),
            "batches": Batches(),
            "passing": {},
            "under_way": None,
            "graphs": {},
            "compiled": {},
            "sources": set(),
            "_ended": None,
            "early": EarlySums(),
            "last_source": "",
            **between_passes(),
        }  # of this run

    def start_logical_batch(self) -> None:
        """Nothing is summed: a step has used it, or it was dropped."""
        self.in_force: list[float] = []  # of each part the largest sensitivity at any clipping of the logical batch
        self.unclipped: list[float] = []  # of each group Σ (1[n ≤ C] - ½) over its samples, if any
        self.samples = 0  # of which it is the sum
        self.accumulated = 0  # most backward passes between two calls of step
        self._backwards = 0  # since the last call of step
        self.evaluated = False

    def open(self, batch: int | None = None) -> None:
        """As any recorder's; and no forward is known yet that the pass is of."""
        if self.opens():
            self.passing.clear()
            self.narrowed = None
        super().open(batch)

    @property
    def used(self) -> bool:
        """Whether a backward pass has ended since the last step of a logical batch."""
        return bool(self.accumulated or self._backwards)

    @property
    def backwards(self) -> int:
        """Backward passes of the logical batch that one step accounts for: most between two calls of ``step``."""
        return max(self.accumulated, self._backwards)

    @property
    def waits_for_step(self) -> bool:
        """Whether a backward pass has ended since the last call of ``step``."""
        return self._backwards > 0

    def start_physical_batch(self) -> None:
        """Samples come that may belong to another logical batch than what was summed: see :class:`Batches`."""
        if self.batches.enter() and self.used:
            self.drop()

    def end_physical_batch(self) -> None:
        """``step`` was called, be it to skip."""
        self.accumulated = max(self.accumulated, self._backwards)
        self._backwards = 0

    def record(self, parameter: Any, form: Form) -> None:
        """As any recorder's; of no parameter whose sum is made."""
        self.early.refuse_more([self._owner(parameter)], self.names)
        super().record(parameter, form)

    def record_call(self, call: Call, forms: Sequence[tuple[Any, Form | Waiting]]) -> None:
        """As any recorder's; of several groups, one that is whole and keeps much memory is summed up now."""
        if self.early.thresholds:
            self.early.refuse_more([self._owner(p) for p, _ in forms], self.names)
        super().record_call(call, forms)
        if len(self.clipping.thresholds) > 1 and self.observer is None:
            self._sum_early(call, [p for p, _ in forms if self.tracked is None or p in self.tracked])

    def _sum_early(self, call: Call, params: Sequence[nn.Parameter]) -> None:
        kept = self.ranks.sharded or self.keeps_grad_samples or self.by_unit or self.packed
        unusual = self.source or self._untrusted or kept
        if unusual or self.closing is not None or self.batches.forwards > 1 or self.model is None:
            return
        held = {p: self._forms[p] for p in params}
        for recorded in self.early.groups(call, held, self.clipping, self.model):
            gone = {id(form) for forms in recorded.values() for form in forms}
            with torch.no_grad():
                summed = summed_up(recorded, self.clips_with(call.batch), self.batches.padding(self.passing))
            for p, form in summed.items():
                self._forms[p] = [form]  # type: ignore[list-item]
                self.early.thresholds[p] = [*self.clipping.thresholds]
            self._versions = [each for each in self._versions if id(each[0]) not in gone]

    def close(self) -> None:
        """Norms → factors → clipped sum, for everything recorded in the backward pass that just ended."""
        try:
            self._close()
        finally:
            self.passing.clear()

    def _close(self) -> None:
        batch, sources, ended = self.batch_size, self.sources, self._ended
        try:
            self.early.check_thresholds(self.clipping)
        finally:
            taken = self.take()
        self.last_source = next(iter(sources)) if len(sources) == 1 else ""
        if ended is not None and (taken or len(sources) > 1):
            self._alone_no_more = True
            raise PassChangedError(ANOTHER_GRAPH)
        narrowed, self.narrowed = self.narrowed, None
        below = self.passing.values()
        if not (taken or ended) and below and not any(map(leaves_gradients, below)):
            return  # torch.autograd.grad, which trains nothing
        recorded = taken
        if self.tracked is not None and not self.tracked.issuperset(taken):
            recorded = {p: forms for p, forms in taken.items() if p in self.tracked}
        with refused_together(self.ranks):
            packed = self._packed_pass(sources) if self.packed and (taken or ended) else None
        if (recorded or ended) and narrowed and self.loss_is_mean:
            size = self._common_batch(recorded) if ended is None else ended.batch
            self._check_mean(narrowed, size if packed is None else len(packed.segments or ()))
        kinds = self._kinds(taken) if self.by_unit and taken else []
        padding = self._admit(bool(taken or ended))
        try:
            if ended is None:
                self._sum_up(recorded, batch, padding, kinds, packed)
            else:
                self._add(ended, padding)
        except BaseException:
            self.drop()  # a part of the sums may be there: retried, a sample would count twice
            raise

    def _kinds(self, taken: Mapping[nn.Parameter, list[Form | Waiting]]) -> list[Alike]:
        """The units of the running pass.

        Raises:
            ValueError: it cannot be told which these are.
        """
        units = units_of(self.passing) if self.units is None else self.units
        if len(units) != self._common_batch(taken):
            raise UnitsError(UNKNOWN)
        return kinds_of(units)

    def _packed_pass(self, sources: set[str]) -> ForwardPass:
        """The forward that the running pass is of, whose rows are packed.

        Raises:
            UnitsError: there are others, or it has other segments than the loader has given samples.
        """
        if any(sources):
            raise UnitsError(f"units={PACKED!r} with torch.compile: leave compiling out; nothing was summed")
        passing = [forward for forward in self.passing if forward.batch != 0]
        if not passing or any(forward.segments != passing[0].segments for forward in passing):
            raise UnitsError(
                f"units={PACKED!r}: one backward pass of several forwards that are packed in other ways, or of none: "
                f"call backward() for each forward by itself. Nothing was summed"
            )
        for forward in passing:
            check_samples(forward, drawn=not self.accumulation_allowed and self.units is None)
        return passing[0]

    def _check_mean(self, narrowed: tuple[str, torch.dtype], size: int) -> None:
        if size > 1:
            raise MeanIn16BitsError(refusal(*narrowed, size))

    def _admit(self, reached: bool) -> list[int]:
        """The running pass is to be a part of the step, or is refused; rows of it that no sample is in."""
        self.start_physical_batch()
        if self._backwards and not self.accumulation_allowed:
            raise SecondBackwardError(
                "Poisson sampling is not compatible with grad accumulation: a second backward came before "
                "optimizer.step(). Add several losses of a batch up and call backward() once; step after every "
                "backward; or use BatchMemoryManager for large batches"
            )
        parameters = self.tracked if self.tracked is not None else self.names
        if self.batches.used and all(getattr(p, "summed_grad", None) is None for p in parameters):
            self.batches.drop()  # the sums were cleared by hand
        self.batches.use(self.passing, reached, drawn=not self.accumulation_allowed)
        return self.batches.padding(self.passing)

    def _count_pass(self, in_force: Sequence[float]) -> None:
        self._backwards += 1
        self.in_force = [*map(max, self.in_force or in_force, in_force)]

    def drop_physical_batch(self) -> None:
        """Gradients are cleared before a step has used them: the batch is left out, with the logical one around it."""
        self.batches.cleared = True
        if self.waits_for_step:
            self.batches.drop_piece()
            self.drop()
        elif self.batches.tried and self.used:  # its step was refused
            self.lose()

    def drop(self) -> None:
        """Forget what is summed."""
        for p in self.tracked if self.tracked is not None else self.names:
            p.summed_grad = None  # type: ignore[attr-defined]
        self.start_logical_batch()
        self.batches.drop()

    def _sum_up(
        self,
        recorded: dict[nn.Parameter, list[Form | Waiting]],
        batch: int | None,
        padding: list[int],
        kinds: Sequence[Alike],
        packed: ForwardPass | None,
    ) -> None:
        self._count_pass(self.clipping.in_force)
        if not recorded:
            units = sum(len(kind.units) for kind in kinds) if self.by_unit else batch or 0
            units = len(packed.segments or ()) if packed is not None else units
            self.per_sample_gradient_norms = torch.zeros(units)
            if self.ranks.sharded and self.packed:
                check_finite([], torch.zeros(0), self.ranks)
            if self.ranks.sharded:
                self._share([], [])
            return

        device = next(iter(recorded)).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # a backward may run inside of a region of it
            size = self._common_batch(recorded)
            setting = self.clips_with(size if packed is None else len(packed.segments or ()))
            params = list(recorded)
            groups = [self.clipping.group_of(p) for p in params]
            thresholds, scale = self.clipping.on(device), setting.scales.of_norms
            forms = whole_forms(recorded, setting) if packed is None else []
            if packed is not None:
                assert packed.segments is not None
                with refused_together(self.ranks):
                    found, parts, owners = clipped_segments(recorded, groups, packed.segments, setting, thresholds)
                check_finite(self.passing, found.lost, self.ranks)
                padding = []
            recorded.clear()
            if packed is None and self.by_unit:
                found, parts, owners = clipped_units(params, forms, groups, kinds, setting, thresholds)
                padding = []  # is of no unit
            elif packed is None:
                found = factors_of(forms, groups, device, setting, thresholds)
                if padding:
                    found.factors.index_fill_(1, index_of(tuple(padding), device), 0.0)
                parts, owners = weighted(params, forms, groups, found.factors, setting.scales.of_weights)
            self.report(found, scale, padding)
            if self.keeps_grad_samples:
                for p, its in zip(params, forms, strict=True):
                    samples = mean_gradients(its, kinds) if self.by_unit else gradients(its, padding)
                    keep_grad_sample(p, samples * scale)
            forms.clear()  # what a sum was made of can go
            if self.ranks.sharded:
                self._share(owners, parts)
                return
            for k, clipped in clipped_sums(parts):
                self._accumulate(owners[k], clipped)

    @property
    def ends_at_once(self) -> bool:
        """Whether the last pass was clipped at the end of a compiled graph, or the next one may be."""
        return bool(self.last_source) and not self._alone_no_more

    def can_end_at_once(self, graph: GraphCalls) -> bool:
        """Whether the forms of ``graph`` are for sure all that the running pass records, and are trusted."""
        alone = self.ends_at_once and self.last_source == graph.name and not self.sources
        kept = self.ranks.sharded or self.keeps_grad_samples or self.by_unit or self.packed
        plain = not (self.observer or kept) and self.batches.forwards <= 1
        trains = self.tracked is None or not self.tracked.isdisjoint(graph.trained)
        return alone and plain and trains and (not self.verifies or graph.layouts <= self.verified)

    def end_at_once(self, graph: GraphCalls, given: Sequence[Tensor]) -> None:
        """Clip and sum what a compiled graph has handed over, before its memory is used again."""
        self.sources.add(graph.name)
        padding = self.batches.padding(self.passing)
        self._ended = end_at_once(graph, given, self.clips_with(graph.batch), self.tracked, padding)

    def end_graph(self, ended: Ended, forward: ForwardPass) -> None:
        """A recorded graph of forward and backward has run, outside of autograd."""
        self.passing = {forward: []}
        self.sources, self._ended = {""}, ended
        self.close()

    def begin_graph(self, forward: ForwardPass, size: int) -> list[int]:
        """A recorded graph of a whole step is to run, on ``size`` samples: as :meth:`close`, but for the sum.

        Returns:
            Rows that no sample is in, for :meth:`report`.
        """
        narrowed, self.narrowed, self.passing = self.narrowed, None, {forward: []}
        try:
            if narrowed and self.loss_is_mean:
                self._check_mean(narrowed, size)
            padding = self._admit(True)
        finally:
            self.passing.clear()
        self._count_pass(self.clipping.in_force)
        self.last_source = ""
        return padding

    def lose(self) -> None:
        """The sum of a physical batch is gone, and with it the whole of its logical batch."""
        self.batches.lose()
        self.drop()

    def _add(self, ended: Ended, padding: list[int]) -> None:
        self._count_pass(ended.in_force)
        self.report(ended.found, ended.scales.of_norms, padding)
        if self.accumulated or self._backwards > 1 or self.loss_scale != 1:
            for p, clipped in zip(ended.params, ended.sums, strict=True):
                self._accumulate(p, clipped)
        else:  # the first of its step: there is nothing to add to
            for p, clipped in zip(ended.params, ended.sums, strict=True):
                p.summed_grad = clipped

    def take(self) -> dict[nn.Parameter, list[Form | Waiting]]:
        """As any recorder's; what a graph has summed is dropped."""
        self._ended = None
        self.early.forget()
        return super().take()

    def suspend(self) -> tuple[Any, ...]:
        """As any recorder's."""
        state = super().suspend(), self._ended, self.early.thresholds
        self._ended = None
        self.early.forget()
        return state

    def resume(self, state: tuple[Any, ...]) -> None:
        """As any recorder's."""
        kept, self._ended, self.early.thresholds = state
        super().resume(kept)

    def clips_with(self, size: int) -> Setting:
        """What clips a backward pass of ``size`` samples."""
        of_norms = (size if self.loss_is_mean else 1) / self.loss_scale
        return Setting(self.clipping, self.planner, self.names, Scales(of_norms, of_norms * self.loss_scale))

    def report(self, found: Factors, scale: float, padding: list[int]) -> None:
        """Norms and counts of the samples, without rows that none is in."""
        squared, bounds, lost = found.squared, found.bounds, found.lost
        if padding:
            rows = index_of(tuple([row for row in range(len(lost)) if row not in padding]), lost.device)
            squared, bounds, lost = (x.index_select(-1, rows) for x in (squared, bounds, lost))
        norms = squared.sum(0).sqrt() * scale
        self.per_sample_gradient_norms = norms.to(compute_dtype(next(iter(self.names)).dtype))
        if self.counts_unclipped:
            counts = (self.clipping.within(squared, bounds, scale) - 0.5).sum(1).tolist()
            self.unclipped = [a + b for a, b in zip(self.unclipped or [0.0] * len(counts), counts, strict=True)]
            self.samples += len(norms)
        self._count(lost)

    def _share(self, owners: Sequence[nn.Parameter], flat: Sequence[tuple[Summed, Tensor]]) -> None:
        """All ranks add up the same parameters in the same order, whatever each one's batch has reached."""
        parts: dict[nn.Parameter, list[tuple[Summed, Tensor]]] = {}
        for p, part in zip(owners, flat, strict=True):
            parts.setdefault(p, []).append(part)
        for p in self.names:
            if not p.requires_grad or (self.tracked is not None and p not in self.tracked):
                continue
            total = None
            for _, clipped in clipped_sums(parts.pop(p, [])):
                total = clipped.reshape(p.shape) if total is None else total.add_(clipped.reshape(p.shape))
            if total is None:
                total = torch.zeros(p.shape, dtype=compute_dtype(p.dtype), device=p.device)
            self._accumulate(p, self.ranks.share(p, total))

    def _common_batch(self, recorded: Mapping[nn.Parameter, list[Form | Waiting]]) -> int:
        sizes = {form.batch: p for p, forms in recorded.items() for form in forms}
        if len(sizes) > 1:
            seen = " and ".join(f"{size} (by {self.names[sizes[size]]!r})" for size in sorted(sizes))
            raise SecondBackwardError(
                f"one backward pass had batches of different sizes: {seen}. The loss adds up terms of several batches, "
                f"and no sample's gradient is whole: call backward() for each batch alone (poisson_sampling=False "
                f"allows several before a step), or call the model once, on samples that have both parts"
            )
        return next(iter(sizes))

    @property
    def nonfinite_samples(self) -> int:
        """How many samples were lost for their norm; a device that still counts is waited for."""
        return 0 if self._lost is None else int(self._lost)

    def _count(self, lost: Tensor) -> None:
        """Of the samples ``[B]`` those that are lost for their norm; they are warned of once.

        On a device their number is read where somebody asks for it, and in passes 1, 2, 4, 8 and so on.
        """
        self._lost = lost.sum() if self._lost is None else self._lost.to(lost.device) + lost.sum()
        self._counted += 1
        if self._warned:
            return
        on_cpu = lost.device.type == "cpu"
        if bool(lost.numpy().any()) if on_cpu else not self._counted & (self._counted - 1) and int(self._lost):
            self._warned = True
            of = f" of {len(lost)}" if on_cpu else ""
            warnings.warn(
                f"{self.nonfinite_samples}{of} samples have a gradient norm that is NaN, infinite or over 2⁶⁴ times "
                f"the norm to clip to, its error bound included: each contributes exact zeros. Warned once; see "
                f"nonfinite_samples for the count",
                RuntimeWarning,
                stacklevel=2,
            )

    def _accumulate(self, p: nn.Parameter, clipped: Tensor) -> None:
        shape = local(p).shape
        if clipped.shape != shape:
            clipped = clipped.reshape(shape)
        if self.loss_scale != 1:
            clipped.mul_(1 / self.loss_scale)
        p.summed_grad = clipped if getattr(p, "summed_grad", None) is None else p.summed_grad.add_(clipped)  # type: ignore[attr-defined]
