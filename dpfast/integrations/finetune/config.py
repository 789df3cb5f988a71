"""What a fine-tuning run is told: every field is also an option of the command, with ``-`` for ``_``."""

# ruff: noqa: RUF009 (the calls make dataclass fields)
from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

TASKS = ("causal-lm", "classification")
SCHEDULES = ("constant", "linear", "cosine")
MOST_EPSILON = 100.0  # above it the search for the noise takes minutes, and the guarantee is empty


class FinetuneError(Exception):
    """Something about the request, the data or the machine that the user can put right: one line, with the remedy."""


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class FinetuneConfig:
    """A private fine-tuning run; defaults train a small random GPT-2 on the bundled English text.

    ``train`` and ``eval`` may also be rows themselves, from Python: a sequence of dicts, a ``datasets.Dataset`` or a
    pandas ``DataFrame``.
    """

    model: str | None = _option(None, "folder or hub name of a Transformers model; a small random GPT-2 without it")
    random_weights: bool = _option(False, "start --model (also just a kind, such as gpt2) from random weights")
    task: str = _option("causal-lm", "what to train for", choices=TASKS)
    dpo: bool = _option(False, "preference pairs: rows with the columns prompt, chosen and rejected, and DPO's loss")
    dpo_beta: float = _option(0.1, "how near DPO keeps to the model that it starts from")
    train: Any = _option(None, ".jsonl, .csv, .parquet, a folder of datasets.save_to_disk, or text, a sample a line")
    text_column: str = _option("text", "column of the texts")
    label_column: str = _option("label", "column of the classes (classification)")
    eval: Any = _option(None, "file to evaluate on, or a fraction of the training rows to hold out")
    context: int | None = _option(None, "most tokens of a sample (what the model takes)")
    truncate: bool = _option(False, "cut samples that are longer than the context instead of refusing them")
    output: str = _option("finetuned", "folder for the result, the logs and the checkpoints")
    lora_rank: int | None = _option(None, "train LoRA adapters of this rank instead of the whole model")
    lora_alpha: float | None = _option(None, "LoRA's scale (twice the rank)")
    lora_targets: str = _option("all-linear", "modules that get adapters: names, with commas between them")
    target_epsilon: float | None = _option(None, "epsilon that the run may spend (8, unless --noise-multiplier)")
    target_delta: float | None = _option(None, "delta (1e-5, or a tenth of one over the number of samples)")
    noise_multiplier: float | None = _option(None, "noise over --max-grad-norm, instead of --target-epsilon")
    accountant: str = _option("prv", "how epsilon is counted", choices=("prv", "rdp"))
    max_grad_norm: float = _option(1.0, "norm that each sample's gradient is clipped to")
    clipping_fn: str = _option("abadi", "abadi, automatic, normalised, psac or global")
    unit_column: str | None = _option(
        None,
        "column that says whose a row is, such as user_id: epsilon is then for one user, and --batch-size in users",
    )
    rows_per_unit: int | None = _option(None, "most rows of a user in a step (--unit-column)")
    batch_size: int = _option(64, "expected samples of a step")
    physical_batch_size: int | str = _option("auto", "most samples in memory at once; auto finds what fits")
    epochs: float | None = _option(None, "passes over the data (3, or 20 over the bundled text)")
    max_steps: int | None = _option(None, "steps, instead of --epochs")
    learning_rate: float = _option(1e-3, "of AdamW")
    weight_decay: float = _option(0.0, "of AdamW")
    lr_schedule: str = _option("constant", "course of the learning rate after the warm-up", choices=SCHEDULES)
    warmup_steps: int = _option(0, "steps over which the learning rate rises from 0")
    probe_first: float | None = _option(
        None, "share of the steps, such as 0.2, that train the head alone before everything trains (classification)"
    )
    bf16: bool = _option(False, "bfloat16 arithmetic (autocast), float32 parameters")
    pure_bf16: bool = _option(False, "bfloat16 parameters too")
    low_precision: str = _option(
        "stochastic", "how bfloat16 parameters are updated (--pure-bf16)", choices=("stochastic", "master")
    )
    gradient_checkpointing: bool = _option(False, "less memory, one more forward")
    compile: bool = _option(False, "torch.compile for the model")
    pad: bool = _option(False, "physical batches of one shape, so that --compile compiles once; padding counts nothing")
    packing: bool = _option(False, "samples in one row behind one another, without padding; each is clipped by itself")
    fsdp: bool = _option(False, "shard the model over the ranks (under torchrun)")
    secure: bool = _option(False, "noise and batches from the operating system's generator, which nothing repeats")
    seed: int | None = _option(
        None, "repeat a run; whoever knows it can take the noise off (default: drawn, kept secret)"
    )
    device: str | None = _option(None, "cpu or cuda (cuda if there is one)")
    report_to: str = _option(
        "tensorboard",
        "where logs go, with commas between them: tensorboard, wandb, mlflow and what else Transformers knows, or none",
    )
    log_every: int | None = _option(None, "steps between two log entries (a twentieth of the run)")
    save_every: int | None = _option(None, "steps between two checkpoints, each followed by an evaluation (an epoch)")
    resume: bool = _option(False, "go on from the newest checkpoint in --output")
    show_training_loss: bool = _option(False, "show the training loss, which is not private, on the progress bar")

    def reports(self) -> list[str]:
        """Where logs go, by Transformers' names."""
        found = [name.strip() for name in self.report_to.split(",")]
        return [name for name in found if name not in ("", "none")]

    def validate(self) -> None:
        """Check what can be checked without data and model.

        Raises:
            FinetuneError: the first value that cannot be, by the name of its option.
        """
        for each in fields(self):
            choices = each.metadata.get("choices")
            if choices and getattr(self, each.name) not in choices:
                _refuse(each.name, getattr(self, each.name), f"use one of {', '.join(choices)}")
        whole = ("batch_size", "max_steps", "lora_rank", "context", "log_every", "save_every", "rows_per_unit")
        for name in whole:
            self._whole(name, 2 if name == "context" else 1)
        self._whole("warmup_steps", 0)
        for name in (
            "target_epsilon",
            "max_grad_norm",
            "epochs",
            "lora_alpha",
            "learning_rate",
            "dpo_beta",
            "probe_first",
        ):
            self._number(name, above=True)
        for name in ("noise_multiplier", "weight_decay"):
            self._number(name, above=False)
        if self.noise_multiplier and not 1e-20 < self.noise_multiplier * self.max_grad_norm < 1e20:
            _refuse("noise_multiplier", self.noise_multiplier, "times --max-grad-norm it is out of the noise's range")
        if isinstance(self.physical_batch_size, str) and self.physical_batch_size.isdecimal():
            self.physical_batch_size = int(self.physical_batch_size)
        if self.physical_batch_size != "auto":
            self._whole("physical_batch_size", 1)
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 128):
            _refuse("seed", self.seed, "give an integer of at most 128 bits that is not negative")
        if self.target_delta is not None and not 0 < self.target_delta < 1:
            _refuse("target_delta", self.target_delta, "give a number between 0 and 1, such as 1e-5")
        for one, other in (
            ("target_epsilon", "noise_multiplier"),
            ("epochs", "max_steps"),
            ("bf16", "pure_bf16"),
            ("seed", "secure"),
        ):
            if all(getattr(self, name) not in (None, False) for name in (one, other)):
                raise FinetuneError(f"{option(one)} and {option(other)} exclude each other: give one of them")
        if self.target_epsilon is not None and self.target_epsilon > MOST_EPSILON:
            _refuse("target_epsilon", self.target_epsilon, f"at most {MOST_EPSILON:g}; or give --noise-multiplier")
        if not isinstance(self.report_to, str) or "all" in self.reports():
            _refuse("report_to", self.report_to, "name the reports one by one, such as tensorboard,wandb")
        if self.unit_column is not None and self.rows_per_unit is None:
            raise FinetuneError(
                f"--unit-column {self.unit_column}: give --rows-per-unit too, the most rows that a step takes of a "
                f"user, chosen without looking at the data"
            )
        if self.rows_per_unit is not None and self.unit_column is None:
            _refuse("rows_per_unit", self.rows_per_unit, "say whose a row is, with --unit-column")
        if self.dpo:
            self._check_dpo()
        if self.packing:
            self._check_packing()
        if self.probe_first is not None:
            self._check_probe_first()
        if self.random_weights and self.model is None:
            raise FinetuneError("--random-weights: say of which model, with --model")
        from dpfast.clipping.functions import clipping_function  # loads torch, which help has no need of

        try:
            clipping_function(self.clipping_fn)
        except (ValueError, TypeError) as error:
            raise FinetuneError(f"--clipping-fn: {error}") from error

    def _check_dpo(self) -> None:
        if self.train is None:
            raise FinetuneError("--dpo: give --train, with the columns prompt, chosen and rejected")
        for name, wrong, remedy in (
            ("task", self.task != "causal-lm", "pairs train a causal language model"),
            ("fsdp", self.fsdp, "leave it out with --dpo, or train a sharded model with dpfast.integrations.trl"),
        ):
            if wrong:
                raise FinetuneError(f"{option(name)} with --dpo: {remedy}")

    def _check_packing(self) -> None:
        for name, wrong in (
            ("task", self.task != "causal-lm"),
            ("dpo", self.dpo),
            ("unit_column", self.unit_column is not None),
            ("compile", self.compile),
            ("pad", self.pad),
            ("fsdp", self.fsdp),
        ):
            if wrong:
                raise FinetuneError(
                    f"{option(name)} with --packing: a packed row holds single samples of a causal language model, "
                    f"without padding; leave one of the two out"
                )

    def _check_probe_first(self) -> None:
        assert self.probe_first is not None
        if self.probe_first >= 1:
            _refuse("probe_first", self.probe_first, "give a share of the steps, between 0 and 1, such as 0.2")
        for name, wrong, remedy in (
            ("task", self.task != "classification", "a language model's head is pretrained as the rest is"),
            ("fsdp", self.fsdp, "fully_shard keeps what trained when it sharded the model"),
        ):
            if wrong:
                raise FinetuneError(f"--probe-first with {option(name)}: {remedy}; leave --probe-first out")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            _refuse(name, value, f"give a whole number of at least {least}")

    def _number(self, name: str, above: bool) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (above and value == 0):
            _refuse(name, value, "give a number above 0" if above else "give a number that is not negative")


def option(name: str) -> str:
    """The command's name of a field."""
    return "--" + name.replace("_", "-")


def _refuse(name: str, value: Any, remedy: str) -> None:
    raise FinetuneError(f"{option(name)} {value}: {remedy}")
