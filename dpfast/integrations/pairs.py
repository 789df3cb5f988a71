"""Preference pairs as units: both texts of a pair are rows of one forward, and are clipped as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpfast.capture.trees import map_tensors
from dpfast.integrations.heads import IGNORED, LABELS, LossForward, with_losses
from dpfast.integrations.preference_losses import Preference, Scores
from dpfast.integrations.replayed import fingerprint
from dpfast.integrations.trainer import DPTrainer

NOT_OF_THE_MODEL = ("completion_mask", "labels", "ref_chosen_logps", "ref_rejected_logps")


class PairsFirst:
    """A collator of pairs, whose tensors ``[2n, *]`` (chosen ones first) become ``[n, 2, *]``, with labels.

    Args:
        collator: TRL's ``DataCollatorForPreference``, or one that returns the same.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]):
        self.collator = collator

    def __call__(self, samples: list[Any]) -> dict[str, Tensor]:
        return by_pairs(self.collator(samples))


def by_pairs(batch: Any) -> dict[str, Tensor]:
    """What :class:`PairsFirst` returns, of the collated ``batch``."""
    found = dict(batch)
    found["labels"] = found["input_ids"].masked_fill(found["completion_mask"] == 0, IGNORED)
    rows = len(found["input_ids"])
    return {
        name: x.unflatten(0, (2, rows // 2)).transpose(0, 1).contiguous() if x.shape[0] == rows and x.dim() > 1 else x
        for name, x in found.items()
    }


def as_rows(batch: Any) -> Any:
    """``[n, 2, *]`` as ``[2n, *]``, the chosen and the rejected text of a pair one after the other."""
    return map_tensors(lambda x: x.flatten(0, 1) if x.dim() > 1 else x, batch)


class LogProbs(NamedTuple):
    """Log-probabilities of completions, ``[R]`` each."""

    counted: Tensor  # as the loss counts tokens
    plain: Tensor  # the sum over all tokens
    weights: Tensor | None  # what the pair's loss is multiplied by


class PairTrainer(DPTrainer):
    """``DPTrainer`` of preference pairs: ε is for one pair added or left out, or for all pairs of one user.

    Each pair's loss is its own, see :class:`Preference`. Its gradient is that of both texts, and is clipped as one. The
    reference's log-probabilities are computed without gradients, of the pair alone: they are a part of the pair's loss,
    and nothing of them is released but through its clipped gradient.

    ``per_device_train_batch_size`` and all that follows from it counts pairs, so that a forward has twice as many rows.
    The rewards, margins and accuracies of training pairs are as little private as their losses, and are logged where
    ``privacy.log_training_loss`` asks for these.

    Subclasses set :attr:`preference` and :attr:`ref_model` before training. Where there is no ``ref_model`` the
    reference is the model without its adapters, or with the adapters that are called "ref".
    """

    rows_of_a_sample = 2
    row = "preference pair"
    preference: Preference
    ref_model: Any = None
    _reference_head: LossForward | None = None
    _seen: dict[str, list[Tensor]]  # of pairs, since the last log
    _evaluating = False

    def set_reference(self, model: nn.Module | None) -> None:
        """Take ``model`` as the reference, frozen: with the device that the policy is on, and a head for losses."""
        self.ref_model, self._seen = model, {}
        if model is None:
            return
        model.to(self.args.device).eval().requires_grad_(False)
        if self.compute_loss_func is None and not self.args.torch_compile:
            with self.compute_loss_context_manager():
                self._reference_head = with_losses(model)

    def _data_and_collator(self) -> tuple[Any, Any]:
        data, collator = super()._data_and_collator()
        return data, PairsFirst(collator)

    def _on_device(self, part: Any) -> Any:
        return as_rows(super()._on_device(part))

    def _settings(self) -> dict[str, str]:
        reference = "its own" if self.ref_model is None else fingerprint(self.ref_model)
        return super()._settings() | {"preference": repr(self.preference), "reference": reference}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Losses ``[n]`` of pairs, from rows in which both texts of a pair stand one after the other."""
        scores, weights = self._scores(model, inputs)
        losses = self.preference.losses(scores) * weights
        if self._evaluating or (self.privacy.log_training_loss and self.model.training):  # and not a trial
            self._note(scores)
        return (losses, {}) if return_outputs else losses

    def _scores(self, model: Any, inputs: Any) -> tuple[Scores, Tensor | float]:
        # Of adapters the reference comes first: it turns them off and on.
        if "ref_chosen_logps" in inputs:
            reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], 1).flatten()
        else:
            with torch.no_grad():
                if self.ref_model is not None:
                    reference = self._log_probs(self.ref_model, self._reference_head, inputs).counted
                else:
                    with without_adapters(self.model):
                        reference = self._log_probs(model, self._head, inputs).counted
        found = self._log_probs(model, self._head, inputs, self.preference.use_weighting)
        reference, lengths = reference.to(found.counted.dtype), inputs["completion_mask"].sum(1)
        mean = found.plain / (inputs["labels"][:, 1:] != IGNORED).sum(1).clamp(min=1)
        pairs = (x.unflatten(0, (-1, 2)).unbind(1) for x in (found.counted, reference, lengths))
        (chosen, rejected), (of_chosen, of_rejected), (chosen_tokens, rejected_tokens) = pairs
        scores = Scores(chosen, rejected, of_chosen, of_rejected, chosen_tokens, rejected_tokens, mean[::2])
        return scores, 1.0 if found.weights is None else found.weights.unflatten(0, (-1, 2)).prod(1)

    def _log_probs(self, model: Any, head: LossForward | None, inputs: Any, weigh: bool = False) -> LogProbs:
        labels, alpha = inputs["labels"], self.preference.ld_alpha
        counted = labels[:, 1:] != IGNORED
        given = {name: x for name, x in inputs.items() if name not in NOT_OF_THE_MODEL}
        if head is not None and alpha is None and not weigh and head.takes(given):
            means = model(**given, **{LABELS: labels})
            sums = -means * counted.sum(1)
            return LogProbs(sums, sums, None)
        logits = model(**given, use_cache=False)["logits"][:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        of_tokens = -F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
        weights = None
        if weigh:  # WPO: by how probable the policy holds it, beside what it holds probable
            with torch.no_grad():
                energies = (2 * logits).logsumexp(2) - 2 * logits.logsumexp(2)
                aligned = ((of_tokens - energies) * counted).sum(1) / counted.sum(1).clamp(min=1)
                weights = aligned.exp()
        plain = of_tokens.sum(1)
        if alpha is None:
            return LogProbs(plain, plain, weights)
        places, most = counted.cumsum(1), counted.sum(1).unflatten(0, (-1, 2)).amin(1).repeat_interleave(2)
        shared = places <= most[:, None]  # LD-DPO: what the longer text has more counts for less
        return LogProbs((of_tokens * torch.where(shared, 1.0, alpha)).sum(1), plain, weights)

    @torch.no_grad()
    def _note(self, scores: Scores) -> None:
        beta = self.preference.beta
        chosen = beta * (scores.chosen - scores.reference_chosen)
        rejected = beta * (scores.rejected - scores.reference_rejected)
        found = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": scores.chosen,
            "logps/rejected": scores.rejected,
        }
        prefix = "eval_" if self._evaluating else ""
        for name, value in found.items():
            self._seen.setdefault(prefix + name, []).append(value.detach().float().cpu())

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As DPTrainer's, with the means over pairs since the last log; of training pairs only if asked for."""
        evaluated = any(name.startswith("eval_") for name in logs)
        for name in [name for name in self._seen if name.startswith("eval_") == evaluated]:
            logs[name] = float(torch.cat(self._seen.pop(name)).mean())
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The mean loss of a batch of pairs; there are no logits."""
        self._evaluating = True
        try:
            with torch.no_grad():
                losses = self._losses(model, self._on_device(by_pairs(inputs)))
        finally:
            self._evaluating = False
        return losses.mean(), None, None


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """A PEFT model is what it was before its adapters, or what those called "ref" make of it."""
    names: Sequence[str] = list(getattr(model, "peft_config", ()))
    if "ref" not in names:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    try:
        model.set_adapter("ref")
        yield
    finally:
        model.set_adapter(active)
