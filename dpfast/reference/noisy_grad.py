"""``grad = (summed + std · z) · scale`` in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.reference.noise import secure_integers, standard_normal
from dpfast.reference.rounding import rounded_up

PIECE = 1 << 20


def noisy_grad_(
    summed: Tensor,
    grad: Tensor,
    parameter: int,
    offset: int,
    key: Sequence[int],
    step: int,
    std: float,
    grid: float,
    scale: float,
) -> None:
    """One tensor; arguments as those of :class:`dpfast.ops.Noise`. Fast: float32 with one rounding for ``x + std · z``.

    Secure (``grid > 0``): ``(round(x / grid) + K) · grid · scale``, whole numbers up to the multiplication.
    """
    source, target = summed.view(-1), grad.view(-1)
    wide = summed.dtype == torch.float64
    std32, scale32 = (torch.tensor(value, dtype=torch.float32).item() for value in (std, scale))
    for start in range(0, len(source), PIECE):
        stop = min(start + PIECE, len(source))
        x = source[start:stop]
        place = (key, step, parameter, offset + start, offset + stop)
        if std == 0:
            noisy = x * (scale if wide else scale32)
        elif grid:
            steps = (x.double() / grid).round() + secure_integers(*place, scale=rounded_up(std / grid), device=x.device)
            factor = grid * scale
            noisy = steps * factor if wide else steps.float() * torch.tensor(factor, dtype=torch.float32).item()
        else:
            z = standard_normal(*place, device=x.device).double()
            noisy = (x + std * z) * scale if wide else (x.double() + std32 * z).float() * scale32
        target[start:stop] = noisy
