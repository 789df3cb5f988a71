"""Differentially private training in Lightning, with automatic optimisation: a callback that makes the rest private."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, default_collate

from dpfast.accounting.epsilon import check_budget, noise_multiplier_for
from dpfast.accounting.runs import joined, state_of
from dpfast.analysis.collation import check_collation
from dpfast.capture.trees import tensors
from dpfast.data.row_order import check_order
from dpfast.data.sampling import PoissonBatches, twister
from dpfast.data.unit import Unit
from dpfast.data.units import asked_for
from dpfast.engine import PrivacyEngine
from dpfast.integrations.lightning_batches import Collate, OfUsers, WithUnits
from dpfast.integrations.pieces import announced, counts, pieces
from dpfast.integrations.replayed import whole
from dpfast.integrations.trainer_batches import UsersBatches, users_of
from dpfast.model.private_model import FusedHooks
from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.planning.planner import check_state as check_plan
from dpfast.refusals import CheckpointError, LoaderError, TrainerSettingError, UnitsError


class DPCallback(Callback):
    """Makes a ``LightningModule`` train with (ε, δ)-differential privacy for one sample added or left out.

    Example:
        >>> privacy = DPCallback(
        ...     data, batch_size=256, max_grad_norm=1.0, target_epsilon=3.0, target_delta=1e-5, epochs=3)
        >>> trainer = L.Trainer(callbacks=[privacy], max_epochs=3)
        >>> trainer.fit(net, privacy.train_dataloader())
        >>> privacy.get_epsilon(delta=1e-5)

    The module is as it would be without privacy. The optimizer that its ``configure_optimizers`` returns, alone or in a
    dict with a scheduler, is made private. A module that returns something else calls :meth:`make_private` there.

    Each batch is Poisson-sampled: every sample is in it with probability 1/(steps per epoch), independently, and its
    expected size is about ``batch_size``. One batch is one step, with noise, and accounted for once; an empty one too
    (``training_step`` is then not called).

    The loss that ``training_step`` returns must be the mean (or, with ``loss_reduction="sum"``, the sum; in bfloat16
    always the sum) over the samples of losses that look at one sample each: a mean over all tokens of a batch couples
    samples and breaks the guarantee, see :mod:`dpfast.losses`. What ``training_step`` logs is not private.

    A run that goes on from a Lightning checkpoint has all its steps accounted for. Its noise takes a new key from the
    operating system, and its batches a seed of their own: what ``training_step``, the data's random transforms and
    other callbacks draw cannot be brought back for certain, and the same noise on other batches would lay bare what it
    hides. So the checkpoint holds neither key nor seed.

    Args:
        dataset: with a length.
        batch_size: expected size of a batch, about: ``len(dataset)`` over it, rounded up, are the steps per epoch.
        noise_multiplier: noise standard deviation over ``max_grad_norm``; or leave it out and give the next three.
        target_epsilon, target_delta, epochs: the noise is then such that so many epochs spend at most that (ε, δ).
        max_grad_norm: the norm that each sample's gradient is clipped to.
        units, rows_per_unit: as for ``make_private``: whose each sample is, an id for each or the name of a column, and
            the most samples of a user in a step. ε is then for one user, and ``batch_size`` counts users. Hooks that
            see a batch before ``training_step`` get it with its users, as ``(batch, units)``.
        max_physical_batch_size: most samples that ``training_step`` sees at once; None for whole batches. The parts of
            a batch are cut from its tensors, which all have the samples first.
        accountant, secure_mode: as for :class:`dpfast.PrivacyEngine`.
        seed: repeats noise and batches, for experiments on public data (the noise only up to the first checkpoint that
            the run goes on from); None takes both from the operating system, whatever ``L.seed_everything`` was given.
        collate_fn: from a list of samples to a batch; torch's default if None.
        loader: more arguments of the ``DataLoader``, such as ``num_workers``.
        private: more arguments of :meth:`dpfast.PrivacyEngine.make_private`, such as ``clipping``.

    Raises:
        ValueError: an argument that cannot be had; at ``fit``: gradient clipping or accumulation by Lightning, float16,
            several devices, manual optimisation, or a checkpoint of a run that was not accounted for.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        max_grad_norm: Any,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        epochs: float | None = None,
        units: Any = None,
        rows_per_unit: int | None = None,
        max_physical_batch_size: int | None = None,
        accountant: str = "prv",
        secure_mode: bool = False,
        seed: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        loader: dict[str, Any] | None = None,
        **private: Any,
    ):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
            raise LoaderError(f"dataset={type(dataset).__name__}: Poisson sampling needs a length, and samples")
        for name, value in (("batch_size", batch_size), ("max_physical_batch_size", max_physical_batch_size or 1)):
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        if secure_mode and seed is not None:
            raise ValueError(f"seed={seed} with secure_mode=True, whose keys no seed repeats: leave it out")
        for name in (
            "data_loader",
            "module",
            "optimizer",
            "poisson_sampling",
            "wrap_model",
            "criterion",
            "augmentations",
        ):
            if name in private:
                raise TrainerSettingError(f"{name}: DPCallback sets this itself; leave it out")
        users, collate_fn = None, collate_fn or default_collate
        if (asked := _asked(units, rows_per_unit)) is not None:
            users = users_of(dataset, units, asked)
            check_order(collate_fn, dataset, range(len(dataset)))
            if max_physical_batch_size is not None and users.largest > max_physical_batch_size:
                raise ValueError(
                    f"max_physical_batch_size={max_physical_batch_size}: a user has {users.largest} samples in a "
                    f"batch, and is never split: give at least that, or a smaller rows_per_unit"
                )
        samples = len(dataset) if users is None else len(users)
        steps = -(-samples // batch_size)
        target = {"target_epsilon": target_epsilon, "target_delta": target_delta, "epochs": epochs}
        if noise_multiplier is None:
            noise_multiplier = _noise_for(target, steps, accountant)
        elif given := [name for name, value in target.items() if value is not None]:
            raise ValueError(f"noise_multiplier={noise_multiplier!r} and {', '.join(given)}: give one or the other")
        self.engine = PrivacyEngine(accountant=accountant, secure_mode=secure_mode)
        self.optimizer: FusedDPOptimizer | None = None
        self.hooks: FusedHooks | None = None
        self._size = max_physical_batch_size
        self._seed = seed
        self._loss_reduction = private.pop("loss_reduction", "mean")
        self._private = {
            "noise_multiplier": noise_multiplier,
            "max_grad_norm": max_grad_norm,
            "expected_batch_size": batch_size,
            **private,
        }
        drawn = secrets.randbits(128) if seed is None else seed
        self._batches: PoissonBatches
        drawn_of: Any = dataset
        collate: Callable[[Any], Any] = Collate(collate_fn)
        if users is None:
            self._batches = PoissonBatches(len(dataset), steps, seed=drawn)
        else:
            self._batches = UsersBatches(users, steps, seed=drawn)
            drawn_of, collate = OfUsers(dataset, collate), whole
        self._loader = DataLoader(drawn_of, batch_sampler=self._batches, collate_fn=collate, **(loader or {}))
        # The rows and what collates them, to be compared alone and together; torch's own function pads nothing.
        self.collated = None if collate_fn is default_collate else (dataset, collate_fn)
        self._pending: dict[str, Any] | None = None  # a checkpoint's state, until there is an optimizer

    def train_dataloader(self) -> DataLoader:
        """The Poisson-sampled batches, for ``fit`` or for a module's or data module's ``train_dataloader``."""
        return self._loader

    def get_epsilon(self, delta: float) -> float:
        """ε of all steps so far, of a resumed run since its beginning; ``engine.unit`` says what it is for."""
        return float(self.engine.get_epsilon(delta))

    def make_private(self, module: L.LightningModule, optimizer: Optimizer) -> FusedDPOptimizer:
        """The private optimizer of ``module``, to be returned (or given to a scheduler) by ``configure_optimizers``.

        The module stays what it is, with its layers' ``forward`` replaced in place.
        """
        if self.hooks is not None:
            self.hooks.cleanup()  # an earlier fit's
        module.train()
        self.hooks, private, _ = self.engine.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=self._loader,
            poisson_sampling=False,  # it is Poisson-sampled already
            wrap_model=False,
            loss_reduction=self._loss_reduction,
            **(self._private | self._noise_generator()),
        )
        private.loss_reduction = "mean"  # of the sum over samples the expected batch size is left to divide by
        self.optimizer = private
        return private

    def _noise_generator(self) -> dict[str, Any]:
        """Another one for a fit that goes on from an earlier one of the same seed: its batches are others."""
        if self._seed is None:
            return {}
        words = np.random.SeedSequence([self._seed, self.steps_accounted()]).generate_state(624).tolist()
        return {"noise_generator": twister(words)}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would break the guarantee, before anything is changed."""
        if stage != "fit":
            return
        for name, wrong, remedy in (
            ("gradient_clip_val", bool(trainer.gradient_clip_val), "gradients are clipped per sample; leave it out"),
            ("accumulate_grad_batches", trainer.accumulate_grad_batches != 1, "give DPCallback a larger batch_size"),
            ("precision", str(trainer.precision).startswith(("16", "transformer")), "use 'bf16-mixed' or '32-true'"),
            (
                "precision",
                self._loss_reduction == "mean" and self._size != 1 and "bf16" in str(trainer.precision),
                "a mean over the batch is rounded by its size in 16 bits: give DPCallback loss_reduction='sum', and "
                "return the sum over the samples from training_step",
            ),
            ("strategy", not isinstance(trainer.strategy, SingleDeviceStrategy), "give devices=1 and no strategy"),
            (
                "overfit_batches",
                bool(getattr(trainer, "overfit_batches", 0)),
                "batches must be Poisson-sampled; leave it out",
            ),
        ):
            if wrong:
                value = getattr(trainer, name)
                raise TrainerSettingError(f"{name}={value!r} cannot be had with differential privacy: {remedy}")
        if not pl_module.automatic_optimization:
            raise TrainerSettingError(
                "automatic_optimization=False: DPCallback needs Lightning's automatic optimisation"
            )
        own = pl_module.configure_optimizers
        pl_module.configure_optimizers = _MadePrivate(own, self, pl_module)  # type: ignore[method-assign]
        pl_module.training_step = _Cut(_whole(pl_module.training_step), self, self._size)  # type: ignore[method-assign]
        self._batches.step = self.steps_accounted()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that it is the private optimizer that steps."""
        if len(trainer.optimizers) != 1 or trainer.optimizers[0] is not self.optimizer:
            raise TrainerSettingError(
                "configure_optimizers must return one optimizer, alone or as the 'optimizer' of a dict; or what "
                "callback.make_private(self, optimizer) returns"
            )
        if trainer.ckpt_path is not None and self._pending is None:
            raise CheckpointError(
                f"ckpt_path={trainer.ckpt_path!r} has no state of a DPCallback: that run was not accounted for. To "
                f"start from its weights load them into the module"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from a checkpoint, if there is one."""
        if getattr(trainer.train_dataloader, "batch_sampler", None) is not self._batches:
            raise LoaderError("train_dataloader: train on callback.train_dataloader(), whose batches are accounted for")
        state, self._pending = self._pending, None
        if state is not None:
            assert self.optimizer is not None and self.hooks is not None
            self.optimizer.noise.renew()
            self.hooks.clipped_sum.planner.load_state_dict(state["plan"])
            joined(self.engine.accountant, state["accountant"]).take_over()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own ``training_step`` and ``configure_optimizers`` back."""
        own = _own(vars(pl_module).pop("configure_optimizers", None))
        if own is not None and getattr(own, "__func__", None) is not type(pl_module).configure_optimizers:
            pl_module.configure_optimizers = own  # type: ignore[method-assign]
        step = _whole(vars(pl_module).pop("training_step", None))
        if step is not None and getattr(step, "__func__", None) is not type(pl_module).training_step:
            pl_module.training_step = step  # type: ignore[method-assign]

    def steps_accounted(self) -> int:
        """Steps that the accountant has counted."""
        return sum(steps for _, _, steps in self.engine.accountant.history)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: accountant, plan, and what was sampled from."""
        if self.optimizer is None or self.hooks is None:
            return {}
        return {
            "accountant": state_of(self.engine.accountant),
            "plan": self.hooks.clipped_sum.planner.state_dict(),
            "sampled": (self._batches.num_samples, self._batches.steps_per_epoch),
            "unit": self._batches.unit.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Checked at once; accounting is taken over when training starts, and there is an optimizer."""
        check_plan(state_dict["plan"])
        if (unit := Unit(**state_dict.get("unit", {}))) != self._batches.unit:
            raise CheckpointError(
                f"ckpt_path: epsilon is for {self._batches.unit} here, and was for {unit}: resume with the same units "
                f"and rows_per_unit"
            )
        mine = (self._batches.num_samples, self._batches.steps_per_epoch)
        if tuple(state_dict["sampled"]) != mine:
            raise CheckpointError(
                f"ckpt_path: samples and steps per epoch are {mine}, and were {tuple(state_dict['sampled'])}: resume "
                f"with the same dataset and batch_size"
            )
        held = sum(steps for *_, steps in state_dict["accountant"]["history"])
        if (done := self.steps_accounted()) > held:
            raise CheckpointError(
                f"ckpt_path: {done} steps were taken and the checkpoint accounts for {held} of them; the others would "
                f"be forgotten. Resume from the last checkpoint"
            )
        joined(self.engine.accountant, state_dict["accountant"])
        self._pending = state_dict
        self._batches.step = held  # before a worker asks for a batch


class _Cut:
    """A ``training_step`` that sees a physical batch at a time; Lightning runs the backward of the last one."""

    def __init__(self, whole: Callable[..., Any], callback: DPCallback, size: int | None):
        self.__wrapped__, self.callback, self.size = whole, callback, size  # the name by which Lightning looks inside
        # The rows and what collates them, until they are compared:
        self.collated: tuple[Any, Any] | None = callback.collated

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = self.callback.optimizer
        assert optimizer is not None
        if self.collated is not None:
            data, collate_fn = self.collated
            self.collated = None
            check_step(self.callback.hooks, self.__wrapped__, data, collate_fn, args, kwargs)
        batch, units = self._told(batch)
        optimizer.abandon()  # Lightning's zero_grad comes after the forward of the last, and then keeps the sums
        if not tensors(batch):
            optimizer.expect_no_samples()
            return torch.zeros((), requires_grad=True)
        parts: Iterable[Any] = [(batch, None, True)]
        if self.size is not None or units is not None:
            rows = len(tensors(batch)[0])
            if units is not None and len(units) != rows:
                raise UnitsError(
                    f"units=: a batch of {len(units)} samples has {rows} rows after collate_fn and the module's hooks, "
                    f"so that it cannot be told whose they are: leave each sample one row"
                )
            of = counts(rows, self.size or rows, units=units)
            parts = announced(optimizer, pieces(batch, of), of, units=units)
        for part, _, last in parts:
            out = self.__wrapped__(part, *args, **kwargs)
            loss = _loss(out)
            if not last:
                with torch.autocast(loss.device.type, enabled=False):  # Lightning's is still on
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return out

    def _told(self, batch: Any) -> tuple[Any, list[int] | None]:
        """The batch, and whose each of its rows is where that is asked for."""
        if isinstance(batch, WithUnits):
            return batch.batch, batch.units.tolist()
        hooks = self.callback.hooks
        if hooks is not None and hooks.clipped_sum.by_unit:
            raise UnitsError(
                "units=: a hook of the module has given training_step another batch than the one that DPCallback gave, "
                "so that it cannot be told whose its rows are: return batches as (batch, units), as they come"
            )
        return batch, None


class _MadePrivate:
    """A ``configure_optimizers`` whose optimizer is made private, if that was not done in it."""

    def __init__(self, own: Callable[[], Any], callback: DPCallback, module: L.LightningModule):
        self.__wrapped__, self.callback, self.module = _own(own), callback, module

    def __call__(self) -> Any:
        out = self.__wrapped__()
        given = out.get("optimizer") if isinstance(out, dict) else out
        if not isinstance(given, Optimizer) or isinstance(given, FusedDPOptimizer):
            return out  # looked at when the fit starts
        private = self.callback.make_private(self.module, given)
        if not isinstance(out, dict):
            return private
        schedule = out.get("lr_scheduler")
        scheduler = schedule.get("scheduler") if isinstance(schedule, dict) else schedule
        if scheduler is not None:
            scheduler.optimizer = private  # it changes the same groups
        return {**out, "optimizer": private}


def _own(configure_optimizers: Any) -> Any:
    """The user's own: a fit that ended in an exception leaves it wrapped."""
    wrapped = isinstance(configure_optimizers, _MadePrivate)
    return configure_optimizers.__wrapped__ if wrapped else configure_optimizers


def _noise_for(target: dict[str, Any], steps: int, accountant: str) -> float:
    if missing := [name for name, value in target.items() if value is None]:
        raise ValueError(f"{', '.join(missing)}: give noise_multiplier, or target_epsilon, target_delta and epochs")
    check_budget("epochs", target["epochs"])
    return noise_multiplier_for(
        target_epsilon=target["target_epsilon"],
        target_delta=target["target_delta"],
        sample_rate=1 / steps,
        steps=math.ceil(target["epochs"] * steps),
        accountant=accountant,
    )


def _whole(training_step: Any) -> Any:
    """The user's own: a fit that ended in an exception leaves it cut."""
    return training_step.__wrapped__ if isinstance(training_step, _Cut) else training_step


def _asked(units: Any, rows_per_unit: Any) -> int | None:
    """The most samples of a user in a step, where users are asked for."""
    found = asked_for(units, rows_per_unit, 1, poisson_sampling=True, rand_on_empty=False, alone=False)
    return None if found is None else found.rows_per_unit


def check_step(
    hooks: Any, step: Callable[..., Any], data: Any, collate_fn: Callable[[list[Any]], Any], args: Any, kwargs: Any
) -> None:
    """See :func:`dpfast.analysis.collation.check_collation`; what ``training_step`` logs meanwhile goes nowhere."""
    module = hooks._module

    def loss_of(batch: Any) -> Tensor:
        return _loss(step(module.transfer_batch_to_device(batch, module.device, 0), *args, **kwargs))

    quiet = {"log": _ignored, "log_dict": _ignored}
    before = {name: vars(module)[name] for name in quiet if name in vars(module)}
    vars(module).update(quiet)
    try:
        check_collation(hooks, loss_of, data, collate_fn)
    finally:
        for name in quiet:
            del vars(module)[name]
        vars(module).update(before)


def _ignored(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a module's ``log``."""


def _loss(out: Any) -> Tensor:
    loss = out["loss"] if isinstance(out, dict) else out
    if not isinstance(loss, Tensor):
        raise TrainerSettingError(
            f"training_step returned {out!r}: a step without a loss would be accounted for; return one"
        )
    return loss
