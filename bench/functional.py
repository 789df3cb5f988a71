"""Opake's functional DP-SGD with a face like the others': gradients come to lie in ``p.grad``, noise and all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def private_gradients(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """What takes the place of forward, loss and backward: it fills ``p.grad`` and returns the mean loss.

    ``loss(output, y)`` is of a batch of one sample, as Opake maps over samples.
    """
    from opake.dpsgd.clipping import clipped_grad
    from opake.dpsgd.noise import gaussian_noise
    from opake.random import key

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def of_sample(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    clipped, clip_state = clipped_grad(
        of_sample, clipping_norm=max_grad_norm, normalize_by=batch_size, batch_argnums=(1, 2), return_aux=True
    )
    noise, noise_state = gaussian_noise(noise_multiplier=noise_multiplier, key=key(0))

    def fill(x: Tensor, y: Tensor) -> Tensor:
        nonlocal clip_state, noise_state
        parameters = {name: p.detach() for name, p in trained.items()}
        (gradients, seen), clip_state = clipped(parameters, x.detach(), y, state=clip_state)
        noisy, noise_state = noise(gradients, noise_state)
        for name, gradient in noisy.pytree.items():
            trained[name].grad = gradient
        return seen.loss_values.mean()

    return fill
