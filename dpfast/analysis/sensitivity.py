"""Leave-one-out check of a user's own model and loss: does one sample move the clipped sum by more than C?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.analysis.collation import is_random
from dpfast.analysis.explain import call, pristine_copy
from dpfast.capture.refusals import listed
from dpfast.capture.segments import PACKED, of_batch, only
from dpfast.capture.trees import map_tensors, tensors
from dpfast.clipping.thresholds import Clipping, check_threshold
from dpfast.data.criterion import PerSampleCriterion, PerSampleLoss
from dpfast.data.units import ids_of
from dpfast.model.model_forward import normalises_over_batch
from dpfast.model.private_model import FusedHooks, FusedModule
from dpfast.refusals import LayoutError
from dpfast.separation import Draws, Followed, observed, own_random_numbers

MOST_LEFT_OUT = 32  # samples left out in turn; spread over a larger batch
ROUNDING = 1e-4  # relative slack for float32 sums of a batch
APART = "samples of packed rows are kept apart as far as replacing them shows"
SEEDS = 2  # of dropout and other random numbers, in turn


@dataclass(frozen=True)
class SensitivityReport:
    """What leaving samples out showed.

    Attributes:
        ok: no sample moved the clipped sum by more than ``sensitivity``, and none changed another one's gradient.
        largest_move: the largest L2 distance between the clipped sums with and without a sample.
        sensitivity: the bound it must keep.
        largest_change: the largest relative change of another sample's norm when a sample was left out; 0 if the
            samples are independent.
        worst_sample: index of the sample with the largest move.
        left_out: how many samples were left out in turn.
        unit: what was left out: ``"sample"``, or ``"unit"`` where several samples are one; the other attributes are
            then of units, which are counted in the order in which they appear.
        cause: the likely cause in words, with the operator and the module; empty if ok.
        proof: what the operators of model and loss prove, whatever the values are, and what was only tried.
    """

    ok: bool
    largest_move: float
    sensitivity: float
    largest_change: float
    worst_sample: int
    left_out: int
    cause: str
    proof: str = ""
    unit: str = "sample"

    def __str__(self) -> str:
        verdict = "holds" if self.ok else "is BROKEN"
        lines = [
            f"sensitivity check: the guarantee {verdict} on this batch",
            f"  left out {self.left_out} {self.unit}s in turn; the clipped sum moved by at most "
            f"{self.largest_move:.6g} ({self.unit} {self.worst_sample}), allowed {self.sensitivity:.6g}",
            f"  other {self.unit}s' gradient norms changed by at most {100 * self.largest_change:.3g} %",
        ]
        lines += [f"  likely cause: {self.cause}"] if self.cause else []
        return "\n".join([*lines, *(f"  {line}" for line in self.proof.splitlines())])


def check_sensitivity(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    max_grad_norm: float,
    *,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    collate_fn: Callable[[list[Any]], Any] | None = None,
    units: Sequence[Any] | Tensor | None = None,
) -> SensitivityReport:
    """Run ``model`` and ``loss_fn`` on a real batch, noise off, with every sample left out in turn.

    The first thing to run on a new model: the library makes a layer's gradients exact, but a loss that couples the
    samples of a batch is the user's own, and no library can clip its way out of that. The model runs in training mode,
    dropout included: a sample gets the same random numbers whichever others are left out. Beside that, every operator
    of the model and of the loss is followed, and the report says what that proves.

    Args:
        model: plain or private; it is copied, not touched.
        loss_fn: a criterion module, called as ``loss_fn(model(x), y)`` on a batch ``(x, y)``; the criterion that
            ``make_private(criterion=..., grad_sample_mode="ghost")`` returned, or
            :class:`dpfast.data.criterion.PerSampleCriterion`, called in the same way; or any callable
            ``loss_fn(model, batch)`` that returns the loss (per-sample losses are reduced).
        batch: nested tuples, lists and dicts of tensors with at least two samples; with ``collate_fn`` a list of at
            least two rows of the data set.
        max_grad_norm: C, the sensitivity to check against.
        batch_first: whether dimension 0 (else 1) of the batch's tensors is the batch.
        loss_reduction: how the loss is reduced over the batch.
        collate_fn: the loader's, from a list of rows to a batch. Rows that are left are collated anew, which finds out
            whether a sample's gradient depends on what it is collated with, as under padding to the longest.
        units: an id for each sample of the batch, as in ``make_private(units=...)``. Samples with equal ids are then
            clipped as one, and left out together. ``"packed"`` leaves out the samples of a packed row: ``batch`` is
            then the mapping that the model is called with, of one row, or a list of samples with ``collate_fn``.

    Returns:
        A report; ``print(report)`` tells all of it.

    Raises:
        ValueError: ``max_grad_norm`` is no threshold, ``batch`` has fewer than two samples or units, or ``units`` are
            not an id for each sample.
    """
    C = check_threshold("max_grad_norm", max_grad_norm)
    dim = 0 if batch_first else 1
    rows = list(batch) if collate_fn is not None else []
    if collate_fn is None:
        sizes = [x.shape[dim if x.dim() > dim else 0] for x in tensors(batch) if x.dim()]
    else:
        sizes = [len(rows)]
    packed = isinstance(units, str) and units == PACKED
    if packed:
        units = None
    if packed and collate_fn is None:
        segments = of_batch(batch)
        sizes = [len(segments)]
    if not sizes or sizes[0] < 2:
        raise ValueError(f"batch: leaving one out needs tensors with at least two samples, got {sizes[:1] or 'none'}")
    count = sizes[0]
    ids = None if units is None else ids_of(units, range(count), range(count))
    if ids is not None and len({*ids}) < 2:
        raise ValueError(f"units: leaving one out needs at least two of them, and all samples are of {ids[0]!r}")

    def part(keep: Sequence[int]) -> Any:
        if collate_fn is not None:
            with own_random_numbers(0):
                return collate_fn([rows[i] for i in keep])
        if packed:
            return only(batch, segments, keep)
        return batch if len(keep) == count else _select(batch, torch.tensor(keep), count, dim)

    run = _Runner(model, loss_fn, loss_reduction, batch_first, C, ids, packed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run.leave_out(part, count, replayed=collate_fn is None and not packed)
    slack = ROUNDING * (C + 1e-3 * found.size)
    worst = max(range(len(found.moves)), key=lambda k: found.moves[k])
    held = found.moves[worst] <= C + slack and max(found.changes) <= 1e-2
    ok = held and not run.met and not run.refused
    cause = "" if ok else _cause(run, caught, found.ratios)
    if cause and held and not run.refused:
        cause = f"{run.met}. On this batch nothing has moved, and on another one it may"
    proof = run.proof
    if collate_fn is not None and is_random(collate_fn, rows):
        proof += "\nnot tried: whether a sample depends on what it is collated with (collate_fn draws random numbers)"
    left_out = found.left_out[worst]
    return SensitivityReport(
        ok,
        found.moves[worst],
        C,
        max(found.changes),
        left_out,
        len(found.moves),
        cause,
        proof.strip(),
        "sample" if ids is None else "unit",
    )


@dataclass
class _Found:
    """What leaving samples out did: moves of the sum, changes of others' norms, and their ratios."""

    left_out: list[int]
    moves: list[float]
    changes: list[float]
    ratios: list[Tensor]
    size: float  # of the clipped sum


