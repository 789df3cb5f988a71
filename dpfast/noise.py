"""Gaussian noise, added in place."""

from __future__ import annotations

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch import Tensor

# Noise is made and added piece by piece, so that it stays in cache and needs no second gradient-sized buffer.
# A multiple of 16 keeps torch's CPU stream the same as that of one call for the whole tensor.
PIECE = 1 << 18


def add_noise_(
    summed: Tensor, std: float, generator: torch.Generator | None = None, secure_mode: bool = False
) -> Tensor:
    """``summed += std · z`` with z standard normal from torch's generator, in ``summed``'s dtype.

    ``summed`` is contiguous and float32 or float64; std = 0 adds nothing and draws nothing. ``secure_mode`` makes z as
    Opacus does against floating-point attacks: the sum of four draws, halved (Holohan and Braghin, 2021).
    """
    if std == 0:
        return summed
    if secure_mode:
        return summed.add_(_generate_noise(std, summed, generator=generator, secure_mode=True))
    flat = summed.view(-1)
    end = flat.numel()
    # The last piece takes the remainder: torch draws tensors of fewer than 16 elements in another way.
    for start in range(0, max(end - PIECE, 0) + 1, PIECE) if end else ():
        stop = end if end - start < 2 * PIECE else start + PIECE
        noise = torch.normal(0.0, std, (stop - start,), generator=generator, dtype=flat.dtype, device=flat.device)
        flat[start:stop] += noise
        if stop == end:
            break
    return summed
