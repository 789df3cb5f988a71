"""Each op once. Callers import from here and never from a backend.

Where an op has a compiled version, its file here checks the arguments and :mod:`dpfast.ops.backends` chooses; the other
ops are the plain-PyTorch reference's.
"""

from dpfast.ops.backends import TRITON_DEVICES, backends, is_native, why_no_triton
from dpfast.ops.clipping import ClippingFunction, clip_factors
from dpfast.ops.convolution import (
    convolution_clipped_gradient,
    convolution_grad_samples,
    convolution_squared_norm,
    convolution_stats,
    has_convolution_stats,
)
from dpfast.ops.embedding import embedding_cross_term, embedding_squared_norm, embedding_sum
from dpfast.ops.matmul import (
    all_grad_samples,
    clipped_weight_gradient,
    clipped_weight_gradients,
    ghost_squared_norm,
    ghost_squared_norms,
    ghost_stats,
    grad_samples,
    has_ghost_stats,
    has_tiles,
    is_small,
    tile_squared_norm,
)
from dpfast.ops.noise import KEY_WORDS, Noise, noisy_grad_
from dpfast.ops.norms import (
    certified,
    has_products,
    in_groups,
    index_of,
    one_position_squared_norm,
    side_norms,
    squared_norm,
)
from dpfast.ops.reductions import (
    all_normalised_sums,
    all_position_sums,
    channel_sums,
    normalised_sums,
    sum_positions,
    weighted_sum,
    weighted_sums,
)
from dpfast.ops.update import PARAMETER_DTYPES, SGD, Adam, noisy_step_
from dpfast.ops.update_in_graph import NUMBERS, WORDS, noisy_step_in_graph_, numbers_of, words_of
from dpfast.reference import (
    Geometry,
    alike_for_every_batch,
    all_left_in,
    certified_ghosts,
    compute_dtype,
    convolution_sizes,
    embedding_grad_samples,
    embedding_times_grad_samples,
    factored_times_grad_samples,
    full_precision,
    needs_full_precision,
)

__all__ = [
    "KEY_WORDS",
    "NUMBERS",
    "PARAMETER_DTYPES",
    "SGD",
    "TRITON_DEVICES",
    "WORDS",
    "Adam",
    "ClippingFunction",
    "Geometry",
    "Noise",
    "alike_for_every_batch",
    "all_grad_samples",
    "all_left_in",
    "all_normalised_sums",
    "all_position_sums",
    "backends",
    "certified",
    "certified_ghosts",
    "channel_sums",
    "clip_factors",
    "clipped_weight_gradient",
    "clipped_weight_gradients",
    "compute_dtype",
    "convolution_clipped_gradient",
    "convolution_grad_samples",
    "convolution_sizes",
    "convolution_squared_norm",
    "convolution_stats",
    "embedding_cross_term",
    "embedding_grad_samples",
    "embedding_squared_norm",
    "embedding_sum",
    "embedding_times_grad_samples",
    "factored_times_grad_samples",
    "full_precision",
    "ghost_squared_norm",
    "ghost_squared_norms",
    "ghost_stats",
    "grad_samples",
    "has_convolution_stats",
    "has_ghost_stats",
    "has_products",
    "has_tiles",
    "in_groups",
    "index_of",
    "is_native",
    "is_small",
    "needs_full_precision",
    "noisy_grad_",
    "noisy_step_",
    "noisy_step_in_graph_",
    "normalised_sums",
    "numbers_of",
    "one_position_squared_norm",
    "side_norms",
    "squared_norm",
    "sum_positions",
    "tile_squared_norm",
    "weighted_sum",
    "weighted_sums",
    "why_no_triton",
    "words_of",
]
