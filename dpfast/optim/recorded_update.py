"""The update of a private optimizer as the end of a recorded step: what it reads, and whether it can be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfast import ops
from dpfast.noise.parts import StepNoise
from dpfast.optim.fused_update import (
    Update,
    end_step,
    is_step_replaced,
    look_of,
    updates,
    why_not_fused,
    why_not_known,
)
from dpfast.optim.optimizer import FusedDPOptimizer


def why_not_recorded(optimizer: FusedDPOptimizer) -> str | None:
    """Why the updates of ``optimizer`` stay outside of a recorded step; None if they can be a part of it."""
    clipped_sum, ascending = optimizer.clipped_sum, optimizer.ascending
    if is_step_replaced(optimizer, FusedDPOptimizer):
        return "the optimizer's step method was replaced"
    if optimizer.has_hooks:
        return "the optimizer has step hooks"
    if optimizer.has_own_parts or optimizer.has_own("pre_step"):
        return "a method of the optimizer was replaced"
    if optimizer.keep_summed_grad:
        return "the clipped sums are kept for somebody to look at"
    if optimizer.adaptive is not None:
        return "adaptive clipping counts samples between the clipped sum and the noise"
    if ascending.filters:
        return f"the filter of {ascending.ascent!r} stands between noise and update"
    if optimizer.ranks.world_size > 1 or optimizer.ranks.sharded:
        return "ranks add their sums up before the update"
    if clipped_sum.loss_scale != 1:
        return "a GradScaler scales the loss"
    devices = {p.device for p in clipped_sum.names}
    if len(devices) > 1:
        return f"the parameters are on several devices ({', '.join(sorted(map(str, devices)))})"
    if not {device.type for device in devices} <= {"cpu", "cuda"}:
        return f"the model is on {devices.pop().type}, for which there is no update in a graph"
    if (why := why_not_fused(optimizer.original_optimizer)) is not None:
        return f"the update is not made in the noise's pass, as {why}"
    return None


class RecordedUpdate:
    """The update that the next step makes, of which a recorded one may be a part.

    :func:`why_not_recorded` has just said None. Nothing is changed before :meth:`end`.

    A recorded graph is given tensors alone, in the order of :meth:`inputs`; the rest is in :attr:`key`, and a graph
    that was recorded under another one is not used.
    """

    def __init__(self, optimizer: FusedDPOptimizer):
        clipped_sum = optimizer.clipped_sum
        self.optimizer, wrapped = optimizer, optimizer.original_optimizer
        self.trained = dict.fromkeys(p for p in optimizer.all_parameters() if p.requires_grad)
        self.why_not = why_not_known(wrapped, self.trained, optimizer.low_precision)
        if self.why_not is not None:
            return
        settings = optimizer.low_precision, optimizer.noise_correction, optimizer.clipping.part_of
        self.plan: list[Update] = [*updates(wrapped, self.trained, clipped_sum.index, *settings)]
        sums = ((p, getattr(p, "summed_grad", None)) for p in self.trained)  # of physical batches before
        self.earlier = {p: total.contiguous() for p, total in sums if total is not None}
        each = tuple(
            [
                (type(x.rule), x.rounding, tuple(map(id, x.params)), tuple(map(len, x.states)), len(x.masters))
                for x in self.plan
            ]
        )
        self.secure, self.device = optimizer.noise.secure, next(iter(self.trained)).device
        self.key = look_of(wrapped), each, tuple(map(id, self.earlier)), self.secure, tuple(self._memory())

    def _memory(self) -> list[int]:
        """Where a CUDA graph writes, as its kernels have the addresses; those of the parameters are in the look."""
        if self.device.type == "cpu":
            return []
        return [x.data_ptr() for each in self.plan for of in (*each.states, each.masters) for x in of]

    @property
    def in_place(self) -> int:
        """How many of the last :meth:`inputs` are memory that the update writes to."""
        return sum(len(each.parts) + sum(map(len, each.states)) + len(each.masters) for each in self.plan)

    def inputs(self, noise: StepNoise | None = None, rounding_key: tuple[int, int] = (0, 0)) -> list[Tensor]:
        """Tensors that the graph is given. Without ``noise``, as while it is recorded, they let it write nothing."""
        rows, words = [[0.0] * ops.NUMBERS] * len(self.plan), [0] * ops.WORDS
        if noise is not None:
            self.plan = [each.with_noise(noise.parts[each.part]) for each in self.plan]
            rows = [ops.numbers_of(each.rule, noise.parts[each.part]) for each in self.plan]
            words = ops.words_of(noise.parts[0], rounding_key)  # key and step are those of all parts
        pinned = self.device.type == "cuda"  # so that the host does not wait for the copy
        told = torch.tensor(rows, dtype=torch.float64, pin_memory=pinned), torch.tensor(words, pin_memory=pinned)
        out = [*(x.to(self.device, non_blocking=True) for x in told), *self.earlier.values()]
        for each in self.plan:
            out += [*each.parts, *(state for states in each.states for state in states), *each.masters]
        return out

    def run(self, sums: Mapping[Any, Tensor], given: Sequence[Tensor], lost: Tensor) -> list[Tensor]:
        """A part of the graph: clipped ``sums`` of its pass become noisy gradients, and update the parameters.

        Nothing is written where a sample is ``lost [B]``: sums that may have NaN in them cannot be taken back.
        """
        left = iter(given)
        numbers, words = next(left), next(left)
        totals = dict(sums)
        for p in self.earlier:
            earlier = next(left)
            totals[p] = totals[p].add_(earlier) if p in totals else earlier
        out: list[Tensor] = []
        for k, each in enumerate(self.plan):
            params = [next(left) for _ in each.parts]
            states = [[next(left) for _ in of] for of in each.states]
            masters = [next(left) for _ in each.masters]
            summed = [
                totals[p].contiguous() if p in totals else torch.zeros_like(part, dtype=torch.float32)
                for p, part in zip(each.params, params, strict=True)
            ]
            grads = each.grads(summed)
            ops.noisy_step_in_graph_(
                type(each.rule),
                params,
                summed,
                grads,
                states,
                masters,
                each.indices,
                each.rounding,
                each.firsts,
                numbers[k],
                words,
                lost,
                self.secure,
            )
            out += grads
        return out

    def end(self, grads: Sequence[Tensor]) -> None:
        """The graph has run, and written ``grads``, which ``p.grad`` is from now on."""
        left = iter(grads)
        for each in self.plan:
            each.end([next(left) for _ in each.params])
        end_step(self.optimizer.original_optimizer)
        end_step(self.optimizer)
        self.optimizer.close_update()
