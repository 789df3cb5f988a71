"""``finetune --dpo``: the command's training loop, of preference pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpfast.integrations.finetune.trainer import FinetuneTrainer, Run
from dpfast.integrations.pairs import PairTrainer
from dpfast.integrations.preference_losses import Preference


class FinetunePairTrainer(PairTrainer, FinetuneTrainer):  # type: ignore[misc]
    """:class:`FinetuneTrainer` of pairs, with DPO's loss.

    Args:
        model, run, say: as there.
        reference: the model as it is before training; None where the model without its adapters is.
    """

    def __init__(self, model: nn.Module, run: Run, say: Callable[..., None], reference: nn.Module | None):
        self.preference, self._before, self._seen = Preference(beta=run.config.dpo_beta), reference, {}
        super().__init__(model, run, say)

    def create_optimizer(self, model: Any = None) -> Any:
        """The private one; the reference is ready before any pair is seen."""
        if self.ref_model is None:
            self.set_reference(self._before)
        return super().create_optimizer(model)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss of held-out pairs, and how many of them the model has the right way round; neither is private."""
        if self.run.held_out is None:
            return {}
        self.model.eval()
        losses, right = [], []
        _, collate = self._data_and_collator()
        loader: DataLoader = DataLoader(self.run.held_out, batch_size=self._train_batch_size, collate_fn=collate)
        for batch in loader:
            with self.compute_loss_context_manager():
                scores, weights = self._scores(self.model, self._on_device(batch))
            losses.append(self.preference.losses(scores) * weights)
            margins = scores.chosen - scores.reference_chosen - (scores.rejected - scores.reference_rejected)
            right.append((margins > 0).float())
        self.model.train()
        self.figures = {"loss": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(right).mean())}
        metrics = {f"eval_{name}": value for name, value in self.figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
