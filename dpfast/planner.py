"""Which way each layer's norm and clipped sum are computed, and the table that shows it."""

from __future__ import annotations

from dataclasses import dataclass

# Floating-point operations that cost as much as one byte moved: two CPU cores with AVX-512 measured 10 to 16,
# GPUs lie further up; only the crossover between ghost and instantiate moves with it.
FLOPS_PER_BYTE = 12.0
# Written once, read for the norm, read for the weighted sum.
INSTANTIATE_PASSES = 3


@dataclass(frozen=True)
class Plan:
    """How one use of a parameter is handled, and what that adds to ordinary training, for one physical batch."""

    way: str
    T: int
    d: int
    p: int
    flops: float
    bytes: float

    @property
    def cost(self) -> float:
        return self.flops + FLOPS_PER_BYTE * self.bytes


def product(batch: int, groups: int, T: int, d: int, p: int, itemsize: int) -> Plan:
    """``‖a‖²·‖g‖²``, T = 1: reads A and G once."""
    return Plan("product", T, d, p, 2.0 * batch * groups * (p + d), float(itemsize * batch * groups * (p + d)))


def ghost(batch: int, groups: int, T: int, d: int, p: int, itemsize: int) -> Plan:
    """Symmetric tiles of ``A Aᵀ`` and ``G Gᵀ``; the products pass through memory in plain PyTorch."""
    return Plan("ghost", T, d, p, 1.0 * batch * groups * T * T * (p + d), 6.0 * itemsize * batch * groups * T * T / 2)


def instantiate(batch: int, groups: int, T: int, d: int, p: int, itemsize: int) -> Plan:
    """The per-sample products replace the weight gradient's own matrix product: no extra flops."""
    return Plan("instantiate", T, d, p, 0.0, float(INSTANTIATE_PASSES * itemsize * batch * groups * p * d))


def choose(batch: int, groups: int, T: int, d: int, p: int, itemsize: int) -> Plan:
    """The cheapest way for ``A [batch, groups, T, d]``, ``G [batch, groups, T, p]``.

    Every way is exact; the choice moves time and memory only.
    """
    shape = (batch, groups, T, d, p, itemsize)
    if T == 1:
        return product(*shape)
    return min(ghost(*shape), instantiate(*shape), key=lambda plan: plan.cost)


def segments(batch: int, T: int, d: int, itemsize: int) -> Plan:
    """Embedding rows: sums of G over equal ids, written and read once."""
    return Plan("segments", T, d, 1, float(batch * T * d), float(2 * itemsize * batch * T * d))


def small(batch: int, size: int, itemsize: int) -> Plan:
    """Biases, normalisation layers and bare parameters: ``[batch, size]`` formed and kept."""
    return Plan("instantiate", 1, size, 1, 0.0, float(INSTANTIATE_PASSES * itemsize * batch * size))
