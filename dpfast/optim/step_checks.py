"""What a step refuses before anything of it is used up, and what all ranks of a run have to agree on."""

from __future__ import annotations

import math
import zlib
from typing import Any

from torch.optim import Optimizer

from dpfast.capture.refusals import listed
from dpfast.distributed.ranks import local
from dpfast.optim.fused_update import LOW_PRECISION, why_not_fused
from dpfast.refusals import BypassedLayersError, NothingToReleaseError, ParametersChangedError, RanksError, ScalerError


def refuse_step(optimizer: Any) -> None:
    """Refuse a step with nothing to release, or of what cannot be released.

    Raises:
        ValueError: there is no backward pass to release, gradients were not cleared, or parameters were added.
    """
    if optimizer.__dict__.pop("found_inf", None) is not None:  # left there after a refusal, it would refuse every step
        raise ScalerError(
            "step: torch's GradScaler follows the gradients of the batch, unclipped, and these were clipped with "
            "its scale on them: use dpfast.amp.GradScaler(optimizer)"
        )
    if optimizer.stepped:
        raise NothingToReleaseError(
            "Gradients haven't been cleared since the last optimizer step. In order to obtain privacy guarantees "
            "you must call optimizer.zero_grad() on each step"
        )
    refuse_unknown_parameters(optimizer)
    sums = optimizer.clipped_sum
    sums.start_physical_batch()
    nothing = not (sums.waits_for_step or (sums.batches.tried and sums.used))
    sums.end_physical_batch()
    if sums.evaluated and not sums.accumulated:
        raise NothingToReleaseError(
            "step: the only backward since the last step was of the model in eval() mode, whose gradients are not "
            "clipped and not used; call model.train() before the forward of a training step"
        )
    if nothing and not sums.batches.empty and any(p.requires_grad for p in optimizer.all_parameters()):
        raise NothingToReleaseError(
            "step: no backward pass of the private model has ended since the last step, and there is nothing to "
            "release but noise. Call loss.backward() first, of an output of the model that make_private has "
            "returned, with its hooks in place. For a batch without samples, which is a step too, take it from "
            "the loader that make_private has returned, or call optimizer.expect_no_samples()"
        )


def refuse_unknown_parameters(optimizer: Any) -> None:
    """A parameter that came into the wrapped optimizer behind this one's back: it would get noise alone."""
    tracked = optimizer.clipped_sum.tracked or set()
    params = optimizer.all_parameters()
    if len(params) == len(tracked) and {id(p) for p in params} == {id(p) for p in tracked}:
        return
    if unknown := [p for p in params if p not in tracked]:
        names = listed(
            optimizer.clipped_sum.names.get(p, f"of shape {list(p.shape)}, none of the model's") for p in unknown
        )
        raise ParametersChangedError(
            f"step: parameters {names} were added to the wrapped optimizer itself, so they are not clipped. Take "
            f"them out of optimizer.original_optimizer.param_groups again, and call add_param_group of the private "
            f"optimizer, which make_private returned"
        )


def look_for_bypass(optimizer: Any) -> None:
    """``fully_shard`` puts gradients into ``p.grad`` past all hooks; a skipped step's would be cleared unseen.

    One that the rows of this rank's shard are not touched by is seen on other ranks only: :func:`agree` tells all.
    """
    if not optimizer.ranks.sharded:
        return
    for p in optimizer.all_parameters():
        grad = p.grad
        if p.requires_grad and grad is not None and bool(local(grad).any()):
            optimizer.first_bypassed = 1 + optimizer.clipped_sum.index[p]


def agree(optimizer: Any) -> None:
    """What the noise depends on is the same on all ranks: the largest where shares may differ, else refused.

    Raises:
        ValueError: the ranks are not at the same step of the same run; nothing was released.
        RuntimeError: a sharded parameter was used outside of its own module.
    """
    if optimizer.ranks.world_size == 1 and not optimizer.ranks.sharded:
        return
    clipped_sum = optimizer.clipped_sum
    own = clipped_sum.in_force or optimizer.clipping.in_force
    counts = (clipped_sum.unclipped or [0.0] * len(optimizer.max_grad_norms)) if optimizer.adaptive is not None else []
    mine = (*own, *counts, float(clipped_sum.accumulated), float(optimizer.first_bypassed))
    trained = [clipped_sum.index[p] for p in optimizer.all_parameters() if p.requires_grad]
    alike = {
        "noise_multiplier": float(optimizer.noise_multiplier),
        "the noise's step": float(optimizer.noise.step),
        "the noise's key": float(optimizer.noise.fingerprint()),
        "the expected batch size": float(optimizer.expected_batch_size or 0)
        if optimizer.loss_reduction == "mean"
        else 0.0,
        "the set of parameters that train": float(zlib.crc32(repr(trained).encode())),
    }
    rows = optimizer.ranks.gathered([*mine, *alike.values()])
    for name, values in zip(alike, list(zip(*rows, strict=True))[len(mine) :], strict=True):
        if len(set(values)) > 1:
            shown = "" if "key" in name or "set" in name else f": {list(values)}"
            raise RanksError(
                f"step: {name} differs between the ranks{shown}. Load the same checkpoint, and change the same "
                f"settings, on all of them"
            )
    columns = [*zip(*rows, strict=True)]
    accumulated, bypassed = columns[len(own) + len(counts) : len(mine)]
    if any(bypassed):
        name = list(clipped_sum.names.values())[int(max(bypassed)) - 1]
        raise BypassedLayersError(
            f"parameter {name!r} got a gradient outside of its own module's forward, which nobody has clipped: the "
            f"loss computes with it (for an L2 penalty use the optimizer's weight_decay), or other code does (call "
            f"the module that owns it), or set requires_grad_(False)"
        )
    clipped_sum.in_force, clipped_sum.accumulated = [*map(max, columns[: len(own)])], int(max(accumulated))
    clipped_sum.unclipped = [*map(sum, columns[len(own) : len(own) + len(counts)])]


def check_noise_multiplier(value: Any) -> None:
    """Refuse what is no standard deviation."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"noise_multiplier={value!r}: give a finite number that is not negative")


def check_low_precision(value: Any, optimizer: Optimizer, why_not: str | None = None) -> None:
    """Refuse a way to update 16-bit parameters that is unknown, or that ``optimizer``'s own step does not have.

    ``why_not`` is why that step makes the update, if it does whatever the optimizer is.
    """
    if value not in LOW_PRECISION:
        raise ValueError(f"low_precision={value!r}: use one of {', '.join(map(repr, LOW_PRECISION))}")
    if value != "nearest" and (reason := why_not or why_not_fused(optimizer)) is not None:
        raise ValueError(f"low_precision={value!r} needs the update in the noise's pass, but {reason}; use 'nearest'")
