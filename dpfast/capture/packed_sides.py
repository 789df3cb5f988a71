"""The form of a weight whose samples are segments of packed rows, which stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dpfast import ops
from dpfast.planning.planner import Plan


@dataclass
class PackedSides:
    """``g_i = G_iᵀ A_i`` of the segments of ``A [1, R, d]``, ``G [1, R, p]``, for rows ``[row, row + p)`` of ``rows``.

    ``places`` says where segments lie.
    """

    A: Tensor
    G: Tensor
    places: ops.Places
    rows: int
    row: int = 0
    plan: Plan | None = None

    @property
    def batch(self) -> int:
        return len(self.places)

    def is_ghost(self) -> bool:
        """Whether its norm is of an op for several weights at once."""
        return self.plan is None or self.plan.way != "norm-GEMM"

    def squared_norm(self) -> tuple[Tensor, Tensor]:
        """Where it is no ghost norm."""
        return ops.packed_tile_squared_norm(self.A, self.G, self.places)

    def clipped_sum(self, factors: Tensor) -> Tensor:
        summed = ops.packed_clipped_weight_gradient(self.A, self.G, factors, self.places)
        return ops.place_rows(summed, self.row, self.rows, 0)

    def samples(self) -> tuple[Tensor, Tensor | None]:
        """Per-sample gradients written out, ``[segments, rows, d]``; squared norms where their op has made them."""
        written, squares = ops.packed_grad_samples(self.A, self.G, self.places)
        return ops.place_rows(written, self.row, self.rows, 1), squares
