"""Fine-tuning runs whose process ends half-way, and what they leave."""

from dpfast.integrations.finetune.trainer import FinetuneTrainer


def weights(found):
    return {name: p.detach().clone() for name, p in found.model.named_parameters()}


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    """The process ends right before that step."""
    whole = FinetuneTrainer.training_step

    def training_step(self, *given):
        if self.state.global_step == step:
            raise Killed
        return whole(self, *given)

    monkeypatch.setattr(FinetuneTrainer, "training_step", training_step)
    return lambda: monkeypatch.setattr(FinetuneTrainer, "training_step", whole)
