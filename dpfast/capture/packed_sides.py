"""The form of a weight whose samples are segments of packed rows, where kernels find segments by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpfast import ops
from dpfast.planning.planner import Plan


@dataclass
class PackedSides:
    """``g_i = G_iᵀ A_i`` of the segments of ``A [1, R, d]``, ``G [1, R, p]``, for rows ``[row, row + p)`` of ``rows``.

    ``table`` says where segments lie: see :func:`dpfast.ops.table_of`.
    """

    A: Tensor
    G: Tensor
    table: Any
    rows: int
    row: int = 0
    plan: Plan | None = None

    @property
    def batch(self) -> int:
        return len(self.table)

    def kept(self) -> tuple[Tensor, ...]:
        return self.A, self.G

    def is_ghost(self) -> bool:
        """Whether its norm is of an op for several weights at once."""
        return self.plan is None or self.plan.way != "norm-GEMM"

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        if not self.is_ghost():
            return ops.packed_tile_squared_norm(self.A, self.G, self.table)
        squared, bound = ops.packed_ghost_squared_norms([(self.A, self.G)], self.table)
        return squared[0], bound[0]

    def clipped_sum(self, factors: Tensor) -> Tensor:
        summed = ops.packed_clipped_weight_gradient(self.A, self.G, factors, self.table)
        return ops.place_rows(summed, self.row, self.rows, 0)

    def samples(self) -> tuple[Tensor, Tensor]:
        """Per-sample gradients written out, ``[segments, rows, d]``, and their squared norms."""
        written, squares = ops.packed_grad_samples(self.A, self.G, self.table)
        return ops.place_rows(written, self.row, self.rows, 1), squares
