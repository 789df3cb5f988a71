"""Is a method's clipped sum right on this very model? No speed figure without it.

The oracle is the definition: float64, one sample at a time, clip, add. A method is judged by what its user gets: the
change that one whole step with noise multiplier 0 makes to the parameters, at the batch size at which it is timed, as a
method may go another way at another. There a few samples repeat, so that the oracle has few to go through. How far it
may be off comes from doing the same as the oracle in the model's own dtype.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.measure import said
from bench.methods import Method, fixed_loader, prepare
from bench.workloads import BASE_VARIANT, SEED, Workload, sequence_loss

# float32 against float64 is about 1e-5 here, and a certified norm may clip a little more; a wrong method is off by 1e-2
# and more.
TOLERANCE = 1e-3
TIMES = 3.0  # a 16-bit model's own error may be larger; a method's may be this many times that
# A power of two, large enough that the change of a parameter is not lost in the parameter's own rounding.
SCALE = 1024.0


@dataclass(frozen=True)
class Verdict:
    """What came of checking one method on one variant of a workload."""

    variant: str
    error: float | None  # the largest relative error over the parameters
    where: str | None  # the parameter that has it
    reason: str | None  # why it is not usable; None when it is right

    @property
    def right(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Truth:
    """The clipping norm, the clipped sum and how far it may be missed."""

    max_grad_norm: float
    sums: Mapping[str, Tensor]
    tolerance: float


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@functools.lru_cache(maxsize=1)
def oracle(work: Workload, variant: str, layerwise: bool, device: torch.device) -> Truth:
    """With the median of the samples' norms as the clipping norm, about half of them are clipped."""
    model = work.model(variant, device)
    exact = copy.deepcopy(model).double()
    x, y = work.batch(work.check_size, device)
    counts = torch.bincount(repeats(work), minlength=len(x)).tolist()
    norms = [torch.stack(list(_squares(g).values())).sum().sqrt().item() for g in _gradients(exact, x, y)]
    max_grad_norm = sorted(norms)[(len(norms) - 1) // 2]
    sums = _clipped_sums(exact, x, y, counts, max_grad_norm, layerwise)
    own_error, _ = compare(_clipped_sums(model, x, y, counts, max_grad_norm, layerwise), sums)
    return Truth(max_grad_norm, sums, max(TOLERANCE, TIMES * own_error))


def repeats(work: Workload) -> Tensor:
    """Which of the few samples stands where in the batch."""
    each = torch.arange(work.batch_size) % work.check_size
    return each[torch.randperm(work.batch_size, generator=torch.Generator().manual_seed(SEED))]


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[dict[str, Tensor]]:
    """One sample's after the other, by name."""
    parameters = trained(model)
    dtype = next(iter(parameters.values())).dtype
    for i in range(len(x)):
        one = x[i : i + 1].to(dtype) if x.is_floating_point() else x[i : i + 1]
        loss = sequence_loss(nn.CrossEntropyLoss(), model(one), y[i : i + 1])
        yield dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def _squares(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.double().square().sum() for name, g in gradient.items()}


def _clipped_sums(
    model: nn.Module, x: Tensor, y: Tensor, counts: Sequence[int], bound: float, layerwise: bool
) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained(model).items()}
    layers = {name.rpartition(".")[0] for name in sums}
    for gradient, count in zip(_gradients(model, x, y), counts, strict=True):
        squares = _squares(gradient)
        for name, g in gradient.items():
            mine = [
                s
                for other, s in squares.items()
                if not layerwise or other.rpartition(".")[0] == name.rpartition(".")[0]
            ]
            limit = bound / math.sqrt(len(layers)) if layerwise else bound
            norm = torch.stack(mine).sum().sqrt()
            sums[name] += count * g.double() * (limit / norm).clamp(max=1.0)
    return sums


def clipped_sum(
    work: Workload, method: Method, variant: str, max_grad_norm: float, device: torch.device
) -> dict[str, Tensor]:
    """The clipped sum that the method's optimizer applied: with SGD, the change of the parameters over the rate."""
    rows = repeats(work).to(device)
    x, y = (of_few[rows] for of_few in work.batch(work.check_size, device))
    model = work.model(variant, device)
    parameters = trained(model)
    before = {name: p.detach().double() for name, p in parameters.items()}
    trainer = prepare(
        method,
        model,
        torch.optim.SGD(list(parameters.values()), lr=SCALE * len(x)),
        fixed_loader(x, y),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
    )
    trainer.step(x, y)
    scale = SCALE * len(x) if trainer.summed else SCALE  # a sum over the samples is not divided by their number
    return {name: (before[name] - p.detach().double()) / scale for name, p in parameters.items()}


def compare(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The worst parameter's relative error, and its name.

    Each is relative to its own norm, or to 1 % of the whole sum's where that is more: a gradient that is zero in exact
    arithmetic has no digits to get right.
    """
    whole = torch.stack([w.norm() for w in want.values()]).norm()
    errors = {name: ((got[name] - w).norm() / w.norm().clamp(min=0.01 * whole)).item() for name, w in want.items()}
    # NaN compares as false with everything: it must win here, not vanish.
    where = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return errors[where], where


def check(work: Workload, method: Method, variant: str, device: torch.device) -> Verdict:
    """One step of the method against the oracle; a method that raises is reported with its own words."""
    truth = oracle(work, BASE_VARIANT[variant], method.layerwise, device)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # fastDP prints what it cannot train
            got = clipped_sum(work, method, variant, truth.max_grad_norm, device)
    except Exception as failure:  # a peer may fail in any way that it likes: its row in the table quotes it
        return Verdict(variant, None, None, said(failure))
    error, where = compare(got, truth.sums)
    if not error <= truth.tolerance:
        return Verdict(variant, error, where, f"wrong: relative error {error:.1e} in {where}")
    return Verdict(variant, error, where, None)


def find_variant(work: Workload, method: Method, device: torch.device) -> list[Verdict]:
    """Try the variants in order until one is right; the last verdict stands, the others say why it is not plain."""
    verdicts: list[Verdict] = []
    for variant in work.variants if method.any_variant else work.variants[:1]:
        verdicts.append(check(work, method, variant, device))
        if verdicts[-1].right:
            break
    return verdicts
