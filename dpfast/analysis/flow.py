"""The gradient flow of clipped training, by Euler steps, with and without noise.

    w ← w − η (Σ_i C_i g_i + σ S z)                       in the parameters' space (full-batch DP-GD itself)
    f ← f − η (H C (∂L/∂f)ᵀ + σ S H^½ z)                  in the functions' space, H that of the start (lazy training)

with S the sensitivity and z standard normal. Per unit of time the noise has variance ``η σ² S²``: at fixed σ it
vanishes with η, and the path comes to that without noise, at a distance of order √η. At a fixed privacy budget σ grows
as √(steps), so as 1/√η, and it does not (Bu et al., arXiv 2106.07830).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.analysis.functional import Problem, check_memory, clipping_of, factors_of
from dpfast.analysis.ntk import _ntk
from dpfast.clipping.thresholds import Clipping

RISE = 1e-9  # relative to the loss: rounding


@dataclass(frozen=True)
class Trajectory:
    """What a simulation went through.

    Attributes:
        times: ``[steps + 1]``, η · step.
        losses: ``L = Σ_i ℓ_i`` at these times, ``[steps + 1]``.
        slopes: dL/dt along the flow without noise, at these times, ``[steps + 1]``; whatever the length of a step.
        outputs: ``[n, c]``, at the end.
        parameters: ``[P]``, at the end, in the model's order; empty in the functions' space.
    """

    times: Tensor
    losses: Tensor
    slopes: Tensor
    outputs: Tensor
    parameters: Tensor

    @property
    def monotone(self) -> bool:
        """Whether the loss never rose."""
        return bool((self.losses.diff() <= RISE * self.losses[:-1].abs()).all())


def simulate(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    learning_rate: float,
    steps: int,
    max_grad_norm: float | Sequence[float] | Mapping[str, float] | None,
    clipping: str | Sequence[str] = "flat",
    clipping_fn: Any = "abadi",
    noise_multiplier: float = 0.0,
    space: str = "parameters",
    seed: int = 0,
    memory_limit: float | None = None,
) -> Trajectory:
    """Follow the flow from the model's present weights; the model is not touched.

    Args:
        model, loss_fn, inputs, targets: as in :func:`dpfast.analysis.ntk.convergence_report`; gradients are summed
            over the batch, not averaged.
        learning_rate: η, the Euler step, in units of time.
        steps: how many.
        max_grad_norm, clipping, clipping_fn: as in ``make_private``; ``max_grad_norm=None`` is no clipping.
        noise_multiplier: σ, standard deviation over sensitivity; 0 for the flow itself.
        space: ``"parameters"``, or ``"function"`` for the kernel of the start kept fixed.
        seed: of the noise. (It is a simulation: the noise is torch's, and protects nobody.)
        memory_limit: GiB.

    Raises:
        ValueError: names the argument and its value; or the path diverges (says at which step).
    """
    for name, value in {"learning_rate": learning_rate, "noise_multiplier": noise_multiplier}.items():
        least = 0 if name == "noise_multiplier" else math.ulp(0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise ValueError(
                f"{name}={value!r}: give a finite number that is {'not negative' if not least else 'positive'}"
            )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: give a whole number of at least 1")
    if space not in ("parameters", "function"):
        raise ValueError(f"space={space!r}: use 'parameters' or 'function'")
    if noise_multiplier and max_grad_norm is None:
        raise ValueError(f"noise_multiplier={noise_multiplier!r} without clipping: give max_grad_norm, which scales it")
    problem = Problem(model, loss_fn, inputs, targets)
    how = clipping_of(problem.trainable, max_grad_norm, clipping, clipping_fn)
    std = noise_multiplier * how.sensitivity if how is not None else 0.0
    generator = torch.Generator().manual_seed(seed)
    walk = _in_parameters if space == "parameters" else _in_functions
    losses: list[float] = []
    slopes: list[float] = []
    state = torch.empty(0), torch.empty(0), 0.0
    for state in walk(problem, how, learning_rate, steps, std, generator, memory_limit):
        losses.append(float(problem.losses(state[0]).sum()))
        slopes.append(state[2])
        if not math.isfinite(losses[-1]):
            after = len(losses) - 1
            raise ValueError(f"learning_rate={learning_rate!r}: the loss is {losses[-1]} after {after} steps; lower it")
    times = learning_rate * torch.arange(steps + 1, dtype=torch.float64)
    paths = [torch.tensor(values, dtype=torch.float64) for values in (losses, slopes)]
    return Trajectory(times, paths[0], paths[1], state[0], state[1])


def _in_parameters(
    problem: Problem,
    how: Clipping | None,
    rate: float,
    steps: int,
    std: float,
    generator: torch.Generator,
    memory_limit: float | None,
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Outputs, parameters and dL/dt before each step and after the last."""
    n = problem.samples
    check_memory(
        f"per-sample gradients of {n} samples and {problem.parameters} parameters",
        2 * n * problem.parameters,
        memory_limit,
        "give fewer samples, freeze parameters, or raise memory_limit",
    )
    groups = {name: 0 if how is None else how.group_of(p) for name, p in problem.trainable.items()}
    at = dict(problem.start)
    for step in range(steps + 1):
        gradients = {name: g.reshape(n, -1) for name, g in problem.sample_gradients(at).items()}
        squared = torch.zeros(max(groups.values()) + 1, n, dtype=torch.float64)
        for name, g in gradients.items():
            squared[groups[name]] += g.square().sum(1)
        factors = factors_of(how, squared)
        clipped = {name: factors[groups[name]] @ g for name, g in gradients.items()}
        slope = -sum(float(g.sum(0) @ clipped[name]) for name, g in gradients.items())
        yield problem.outputs(at), torch.cat([p.reshape(-1) for p in at.values()]), slope
        if step == steps:
            return
        for name, total in clipped.items():
            if std:
                total = total + std * torch.randn(total.shape, generator=generator, dtype=torch.float64)
            at[name] = at[name] - rate * total.view_as(at[name])


def _in_functions(
    problem: Problem,
    how: Clipping | None,
    rate: float,
    steps: int,
    std: float,
    generator: torch.Generator,
    memory_limit: float | None,
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Outputs, no parameters, and dL/dt before each step and after the last."""
    groups = {name: 0 if how is None else how.group_of(p) for name, p in problem.trainable.items()}
    kernel = _ntk(problem, groups, memory_limit)
    values, vectors = torch.linalg.eigh(kernel.H) if std else (torch.empty(0), torch.empty(0))
    root = vectors * values.clamp(min=0).sqrt()
    f = problem.outputs(problem.start)
    for step in range(steps + 1):
        v = problem.loss_gradient(f)
        change = kernel.clipped(factors_of(how, kernel.squared_norms(v))) @ v.reshape(-1)
        yield f, torch.empty(0), -float(v.reshape(-1) @ change)
        if step == steps:
            return
        if std:
            change = change + std * (root @ torch.randn(len(root), generator=generator, dtype=torch.float64))
        f = f - rate * change.view_as(f)
