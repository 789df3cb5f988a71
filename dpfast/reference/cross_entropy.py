"""Cross-entropy of logits, a few positions at a time: losses, and gradients that may be written over the logits.

``logits [B, T, V]``, ``targets [B, T]``, ``weights [B, T]``: what each position's loss is multiplied by. A target of
``IGNORED`` does not count. A chunk is made in float32 (float64 for float64), whatever the dtype of the logits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dpfast.reference.rounding import compute_dtype

IGNORED = -1  # of targets: callers have their own index for it
CHUNK = 1 << 22  # elements of a chunk


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``log Σ_v exp(z_v) - z_target`` and ``log Σ_v exp(z_v)`` of each position: ``[B, T]``; a loss is 0 if ignored."""
    dtype = compute_dtype(logits.dtype)
    losses, normalisers = (torch.empty(targets.shape, dtype=dtype, device=logits.device) for _ in range(2))
    for place in chunks(logits.shape):
        z, target = logits[place].to(dtype), targets[place]
        normaliser = torch.logsumexp(z, 2)
        picked = z.gather(2, of_class(target).unsqueeze(2)).squeeze(2)
        normalisers[place] = normaliser
        losses[place] = (normaliser - picked).masked_fill(target == IGNORED, 0)
    return losses, normalisers


def logit_gradient(logits: Tensor, targets: Tensor, normalisers: Tensor, weights: Tensor, over: bool) -> Tensor:
    """``weight · (softmax - 1[target])`` of each position, ``[B, T, V]`` in the logits' dtype, ``over`` them if asked.

    Where the weight is 0, or the target ignored, it is exactly 0, whatever the logits are.
    """
    G = logits if over else torch.empty_like(logits)
    for place in chunks(logits.shape):
        target = targets[place]
        z = logits[place].to(normalisers.dtype)
        G[place] = _gradient(z, of_class(target), target != IGNORED, normalisers[place], weights[place])
    return G


def of_class(targets: Tensor) -> Tensor:
    """Targets that can be looked up: of those that are ignored, class 0."""
    return targets.masked_fill(targets == IGNORED, 0)


def _gradient(z: Tensor, target: Tensor, counts: Tensor, normaliser: Tensor, weights: Tensor) -> Tensor:
    """Of logits ``[b, t, v]``; ``counts`` says at which positions it is for ``target`` to lose 1."""
    G = torch.sub(z, normaliser.unsqueeze(2)).exp_()
    G.scatter_add_(2, target.unsqueeze(2), -counts.to(G.dtype).unsqueeze(2))
    return G.mul_(weights.unsqueeze(2)).masked_fill_((weights == 0).unsqueeze(2), 0)


def chunks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Whole samples, or positions of one, whose logits make no more than a chunk."""
    B, T, V = shape
    samples = max(1, CHUNK // max(1, T * V))
    positions = T if T * V <= CHUNK else max(1, CHUNK // max(1, V))
    for b in range(0, B, samples):
        for t in range(0, T, max(1, positions)):
            yield slice(b, b + samples), slice(t, t + positions)
