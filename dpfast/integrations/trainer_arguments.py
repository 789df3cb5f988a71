"""What ``DPTrainer`` is told about privacy, and what it refuses of the Trainer's own arguments."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.utils import ENV_VARS_TRUE_VALUES

from dpfast.amp import check_scale
from dpfast.refusals import TrainerSettingError

# Arguments of the Trainer under which the guarantee or the run would break, and what to do instead.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mixed_precision": (lambda x: x == "fp8", "its layers have no per-sample gradients; use bf16=True"),
    "deepspeed": (bool, "it has an optimizer and gradients of its own; use torchrun or `accelerate launch` without it"),
    "fsdp": (bool, "leave it out, and shard the model with fully_shard before the trainer gets it"),
    "parallelism_config": (bool, "leave it out; a model may be sharded with fully_shard"),
    "use_liger_kernel": (bool, "its fused layers have no per-sample gradients; leave it out"),
    "neftune_noise_alpha": (bool, "its noise depends on the padded length of the batch, which other samples set"),
    "label_smoothing_factor": (bool, "pass compute_loss_func with per-sample losses [B] that are smoothed"),
    "auto_find_batch_size": (bool, "it trains again on the same data after a failure; use a smaller "
                             "per_device_train_batch_size and more gradient_accumulation_steps"),
    "include_num_input_tokens_seen": (lambda x: x not in (False, "no"), "the size of a Poisson batch is not private"),
    "train_sampling_strategy": (lambda x: x != "random", "batches are Poisson-sampled; leave it at 'random'"),
    "optim": (
        lambda x: any(word in str(x).lower() for word in ("lomo", "layerwise", "schedule_free")),
        "it steps inside of the backward pass, or needs eval(); use an optimizer with an ordinary step()",
    ),
    "hub_strategy": (lambda x: "checkpoint" in str(x).lower(), "a checkpoint has the noise's key; use 'end'"),
}  # fmt: skip

# Reports of Transformers that upload checkpoints: a setting (of the environment in capitals), when it does, a remedy.
UPLOADS: dict[str, list[tuple[str, Callable[[Any], bool], str]]] = {
    "WandbCallback": [("WANDB_LOG_MODEL", lambda x: x == "checkpoint", "set it to 'end' or leave it out")],
    "MLflowCallback": [("HF_MLFLOW_LOG_ARTIFACTS", lambda x: _on(x), "leave it out")],
    "DagsHubCallback": [("HF_DAGSHUB_LOG_ARTIFACTS", lambda x: _on(x), "leave it out")],
    "CometCallback": [("COMET_LOG_ASSETS", lambda x: _on(x), "leave it out")],
    "ClearMLCallback": [("CLEARML_LOG_MODEL", lambda x: x is None or _on(x), "set it to 'FALSE'")],
    "DVCLiveCallback": [("_log_model", lambda x: x == "all", "leave it out, or set it to true")],
    "NeptuneCallback": [("_log_checkpoints", lambda x: x is not None, "leave log_checkpoints out")],
    "FlyteCallback": [("sync_checkpoints", bool, "give sync_checkpoints=False")],
}


def _on(value: str | None) -> bool:
    return value is not None and value.upper() in ENV_VARS_TRUE_VALUES


@dataclass
class DPArguments:
    """What :class:`DPTrainer` needs to know about privacy.

    Args:
        target_epsilon: ε to be spent at the end of training; 8 if neither this nor ``noise_multiplier`` is given.
        target_delta: δ; should be well below one over the number of samples.
        noise_multiplier: noise standard deviation over ``max_grad_norm``, instead of ``target_epsilon``.
        max_grad_norm, clipping, clipping_fn, group_noise, low_precision, noise_correction, memory_budget: as for
            :meth:`dpfast.PrivacyEngine.make_private`.
        accountant: ``"prv"``, ``"rdp"`` or ``"gdp"``.
        secure_mode: noise of ChaCha20, with keys that are never kept.
        seed: repeats noise and batches, for experiments on data that are public: who knows it can take the noise off.
            None takes both from the operating system, whatever ``TrainingArguments.seed`` is.
        loss_scale: what losses are multiplied by under ``fp16=True``, a power of two that stays as it is: one that
            follows the gradients would tell of samples. A sample whose gradient overflows contributes zeros.
        log_training_loss: log the loss of the training batches, which is not private.
        expected_batch_size: samples that a step is expected to see, over all processes, instead of
            ``per_device_train_batch_size · gradient_accumulation_steps · world size``.
        pad: every physical batch has ``per_device_train_batch_size`` rows, an empty Poisson batch included, so that
            ``torch_compile`` compiles for one number of rows. Zeros stand behind the samples, in every tensor whose
            first dimension is the batch; they contribute exactly nothing, and are in no loss that is logged. Where the
            collator pads texts to the longest, lengths still change: have it pad to one, as by
            ``padding="max_length"``.
        unit_column: the column (or key) of ``train_dataset`` that says whose each sample is, such as ``"user_id"``. ε
            is then for one user: batches draw users, all rows of a user are clipped as one, and the number of samples,
            ``expected_batch_size`` and what it follows from count users. The model does not see the column.
            ``per_device_train_batch_size`` still counts rows, and a user's have to fit.
        rows_per_unit: with ``unit_column``, the most rows that a step takes of a user; a public number.
        packing: the samples of a physical batch stand behind one another in one row, so that no token is padding. They
            are packed after they were drawn, and each is clipped by itself: ε is for one sample, as without. For
            causal language models of Transformers whose attention goes by ``position_ids``.
    """

    target_epsilon: float | None = None
    target_delta: float = 1e-5
    noise_multiplier: float | None = None
    max_grad_norm: float | Sequence[float] | Mapping[str, float] = 1.0
    clipping: str | Sequence[str] = "flat"
    clipping_fn: Any = "abadi"
    group_noise: str | Sequence[float] | Mapping[str, float] = "global"
    accountant: str = "prv"
    secure_mode: bool = False
    seed: int | None = None
    low_precision: str = "nearest"
    noise_correction: bool | float = False
    memory_budget: int | float | None = None
    loss_scale: float = 2.0**10
    log_training_loss: bool = False
    expected_batch_size: int | None = None
    pad: bool = False
    unit_column: str | None = None
    rows_per_unit: int | None = None
    packing: bool = False

    def __post_init__(self):
        if self.target_epsilon is None and self.noise_multiplier is None:
            self.target_epsilon = 8.0
        elif self.target_epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                f"target_epsilon={self.target_epsilon} and noise_multiplier={self.noise_multiplier}: give one of them"
            )
        if self.target_epsilon is not None and not 0 < self.target_epsilon < math.inf:
            raise ValueError(f"target_epsilon={self.target_epsilon}: give a positive number")
        if not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta={self.target_delta}: give a number between 0 and 1")
        size = self.expected_batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"expected_batch_size={size!r}: give a whole number of at least 1")
        check_scale("loss_scale", self.loss_scale)
        self._check_units()
        if self.secure_mode and self.seed is not None:
            raise ValueError(f"seed={self.seed} with secure_mode=True, whose keys no seed repeats: leave it out")

    def _check_units(self) -> None:
        column, rows = self.unit_column, self.rows_per_unit
        if self.packing and (column is not None or self.pad):
            given = "pad=True" if self.pad else f"unit_column={column!r}"
            raise ValueError(
                f"packing=True with {given}: a packed row holds single samples, and no padding; leave one out"
            )
        if column is None and rows is not None:
            raise ValueError(f"rows_per_unit={rows!r} without unit_column: name the column that says whose a row is")
        if column is None:
            return
        if not isinstance(column, str) or not column:
            raise ValueError(f"unit_column={column!r}: give the name of a column")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ValueError(
                f"rows_per_unit={rows!r}: with unit_column={column!r} give the most rows that a step takes of a user, "
                f"a whole number of at least 1 that was chosen without looking at the data"
            )


def check_arguments(args: TrainingArguments) -> None:
    """Refuse arguments of the Trainer under which the guarantee or the run would break."""
    for name, (bad, remedy) in REFUSED.items():
        value = getattr(args, name, None)
        if value is not None and bad(value) and (name != "hub_strategy" or args.push_to_hub):
            raise TrainerSettingError(f"{name}={value!r} cannot be had with differential privacy: {remedy}")


def check_reports(callbacks: Iterable[Any]) -> None:
    """Refuse reports that would carry checkpoints, in which the noise's key is, to where others can read them.

    Raises:
        ValueError: the name of the setting, its value and what to set instead.
    """
    for callback in callbacks:
        for kind in type(callback).__mro__:
            for setting, uploads, remedy in UPLOADS.get(kind.__name__, ()):
                value = os.environ.get(setting) if setting.isupper() else getattr(callback, setting, None)
                if uploads(value):
                    raise TrainerSettingError(
                        f"{kind.__name__} with {setting}={value!r} would upload checkpoints, and a checkpoint has the "
                        f"noise's key: {remedy}, and upload the model that save_model() has written"
                    )
