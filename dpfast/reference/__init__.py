"""The ops in plain PyTorch, any dtype, any device: the definition of right.

Shapes: ``A`` activations ``[B, g, T, d]``, ``G`` backprops ``[B, g, T, p]`` (``g`` groups, 1 but for grouped
convolutions), ``factors`` ``[B]``. A norm comes as a pair ``(squared norm [B], bound [B])``, float64: the true
squared norm is at most their sum (rounding of this very computation included), so that clipping by the sum
never lets a contribution above the sensitivity.
"""

from dpfast.reference.convolution import (
    Geometry,
    convolution_grad_samples,
    convolution_sizes,
    convolution_squared_norm,
    convolution_weight_gradient,
)
from dpfast.reference.cross_entropy import IGNORED, logit_gradient, token_losses
from dpfast.reference.embedding import (
    embedding_cross_term,
    embedding_grad_samples,
    embedding_squared_norm,
    embedding_times_grad_samples,
)
from dpfast.reference.matmul import (
    certified_ghost,
    certified_ghosts,
    clipped_weight_gradient,
    clipped_weight_gradients,
    factored_times_grad_samples,
    ghost_squared_norm,
    ghost_stats,
    grad_samples,
    one_position_squared_norm,
)
from dpfast.reference.packed import certified_packed_ghosts, packed_ghost_stats, packed_grad_samples
from dpfast.reference.precision import alike_for_every_batch, full_precision, needs_full_precision
from dpfast.reference.recomputed_head import Backward as HeadBackward
from dpfast.reference.recomputed_head import Sides as HeadSides
from dpfast.reference.recomputed_head import (
    head_backward,
    head_clipped_sum,
    head_embedding_cross_term,
    head_gradient,
    head_losses,
)
from dpfast.reference.reductions import (
    channel_sums,
    normalised_sums,
    row_squares,
    squared_norm,
    sum_positions,
    weighted_sum,
)
from dpfast.reference.rounding import all_left_in, compute_dtype, left_in

__all__ = [
    "IGNORED",
    "Geometry",
    "HeadBackward",
    "HeadSides",
    "alike_for_every_batch",
    "all_left_in",
    "certified_ghost",
    "certified_ghosts",
    "certified_packed_ghosts",
    "channel_sums",
    "clipped_weight_gradient",
    "clipped_weight_gradients",
    "compute_dtype",
    "convolution_grad_samples",
    "convolution_sizes",
    "convolution_squared_norm",
    "convolution_weight_gradient",
    "embedding_cross_term",
    "embedding_grad_samples",
    "embedding_squared_norm",
    "embedding_times_grad_samples",
    "factored_times_grad_samples",
    "full_precision",
    "ghost_squared_norm",
    "ghost_stats",
    "grad_samples",
    "head_backward",
    "head_clipped_sum",
    "head_embedding_cross_term",
    "head_gradient",
    "head_losses",
    "left_in",
    "logit_gradient",
    "needs_full_precision",
    "normalised_sums",
    "one_position_squared_norm",
    "packed_ghost_stats",
    "packed_grad_samples",
    "row_squares",
    "squared_norm",
    "sum_positions",
    "token_losses",
    "weighted_sum",
]
