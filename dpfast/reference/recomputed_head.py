"""Linear cross-entropy whose logits are never stored: ``z = x Wᵀ + b``, made again wherever they are needed.

``x [B, T, d]``, ``W [V, d]``, ``b [V]`` or None, targets and weights as in :mod:`dpfast.reference.cross_entropy`. Some
classes are taken at a time, for all positions. The logits' gradient ``G = weight · (softmax - 1[target])`` is made
several times, and products of other shapes round it differently; so logits are made in float64, and G, rounded to
float32 (float64 for float64), is the same up to a unit in its last place: :func:`slips` bounds what is left.

Products: one forward; three for the backward, with the norms; two for the clipped sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.reference.cross_entropy import CHUNK, IGNORED, _gradient, of_class
from dpfast.reference.precision import full_precision
from dpfast.reference.reductions import row_squares
from dpfast.reference.rounding import compute_dtype, drift, left_in, of_slip, underflow, unit_roundoff, with_safety

LEAST_CLASSES = 64  # of a chunk: products of fewer columns are slow


class Sides(NamedTuple):
    """What the gradient of the logits is made of."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    normalisers: Tensor  # [B, T], float64: log Σ_v exp(z_v)
    weights: Tensor  # [B, T]

    @property
    def dtype(self) -> torch.dtype:
        """Of G, of products with it and of sums."""
        return compute_dtype(self.x.dtype)

    def left_in(self, factors: Tensor) -> tuple[Tensor, "Sides"]:
        """Without the samples whose factor is 0."""
        factors, x, targets, normalisers, weights = left_in(
            factors, self.x, self.targets, self.normalisers, self.weights
        )
        return factors, self._replace(x=x, targets=targets, normalisers=normalisers, weights=weights)


