"""Does clipped gradient descent converge? The tangent kernel of a batch, and what clipping does to it.

From Bu, Wang, Dai, Long, *On the Convergence and Calibration of Deep Learning with Differential Privacy*
(arXiv 2106.07830). Along the flow ``dw/dt = −Σ_i C_i g_i`` with ``L = Σ_i ℓ_i`` and outputs f,

    dL/dt = −(∂L/∂f) H C (∂L/∂f)ᵀ,      H = (∂f/∂w)(∂f/∂w)ᵀ      (flat: one factor C_i a sample)
    dL/dt = −(∂L/∂f) Σ_r H_r C_r (∂L/∂f)ᵀ                         (over groups r of parameters)

C is diagonal, with the factor of sample i in each of its c rows. All in float64. A sample's gradient norm needs no
gradient: ``‖g_{i,r}‖² = v_i H_r[i,i] v_iᵀ`` with ``v = ∂L/∂f``.

These figures come from private data without noise: they are for research, and no release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from dpfast.analysis.functional import Problem, check_memory, clipping_of, factors_of

AT_ONCE = 1 << 23  # numbers of the Jacobian formed by one call
MATRICES = 8  # [n·c, n·c] that the eigenvalues take besides the kernels
TOLERANCE = 1e-10  # relative to the largest eigenvalue: rounding


@dataclass(frozen=True)
class NTK:
    """The kernel of each group of parameters.

    Attributes:
        kernels: ``H_r``, ``[groups, n·c, n·c]``, symmetric and positive semi-definite; row ``i·c + k`` is output k
            of sample i.
        samples, outputs: n and c.
        groups: what parameters are in each group.
    """

    kernels: Tensor
    samples: int
    outputs: int
    groups: tuple[tuple[str, ...], ...]

    @property
    def H(self) -> Tensor:
        """``[n·c, n·c]``, the sum over groups."""
        return self.kernels.sum(0)

    def squared_norms(self, loss_gradient: Tensor) -> Tensor:
        """Squared per-sample gradient norms ``[groups, n]`` from ``∂ℓ_i/∂f_i``, ``[n, c]``."""
        n, c = self.samples, self.outputs
        blocks = self.kernels.view(-1, n, c, n, c).diagonal(dim1=1, dim2=3)  # [groups, c, c, n]
        return torch.einsum("nj,gjkn,nk->gn", loss_gradient, blocks, loss_gradient).clamp(min=0)

    def clipped(self, factors: Tensor) -> Tensor:
        """``HC = Σ_r H_r C_r``, ``[n·c, n·c]``, for factors ``[groups, n]``."""
        return torch.einsum("gij,gj->ij", self.kernels, factors.repeat_interleave(self.outputs, 1))


@dataclass(frozen=True)
class Property:
    """One of the paper's properties: whether it is guaranteed, whether it was seen, and by what figure."""

    name: str
    holds: bool
    guaranteed: bool
    figure: str


@dataclass(frozen=True)
class ConvergenceReport:
    """Which of the paper's properties hold for a model, a batch and a way to clip; ``print(report)`` tells.

    Attributes:
        how: the way to clip, in words.
        factors: clipping factors, ``[groups, n]``.
        norms: per-sample gradient norms, ``[groups, n]``.
        eigenvalues: of HC, ``[n·c]``, complex, by falling real part.
        smallest_symmetric: the smallest eigenvalue of ``(HC + (HC)ᵀ)/2``; below 0 the quadratic form is not positive.
        rank, rank_unclipped: of HC and of H.
        dropped: samples with factor 0 in any group.
        loss, loss_derivative: ``L = Σ_i ℓ_i``, and dL/dt along the clipped flow, loss per unit of time.
        properties: the verdicts.
    """

    how: str
    factors: Tensor
    norms: Tensor
    eigenvalues: Tensor
    smallest_symmetric: float
    rank: int
    rank_unclipped: int
    dropped: int
    loss: float
    loss_derivative: float
    properties: tuple[Property, ...]

    def holds(self, name: str) -> bool:
        """The verdict on the property of that name."""
        return next(one.holds for one in self.properties if one.name == name)

    def __str__(self) -> str:
        clipped = int((self.factors < 1).any(0).sum())
        lines = [
            f"convergence with {self.how}",
            f"  {self.factors.shape[1]} samples, {len(self.eigenvalues)} outputs in all; factors "
            f"{float(self.factors.min()):.3g} to {float(self.factors.max()):.3g}, {clipped} samples scaled down, "
            f"{self.dropped} dropped",
            f"  {'property':<36} {'here':<5} {'guaranteed':<11} seen",
        ]
        word = {True: "yes", False: "no"}
        for one in self.properties:
            lines.append(f"  {one.name:<36} {word[one.holds]:<5} {word[one.guaranteed]:<11} {one.figure}")
        return "\n".join(lines)


SYMMETRIC, REAL, NOT_NEGATIVE = "HC symmetric", "eigenvalues real", "eigenvalues not negative"
FULL_RANK, QUADRATIC, FALLING = "HC no more singular than H", "quadratic form not negative", "loss falls at this point"


def ntk(
    model: nn.Module,
    inputs: Tensor,
    *,
    group_of: Mapping[str, int] | None = None,
    memory_limit: float | None = None,
) -> NTK:
    """The neural tangent kernel of ``model`` on a batch, in float64.

    Args:
        model: plain or private; copied, and looked at in eval mode.
        inputs: ``[n, ...]``.
        group_of: parameter names to groups 0, 1, ...; all in one if None.
        memory_limit: GiB.

    Raises:
        ValueError: it would not fit in memory; says how large it would be.
    """
    return _ntk(Problem(model, None, inputs, None), group_of, memory_limit)


