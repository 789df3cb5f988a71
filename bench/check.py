"""Is a method's clipped sum right on this very model? No speed figure without it.

The oracle is the definition: float64, one sample at a time, clip, add. A method is judged by what its user gets: the
changes that two steps with noise multiplier 0 make to the parameters, at the batch size at which it is timed, as a
method may go another way at another. There a few samples repeat, so that the oracle has few to go through. How far a
method may be off comes from doing the same as the oracle in the model's own dtype.

A check that would pass a sum without clipping, or one that is clipped in the other style, says nothing: then nobody
passes it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.measure import why_not
from bench.methods import Method, Plan, fixed_loader, prepare
from bench.workloads import BASE_VARIANT, SEED, Workload, sequence_loss

# float32 against float64 is about 1e-5 here, and a certified norm may clip a little more; a wrong method is off by 1e-2
# and more.
TOLERANCE = 1e-3
# A 16-bit model's own error may be larger. A method may be this many times as far off: in one parameter, which the
# model may hit by luck, and in all of them together.
TIMES, TIMES_WHOLE = 6.0, 3.0
CLIPPED = 0.5  # the clipping norm over the median of the samples' norms, which differ little in some models
WHOLE = "all parameters"  # together, beside each of them
# A power of two, large enough that the change of a parameter is not lost in the parameter's own rounding.
SCALE = 1024.0


@dataclass(frozen=True)
class Verdict:
    """What came of checking one method on one variant of a workload."""

    variant: str
    error: float | None  # the relative error that is largest beside what is tolerated there
    where: str | None  # the parameter that has it, or WHOLE
    reason: str | None  # why it is not usable; None when it is right

    @property
    def right(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Truth:
    """The clipping norm, the clipped sum and how far it may be missed, by parameter and as a whole."""

    max_grad_norm: float
    sums: Mapping[str, Tensor]
    tolerances: Mapping[str, float]
    blunt: str | None  # what the check would not tell from it


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@functools.lru_cache(maxsize=1)
def oracle(work: Workload, variant: str, layerwise: bool, device: torch.device) -> Truth:
    """The clipped sum of the batch, with a clipping norm that most samples are far above."""
    model = work.model(variant, device)
    exact = copy.deepcopy(model).double()
    x, y = work.batch(work.check_size, device)
    counts = torch.bincount(repeats(work, 0), minlength=len(x)).tolist()
    norms = [torch.stack(list(_squares(g).values())).sum().sqrt().item() for g in _gradients(exact, x, y)]
    bound = CLIPPED * sorted(norms)[(len(norms) - 1) // 2]
    sums = _clipped_sums(exact, x, y, counts, bound, layerwise)
    own = errors(_clipped_sums(model, x, y, counts, bound, layerwise), sums)
    usual = statistics.median(own.values())  # of a parameter, which one may miss by luck
    least = max(TOLERANCE, 2 * torch.finfo(work.dtype).eps)  # gradients are stored in this dtype
    tolerances = {name: max(least, TIMES * max(error, usual)) for name, error in own.items()}
    tolerances[WHOLE] = max(least, TIMES_WHOLE * own[WHOLE])
    wrong = {"a sum without clipping": (math.inf, layerwise)}
    if len(_layers(sums)) > 1:
        wrong["clipping all layers together" if layerwise else "clipping each layer"] = (bound, not layerwise)
    blunt = None
    for said_of_it, how in wrong.items():
        if worst(errors(_clipped_sums(exact, x, y, counts, *how), sums), tolerances)[0] <= 1:
            blunt = said_of_it
    return Truth(bound, sums, tolerances, blunt)


def repeats(work: Workload, step: int) -> Tensor:
    """Which of the few samples stands where in the batch of a step; how often each is there, steps have in common."""
    each = torch.arange(work.batch_size) % work.check_size
    return each[torch.randperm(work.batch_size, generator=torch.Generator().manual_seed(SEED + step))]


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


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _layers(parameters: Iterable[str]) -> set[str]:
    return {_layer(name) for name in parameters}


def _clipped_sums(
    model: nn.Module, x: Tensor, y: Tensor, counts: Sequence[int], bound: float, layerwise: bool
) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained(model).items()}
    layers = _layers(sums)
    for gradient, count in zip(_gradients(model, x, y), counts, strict=True):
        squares = _squares(gradient)
        for name, g in gradient.items():
            mine = [s for other, s in squares.items() if not layerwise or _layer(other) == _layer(name)]
            limit = bound / math.sqrt(len(layers)) if layerwise else bound
            norm = torch.stack(mine).sum().sqrt()
            sums[name] += count * g.double() * (limit / norm).clamp(max=1.0)
    return sums


def clipped_sums(
    work: Workload,
    method: Method,
    variant: str,
    max_grad_norm: float,
    device: torch.device,
    plan: Plan | None = None,
) -> Iterator[dict[str, Tensor]]:
    """What the method's optimizer applied in each of two steps from the same parameters: with SGD, their change over
    the rate.
    """
    few = work.batch(work.check_size, device)
    model = work.model(variant, device)
    parameters = trained(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    trainer = prepare(
        method,
        model,
        torch.optim.SGD(list(parameters.values()), lr=SCALE * work.batch_size),
        fixed_loader(*(each[repeats(work, 0).to(device)] for each in few)),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
        plan=plan,
    )
    # a sum over the samples is not divided by their number
    scale = SCALE * work.batch_size if trainer.summed else SCALE
    for step in range(2):
        x, y = (each[repeats(work, step).to(device)] for each in few)
        if work.inner and x.is_floating_point():
            x.requires_grad_()
        trainer.step(x, y)
        yield {name: (before[name].double() - p.detach().double()) / scale for name, p in parameters.items()}
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])


def errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of every parameter's sum, and of all together.

    Each is relative to its own norm, or to 1 % of the whole sum's where that is more: a gradient that is zero in exact
    arithmetic has no digits to get right.
    """
    whole = torch.stack([w.norm() for w in want.values()]).norm()
    missed = {name: (got[name] - w).norm() for name, w in want.items()}
    found = {name: (missed[name] / w.norm().clamp(min=0.01 * whole)).item() for name, w in want.items()}
    return found | {WHOLE: (torch.stack(list(missed.values())).norm() / whole).item()}