def head_losses(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``[B, T]``, float32 (float64 for float64), 0 where the target is ignored, and normalisers, float64."""
    total = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=x.device)
    picked = torch.zeros_like(total)
    target, wide = of_class(targets), x.double()
    for start, stop in _classes(x, weight):
        z = _logits(wide, weight[start:stop], None if bias is None else bias[start:stop])
        total = torch.logaddexp(total, torch.logsumexp(z, 2))
        inside, place = _inside(target, start, stop)
        picked = torch.where(inside, z.gather(2, place.unsqueeze(2)).squeeze(2), picked)
    losses = (total - picked).masked_fill(targets == IGNORED, 0)
    return losses.to(compute_dtype(x.dtype)), total


class Backward(NamedTuple):
    """The gradient of ``x``, and squared norms ``[B]`` of per-sample gradients of ``W`` with their bounds."""

    gx: Tensor | None
    squared: Tensor | None
    bound: Tensor | None
    bias: Tensor | None  # its per-sample gradients, [B, V]


def head_backward(sides: Sides, wants_gx: bool, wants_weight: bool, wants_bias: bool) -> Backward:
    """All that a backward pass is asked for, from one look at the logits."""
    x, weight = sides.x, sides.weight
    (B, T, d), V, dtype = x.shape, len(weight), sides.dtype
    A = x.to(dtype)
    gx = torch.zeros_like(A) if wants_gx else None
    squares, energies = (torch.zeros(*size, dtype=torch.float64, device=x.device) for size in ((B,), (B, T)))
    bias = torch.empty(B, V, dtype=dtype, device=x.device) if wants_bias else None
    with full_precision(x.device):
        for (start, stop), G in _gradients(sides):
            if gx is not None:
                gx.add_(G @ weight[start:stop].to(dtype))
            if wants_weight:
                squares += row_squares(torch.bmm(G.transpose(1, 2), A))
                energies += torch.linalg.vector_norm(G, dim=2).double().square()
            if bias is not None:
                bias[:, start:stop] = G.sum(1)
    gx = None if gx is None else gx.to(x.dtype)
    if not wants_weight:
        return Backward(gx, None, None, bias)
    u, lengths = unit_roundoff(dtype), torch.linalg.vector_norm(A.double(), dim=2)
    # The gradient is rounded when its norm is made, and once more when its clipped sum is.
    slip = (lengths * (2 * drift(T) * u * energies.sqrt() + slips(sides, energies))).sum(1)
    lost = underflow(dtype) * T * (d * energies.sum(1) + V * lengths.square().sum(1) + d * V * T)
    return Backward(gx, *with_safety(squares, of_slip(squares, slip) + lost, dtype, squares=V * d), bias)


def slips(sides: Sides, energies: Tensor) -> Tensor:
    """How far G of a position, of squared length ``energies [B, T]``, may be from G made another time, in norm."""
    u, u64 = unit_roundoff(sides.dtype), unit_roundoff(torch.float64)
    largest = torch.linalg.vector_norm(sides.weight.to(sides.dtype), dim=1).max().double() if len(sides.weight) else 0.0
    shift = 0.0 if sides.bias is None else sides.bias.abs().max().double()
    lengths = torch.linalg.vector_norm(sides.x.double(), dim=2)
    moved = (2 * drift(sides.x.shape[2]) + 4) * u64 * (1.01 * lengths * largest + shift)
    # Probabilities, of length 1 at most, are off by as much as the logits are, and by eight roundings of their own.
    return 2 * u * energies.sqrt() + 1.01 * sides.weights.double().abs() * (torch.expm1(moved) + 8 * u64)


def head_clipped_sum(sides: Sides, factors: Tensor) -> Tensor:
    """``Σ_i factor_i · G_iᵀ x_i``: ``[V, d]``; a sample whose factor is 0 is left out."""
    dtype = sides.dtype
    factors, sides = sides.left_in(factors.to(dtype))
    A = (sides.x.to(dtype) * factors.view(-1, 1, 1)).flatten(0, 1)
    out = torch.empty(sides.weight.shape, dtype=dtype, device=A.device)
    with full_precision(A.device):
        for (start, stop), G in _gradients(sides):
            out[start:stop] = G.flatten(0, 1).t() @ A
    return out


def head_gradient(sides: Sides) -> Tensor:
    """G as a whole, ``[B, T, V]``."""
    out = torch.empty(*sides.targets.shape, len(sides.weight), dtype=sides.dtype, device=sides.x.device)
    for (start, stop), G in _gradients(sides):
        out[:, :, start:stop] = G
    return out


def head_embedding_cross_term(sides: Sides, ids: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨embedding part, G_iᵀ x_i⟩ = Σ_{s,t} (x_s·e_t) G[s, id_t]`` for a head tied to the embedding, and its bound.

    ``ids [B, S]``, ``E [B, S, d]`` the embedding's backprops. Only those elements of G are made.
    """
    dtype = sides.dtype
    x, E = sides.x.to(dtype), E.to(dtype)
    rows = sides.weight.index_select(0, ids.flatten()).view(*ids.shape, -1)
    z = torch.bmm(x.double(), rows.double().transpose(1, 2))
    if sides.bias is not None:
        z = z + sides.bias.double()[ids].unsqueeze(1)
    hit = (sides.targets.unsqueeze(2) == ids.unsqueeze(1)).to(z.dtype)
    weights = sides.weights.to(torch.float64).unsqueeze(2)
    G = ((z - sides.normalisers.unsqueeze(2)).exp_() - hit).mul_(weights)
    G = G.masked_fill_(weights == 0, 0).to(dtype)
    with full_precision(x.device):
        products = torch.bmm(x, E.transpose(1, 2))
    term = (products * G).sum((1, 2), dtype=torch.float64)
    lengths, others = (torch.linalg.vector_norm(side.double(), dim=2) for side in (x, E))
    reach = torch.einsum("bs,bt,bst->b", lengths, others, G.abs().double())
    slip = (lengths * slips(sides, torch.zeros_like(lengths))).sum(1) * others.sum(1)
    return term, (drift(x.shape[2]) + 4) * unit_roundoff(dtype) * reach + slip


def _logits(wide: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of some classes, float64."""
    z = wide @ weight.double().t()
    return z if bias is None else z + bias.double()


def _gradients(sides: Sides) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """G of some classes at a time: ``[B, T, stop - start]``."""
    target, wide = of_class(sides.targets), sides.x.double()
    counts, weights = sides.targets != IGNORED, sides.weights.double()
    for start, stop in _classes(sides.x, sides.weight):
        z = _logits(wide, sides.weight[start:stop], None if sides.bias is None else sides.bias[start:stop])
        inside, place = _inside(target, start, stop)
        yield (start, stop), _gradient(z, place, inside & counts, sides.normalisers, weights).to(sides.dtype)


def _inside(target: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Which targets are among these classes, and where: of others, somewhere."""
    return (target >= start) & (target < stop), (target - start).clamp(0, stop - start - 1)


def _classes(x: Tensor, weight: Tensor) -> Iterator[tuple[int, int]]:
    B, T, d = x.shape
    step = max(LEAST_CLASSES, CHUNK // max(1, B * max(T, d)))
    for start in range(0, len(weight), step):
        yield start, min(start + step, len(weight))
