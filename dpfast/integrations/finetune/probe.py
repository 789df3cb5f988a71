"""``--probe-first``: the first steps train the classifier's head alone, the others everything that is to train.

A new head starts from random weights. Until it has learnt something, the gradients of the pretrained weights below it
say little, and the noise on them changes what was pretrained. With these weights frozen the head has the whole clipping
norm to itself.

Every step is one of DP-SGD with the noise and the sampling of all others, over the parameters that train at its time,
so that ε is that of as many steps of anything. Which parameters these are follows from the number of the step alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dpfast.integrations.finetune.config import FinetuneError


def steps_of_probe(share: float | None, steps: int) -> int:
    """How many of ``steps`` train the head alone; 0 without a share.

    Raises:
        FinetuneError: it would be none of them, or all.
    """
    if share is None:
        return 0
    of_probe = round(share * steps)
    if not 0 < of_probe < steps:
        raise FinetuneError(
            f"--probe-first {share:g}: of {steps} steps that is {of_probe} for the head, and {steps - of_probe} for "
            f"everything: both need at least one; take more steps, or another share"
        )
    return of_probe


class ProbeFirst:
    """Freezes all but the head of a classifier for the first steps.

    Args:
        model: of Transformers, with PEFT's adapters or without; what is to train requires gradients.
        steps: how many train the head alone.

    Raises:
        FinetuneError: the model is not made of a pretrained part and a head that trains.
    """

    def __init__(self, model: Any, steps: int):
        self.steps = steps
        whole: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        pretrained = getattr(whole, getattr(whole, "base_model_prefix", ""), None)
        below = set(pretrained.parameters()) if isinstance(pretrained, nn.Module) else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.rest = [p for p in trained if p in below]
        if not self.rest or len(self.rest) == len(trained):
            raise FinetuneError(
                f"--probe-first with a {type(whole).__name__}: it has no head of its own on top of a pretrained model, "
                f"which could be trained before the rest: leave --probe-first out"
            )

    def before_step(self, step: int) -> None:
        """Freeze or unfreeze, as step ``step`` of the run is to have it; the first one is 0."""
        for p in self.rest:
            p.requires_grad_(step >= self.steps)
