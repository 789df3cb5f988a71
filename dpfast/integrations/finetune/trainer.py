"""The training loop of a run: ``DPTrainer``, with the sizes, figures and messages of the command."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opacus.validators.errors import UnsupportedModuleError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dpfast.data.units import Units, rows_by_id
from dpfast.integrations.finetune import fit
from dpfast.integrations.finetune.callbacks import Ending, Interruption, Progress, TensorBoard
from dpfast.integrations.finetune.checkpoint import FOLDER, KEEP
from dpfast.integrations.finetune.config import FinetuneConfig, FinetuneError
from dpfast.integrations.finetune.data import IGNORED, Collate, Samples
from dpfast.integrations.finetune.preferences import CollatePairs, Pairs
from dpfast.integrations.finetune.privacy import Plan
from dpfast.integrations.finetune.probe import ProbeFirst
from dpfast.integrations.trainer import DPArguments, DPTrainer
from dpfast.integrations.trainer_arguments import check_reports
from dpfast.integrations.trainer_checkpoints import newest_whole
from dpfast.losses import causal_lm_loss, sequence_classification_loss
from dpfast.refusals import LayoutError

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass
class Run:
    """What a run trains, on what, and with how much noise."""

    config: FinetuneConfig
    device: torch.device
    collate: Collate | CollatePairs
    data: Samples | Pairs
    held_out: Samples | Pairs | None
    plan: Plan
    seed: int

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints."""
        return self.config.save_every or self.plan.steps_per_epoch

    def arguments(self) -> TrainingArguments:
        """Of Transformers' ``Trainer``."""
        config, plan, output = self.config, self.plan, Path(self.config.output)
        asked = config.physical_batch_size
        return TrainingArguments(
            output_dir=str(output / FOLDER),
            per_device_train_batch_size=asked if isinstance(asked, int) else config.rows_per_unit or 1,  # until chosen
            max_steps=plan.steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            optim="adamw_torch",
            lr_scheduler_type=SCHEDULES[config.lr_schedule],
            warmup_steps=config.warmup_steps,
            bf16=config.bf16,
            use_cpu=self.device.type == "cpu",
            torch_compile=config.compile,
            save_steps=self.save_every,
            save_total_limit=KEEP,
            eval_strategy="no" if self.held_out is None else "steps",
            eval_steps=self.save_every,
            logging_steps=config.log_every or max(1, plan.steps // 20),
            report_to=[name for name in config.reports() if name != "tensorboard"] or "none",
            remove_unused_columns=False,
            log_level_replica="error",  # else ranks other than the first warn where the first one is told not to
            disable_tqdm=True,
        )

    def privacy(self) -> DPArguments:
        """Of ``DPTrainer``."""
        config, plan = self.config, self.plan
        return DPArguments(
            noise_multiplier=plan.noise_multiplier,
            target_delta=plan.delta,
            max_grad_norm=config.max_grad_norm,
            clipping_fn=config.clipping_fn,
            accountant=config.accountant,
            secure_mode=config.secure,
            seed=None if config.secure else self.seed,
            low_precision=config.low_precision if config.pure_bf16 else "nearest",
            expected_batch_size=plan.expected_batch_size,
            log_training_loss=config.show_training_loss,
            pad=config.pad,
            unit_column=config.unit_column,
            rows_per_unit=config.rows_per_unit,
            packing=config.packing,
        )


class FinetuneTrainer(DPTrainer):
    """``DPTrainer`` for a :class:`Run`.

    Args:
        model: on its device, and sharded if it is to be.
        run: see there.
        say: prints, on the first rank.

    Raises:
        FinetuneError: a model that cannot be trained privately; a report of ``--report-to`` that is not known, or not
            installed.
    """

    def __init__(self, model: nn.Module, run: Run, say: Callable[..., None]):
        self.run, self.say = run, say
        self.classes = run.config.task == "classification"
        self.progress, self.interruption = Progress(), Interruption()
        self.figures: dict[str, float] = {}  # of the last evaluation
        self.since = time.perf_counter(), 0  # of the last log: when, and after which step
        reports: list[Any] = [self.progress, self.interruption, Ending()]
        if "tensorboard" in run.config.reports():
            reports.append(TensorBoard(str(Path(run.config.output) / "logs")))
        try:
            super().__init__(
                model,
                run.arguments(),
                train_dataset=run.data,
                eval_dataset=run.held_out,
                data_collator=run.collate,
                callbacks=reports,
                privacy=run.privacy(),
            )
        except (ValueError, ImportError, RuntimeError) as error:
            raise FinetuneError(f"the run cannot be set up: {str(error).splitlines()[0]}") from error
        self.remove_callback(PrinterCallback)
        self.probe = ProbeFirst(model, run.plan.probe_steps) if run.plan.probe_steps else None
        if run.config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore
        try:
            self.create_optimizer()
        except UnsupportedModuleError as error:
            reasons = "; ".join(line for line in str(error).splitlines() if line.strip())
            raise FinetuneError(f"--model cannot be trained privately: {reasons}") from error
        self._choose_size()

    # ---------------------------------------------------------------- the physical batch

    def _choose_size(self) -> None:
        """Set the physical batch size, as asked for or as it fits."""
        size = self.run.config.physical_batch_size
        if not isinstance(size, int):
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            most = math.ceil(self.run.plan.expected_batch_size / self.args.world_size)
            most *= self.run.config.rows_per_unit or 1
            size = fit.fitting_size(self._attempt, most, self.args.device, 8 * trained)
            size = int(min(sizes[0] for sizes in self.optimizer.ranks.gathered([size])))
        self.args.per_device_train_batch_size = self._train_batch_size = size
        self._check_size()

    @property
    def _users(self) -> Units | None:
        config, users = self.run.config, self.run.data.users
        if config.unit_column is None or config.rows_per_unit is None or users is None:
            return None
        indices = range(len(users))
        return Units(rows_by_id(users, indices), config.rows_per_unit, column=config.unit_column)

    def _check_size(self) -> None:
        users, size = self._users, self._train_batch_size
        if users is not None and users.largest > size:
            raise FinetuneError(
                f"--physical-batch-size {size}: a user has {users.largest} rows in a batch, and is never split: give "
                f"at least that, or a smaller --rows-per-unit"
            )

    def _attempt(self, rows: int) -> None:
        """Forward and backward of made-up samples, and nothing left of them."""
        assert self.hooks is not None
        clipped_sum, (_, collate) = self.hooks.clipped_sum, self._data_and_collator()
        batch = self._on_device(collate(self.run.data.made_up(rows)))
        made_up = clipped_sum.by_unit or clipped_sum.packed  # no loader has given them
        clipped_sum.units = [0] * (self.rows_of_a_sample * rows) if made_up else None
        try:
            self._losses(self.model, batch).sum().backward()
        finally:
            clipped_sum.units = None
            self.optimizer.zero_grad()

    # ---------------------------------------------------------------- a step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As DPTrainer's, with one line on what a person can put right."""
        if self.probe is not None:
            self.probe.before_step(self.state.global_step)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except (LayoutError, ValueError) as error:  # of the collator, too
            raise FinetuneError(f"--model cannot be trained privately: {str(error).splitlines()[0]}") from error

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {"--gradient-checkpointing": str(self.run.config.gradient_checkpointing)}

    # ---------------------------------------------------------------- figures

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As DPTrainer's; the training loss goes on the progress bar alone."""
        loss, _ = logs.pop("loss", None), logs.pop("train_loss", None)
        if loss is not None and self.run.config.show_training_loss:
            self.progress.show({"training loss (not private)": loss})
        if "learning_rate" in logs:
            now, step = time.perf_counter(), self.state.global_step
            steps = (step - self.since[1]) / (now - self.since[0])
            # The expected number of samples: the number in a Poisson batch is not private.
            them = "samples" if self.run.config.unit_column is None else "users"
            logs[f"{them}_per_second"] = self.run.plan.expected_batch_size * steps
            self.since = now, step
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any):
        """The Trainer's, but saved first: what an evaluation shows is never taken back and done anew."""
        if self.control.should_save:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and perplexity per token, or loss and accuracy, on the held-out samples; on every rank alike."""
        if self.run.held_out is None:
            return {}
        self.model.eval()
        total, counted, right = 0.0, 0, 0
        loader: DataLoader = DataLoader(
            self.run.held_out, batch_size=self._train_batch_size, collate_fn=self.run.collate
        )
        for batch in loader:
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            with self.compute_loss_context_manager():
                logits = self.model(**batch).logits
            if self.classes:
                total += float(sequence_classification_loss(logits, labels))
                counted += len(labels)
                right += int((logits.argmax(-1) == labels).sum())
            else:  # per token, not per sample: what perplexity means
                each = (labels[:, 1:] != IGNORED).sum(1)
                total += float((causal_lm_loss(logits, labels, reduction="none") * each).sum())
                counted += int(each.sum())
        self.model.train()
        loss = total / max(1, counted)
        self.figures = {"loss": loss}
        self.figures |= {"accuracy": right / counted} if self.classes else {"perplexity": math.exp(min(loss, 700))}
        metrics = {f"eval_{name}": value for name, value in self.figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---------------------------------------------------------------- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As DPTrainer's; after Ctrl-C it ends with the step that runs, and a checkpoint.

        Raises:
            KeyboardInterrupt: the run was interrupted, and is saved.
            FinetuneError: something that a person can put right.
        """
        try:
            check_reports(self.callback_handler.callbacks)
        except ValueError as error:
            raise FinetuneError(f"--report-to {self.run.config.report_to}: {error}") from error
        try:
            found = super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:  # in a step, the optimizer's too, or in an evaluation
            if not fit.is_out_of_memory(error):
                raise
            size = self._train_batch_size
            smaller = f"--physical-batch-size {size // 2}" if size > 1 else "a shorter --context"
            raise FinetuneError(
                f"{size} samples at once do not fit in memory: use {smaller}, --gradient-checkpointing or "
                f"--physical-batch-size auto"
            ) from error
        finally:
            self.interruption.restore()
            self.progress.close()
        if self.state.global_step < self.run.plan.steps:
            raise KeyboardInterrupt
        return found

    def _read(self, path: str) -> dict[str, Any]:
        try:
            return super()._read(path)
        except ValueError as error:
            raise FinetuneError(f"{path} does not fit this run ({str(error).splitlines()[0]}): start anew") from error

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            super()._load_optimizer_and_scheduler(checkpoint)
        for warning in said:
            if "new key" in str(warning.message):
                self.say(f"          {warning.message}")
        self.since = time.perf_counter(), self.state.global_step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, with one line on a disk that is full."""
        self.extra_state["physical_batch_size"] = self._train_batch_size
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk becomes, by who has found it
            last = newest_whole(str(self.args.output_dir))
            kept = f"; {Path(last).name} is whole" if last is not None else ""
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise FinetuneError(
                f"the checkpoint of step {self.state.global_step} cannot be written ({reason}): make room{kept}"
            ) from error
