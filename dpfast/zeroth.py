"""Zeroth-order training: two forwards a step, no backward, and one private number; see :func:`zeroth_order`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from opacus.grad_sample import AbstractGradSampleModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.loss import _Loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dpfast import ops
from dpfast.clipping.thresholds import check_threshold
from dpfast.data.loaders import watched
from dpfast.data.public_numbers import Public
from dpfast.engine import PrivacyEngine
from dpfast.model.forwards import Forward
from dpfast.model.model_forward import normalises_over_batch
from dpfast.model.private_model import check_public_state
from dpfast.noise.stream import NoiseStream
from dpfast.ops.numbers import plain
from dpfast.optim.direction import Direction
from dpfast.optim.step_checks import check_noise_multiplier
from dpfast.refusals import (
    AlreadyPrivateError,
    BatchStatisticsError,
    LeftBehindError,
    LossCouplesError,
    NothingToReleaseError,
    RanksError,
    SamplesMeetError,
)
from dpfast.separation import LossCheck, kind, unvarying
from dpfast.separation.schedule import Schedule
from dpfast.separation.texts import Left

DTYPES = (torch.float32, torch.float64)
NUMBERS = ("lr", "phi", "noise_multiplier", "max_grad_norm")  # of a step, which schedules may change


def zeroth_order(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *,
    engine: PrivacyEngine,
    data_loader: DataLoader,
    lr: float,
    noise_multiplier: float,
    max_grad_norm: float,
    phi: float = 1e-3,
    expected_batch_size: int | float | None = None,
    sample_rate: float | None = None,
    noise_generator: torch.Generator | None = None,
    public_state: Sequence[str] = (),
) -> tuple[ZerothOrder, DataLoader]:
    """Private training of a model that no backward fits: DPZero, in about the memory of inference.

    ::

        step, loader = dpfast.zeroth_order(
            model, lambda model, x, y: F.cross_entropy(model(x), y, reduction="none"),
            engine=engine, data_loader=loader, lr=1e-4, noise_multiplier=1.0, max_grad_norm=1.0)
        for x, y in loader:
            step(x, y)

    A step draws a direction z ~ N(0, I) over all trained parameters, and moves the weights w along it::

        s_i = (l_i(w + φz) - l_i(w - φz)) / 2φ                                       of each sample
        value = (Σ_i min(max(s_i, -C), C) + noise_multiplier · C · N(0, 1)) / expected_batch_size
        w ← w - lr · value · z

    Privacy: one sample moves the sum by at most C, and one Gaussian number hides that. ε is the accountant's for
    Poisson batches, as of :meth:`~dpfast.PrivacyEngine.make_private`. z hides nothing: it does not depend on the data,
    and whoever sees the weights before and after a step sees it. So it has a key of its own. Were it the noise's key,
    what is seen of z could tell of the noise. An empty batch is a step of noise alone.

    ====================  ================================================================================
    s_i not finite        the sample contributes exactly 0, and is counted in ``step.nonfinite_samples``
    φ, lr, σ, C           public numbers; ``step.lr`` and the others may be changed between steps
    dropout               both forwards of a step draw the same random numbers of torch
    rounding              the update is a part of the way back from w - φz, so that nothing has to be kept of w: each
                          element is rounded three times a step where SGD rounds it once. In 16 bits that would be more
                          than a step moves, so parameters that train must be float32 or float64; frozen ones need not
    an exception          in a forward: nothing is released or accounted for, and the weights go back, up to rounding
    checkpoints           of model and engine: ``engine.save_checkpoint`` and ``load_checkpoint`` without an optimizer.
                          ``step`` has no state that goes on: a new one has new keys
    ====================  ================================================================================

    Source: Zhang et al. 2023, *DPZero: Private Fine-Tuning of Language Models without Backpropagation*; see also Tang
    et al. 2024, *Private Fine-tuning of Large Language Models with Zeroth-order Optimization*.

    Args:
        model: in the mode in which it is to train. Its parameters with ``requires_grad`` are trained, in place.
        loss: called with the model and a batch without gradients; a loss for each sample, ``[B]``. It may go through
            the batch in parts, where all of it does not fit, and ``torch.cat`` what it gets.
        engine: accounts for the steps, and says whether noise and batches are those of the secure mode.
        data_loader: Poisson batches are drawn of its samples; its batch size is the expected one.
        lr: learning rate η, from 0 up.
        noise_multiplier: standard deviation of the noise over C.
        max_grad_norm: C, what each s_i is clipped to.
        phi: φ, how far along z the two forwards are from the weights.
        expected_batch_size, sample_rate, noise_generator, public_state: as for
            :meth:`~dpfast.PrivacyEngine.make_private`.

    Returns:
        ``step``, to be called with each batch of the returned loader, and the loader.

    Raises:
        ValueError: an argument that cannot be served, with its name and what to do; nothing is changed.
        RuntimeError: from a step, where the model or the loss lets samples meet.
    """
    if isinstance(loss, _Loss) or not callable(loss):
        raise ValueError(
            f"loss={loss!r}: give a function of the model and the batch, such as lambda model, x, y: "
            f"F.cross_entropy(model(x), y, reduction='none')"
        )
    numbers = dict(lr=lr, phi=phi, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    numbers = _checked(numbers)
    _check_kind(model)
    check_model(model)
    check_public_state(public_state, model)
    loader, public = engine.sampled(
        data_loader,
        expected_batch_size=expected_batch_size,
        sample_rate=sample_rate,
        noise_generator=noise_generator,
    )
    step = ZerothOrder(model, loss, engine, public, noise_generator, tuple(public_state), **numbers)
    return step, watched(loader, step)


class ZerothOrder:
    """See :func:`zeroth_order`. A call takes one step, and returns its noisy value, which is private.

    Attributes:
        lr, phi, noise_multiplier, max_grad_norm: of the next step.
        nonfinite_samples: how many samples had an s_i that was not finite, and contributed 0.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        engine: PrivacyEngine,
        public: Public,
        noise_generator: torch.Generator | None,
        public_state: tuple[str, ...],
        *,
        lr: float,
        noise_multiplier: float,
        max_grad_norm: float,
        phi: float,
    ):
        self.model, self.loss, self.engine, self.public = model, loss, engine, public
        self.lr, self.noise_multiplier, self.max_grad_norm, self.phi = lr, noise_multiplier, max_grad_norm, phi
        self.noise = NoiseStream(noise_generator, engine.secure_mode)
        self.directions = NoiseStream(noise_generator)
        self.public_state = public_state
        self.nonfinite_samples = 0
        self.batches = self  # a watched loader tells these
        self._drawn: int | None = None  # samples of the batch that was given and not used yet
        self._kinds: set[Any] = set()  # of calls that were checked
        self._alike: set[int] = set()  # tensors that were alike for all samples in every check, which shows nothing
        self._schedule = Schedule()

    def give(self, samples: Any, batch: Any) -> None:
        """The loader hands out a batch."""
        self._drawn = len(samples.indices)

    def end_whole(self) -> None:
        """The loader has no more batches."""

    def __call__(self, *batch: Any) -> float:
        """Take a step on a batch, the last that the loader has given, with its tensors on whatever device.

        Returns:
            The noisy mean of the clipped s_i: the loss' slope along z.
        """
        vars(self).update(_checked({name: getattr(self, name) for name in NUMBERS}))  # which may have been set
        count = self._drawn
        if count is None:
            raise NothingToReleaseError(
                "zeroth_order: this step has no batch of its own. Take one from the loader that zeroth_order has "
                "returned for each step, and one step with each: ε is not for a second step with a batch"
            )
        self.noise.check()
        self.directions.check()
        check_model(self.model)
        if count:
            self._look(batch, count)
        params = _trained(self.model)
        index = {p: k for k, p in enumerate(self.model.parameters())}
        elements = sum([p.numel() for p in params])
        direction = Direction(params, index, self.directions.next(1.0, 1.0, elements, 1.0))
        at, total = 0.0, torch.zeros(1, dtype=torch.float64)
        try:
            # An empty batch goes the same way: how often a weight was rounded would tell that it was empty.
            at = self._move(direction, at, self.phi)
            with torch.random.fork_rng(_devices(params)):
                above = self._losses(batch, count) if count else total
            at = self._move(direction, at, -self.phi)
            if count:
                total += self._clipped_sum(above, self._losses(batch, count))
            self._account()
            self._drawn = None
            noise = self.noise.next(
                self.noise_multiplier, self.max_grad_norm, 1, 1 / float(self.public.expected_batch_size or 1)
            )
            ops.noisy_grad_([total], [total], [0], noise)
            value = total.item()
            at = self._move(direction, at, -self.lr * value)
        except BaseException:
            direction.move(-at)
            raise
        return value

    def _move(self, direction: Direction, at: float, to: float) -> float:
        """From ``w + at · z`` to ``w + to · z``."""
        direction.move(to - at)
        return to

    def _losses(self, batch: Sequence[Any], count: int) -> Tensor:
        """Losses of the samples, ``[count]``, without a graph."""
        with torch.no_grad():
            losses = self.loss(self.model, *batch)
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            found = f"of shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise LossCouplesError(
                f"zeroth_order: loss must return one loss for each sample, [B] = [{count}], and has returned {found}: "
                f"use reduction='none' and average over what belongs to one sample, as the losses of dpfast.losses do. "
                f"[{count}] is how many samples the loader has drawn: give the step all of its batch"
            )
        return losses.detach()

    def _clipped_sum(self, above: Tensor, below: Tensor) -> Tensor:
        """``Σ clip(s_i)``, float64; a sample whose s_i is not finite adds 0."""
        slopes = (above.double() - below.double()) / (2 * self.phi)
        finite = slopes.isfinite()
        self.nonfinite_samples += int((~finite).sum())
        clipped = slopes.clamp(-self.max_grad_norm, self.max_grad_norm)
        return torch.where(finite, clipped, 0.0).sum().cpu()

    def _account(self) -> None:
        """Before anything is released: it may refuse."""
        accountant = self.engine.accountant
        before = [*accountant.history]
        try:
            accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.public.sample_rate)
        except BaseException:
            accountant.history = before  # Opacus' GaussianAccountant takes it apart before it refuses
            raise

    def _look(self, batch: Any, count: int) -> None:
        """Whether each sample's loss is its own: before the first step, and at steps 2, 4, 8 and so on.

        And where the call is of another kind than those before, the first one of several samples, or the first in which
        an input differs between samples.
        """
        due = self._schedule.due()
        modes = tuple([module.training for module in self.model.modules()])
        this = kind(batch, {}, count, 0), modes, count > 1
        if not due and this in self._kinds and self._alike <= unvarying(batch, count, 0, self._alike):
            return
        check = LossCheck(self._losses, self.model, batch, count, self._schedule.steps, self._is_public)
        with self._schedule.checking(again=due):
            verdict = check.verdict()
        if isinstance(verdict.mixed, Left):
            raise LeftBehindError(f"zeroth_order: {verdict.mixed}")
        if verdict.mixed:
            raise SamplesMeetError(f"zeroth_order: {verdict.mixed}")
        alike = unvarying(batch, count, 0)
        self._alike = self._alike & alike if self._kinds else alike
        self._kinds.add(this)

    def _is_public(self, name: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.public_state)

    def __copy__(self) -> NoReturn:
        self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Copies of both kinds and ``pickle`` come here."""
        raise TypeError("a zeroth-order step has no copy: call zeroth_order with a copy of the model")


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be trained so as it is now.

    Raises:
        ValueError: names the parameter or module.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: it has no parameter with requires_grad, so that there is nothing to train")
    for name, p in model.named_parameters():
        if p.requires_grad and (p.dtype not in DTYPES or not p.is_contiguous()):
            what = "not contiguous" if p.dtype in DTYPES else str(p.dtype)
            raise ValueError(
                f"model: parameter {name!r} is {what}, and the way back from w + φz would not lead to w: keep what "
                f"trains in float32, as adapters beside frozen weights of 16 bits are, or freeze it with "
                f"requires_grad_(False)"
            )
    for name, module in model.named_modules():
        if normalises_over_batch(module):
            raise BatchStatisticsError(
                f"{name} ({type(module).__name__}) normalises every sample by the others in its batch: call eval() "
                f"on it, or replace it with opacus.validators.ModuleValidator.fix(model)"
            )


def _check_kind(model: nn.Module) -> None:
    if isinstance(model, AbstractGradSampleModule) or any(
        isinstance(vars(module).get("forward"), Forward) for module in model.modules()
    ):
        raise AlreadyPrivateError(
            "model: it is private already, for training with gradients: pass model.to_standard_module()"
        )
    if isinstance(model, (DistributedDataParallel, FSDPModule)):
        raise RanksError(
            f"model: it is a {type(model).__name__}, and ranks do not share a zeroth-order step: give the model "
            f"itself, on one device"
        )


def _checked(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The :data:`NUMBERS` as Python's, refused by name where they are none that can be used."""
    found = {name: plain(value) for name, value in numbers.items()}
    check_noise_multiplier(found["noise_multiplier"])
    found["max_grad_norm"] = check_threshold("max_grad_norm", found["max_grad_norm"])
    for name, least in (("lr", 0.0), ("phi", 2.0**-60)):
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 2.0**60:
            raise ValueError(
                f"{name}={value!r}: give a finite number that is {'not negative' if least == 0 else 'positive'}"
            )
    return found


def _trained(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def _devices(params: Sequence[Any]) -> list[int]:
    """The GPUs whose random numbers a forward may draw."""
    return sorted({p.device.index for p in params if p.device.type == "cuda"})