class _Runner:
    """The clipped sum and the norms of a batch, on a private copy of the model, in training."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        loss_reduction: str,
        batch_first: bool,
        C: float,
        ids: list[Any] | None,
        packed: bool = False,
    ):
        self.twin = pristine_copy(model._module if isinstance(model, FusedModule) else model).train()
        for module in self.twin.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)  # its own parameters have no per-sample gradients to measure
        self.hooks = FusedHooks(
            self.twin, batch_first=batch_first, loss_reduction=loss_reduction, clipping=Clipping.flat(C)
        )
        self.hooks.public_state = [name for name, _ in self.twin.named_buffers()]  # told of below, not refused
        self.ids = ids  # of the units that samples are of; None: each is one
        self.hooks.clipped_sum.by_unit = ids is not None
        self.packed = self.hooks.clipped_sum.packed = packed
        self.loss_fn, self.loss_reduction, self.batch_dim = loss_fn, loss_reduction, 0 if batch_first else 1
        self.shapes: tuple[Any, ...] = ()
        self.met = self.refused = self.proof = ""

    def leave_out(self, part: Callable[[Sequence[int]], Any], count: int, replayed: bool) -> _Found:
        """Every sample in turn; ``replayed``: the others have the shapes that they had beside it."""
        whole = part(range(count))
        self._look(whole, count)
        if self.packed and self.refused:  # it would be refused again
            return _Found([0], [0.0], [0.0], [], 0.0)
        units = count if self.ids is None else len({*self.ids})
        spread = {round(i * (units - 1) / (MOST_LEFT_OUT - 1)) for i in range(MOST_LEFT_OUT)}
        left_out = list(range(units)) if units <= MOST_LEFT_OUT else sorted(spread)
        try:
            return self._compared(part, whole, count, left_out, replayed)
        except RuntimeError:
            if not replayed:
                raise
            # Random numbers that are not drawn sample by sample cannot be had again for fewer samples.
            self.proof += "\nin evaluation mode, as random numbers could not be had again for fewer samples"
            return self._compared(part, whole, count, left_out, False)

    def _compared(
        self, part: Callable[[Sequence[int]], Any], whole: Any, count: int, left_out: list[int], replayed: bool
    ) -> _Found:
        self.twin.train(replayed)
        self.hooks.clipped_sum.needs_model = replayed  # without random numbers gradients count in eval() too
        found = _Found(left_out, [], [], [], 0.0)
        ids = range(count) if self.ids is None else self.ids
        names = [*dict.fromkeys(ids)]
        for seed in range(SEEDS if replayed else 1):
            draws = Draws(count)
            everything, norms = self._run(whole, range(count), seed, draws if replayed else nullcontext())
            found.size = max(found.size, float(torch.linalg.vector_norm(everything)))
            for i in left_out[seed :: SEEDS if replayed else 1]:
                keep = [j for j in range(count) if ids[j] != names[i]]
                played = draws.playing(torch.tensor(keep)) if replayed else nullcontext()
                total, rest = self._run(part(keep), keep, seed, played)
                found.moves.append(float(torch.linalg.vector_norm(everything - total)))
                ratio = (rest + 1e-30) / (norms[torch.arange(len(names)) != i] + 1e-30)
                found.changes.append(float((ratio - 1).abs().nan_to_num(0, 0, 0).max()))
                found.ratios.append(ratio)
        found.left_out = [
            i for seed in range(SEEDS if replayed else 1) for i in left_out[seed :: SEEDS if replayed else 1]
        ]
        return found

    def _look(self, batch: Any, count: int) -> None:
        """What the operators of model and loss show, and whether the model would be refused."""
        clipped_sum = self.hooks.clipped_sum
        try:
            with own_random_numbers(0), torch.enable_grad():
                self._loss(batch)
            self.proof = f"the model: {APART if self.packed else self.hooks.separation}"
        except (LayoutError, ValueError) as refusal:
            self.refused = str(refusal)  # an error of the loss comes again where sums are made
        if self.packed:
            return  # a proof follows rows
        clipped_sum.batch_sizes = [count]
        clipped_sum.verifies = False  # what mixes samples is to be measured here, not refused
        follow = Followed(clipped_sum, self.twin, self.batch_dim, base="the loss")
        try:
            with (
                observed(clipped_sum, lambda name, form, _: follow.sees(name, form)),
                own_random_numbers(0),
                torch.enable_grad(),
            ):
                follow.label(batch)
                with follow.following():
                    loss = self._loss(batch)
                    follow.returns([loss], [loss])
                    loss.backward()
        except (RuntimeError, ValueError, AssertionError) as error:
            self.proof += f"\nmodel and loss: not followed ({error})"
            return
        self.met = follow.why()
        lost = {*follow.lost, *(f"a value that Python reads in {read.module}" for read in follow.reads)}
        gaps = f"no proof beyond {listed(sorted(lost))}" if lost else "proved to keep samples apart"
        self.proof += f"\nmodel and loss: {self.met or gaps}"

    def _run(
        self, batch: Any, samples: Sequence[int], seed: int, draws: AbstractContextManager[Any]
    ) -> tuple[Tensor, Tensor]:
        """Clipped sum ``[n]`` and norms ``[B]`` of a batch of these ``samples``."""
        if self.ids is not None:
            self.hooks.clipped_sum.units = [self.ids[k] for k in samples]
        for p in self.twin.parameters():
            p.summed_grad = None  # type: ignore[attr-defined]
        with own_random_numbers(seed), torch.enable_grad(), draws:
            self._loss(batch).backward()
        sums = [
            (torch.zeros_like(p) if p.summed_grad is None else p.summed_grad).double().reshape(-1)  # type: ignore[attr-defined]
            for p in self.twin.parameters()
            if p.requires_grad
        ]
        return torch.cat(sums), self.hooks.per_sample_gradient_norms.double().cpu()

    def _loss(self, batch: Any) -> Tensor:
        loss = self._given_loss(batch)
        if isinstance(loss, PerSampleLoss):
            return loss.reduced()
        if loss.dim():
            return loss.mean() if self.loss_reduction == "mean" else loss.sum()
        return loss

    def _given_loss(self, batch: Any) -> Any:
        if not isinstance(self.loss_fn, (nn.Module, PerSampleCriterion)):
            return self.loss_fn(self.twin, batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                "loss_fn is a criterion: give batch as a pair (inputs, targets), or a callable (model, batch)"
            )
        output = call(self.twin, batch[0])
        self.shapes = tuple(getattr(x, "shape", None) for x in (output, batch[1]))
        return self.loss_fn(output, batch[1])


def _select(batch: Any, keep: Tensor, count: int, dim: int) -> Any:
    def pick(x: Tensor) -> Tensor:
        axis = dim if x.dim() > dim else 0
        return x.index_select(axis, keep.to(x.device)) if x.dim() and x.shape[axis] == count else x

    return map_tensors(pick, batch)


def _cause(run: _Runner, caught: list[Any], ratios: list[Tensor]) -> str:
    """The likely cause in words."""
    shapes = run.shapes
    where = f" ({run.met})" if run.met else ""
    if coupled := [name for name, module in run.twin.named_modules() if normalises_over_batch(module)]:
        return (
            f"BatchNorm normalises every sample by the others in its batch ({', '.join(coupled)}); replace it with "
            f"opacus.validators.ModuleValidator.fix(model)"
        )
    if run.refused:
        return run.refused
    sizes_differ = any("target size" in str(warning.message) for warning in caught)
    if sizes_differ or (
        len(shapes) == 2 and None not in shapes and len(shapes[0]) == 2 and shapes[0] == (*shapes[1], 1)
    ):
        return (
            "broadcast of a [B, 1] output against [B] targets in the loss pairs every sample with every other; give "
            "both the same shape (targets.unsqueeze(1) or outputs.squeeze(1))"
        )
    if getattr(run.loss_fn, "weight", None) is not None and isinstance(run.loss_fn, nn.Module):
        return (
            f"the criterion divides by the weights of the classes of the whole batch; give it to "
            f"make_private(criterion=..., grad_sample_mode='ghost'), which takes it without its reduction, and pass "
            f"what that returns here{where}"
        )
    if all(bool((ratio / ratio.median() - 1).abs().max() < 1e-3) for ratio in ratios if len(ratio) > 1):
        return (
            f"the loss is scaled by something of the whole batch, as in an average over all tokens (or weights) of "
            f"the batch: each sample's scale then depends on the others'; average over each sample's own tokens "
            f"first{where}"
        )
    return (
        f"samples are coupled in the model or in the loss (a mean or interaction over the batch, a contrastive loss), "
        f"or in what collates them (padding to the longest); make each sample's loss a function of that sample "
        f"alone{where}"
    )
