"""The ops in plain PyTorch, any dtype, any device: the definition of right.

Shapes: ``A`` activations ``[B, g, T, d]``, ``G`` backprops ``[B, g, T, p]`` (``g`` groups, 1 but for grouped
convolutions), ``factors`` ``[B]``. A norm comes as a pair ``(squared norm [B], bound [B])``, float64: the true
squared norm is at most their sum (rounding of this very computation included), so that clipping by the sum
never lets a contribution above the sensitivity.
"""

from dpfast.reference.embedding import (
    embedding_cross_term,
    embedding_grad_samples,
    embedding_squared_norm,
    embedding_times_grad_samples,
)
from dpfast.reference.matmul import (
    clipped_weight_gradient,
    factored_times_grad_samples,
    ghost_squared_norm,
    grad_samples,
    one_position_squared_norm,
)
from dpfast.reference.patches import patches
from dpfast.reference.reductions import squared_norm, weighted_sum
from dpfast.reference.rounding import compute_dtype

__all__ = [
    "clipped_weight_gradient",
    "compute_dtype",
    "embedding_cross_term",
    "embedding_grad_samples",
    "embedding_squared_norm",
    "embedding_times_grad_samples",
    "factored_times_grad_samples",
    "ghost_squared_norm",
    "grad_samples",
    "one_position_squared_norm",
    "patches",
    "squared_norm",
    "weighted_sum",
]