def worst(found: Mapping[str, float], tolerances: Mapping[str, float]) -> tuple[float, str]:
    """The largest error over what is tolerated, and where; NaN is more than any."""
    over = {name: math.inf if math.isnan(error) else error / tolerances[name] for name, error in found.items()}
    where = max(over, key=lambda name: over[name])
    return over[where], where


def check(work: Workload, method: Method, variant: str, device: torch.device, plan: Plan | None = None) -> Verdict:
    """Steps of the method against the oracle; a method that raises is reported with its own words."""
    truths: list[Truth] = []
    reason = why_not(lambda: truths.append(oracle(work, BASE_VARIANT[variant], method.layerwise, device)))
    if reason is not None:
        return Verdict(variant, None, None, f"not checked: the oracle has no answer: {reason}")
    (truth,) = truths
    if truth.blunt is not None:
        return Verdict(variant, None, None, f"not checked: the check would not tell {truth.blunt} from it")
    found: list[dict[str, float]] = []

    def attempt() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # fastDP prints what it cannot train
            for sums in clipped_sums(work, method, variant, truth.max_grad_norm, device, plan):
                found.append(errors(sums, truth.sums))

    reason = why_not(attempt)  # a peer may fail in any way that it likes: its row in the table quotes it
    if reason is not None:
        return Verdict(variant, None, None, reason)
    excess, where = max((worst(each, truth.tolerances) for each in found), key=lambda one: one[0])
    error = max((each[where] for each in found), key=lambda e: math.inf if math.isnan(e) else e)
    return Verdict(variant, error, where, None if excess <= 1 else f"wrong: relative error {error:.1e} in {where}")


def find_variant(work: Workload, method: Method, device: torch.device, plan: Plan | None = None) -> list[Verdict]:
    """Try the variants in order until one is right; the last verdict stands, the others say why it is not plain."""
    verdicts: list[Verdict] = []
    for variant in work.variants if method.any_variant else work.variants[:1]:
        verdicts.append(check(work, method, variant, device, plan))
        if verdicts[-1].right:
            break
    return verdicts
