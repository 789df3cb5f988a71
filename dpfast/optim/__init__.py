"""Optimizers on noisy gradients."""

from dpfast.optim.optimizer import FusedDPOptimizer

__all__ = ["FusedDPOptimizer"]
