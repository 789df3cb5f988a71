"""Is a method's clipped sum right on this very model? No speed figure without it.

The oracle is the definition: float64, one sample at a time, clip, add. A method is judged by what its user gets: the
change that one whole step with noise multiplier 0 makes to the parameters.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.methods import Method, fixed_loader, prepare
from bench.workloads import BASE_VARIANT, Workload, sequence_loss

# float32 against float64 is about 1e-5 here, and a certified norm may clip a little more; a wrong method is off by 1e-2
# and more.
TOLERANCE = 1e-3
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


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@functools.lru_cache(maxsize=1)
def oracle(work: Workload, variant: str) -> tuple[float, dict[str, Tensor]]:
    """The clipping norm (the median of the samples' norms, so that about half are clipped) and the clipped sum."""
    model = work.model(variant).double()
    x, y = work.batch(work.check_size)
    x = x.double() if x.is_floating_point() else x
    names, parameters = zip(*trained(model).items(), strict=True)
    grads, norms = [], []
    for i in range(len(x)):
        loss = sequence_loss(nn.CrossEntropyLoss(), model(x[i : i + 1]), y[i : i + 1])
        grads.append(torch.autograd.grad(loss, parameters))
        norms.append(torch.stack([g.norm() for g in grads[-1]]).norm().item())
    max_grad_norm = sorted(norms)[(len(norms) - 1) // 2]
    factors = [min(1.0, max_grad_norm / norm) for norm in norms]
    sums = [sum(f * g for f, g in zip(factors, column, strict=True)) for column in zip(*grads, strict=True)]
    return max_grad_norm, dict(zip(names, sums, strict=True))


def clipped_sum(work: Workload, method: Method, variant: str, max_grad_norm: float) -> dict[str, Tensor]:
    """The clipped sum that the method's optimizer applied: with SGD, the change of the parameters over the rate."""
    x, y = work.batch(work.check_size)
    model = work.model(variant)
    parameters = trained(model)
    before = {name: p.detach().double() for name, p in parameters.items()}
    trainer = prepare(
        method,
        model,
        torch.optim.SGD(model.parameters(), lr=SCALE * len(x)),
        fixed_loader(x, y),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
    )
    trainer.step(x, y)
    return {name: (before[name] - p.detach().double()) / SCALE for name, p in parameters.items()}


def compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The worst parameter's relative error, and its name.

    Each is relative to its own norm, or to 1 % of the whole sum's where that is more: a gradient that is zero in exact
    arithmetic has no digits to get right.
    """
    whole = torch.stack([w.norm() for w in want.values()]).norm()
    errors = {name: ((got[name] - w).norm() / w.norm().clamp(min=0.01 * whole)).item() for name, w in want.items()}
    # NaN compares as false with everything: it must win here, not vanish.
    where = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return errors[where], where


def check(work: Workload, method: Method, variant: str) -> Verdict:
    """One step of the method against the oracle; a method that raises is reported with its own words."""
    max_grad_norm, want = oracle(work, BASE_VARIANT[variant])
    try:
        got = clipped_sum(work, method, variant, max_grad_norm)
    except Exception as failure:  # a peer may fail in any way that it likes: its row in the table quotes it
        return Verdict(variant, None, None, f"{type(failure).__name__}: {' '.join(str(failure).split())}")
    error, where = compare(got, want)
    if not error <= TOLERANCE:
        return Verdict(variant, error, where, f"wrong: relative error {error:.1e} in {where}")
    return Verdict(variant, error, where, None)


def find_variant(work: Workload, method: Method) -> list[Verdict]:
    """Try the variants in order until one is right; the last verdict stands, the others say why it is not plain."""
    verdicts: list[Verdict] = []
    for variant in work.variants:
        verdicts.append(check(work, method, variant))
        if verdicts[-1].right:
            break
    return verdicts
