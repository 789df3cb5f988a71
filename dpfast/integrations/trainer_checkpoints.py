"""What a checkpoint of ``DPTrainer`` holds beside Transformers' own files, and how a run goes on from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from dpfast.accounting.runs import joined, state_of
from dpfast.checkpoints import read, written
from dpfast.data.unit import Unit
from dpfast.engine import PrivacyEngine
from dpfast.integrations.distributed import PRIVACY_NAME, is_sharded, load_shards, save_shards, whole_state
from dpfast.integrations.replayed import digest_of, weights_digest
from dpfast.integrations.trainer_arguments import DPArguments, check_reports
from dpfast.integrations.trainer_batches import digest_of_users
from dpfast.model.private_model import FusedHooks
from dpfast.noise.stream import as_text, check_state
from dpfast.planning.planner import check_state as check_plan
from dpfast.refusals import CheckpointError

STATE_NAME = "trainer_state.json"  # Transformers' own, which it writes last
UNKNOWN = "cannot be told from others"  # of data, in the settings
# Of these the sums of a run depend, beside data and model.
DECISIVE = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "seed", "mixed_precision"),  # which `accelerate launch` sets too
    *("world_size", "torch_compile", "gradient_checkpointing", "activation_checkpointing"),  # on which dropout depends
    *("torch_compile_backend", "torch_compile_mode", "tf32"),
)


def newest_whole(folder: str) -> str | None:
    """The checkpoint of the last step in ``folder``; none whose writing was interrupted."""
    found = sort_checkpoints(folder) if os.path.isdir(folder) else []
    return next((path for path in reversed(found) if is_whole(path)), None)


def is_whole(checkpoint: str) -> bool:
    """Whether everything was written, down to the file that comes last."""
    try:
        with open(os.path.join(checkpoint, STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return os.path.isfile(os.path.join(checkpoint, PRIVACY_NAME))


def _computing(config: Any) -> Any:
    """Of a model's config what it computes by, dropout for one; not what the Trainer notes there as it saves it."""
    if not hasattr(config, "to_dict"):
        return config
    noted = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path")
    return {name: value for name, value in config.to_dict().items() if name not in noted}


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold what a private run needs to go on; :class:`DPTrainer` does the training."""

    privacy: DPArguments
    engine: PrivacyEngine
    hooks: FusedHooks | None
    lr_scheduler: Any
    optimizer: Any  # private from the beginning of training
    model: Any
    _batch_seed: int | None
    _resumed: dict[str, Any] | None  # what privacy.pt of the checkpoint holds
    _batches: Callable[[int], Any]  # those of a seed
    _data_and_collator: Callable[[], tuple[Any, Any]]
    _logical_batch_size: int
    _data_digest: str | None = None
    _fingerprint: str | None = None  # of the model
    extra_state: Any = None  # what else ``privacy.pt`` is to hold, for programs that build on the trainer

    def steps_accounted(self) -> int:
        """Steps that the accountant has counted."""
        return sum(steps for _, _, steps in self.engine.accountant.history)

    def privacy_spent(self) -> tuple[float, float]:
        """``(ε, δ)`` of all steps so far, of a resumed run since its beginning; δ is ``privacy.target_delta``."""
        history = self.engine.accountant.history
        delta = self.privacy.target_delta
        if not history or any(sigma == 0 for sigma, _, _ in history):
            return (math.inf if history else 0.0), delta
        return float(self.engine.get_epsilon(delta)), delta

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            ValueError: the checkpoint was not accounted for (it has no ``privacy.pt``), or is of another number of
                samples, other batch sizes or an earlier time of this very trainer; or ``target_epsilon`` is spent.
        """
        if self.args.load_best_model_at_end and is_sharded(self.model):
            raise CheckpointError(
                "load_best_model_at_end=True: the checkpoints of a sharded model hold shards, which the Trainer passes "
                "over at the end: leave it out, and take the best checkpoint yourself"
            )
        self._resumed, self._batch_seed = None, None
        check_reports(self.callback_handler.callbacks)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(str(self.args.output_dir)) or True
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            self._resumed = self._read(os.path.join(resume_from_checkpoint, PRIVACY_NAME))
            self._batch_seed = self._resumed["batch_seed"]
        elif self.privacy.target_epsilon is not None and self.steps_accounted():
            raise CheckpointError(
                f"target_epsilon={self.privacy.target_epsilon}: this trainer's first train() was planned to spend it; "
                f"resume from a checkpoint, or give noise_multiplier, with which any number of runs adds up"
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _read(self, path: str) -> dict[str, Any]:
        if not os.path.isfile(path):
            raise CheckpointError(
                f"resume_from_checkpoint: there is no {path}; the checkpoint is of a run that was not accounted for, "
                f"or was saved with save_only_model=True. To start from its weights load them into the model"
            )
        state = read(path, map_location="cpu")
        check_state(state["noise"])
        check_plan(state["plan"])
        batches = self._batches(0)
        if (unit := Unit(**state.get("unit", {}))) != batches.unit:
            raise CheckpointError(
                f"resume_from_checkpoint: epsilon is for {batches.unit} here, and was for {unit} in {path}: resume "
                f"with the same unit_column and rows_per_unit"
            )
        for name in ("num_samples", "steps_per_epoch"):
            mine = getattr(batches, name)
            if state[name] != mine:
                raise CheckpointError(
                    f"resume_from_checkpoint: {name} is {mine}, and was {state[name]} in {path}: resume with the same "
                    f"train_dataset and the same batch size over all"
                )
        if (done := self.steps_accounted()) > (held := sum(steps for *_, steps in state["accountant"]["history"])):
            raise CheckpointError(
                f"resume_from_checkpoint: this trainer has taken {done} steps and {path} accounts for {held} of them; "
                f"the others would be forgotten. Resume from the last checkpoint"
            )
        joined(self.engine.accountant, state["accountant"])
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(self.model):  # weights are loaded with the optimizer's state
            return
        before = dict(self.model.named_parameters(remove_duplicate=False))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, p in before.items():
            loaded = self.model.get_parameter(name)
            if loaded is not p:  # PEFT puts float32 ones in the place of 16-bit adapters, which the optimizer has
                p.data.copy_(loaded.data)
                parent, _, own = name.rpartition(".")
                setattr(self.model.get_submodule(parent), own, p)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint is not None and is_sharded(self.model):
            load_shards(checkpoint, self.model, self.optimizer)
            self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._resumed is not None:
            assert self.hooks is not None
            noise, settings = self._resumed["noise"], self._settings()
            saved = self._resumed.get("settings", {})
            changed = sorted(
                name
                for name in {*saved, *settings}
                if saved.get(name) != settings.get(name) or settings[name] == UNKNOWN
            )
            # Of two ranks that see different changes, one would draw a key for all, and the other keep the old one.
            of_ranks = self.optimizer.ranks.gathered([len(changed)])
            if any(count for (count,) in of_ranks) and not self.privacy.secure_mode:
                warnings.warn(
                    f"resume_from_checkpoint: {', '.join(changed) or 'something on another rank'} changed; the noise "
                    f"takes a new key, as the same noise on the sums of two runs would lay their difference bare",
                    stacklevel=2,
                )
                noise = {**noise, "key": None}
            self.optimizer.noise.load_state_dict(noise)
            self.hooks.clipped_sum.planner.load_state_dict(self._resumed["plan"])
            joined(self.engine.accountant, self._resumed["accountant"]).take_over()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; of a sharded model all ranks have to ask together."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        # A checkpoint to go on from has its shards; see _save_optimizer_and_scheduler.
        if not _internal_call or self.args.save_only_model:
            state = whole_state(self.model)
            self._save(output_dir, state_dict=state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's; one that is there already counts as half-written from here on, until it is whole again."""
        if self.args.should_save:
            there = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(there, STATE_NAME))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Not needed: every step sets the generators. Their states would tell the seed of the batches."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Not needed: see :meth:`_save_rng_state`."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            os.makedirs(output_dir, exist_ok=True)
            save_shards(output_dir, self.model, self.optimizer)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        settings = self._settings()  # of all ranks together
        if not self.args.should_save:
            return
        assert self.hooks is not None and self._batch_seed is not None
        batches = self._batches(self._batch_seed)
        state = {
            "noise": self.optimizer.noise.state_dict(),
            "accountant": state_of(self.engine.accountant),
            "plan": self.hooks.clipped_sum.planner.state_dict(),
            "settings": settings,
            "noise_multiplier": self.optimizer.noise_multiplier,
            "batch_seed": batches.seed,
            "step": self.state.global_step,
            "unit": batches.unit.state_dict(),
            "num_samples": batches.num_samples,
            "steps_per_epoch": batches.steps_per_epoch,
            "extra": self.extra_state,
        }
        with written(os.path.join(output_dir, PRIVACY_NAME)) as file:
            torch.save(state, file)

    def _save_scaler(self, output_dir: str) -> None:
        """Not needed: its scale is constant, and among the settings."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Not needed, and a run that goes on with another precision has none to load into."""

    def _digest(self) -> str | None:
        """What tells the training data from all others; None where nothing does."""
        return digest_of(*self._data_and_collator())

    def _settings(self) -> dict[str, str]:
        """What has to be as it was for the same noise to meet the same sums."""
        found = {name: getattr(self.args, name, None) for name in DECISIVE}
        privacy = ["noise_multiplier", "max_grad_norm", "clipping", "clipping_fn", "low_precision", "noise_correction"]
        privacy += ["group_noise", "secure_mode", "loss_scale", "pad", "packing"]
        found |= {f"privacy.{name}": getattr(self.privacy, name) for name in privacy}
        found |= {"device": self.args.device.type, "torch": str(torch.__version__)}
        found |= {"expected_batch_size": self._logical_batch_size}
        users = getattr(self._batches(0), "units", None)
        found |= {} if users is None else {"users": digest_of_users(users)}
        found |= {"optimizer": type(self.optimizer.original_optimizer), "lr_scheduler": type(self.lr_scheduler)}
        parts = {"model": self.model, "data_collator": self.data_collator, "compute_loss_func": self.compute_loss_func}
        parts["config"] = _computing(getattr(self.model, "config", None))
        long = {name: as_text({name: part})[name].encode() for name, part in parts.items()}
        if self._data_digest is None:
            self._data_digest = self._digest() or UNKNOWN
        assert self._fingerprint is not None, "taken when the optimizer is made private"
        return (
            as_text(found)
            | {name: hashlib.blake2b(text, digest_size=16).hexdigest() for name, text in long.items()}
            | {
                "train_dataset": self._data_digest,
                "parameters": self._fingerprint,
                "weights": weights_digest(self.model, self.optimizer.all_parameters()),
            }
        )
