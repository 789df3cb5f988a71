"""TRL's trainers with differential privacy: ``DPSFTTrainer`` and ``DPDPOTrainer``, for one changed line of a script.

Data are prepared by TRL's own classes, and trained on by :class:`dpfast.integrations.trainer.DPTrainer`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dpfast.integrations.pairs import PairTrainer
from dpfast.integrations.preference_losses import Preference
from dpfast.integrations.replayed import MOST_ROWS, digest_of
from dpfast.integrations.trainer import DPArguments, DPTrainer
from dpfast.refusals import TrainerSettingError

__all__ = ["DPArguments", "DPDPOTrainer", "DPSFTTrainer"]

# Settings of TRL that would break the guarantee or would not be followed, and what to do instead.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "activation_offloading": (bool, "leave it out; gradient_checkpointing=True saves memory"),
    "router_aux_loss_coef": (bool, "it balances the tokens of a whole batch; set it to 0.0"),
}
OF_SFT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "loss_type": (lambda x: x != "nll", "use 'nll', or override compute_loss with losses [B]"),
    "eval_packing": (bool, "rows of evaluation data are evaluated one by one; leave it out"),
}
OF_DPO: dict[str, tuple[Callable[[Any], bool], str]] = {
    "padding_free": (bool, "it puts a whole batch into one row; leave it out"),
    "sync_ref_model": (bool, "a checkpoint does not hold the reference, so that a resumed run would have another one"),
}


def check_settings(args: Any, refused: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Refuse settings of a config of TRL's.

    Raises:
        ValueError: the name of the setting, its value and what to do instead.
    """
    for name, (bad, remedy) in (REFUSED | refused).items():
        value = getattr(args, name, None)
        if value is not None and bad(value):
            raise TrainerSettingError(f"{name}={value!r} cannot be had with differential privacy: {remedy}")


def without_packing(args: SFTConfig, privacy: DPArguments | None) -> tuple[SFTConfig, DPArguments | None]:
    """Where ``packing`` or ``padding_free`` is asked for: rows are packed by us, after samples were drawn.

    TRL packs the data set, so that samples come and go together: rows would be drawn then, and ε would be for a row of
    several samples.

    Raises:
        ValueError: ``packing_strategy`` would cut a sample into several.
    """
    if not (args.packing or args.padding_free):
        return args, privacy
    if args.packing and args.packing_strategy != "bfd":
        raise TrainerSettingError(
            f"packing_strategy={args.packing_strategy!r} cannot be had with differential privacy: it cuts a sample "
            f"into several, which would be clipped and drawn apart; use 'bfd', which cuts off what is over max_length"
        )
    args = copy.copy(args)  # the user's own stays as it is
    args.packing = args.padding_free = False
    return args, replace(DPArguments() if privacy is None else privacy, packing=True)


def check_model(trainer: Any) -> None:
    """Refuse what only the made trainer shows; and give the model the forward of its class back.

    TRL puts one in its place that multiplies with the head's weight past the head.
    """
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            vars(base).pop("forward", None)
    if getattr(trainer, "aux_loss_enabled", False):
        raise TrainerSettingError(
            f"router_aux_loss_coef: the config of {type(trainer.model).__name__} has a loss that balances the tokens "
            f"of a whole batch: set router_aux_loss_coef=0.0"
        )


def check_data(data: Any) -> None:
    """Refuse images: what a collator makes of them is not one row a text."""
    if images := {"image", "images"} & {*(getattr(data, "column_names", None) or ())}:
        raise TrainerSettingError(f"train_dataset has the column {images.pop()!r}: only texts are served")


class _Rows:
    """The samples of a data set, and not the name that its library has for it."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class _Prepared(DPTrainer):
    """Data that TRL has prepared: their fingerprint follows the tokenizer's state, which changes as it is used."""

    def _digest(self) -> str | None:
        data, collator = self._data_and_collator()
        return digest_of(_Rows(data) if len(data) <= MOST_ROWS else data, collator)


class DPSFTTrainer(_Prepared, SFTTrainer):
    """TRL's ``SFTTrainer`` whose training is (ε, δ)-differentially private for one row of its data set, or one user.

    A row is a sample. Its loss is the mean over its own tokens that have labels, those of the completion under
    ``completion_only_loss``, where TRL's is a mean over the tokens of the batch. Under ``packing`` or ``padding_free``
    the samples of a physical batch stand in one row, without padding: they are packed after they were drawn, and each
    is clipped by itself, as without. TRL's metrics of training batches (entropy, token accuracy, counts of tokens) are
    not computed. Everything else is :class:`DPTrainer`'s and TRL's.

    Example:
        >>> trainer = DPSFTTrainer(
        ...     "Qwen/Qwen3-0.6B", SFTConfig("out"), train_dataset=data, privacy=DPArguments(target_epsilon=8))
        >>> trainer.train()

    Raises:
        ValueError: a setting that cannot be had with privacy, before anything is changed.
    """

    def __init__(
        self, model: Any, args: SFTConfig | None = None, *, privacy: DPArguments | None = None, **keywords: Any
    ):
        args = SFTConfig("sft") if args is None else args
        check_settings(args, OF_SFT)
        args, privacy = without_packing(args, privacy)
        check_data(keywords.get("train_dataset"))
        super().__init__(model, args, privacy=privacy, **keywords)
        check_model(self)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """TRL's, with one loss for a batch."""
        found: Any = super().prediction_step(*args, **kwargs)
        return found[0].mean(), found[1], found[2]


class DPDPOTrainer(_Prepared, PairTrainer, DPOTrainer):
    """TRL's ``DPOTrainer`` whose training is (ε, δ)-differentially private for one preference pair, or one user.

    Both texts of a pair are clipped as one. See :class:`dpfast.integrations.pairs.PairTrainer` for what that means, and
    :mod:`dpfast.integrations.preference_losses` for the losses: all of TRL's but the two that sort a batch.

    Example:
        >>> trainer = DPDPOTrainer(
        ...     "Qwen/Qwen3-0.6B", args=DPOConfig("out"), train_dataset=pairs, privacy=DPArguments(target_epsilon=8))
        >>> trainer.train()

    Raises:
        ValueError: a setting that cannot be had with privacy, before anything is changed.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        privacy: DPArguments | None = None,
        **keywords: Any,
    ):
        args = DPOConfig("dpo") if args is None else args
        check_settings(args, OF_DPO)
        check_data(keywords.get("train_dataset"))
        if keywords.get("compute_metrics") is not None:
            raise TrainerSettingError("compute_metrics: evaluation has losses and rewards, and no logits; leave it out")
        self.preference = Preference.of(args)
        self._seen = {}
        super().__init__(model, args, privacy=privacy, ref_model=ref_model, **keywords)
        check_model(self)
        self.set_reference(self.ref_model)
