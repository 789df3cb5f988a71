"""``DPTrainer``: ``transformers.Trainer`` with differential privacy, for one changed line of a training script."""

from __future__ import annotations

import copy
import math
import secrets
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainingArguments

from dpfast.accounting.epsilon import noise_multiplier_for
from dpfast.amp import GradScaler
from dpfast.analysis.collation import check_collation
from dpfast.capture.segments import PACKED
from dpfast.data.packed import PackedAfter
from dpfast.data.row_order import check_order
from dpfast.data.sampling import twister
from dpfast.data.unit import ROW
from dpfast.data.units import Units
from dpfast.engine import PrivacyEngine
from dpfast.integrations.distributed import is_sharded
from dpfast.integrations.heads import LABELS, LossForward, with_losses
from dpfast.integrations.pieces import CollatedPieces, backward_in_pieces, counts, first_rows
from dpfast.integrations.replayed import MODEL, Replayed, fingerprint, seed_all, seeded, whole
from dpfast.integrations.task_losses import is_causal_lm, task_loss
from dpfast.integrations.trainer_arguments import DPArguments, check_arguments
from dpfast.integrations.trainer_batches import SampleBatches, UsersBatches, users_of, without_column
from dpfast.integrations.trainer_checkpoints import PRIVACY_NAME, ResumableTrainer
from dpfast.losses import segment_cross_entropy
from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.refusals import (
    BudgetError,
    CheckpointError,
    LoaderError,
    LossCouplesError,
    RanksError,
    TrainerSettingError,
)

__all__ = ["PRIVACY_NAME", "DPArguments", "DPTrainer"]


