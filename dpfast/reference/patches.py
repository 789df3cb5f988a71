"""Convolution as a linear layer over its patches."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Zero-padded patches of ``x [B, C, *spatial]`` (1 to 3 spatial dimensions): ``[B, g, L, C/g · ∏kernel]``."""
    x = F.pad(x, [n for pad in reversed(padding) for n in (pad, pad)])
    for axis, (k, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, (k - 1) * spread + 1, step)[..., ::spread]
    n = len(kernel)
    x = x.unflatten(1, (groups, x.shape[1] // groups))  # [B, g, C/g, *out, *kernel]
    order = [0, 1, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n)]
    return x.permute(order).flatten(2 + n).flatten(2, 1 + n)