def _ntk(problem: Problem, group_of: Mapping[str, int] | None, memory_limit: float | None) -> NTK:
    n, c = problem.samples, problem.outputs_per_sample
    group_of = dict.fromkeys(problem.start, 0) if group_of is None else group_of
    groups = max(group_of.values()) + 1
    largest = max(p.numel() for p in problem.start.values())
    rows = n * c
    check_memory(
        f"the kernel of {n} samples × {c} outputs, {problem.parameters} parameters and {groups} groups",
        rows * problem.parameters + rows * largest + (groups + MATRICES) * rows * rows,
        memory_limit,
        "give fewer samples, freeze parameters, or raise memory_limit",
    )
    jacobian = {name: torch.empty(n, c, p.numel(), dtype=torch.float64) for name, p in problem.start.items()}
    step = max(1, AT_ONCE // (c * problem.parameters))
    for first in range(0, n, step):
        part = vmap(jacrev(problem.output), (None, 0))(problem.start, problem.inputs[first : first + step])
        for name, values in part.items():
            jacobian[name][first : first + step] = values.reshape(-1, c, jacobian[name].shape[2])
    kernels = torch.zeros(groups, rows, rows, dtype=torch.float64)
    for name in list(jacobian):
        J = jacobian.pop(name).view(rows, -1)
        kernels[group_of[name]].addmm_(J, J.T)
    members = tuple(tuple(name for name in problem.start if group_of[name] == r) for r in range(groups))
    return NTK((kernels + kernels.mT) / 2, n, c, members)


def convergence_report(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    max_grad_norm: float | Sequence[float] | Mapping[str, float] | None,
    clipping: str | Sequence[str] = "flat",
    clipping_fn: Any = "abadi",
    memory_limit: float | None = None,
) -> ConvergenceReport:
    """Which of the paper's properties hold here and now, at the model's present weights.

    Args:
        model, inputs: as in :func:`ntk`.
        loss_fn: a criterion ``loss_fn(outputs, targets)``; the loss of the batch is the sum of its samples'.
        targets: ``[n, ...]``.
        max_grad_norm, clipping, clipping_fn: as in ``make_private``; ``max_grad_norm=None`` is no clipping.
        memory_limit: GiB.
    """
    problem = Problem(model, loss_fn, inputs, targets)
    how = clipping_of(problem.trainable, max_grad_norm, clipping, clipping_fn)
    groups = {name: 0 if how is None else how.group_of(p) for name, p in problem.trainable.items()}
    kernel = _ntk(problem, groups, memory_limit)
    outputs = problem.outputs(problem.start)
    v = problem.loss_gradient(outputs)
    squared = kernel.squared_norms(v)
    factors = factors_of(how, squared)
    words = "no clipping"
    if how is not None:
        style = clipping if isinstance(clipping, str) else f"groups {list(clipping)}"
        words = f"{style} clipping, {how.function}, sensitivity {how.sensitivity:g}"
    return _report(words, kernel, v.reshape(-1), squared.sqrt(), factors, float(problem.losses(outputs).sum()))


def _report(how: str, kernel: NTK, v: Tensor, norms: Tensor, factors: Tensor, loss: float) -> ConvergenceReport:
    H, HC = kernel.H, kernel.clipped(factors)
    scale = float(torch.linalg.matrix_norm(HC, 2)) or 1.0
    flat = len(factors) == 1
    if flat:  # similar to C^½ H C^½, whose eigenvalues come without rounding's imaginary parts
        root = factors[0].repeat_interleave(kernel.outputs).sqrt()
        eigenvalues = torch.linalg.eigvalsh(root.unsqueeze(1) * H * root).flip(0).to(torch.complex128)
    else:
        eigenvalues = torch.linalg.eigvals(HC)
        eigenvalues = eigenvalues[eigenvalues.real.argsort(descending=True)]
    symmetric = torch.linalg.eigvalsh((HC + HC.mT) / 2)
    # Over groups a defective kernel's zero eigenvalues are known to the root of the rounding only.
    slack = TOLERANCE if flat else TOLERANCE**0.5
    imaginary, real = float(eigenvalues.imag.abs().max()) / scale, float(eigenvalues.real.min()) / scale
    asymmetry = float(torch.linalg.matrix_norm(HC - HC.mT, 2)) / scale
    rank, rank_unclipped = int(torch.linalg.matrix_rank(HC)), int(torch.linalg.matrix_rank(H, hermitian=True))
    smallest = float(symmetric.min())
    derivative = -float(v @ HC @ v)
    same = bool((factors == factors[:, :1]).all())  # in each group, so Σ_r C_r H_r is symmetric and PSD
    kept = bool((factors > 0).all())
    size = len(HC)
    properties = (
        Property(SYMMETRIC, asymmetry <= TOLERANCE, same, f"‖HC − (HC)ᵀ‖/‖HC‖ = {asymmetry:.3g}"),
        Property(REAL, imaginary <= slack, flat or same, f"largest |imaginary part| {imaginary:.3g} ‖HC‖"),
        Property(NOT_NEGATIVE, real >= -slack, flat or same, f"smallest real part {real:.3g} ‖HC‖"),
        Property(FULL_RANK, rank >= rank_unclipped, flat and kept, f"rank {rank} of {size}, of H {rank_unclipped}"),
        Property(
            QUADRATIC,
            smallest >= -TOLERANCE * scale,
            same,
            f"smallest symmetric eigenvalue {smallest / scale:.3g} ‖HC‖",
        ),
        Property(FALLING, derivative <= 0, same, f"dL/dt = {derivative:.4g} at L = {loss:.4g}"),
    )
    dropped = int((factors == 0).any(0).sum())
    return ConvergenceReport(
        how, factors, norms, eigenvalues, smallest, rank, rank_unclipped, dropped, loss, derivative, properties
    )