class DPTrainer(ResumableTrainer):
    """``transformers.Trainer`` whose training is (ε, δ)-differentially private for one sample added or left out.

    With ``privacy.unit_column`` read "user" for "sample": all samples of a user are clipped as one. With
    ``privacy.packing`` the samples of a physical batch stand in one row, and each is clipped by itself.

    Arguments are the Trainer's, and ``privacy``. One step accounts for one logical batch: each sample of
    ``train_dataset`` is in it with probability 1/(steps per epoch), independently, and its expected size is about
    ``per_device_train_batch_size · gradient_accumulation_steps · world size``, or ``privacy.expected_batch_size``. It
    runs forward and backward ``per_device_train_batch_size`` samples at a time; ``privacy.pad`` makes this the number
    of rows. Gradients are clipped per sample, by ``privacy.max_grad_norm``; the Trainer's ``max_grad_norm`` is not
    used. Each step adds noise and is accounted for once, an empty batch's too.

    Losses are per sample. Causal language models, masked and sequence-to-sequence language models, token and
    sequence classification and image classification are known by the model's class; a language model's loss is the
    mean over a sample's own tokens, never over those of the batch. For any other model, pass ``compute_loss_func``
    (or override ``compute_loss``): from outputs and labels to losses ``[B]``.

    ``epsilon`` is logged with the learning rate, as ``epsilon_per_user_id`` where ``privacy.unit_column`` is
    ``"user_id"``: ``trainer.engine.unit`` says in words what it is for. The training loss and gradient norms are not
    private and are not logged, unless ``privacy.log_training_loss``; ``train()`` then returns 0 as ``training_loss``.
    What evaluation says of ``eval_dataset`` is not private either.

    A checkpoint holds the noise's key and the seed of the batches, in ``privacy.pt``: **publish the model, never the
    checkpoints.** A resumed run is bit-equal to one that was not interrupted (in secure mode up to the noise): batches,
    their random transforms and dropout are functions of that seed and the step. With other settings, another model,
    collator or loss, or other data it takes a new key, as the same noise on two sums lays their difference bare; so it
    does where the data cannot be told from others: large data sets of one's own class, samples that are neither
    numbers, text, arrays nor tensors, and samples or a collator that draw from generators of their own.

    On several processes (torchrun, ``accelerate launch``) every rank clips its share of the logical batch, and the
    clipped sums are added up; the model is not left in ``DistributedDataParallel``. A model that ``fully_shard`` has
    sharded stays sharded, in checkpoints too. Its collator is not tried out on rows alone and together.

    ``fp16=True`` multiplies losses by the constant ``privacy.loss_scale``, which norms and sums are free of: see
    :class:`dpfast.amp.GradScaler`, and its advice on how to choose the scale.

    Example:
        >>> trainer = DPTrainer(model, args, train_dataset=data, privacy=DPArguments(target_epsilon=8))
        >>> trainer.train()
        >>> epsilon, delta = trainer.privacy_spent()

    Raises:
        ValueError: an argument that cannot be had with privacy, or a model whose per-sample loss is not known.
    """

    rows_of_a_sample = 1  # that the model sees
    row = "row"  # what a sample of the data is called

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        privacy: DPArguments | None = None,
        **keywords: Any,
    ):
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        check_arguments(args)
        self.privacy = DPArguments() if privacy is None else privacy
        self.engine = PrivacyEngine(accountant=self.privacy.accountant, secure_mode=self.privacy.secure_mode)
        self.hooks = None
        self._resumed, self._batch_seed = None, None
        self._found: tuple[Any, Units] | None = None  # the users of a data set, which are read once
        self._head: LossForward | None = None  # of a model whose losses need no logits
        self._collated: tuple[Any, Any] | None = None  # the rows and what collates them, until they are compared
        product = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        self._logical_batch_size = self.privacy.expected_batch_size or product
        args = copy.copy(args)  # the user's own stays as it is
        args.gradient_accumulation_steps = 1  # the loop sees one logical batch a step
        args.max_grad_norm = 0.0  # the sum of clipped gradients and noise is not to be clipped again
        args.ignore_data_skip = True  # batches are a function of the step: a resumed run has none to skip
        if args.n_gpu > 1:
            warnings.warn(f"DPTrainer uses one of {args.n_gpu} GPUs in one process; use torchrun for all", stacklevel=2)
            args._n_gpu = 1
        if positional:
            super().__init__(model, args, *positional, **keywords)
        else:  # trainers of TRL have other arguments before this one
            super().__init__(model, args=args, **keywords)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise RanksError(
                "accelerate was launched with DeepSpeed or FSDP: launch without, and shard the model with fully_shard"
            )
        self._task_loss = None if self.compute_loss_func is not None else task_loss(self.model)
        own = self.compute_loss_func is not None or type(self).compute_loss is not DPTrainer.compute_loss
        if self._task_loss is None and not own:
            raise LossCouplesError(
                f"model is a {type(self.model).__name__}, whose per-sample loss is not known: pass compute_loss_func, "
                f"from (outputs, labels, num_items_in_batch) to losses [B]"
            )
        if self.privacy.packing:
            self._check_packing()
        if self.train_dataset is not None and self.privacy.unit_column is not None:
            self._check_size()
        self.add_callback(_Epochs())

    def _check_packing(self) -> None:
        """Samples of a packed row have a loss each, of a causal language model.

        Raises:
            ValueError: it is another model or loss, or a setting that packed rows do not go with.
        """
        refused = {
            f"model={type(self.model).__name__}": not is_causal_lm(self.model),
            "compute_loss_func": self.compute_loss_func is not None,
            "torch_compile=True": self.args.torch_compile,
            "a sharded model": is_sharded(self.model),
            f"a {self.row}": self.rows_of_a_sample > 1,
        }
        if given := [name for name, is_given in refused.items() if is_given]:
            raise TrainerSettingError(
                f"packing=True with {given[0]}: several samples in one row are for causal language models with their "
                f"own loss, as they are written and whole on each rank; leave packing out"
            )

    def _check_size(self) -> None:
        """A unit's rows are in one physical batch, as they are clipped as one.

        Raises:
            ValueError: they do not fit.
        """
        if self._users is not None and self._users.largest > self._train_batch_size:
            raise ValueError(
                f"per_device_train_batch_size={self._train_batch_size}: a user has {self._users.largest} rows in a "
                f"batch, and is never split: give at least that, or a smaller rows_per_unit"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's; but accelerate must not put a private model into DDP, nor replace its ``forward``."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, *_, **__: model
        self.accelerator.prepare_optimizer = lambda optimizer, *_, **__: optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Mixed precision, which accelerate would have built into the model's ``forward``."""
        if self.accelerator.mixed_precision == "fp16":  # on the CPU accelerate would leave it out, and not say so
            return torch.autocast(self.args.device.type, torch.float16)
        return self.accelerator.autocast()

    def get_total_train_batch_size(self, args: Any) -> int:
        """The expected size of a logical batch."""
        return self._logical_batch_size

    @property
    def _samples(self) -> int:
        """How many there are; users, where these are drawn."""
        return self._rows_of_data if self._users is None else len(self._users)

    @property
    def _users(self) -> Units | None:
        column, most = self.privacy.unit_column, self.privacy.rows_per_unit
        if column is None or most is None or not self._rows_of_data:
            return None
        if self._found is None or self._found[0] is not self.train_dataset:
            self._found = self.train_dataset, users_of(self.train_dataset, column, most)
        return self._found[1]

    @property
    def _rows_of_data(self) -> int:
        data: Any = self.train_dataset
        if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not len(data):
            raise LoaderError(
                f"train_dataset={type(data).__name__}: Poisson sampling needs a data set with a length and samples"
            )
        return len(data)

    @property
    def _rows(self) -> int:
        """Fewest rows of a physical batch: the ranks of a sharded model gather its parameters in every forward."""
        return self._train_batch_size if self.privacy.pad else int(is_sharded(self.model))

    def _batches(self, seed: int) -> SampleBatches | UsersBatches:
        steps_per_epoch = math.ceil(self._samples / self._logical_batch_size)
        share: dict[str, Any] = dict(seed=seed, rank=self.args.process_index, world_size=self.args.world_size)
        batches: SampleBatches | UsersBatches
        if self._users is not None:
            batches = UsersBatches(self._users, steps_per_epoch, **share)
        else:
            batches = SampleBatches(self._samples, steps_per_epoch, **share)
        batches.unit = replace(batches.unit, row=self.row)
        epochs, steps = self.args.num_train_epochs, self.args.max_steps
        batches.total = steps if steps > 0 else math.ceil(epochs * steps_per_epoch)
        return batches

    def get_train_dataloader(self) -> DataLoader:
        """Whole logical batches, this rank's share, already cut into physical ones.

        Raises:
            ValueError: the data set has no length, or no samples.
        """
        if self._batch_seed is None:
            self._batch_seed = self._draw_batch_seed()
        batches = self._batches(self._batch_seed)
        self._check_size()
        if self._resumed is not None:
            batches.step = self._resumed["step"]
        data, collator = self._data_and_collator()
        packed = self.privacy.packing
        if self._users is not None or self.rows_of_a_sample > 1:
            with seeded(0):
                check_order(collator, data, range(len(data)))
        workers = self.args.dataloader_num_workers
        self._collated = None if packed else (data, collator)  # else each sample is collated alone
        pieces = CollatedPieces(collator, self._train_batch_size, data, self._rows)
        return DataLoader(
            Replayed(data, pieces, batches.seed, batches.rank),
            batch_sampler=batches,
            collate_fn=whole,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _data_and_collator(self) -> tuple[Any, Any]:
        """Without the columns that the model does not take."""
        data, collator = self._data_and_own_collator()
        return data, PackedAfter(collator) if self.privacy.packing else collator

    def _data_and_own_collator(self) -> tuple[Any, Any]:
        data: Any = self.train_dataset
        if self.privacy.unit_column is not None:
            data = without_column(data, self.privacy.unit_column)
        if hasattr(data, "remove_columns"):  # a data set of the library datasets
            return self._remove_unused_columns(data, description="training"), self.data_collator
        return data, self._get_collator_with_removed_columns(self.data_collator, description="training")

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer, or the user's, made private; with it the model, in place."""
        if isinstance(self.optimizer, FusedDPOptimizer):
            return self.optimizer
        plain = super().create_optimizer(model)
        batches = self._batches(0)
        if (delta := self.privacy.target_delta) >= 1 / batches.num_samples:
            warnings.warn(
                f"target_delta={delta} is no less than 1/{batches.num_samples} ({batches.unit})", stacklevel=2
            )
        sigma = self._noise_multiplier(batches)
        if self.compute_loss_func is None and not (self.args.torch_compile or is_sharded(self.model)):
            with self.compute_loss_context_manager():
                self._head = with_losses(self.model)
            if self._head is not None:
                self._head.packed = self.privacy.packing
        model = self.model.train()
        self._fingerprint = fingerprint(model)
        if self.args.world_size > 1 and not is_sharded(
            model
        ):  # tells make_private of the ranks, and makes their parameters equal
            model = DistributedDataParallel(model)
        privacy = self.privacy
        self.hooks, optimizer, _ = self.engine.make_private(
            module=model,
            optimizer=plain,
            data_loader=DataLoader(range(self._rows_of_data), batch_sampler=batches),  # type: ignore[arg-type]
            noise_multiplier=sigma,
            max_grad_norm=privacy.max_grad_norm,
            clipping=privacy.clipping,
            clipping_fn=privacy.clipping_fn,
            group_noise=privacy.group_noise,
            low_precision=privacy.low_precision,
            noise_correction=privacy.noise_correction,
            memory_budget=privacy.memory_budget,
            poisson_sampling=False,  # the batches are Poisson-sampled by our own loader
            loss_reduction="sum",  # a loss divided by the size of a physical batch would be rounded by it in 16 bit
            wrap_model=False,
            expected_batch_size=self._logical_batch_size,
            noise_generator=self._noise_generator(),
            units=PACKED if privacy.packing else None,
        )
        self.hooks.clipped_sum.by_unit |= self.rows_of_a_sample > 1
        optimizer.loss_reduction = "mean"  # the update divides by the expected size of a logical batch
        self.optimizer = optimizer
        fp16 = self.accelerator.mixed_precision == "fp16"
        # In place of torch's scaler, whose scale would follow the gradients; one that is disabled scales by 1.
        self.accelerator.scaler = GradScaler(optimizer, privacy.loss_scale, device=self.args.device.type, enabled=fp16)
        if self.args.torch_compile:  # in place, as accelerate would have it do in the model's ``prepare``
            self.model.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        return optimizer

    def _noise_multiplier(self, batches: SampleBatches | UsersBatches) -> float:
        privacy = self.privacy
        if privacy.noise_multiplier is not None:
            return privacy.noise_multiplier
        sigma = noise_multiplier_for(
            target_epsilon=privacy.target_epsilon,  # type: ignore[arg-type]
            target_delta=privacy.target_delta,
            sample_rate=batches.sample_rate,
            steps=batches.total,
            accountant=privacy.accountant,
        )
        if self._resumed is not None and sigma != self._resumed["noise_multiplier"]:
            raise CheckpointError(
                f"target_epsilon={privacy.target_epsilon} asks for noise_multiplier={sigma} with these arguments, and "
                f"the checkpoint was trained with {self._resumed['noise_multiplier']}: resume with the arguments that "
                f"it was trained with, or give noise_multiplier"
            )
        return sigma

    def _words(self, count: int) -> list[int]:
        """Of ``privacy.seed``: others for a run that goes on from an earlier one, and for another purpose."""
        seed = [self.privacy.seed, 2 if count > 4 else count, self.steps_accounted()]
        return np.random.SeedSequence(seed).generate_state(count).tolist()  # type: ignore[arg-type]

    def _noise_generator(self) -> torch.Generator | None:
        return None if self.privacy.seed is None else twister(self._words(624))

    def _draw_batch_seed(self) -> int:
        """128 bits, the operating system's or of ``privacy.seed``; the same on all ranks."""
        if self.privacy.seed is not None:
            return sum(word << 32 * k for k, word in enumerate(self._words(4)))
        held = [secrets.randbits(128)]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one logical batch; returns its loss, or 0 where that is not logged."""
        model.train()
        assert self._batch_seed is not None
        seed_all(self._batch_seed, MODEL, self.state.global_step, self.args.process_index)  # dropout
        optimizer: FusedDPOptimizer = self.optimizer
        scaler, each = self.accelerator.scaler, self.rows_of_a_sample
        if self._collated is not None and not is_sharded(self.model):  # whose ranks would see other rows
            assert self.hooks is not None
            (data, collator), self._collated = self._collated, None
            check_collation(
                self.hooks, lambda batch: self._losses(model, self._on_device(batch)).sum(), data, collator, each
            )
        size, held, units = self._train_batch_size, inputs["pieces"], inputs["units"]
        of = counts(inputs["samples"], size, optimizer.ranks.most(len(held)), units)
        # Where other ranks have more pieces: one without samples, of which no row counts.
        filling = first_rows(held[0], max(of[0], self._rows), self._rows) if self._rows else None
        parts = [*held, *[filling] * (len(of) - len(held))]

        def loss_of(part: Any, given: int) -> Tensor:
            if part is None:  # many models cannot run on no samples
                return torch.zeros((), device=self.args.device, requires_grad=True)
            losses = self._losses(model, part)
            if len(losses) != (seen := max(given, self._rows)):
                raise LossCouplesError(
                    f"the loss has shape {list(losses.shape)} for a batch of {seen} samples: compute_loss and "
                    f"compute_loss_func must return one loss for each sample, [B]; one number for all couples them"
                )
            return scaler.scale(each * losses[:given].sum())  # of a unit's rows the mean is clipped, not the sum

        on_device = (None if part is None else self._on_device(part) for part in parts)
        total = backward_in_pieces(optimizer, on_device, of, loss_of, self._rows, units, each)
        total = total / (optimizer.clipped_sum.loss_scale * each)
        if not self.privacy.log_training_loss:
            return torch.zeros_like(total)
        return total * self.args.world_size / self._logical_batch_size

    def _on_device(self, part: Any) -> Any:
        """A collated piece as the model sees it: ``rows_of_a_sample`` rows of each sample, one after the other."""
        return self._with_decoder_inputs(self._prepare_inputs(part))

    def _with_decoder_inputs(self, inputs: Any) -> dict[str, Any]:
        """An encoder-decoder's, made of labels: before the forward, so that its rows are known by their memory."""
        inputs, model = dict(inputs), self.model
        if "decoder_input_ids" not in inputs and hasattr(model, "prepare_decoder_input_ids_from_labels"):
            labels = inputs.get("labels")
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return inputs

    def _losses(self, model: Any, batch: Any) -> Tensor:
        """Losses of a batch on the device."""
        with self.compute_loss_context_manager():
            losses = self.compute_loss(model, batch)
        if losses.dim() != 1:
            raise LossCouplesError(
                f"the loss has shape {list(losses.shape)}: compute_loss and compute_loss_func must return one loss for "
                f"each sample, [B]; one number for all couples them"
            )
        return losses

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Losses ``[B]``, one for each sample; the Trainer's, one number for all, would couple the samples."""
        inputs = self._with_decoder_inputs(inputs)
        labels = inputs.pop("labels", None)
        packed = self.privacy.packing and self.model.training
        if packed:  # with a cache Transformers makes no mask by segments
            inputs["use_cache"] = False
        if self._head is not None and labels is not None and not return_outputs and self._head.takes(inputs):
            return model(**inputs, **{LABELS: labels})
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            losses = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        else:
            if labels is None:
                raise ValueError(f"the batch has no labels, only {sorted(inputs)}; pass a data_collator that adds them")
            assert self._task_loss is not None
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            marks = {"position_ids": inputs["position_ids"], "reduction": "none"} if packed else {}
            losses = (segment_cross_entropy if packed else self._task_loss)(logits, labels, **marks)
        if not return_outputs:
            return losses
        return losses, outputs if isinstance(outputs, dict) else (losses, *outputs)  # the Trainer drops the first

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        """The number of tokens in a batch is no divisor for a per-sample loss."""

    def _clip_grad_norm(self, model: Any) -> None:
        """Not done, and not logged: there are no gradients before the private step."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Not private, so not had."""

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with ``epsilon`` wherever training itself logs, and without what is not private."""
        if not self.privacy.log_training_loss:
            for name in ("loss", "train_loss"):
                logs.pop(name, None)
        if "learning_rate" in logs or "train_runtime" in logs:
            logs[(self.engine.unit or ROW).epsilon] = self.privacy_spent()[0]
        super().log(logs, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial looks at the data, and choosing among them is not accounted for."""
        raise BudgetError("hyperparameter_search: its trials are not accounted for; search on public data")


class _Epochs(TrainerCallback):
    """``state.epoch``, which the Trainer counts from the resumed step where it has skipped no data."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / len(kwargs["train_dataloader"])
