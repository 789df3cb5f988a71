"""Each op once. Callers import from here and never from a backend.

The only backend so far is the plain-PyTorch reference; a chooser between it and compiled kernels belongs in
this package, so that no caller changes.
"""

from dpfast.reference import (
    Geometry,
    clipped_weight_gradient,
    compute_dtype,
    convolution_grad_samples,
    convolution_sizes,
    convolution_squared_norm,
    convolution_weight_gradient,
    embedding_cross_term,
    embedding_grad_samples,
    embedding_squared_norm,
    embedding_times_grad_samples,
    factored_times_grad_samples,
    ghost_squared_norm,
    grad_samples,
    one_position_squared_norm,
    squared_norm,
    weighted_sum,
)

__all__ = [
    "Geometry",
    "clipped_weight_gradient",
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
    "ghost_squared_norm",
    "grad_samples",
    "one_position_squared_norm",
    "squared_norm",
    "weighted_sum",
]
