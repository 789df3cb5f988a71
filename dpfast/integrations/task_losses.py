"""Which per-sample loss a Transformers model trains with, told by its class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto import modeling_auto

from dpfast.losses import causal_lm_loss, sequence_classification_loss, token_loss


def task_loss(model: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Per-sample losses ``[B]`` from logits and labels, as the model's class has them; None if it is not known."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    config = getattr(model, "config", None)
    tasks = {
        # an encoder-decoder reads labels that are shifted already
        "CAUSAL_LM": token_loss if getattr(config, "is_encoder_decoder", False) else causal_lm_loss,
        "SEQ_TO_SEQ_CAUSAL_LM": token_loss,
        "MASKED_LM": token_loss,
        "TOKEN_CLASSIFICATION": token_loss,
        "SEQUENCE_CLASSIFICATION": _classification(config),
        "IMAGE_CLASSIFICATION": _classification(config),
    }
    for task, loss in tasks.items():
        for known in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            if type(model).__name__ in ([known] if isinstance(known, str) else known):
                return partial(loss, reduction="none")
    return None


def is_causal_lm(model: Any) -> bool:
    """Whether ``model`` is a decoder that predicts next tokens."""
    found: Any = task_loss(model)
    return isinstance(found, partial) and found.func is causal_lm_loss


def _classification(config: Any) -> Callable[..., Tensor]:
    """One class a sample, several, or numbers, as Transformers tells them apart."""
    labels = getattr(config, "num_labels", None)
    problem = getattr(config, "problem_type", None) or ("regression" if labels == 1 else None)
    if problem == "regression":
        return partial(_mean_of_labels, F.mse_loss)
    if problem == "multi_label_classification":
        return partial(_mean_of_labels, F.binary_cross_entropy_with_logits)
    return sequence_classification_loss


def _mean_of_labels(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return loss(logits.float(), labels.view(logits.shape).float(), reduction=reduction).flatten(1).mean(1)
