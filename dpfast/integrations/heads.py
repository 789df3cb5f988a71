"""Causal language models whose losses need no logits: body and head of a Transformers model are called apart.

Which models these are: those of which the output embedding, an ``nn.Linear``, is the last thing that a forward does.
Nobody can list what else models do to logits (caps, scales, biases of their own). So after a look at the config a trial
decides, bit by bit, on tokens that are nobody's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from dpfast.losses import linear_cross_entropy, segment_linear_cross_entropy

LABELS = "dpfast_labels"  # the argument that asks for losses
CHANGES = ("softcap", "logit_scale", "logits_scal", "logit_bias", "lm_head_multiplier")  # in names of settings
IGNORED = -100


class LossForward:
    """A model's ``forward``, but where it is given :data:`LABELS`: then it returns losses ``[B]``.

    Attributes:
        packed: rows hold several samples in training, and each has a loss of its own.
    """

    packed = False

    def __init__(self, model: nn.Module, body: nn.Module, head: nn.Module):
        self.model, self.body, self.head = model, body, head
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop(LABELS, None)
        if labels is None:
            return type(self.model).forward(self.model, *args, **kwargs)
        hidden = hidden_states(self.body, kwargs)
        if self.packed and self.model.training:
            positions = kwargs["position_ids"]
            return segment_linear_cross_entropy(hidden, self.head, labels, position_ids=positions, reduction="none")
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # the last position has nothing to predict
        return linear_cross_entropy(hidden, self.head, targets, reduction="none")

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the body takes all of these."""
        names = inspect.signature(self.body.forward).parameters
        return all(name in names for name in inputs)


def hidden_states(body: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """``[B, T, d]``, the last ones."""
    outputs = body(**inputs)
    return outputs["last_hidden_state"] if isinstance(outputs, Mapping) else outputs[0]


def with_losses(model: Any) -> LossForward | None:
    """``model`` can be called for losses from now on, if its logits are its body's states times its head; else None."""
    if "forward" in vars(model):
        return None
    inner = model
    if hasattr(model, "get_base_model"):  # PEFT
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return None
        inner = model.get_base_model()
    parts = _parts(inner)
    if parts is None or not _computes_the_same(model, *parts):
        return None
    forward = LossForward(model, *parts)
    model.forward = forward
    return forward


def _parts(model: Any) -> tuple[nn.Module, nn.Linear] | None:
    """Body and head, as far as class and config tell."""
    known = type(model).__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if not isinstance(model, PreTrainedModel) or not known or "forward" in vars(model):
        return None
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return None
    if any(value not in (None, False, 1, 1.0) for name, value in vars(config).items() if _changes_logits(name)):
        return None
    body, head = model.base_model, model.get_output_embeddings()
    if body is model or not isinstance(head, nn.Linear) or any(head is module for module in body.modules()):
        return None
    return body, head


def _changes_logits(name: str) -> bool:
    return any(part in name for part in CHANGES)


@torch.no_grad()
def _computes_the_same(model: nn.Module, body: nn.Module, head: nn.Linear) -> bool:
    """Whether the model's logits of some tokens are the head's of what the body returns, bit by bit."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device).remainder(len(head.weight)).view(2, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 3:] = 0
    try:
        model.eval()
        with torch.random.fork_rng():
            outputs = model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            return torch.equal(logits, head(hidden_states(body, inputs)))
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):  # of a model that wants other inputs
        return False
    finally:
        for module in training:
            module.training = True
