"""``PrivacyEngine``: Opacus' engine with one more ``grad_sample_mode``, "fused", which is the default."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any, TypeGuard

import torch
from opacus import PrivacyEngine as OpacusEngine
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from opacus.validators.module_validator import ModuleValidator
from torch import nn, optim
from torch.utils.data import DataLoader

from dpfast import checkpoints
from dpfast.accounting.epsilon import check_budget, check_delta, epsilon_of, noise_multiplier_for
from dpfast.accounting.runs import shared_by
from dpfast.capture.refusals import refuse_gradient_hooks
from dpfast.capture.segments import PACKED
from dpfast.clipping.adaptive import AdaptiveClipping
from dpfast.clipping.functions import ClippingFunction, clipping_function
from dpfast.clipping.group_noise import GLOBAL
from dpfast.clipping.thresholds import Clipping
from dpfast.data.criterion import PerSampleCriterion
from dpfast.data.loaders import poisson_loader, public_numbers, watched
from dpfast.data.public_numbers import Public
from dpfast.data.sampling import PoissonBatches, check_shares, system_generator
from dpfast.data.unit import ROW, Unit
from dpfast.data.units import Units, asked_for
from dpfast.data.user_batches import UserBatches
from dpfast.distributed.ranks import Ranks, model_and_ranks
from dpfast.model.private_model import FusedHooks, FusedModule, check_public_state, parameter_names
from dpfast.model.unsupported import problems
from dpfast.native import allocator
from dpfast.ops.numbers import plain
from dpfast.optim.ascent import Ascent, check_ascent
from dpfast.optim.fused_update import why_not_fused
from dpfast.optim.noise_correction import check_noise_correction
from dpfast.optim.optimizer import FusedDPOptimizer
from dpfast.optim.step_checks import check_low_precision, check_noise_multiplier
from dpfast.planning.planner import Planner
from dpfast.refusals import AlreadyPrivateError, BudgetError, LoaderError, ParametersChangedError, UnservedModuleError

FUSED, GHOST = "fused", "ghost"
NO_SIZE = "data_loader does not say how large its batches are: give expected_batch_size=, which the update divides by"


class PrivacyEngine(OpacusEngine):
    """Drop-in for ``opacus.PrivacyEngine`` (1.6): same arguments, methods, accountants and checkpoints.

    ``grad_sample_mode="fused"`` (the default) clips per-sample gradients exactly in one backward pass, and ``"ghost"``
    does the same with a criterion, as in Opacus; every other mode is Opacus', untouched. (ε, δ) is that of the
    accountant for the sampled Gaussian mechanism with the given noise multiplier, sample rate and number of steps: one
    sample moves the clipped sum by at most ``max_grad_norm`` (L2), and noise of ``noise_multiplier · max_grad_norm`` is
    added once a step.

    On several ranks give ``make_private`` the model in ``DistributedDataParallel``, on each rank, and use the model
    that it returns. A step is then the step of one process on the union of the ranks' batches: the same noise, bit for
    bit, and the same sums but for the order of adding up. The loader's batch size and the expected batch size are
    those of all ranks together, unless the loader has a ``DistributedSampler``, whose batch size is each rank's.
    A model that was sharded by ``fully_shard`` is given as it is: every rank keeps its shard of the clipped sums, makes
    its shard of the noise, and has its shard of the optimizer's state.

    Example:
        >>> engine = PrivacyEngine()
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False):
        """As in Opacus, but for ``secure_mode=True``, which needs no further package in the fused mode.

        The noise is then ChaCha20's, keyed by the operating system, and guarded against attacks on floating-point
        noise: see :class:`dpfast.noise.stream.NoiseStream`. Batches are drawn by torchcsprng if it is installed, else
        by torch's Mersenne Twister with its whole state from the operating system.
        """
        with warnings.catch_warnings():
            if secure_mode:
                warnings.filterwarnings("ignore", "Secure RNG turned off")
            super().__init__(accountant=accountant)
        self.unit: Unit | None = None  # what ε is for, once a model was made private
        self.secure_mode = secure_mode
        if secure_mode:
            self.secure_rng = system_generator()

    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer | None = None,
        data_loader: DataLoader | None = None,
    ) -> bool:
        """Whether the fused mode can train ``module``."""
        return not problems(module)

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer | None = None,
        data_loader: DataLoader | None = None,
    ) -> None:
        """Like :meth:`is_compatible`, but raises.

        Raises:
            UnsupportedModuleError: names every module that cannot be trained, why, and what to do.
        """
        if found := problems(module):
            raise UnservedModuleError("\n".join(found))

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float] | Mapping[str, float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str | Sequence[str] = "flat",
        clipping_fn: str | ClippingFunction = "abadi",
        group_noise: str | Sequence[float] | Mapping[str, float] = "global",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str | None = None,
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        keep_grad_samples: bool = False,
        max_physical_batch_size: int | None = None,
        low_precision: str = "nearest",
        noise_correction: bool | float = False,
        ascent: Ascent | None = None,
        memory_budget: int | float | None = None,
        plan: Mapping[str, str] | None = None,
        public_state: Sequence[str] = (),
        expected_batch_size: int | float | None = None,
        sample_rate: float | None = None,
        units: Any = None,
        rows_per_unit: int | None = None,
        augmentations: int = 1,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Make training objects private; see ``opacus.PrivacyEngine.make_private`` for what is not said here.

        The sample rate is public: sampler, accountant and update go by it. By default it is one over the loader's
        number of batches, so that the size of the data set N is public too, up to a batch. The guarantee is then that
        of two data sets of the same N, one of which has a sample that contributes nothing in place of the other's.
        Where N must not show, give ``sample_rate`` and ``expected_batch_size`` as numbers that were chosen without
        looking at it.

        Args:
            criterion: a loss function. With ``grad_sample_mode="ghost"`` or ``"fused"`` a criterion comes back too, as
                in Opacus' ghost mode: its result has ``backward()``, ``item()`` and arithmetic on per-sample losses.
                Without a mode it changes nothing, as in Opacus.
            max_grad_norm: C; with ``clipping="per_layer"`` a list (one C for each of the optimizer's parameters) or
                a dict of parameter-name prefixes to C.
            clipping: ``"flat"`` (one norm over all parameters), ``"per_layer"`` (one number is shared out, C/√M each),
                a list of parameter-name prefixes (groups, C/√M each), or ``"adaptive"`` (C follows a quantile of the
                norms; give the arguments of :class:`dpfast.clipping.adaptive.AdaptiveClipping` too, as in Opacus; where
                ``max_grad_norm`` is a list or a dict as for ``"per_layer"``, each group's C does).
            clipping_fn: from norms to factors: ``"abadi"``, ``"global"``, ``"automatic"`` (AUTO-S), ``"normalised"``
                (AUTO-V), ``"psac"``, or an object of :mod:`dpfast.clipping.functions`.
            group_noise: γ_r, what each group's noise is scaled by: its standard deviation is ``noise_multiplier · γ_r``
                before division. ``"global"`` (``√Σ C_r²`` for all), ``"equal"`` (``C_r √R`` of R groups), or numbers: a
                list, or a dict with the names of the groups. ``Σ (C_r / γ_r)²`` may be at most 1: see
                :mod:`dpfast.clipping.group_noise`.
            grad_sample_mode: ``None`` or ``"fused"``; ``"ghost"``, which is served by the fused mode with Opacus' four
                values; or another mode of Opacus, which runs as it does there.
            keep_grad_samples: whether ``p.grad_sample`` and ``optimizer.grad_samples`` hold the per-sample gradients
                ``[B, *p.shape]`` of each backward pass until ``zero_grad()``. It takes the memory of Opacus' "hooks"
                mode. They are neither clipped nor noised.
            wrap_model: False attaches to ``module`` in place and returns the hooks object, with ``cleanup()``.
            module: the model; or the model in torch's ``DistributedDataParallel`` or Opacus' own, or after
                ``torch.distributed.fsdp.fully_shard``.
            max_physical_batch_size: 1 trains one sample at a time, through
                ``BatchMemoryManager(max_physical_batch_size=1)``. No layer is tapped then: ordinary gradients are
                per-sample gradients, which is exact for any model and any loss of one sample, also where no
                per-sample path serves them. Larger batches are refused.
            noise_generator: what the key of the noise is made of, which is else the operating system's: it alone
                repeats a run's noise, for experiments on public data, as whoever knows its seed can take the noise
                off. ``torch.manual_seed`` does not touch the noise. It does decide the Poisson batches (or the
                loader's own generator does), as in Opacus: to whoever knows that seed the batches are known, and ε is
                what it is without sampling. Refused in secure mode, in which no seed decides anything.
            low_precision: how bfloat16 and float16 parameters take an update: rounded to the ``"nearest"``, with
                ``"stochastic"`` rounding, or through a float32 ``"master"`` copy in the optimizer's state.
            noise_correction: True takes the noise's variance off the second moments of torch's Adam or AdamW, down to a
                least γ' of 5e-8; a number is another γ'. ε does not change, accuracy may, either way: see
                :mod:`dpfast.optim.noise_correction`.
            ascent: where a step takes its gradients, if not at the weights: ``dpfast.DPSAT(rho=0.03)`` or another of
                :mod:`dpfast.optim.ascent`. ε does not change.
            memory_budget, plan: what per-sample gradients may take, and layers whose way is not the planner's to
                choose: see :class:`dpfast.planning.planner.Planner`. ``dpfast.explain`` shows the plan.
            public_state: names of buffers and parameters, or of modules that hold them, which forwards may change by
                the samples. They are released without noise, and the guarantee does not cover them.
            expected_batch_size: what the update divides by under ``loss_reduction="mean"``; the loader's batch size if
                None (of all ranks together).
            sample_rate: probability of a sample to be in a batch, above 0 and up to 1; an epoch then has
                ``round(1 / sample_rate)`` batches. One over the loader's number of batches if None. Without Poisson
                sampling it is what the accountant is told.
            data_loader: under Poisson sampling its batches are drawn from the samples that its sampler would give in an
                epoch, each with the same probability. Without, a batch that holds a sample twice is refused.
            units: what is protected and clipped as one, where that is not a row: an id for each sample of the data set
                (a list or a tensor), or the name of the column or key in which samples have theirs, such as
                ``"user_id"``. Rows with equal ids are one unit. Poisson sampling then draws units, and a unit's
                gradient, the mean over its rows in the batch, is clipped once. The loader's batch size, the expected
                batch size, the sample rate and N all count units. See ``docs/units.md``.
                ``"packed"`` is for rows that hold several samples, as Transformers' ``DataCollatorWithFlattening``
                makes them: each sample is drawn, clipped and counted by itself. See ``docs/units.md``.
            rows_per_unit: with ``units``, the most rows that a step takes of a unit, drawn anew each time; a public
                number.
            augmentations: how often the data set is asked for each sample of a batch, so that its random transforms
                are drawn as often. These rows stand one after the other, and the mean of their gradients is clipped
                once (De et al. 2022). ε does not change.

        Returns:
            ``(module, optimizer, data_loader)``, or ``(module, optimizer, criterion, data_loader)``.

        Raises:
            ValueError, UnsupportedModuleError: before anything is changed; module, optimizer and loader are as they
                were.
        """
        if self._is_opacus(grad_sample_mode):
            fused_only: dict[str, Any] = dict(
                memory_budget=memory_budget, plan=plan, public_state=public_state or None, ascent=ascent
            )
            fused_only |= dict(keep_grad_samples=keep_grad_samples or None)
            fused_only |= dict(expected_batch_size=expected_batch_size, sample_rate=sample_rate)
            fused_only |= dict(clipping_fn=None if clipping_fn == "abadi" else clipping_fn)
            fused_only |= dict(noise_correction=noise_correction or None)
            fused_only |= dict(
                group_noise=None if isinstance(group_noise, str) and group_noise == GLOBAL else group_noise
            )
            fused_only |= dict(units=units, rows_per_unit=rows_per_unit)
            fused_only |= dict(augmentations=None if augmentations == 1 else augmentations)
            self._check_mode_of_opacus(grad_sample_mode, module, fused_only)
            self._check_unit(ROW)
            self.unit = ROW
            return super().make_private(
                module=module,
                optimizer=optimizer,
                criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
                data_loader=data_loader,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                batch_first=batch_first,
                loss_reduction=loss_reduction,
                poisson_sampling=poisson_sampling,
                clipping=clipping,
                noise_generator=noise_generator,
                grad_sample_mode=grad_sample_mode,
                wrap_model=wrap_model,
                rand_on_empty=rand_on_empty,
                **kwargs,
            )
        noise_multiplier = plain(noise_multiplier)
        adaptive = _adaptive(kwargs) if clipping == "adaptive" else None
        if kwargs:
            raise TypeError(f"make_private got unexpected arguments in the fused mode: {sorted(kwargs)}")
        self._check_generator(noise_generator)
        if max_physical_batch_size not in (None, 1):
            raise ValueError(
                f"max_physical_batch_size={max_physical_batch_size!r}: only 1 changes anything here; to split batches "
                f"into larger pieces use BatchMemoryManager alone"
            )
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: use 'mean' or 'sum'")
        check_noise_multiplier(noise_multiplier)
        asked = asked_for(
            units,
            rows_per_unit,
            augmentations,
            poisson_sampling=poisson_sampling,
            rand_on_empty=rand_on_empty,
            alone=max_physical_batch_size == 1,
        )
        wrapped = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        check_low_precision(low_precision, wrapped)
        check_ascent(ascent, wrapped, low_precision)
        optimizer = wrapped
        module, ranks = model_and_ranks(module)
        if isinstance(module, FusedModule) and ranks.world_size == 1:  # it was taken apart when it was made private
            ranks = module.clipped_sum.ranks
        if ascent is not None and ranks.sharded:
            raise ValueError(f"ascent={ascent!r}: a sharded model has no ascent; use DistributedDataParallel")
        if keep_grad_samples and (ranks.sharded or max_physical_batch_size == 1):
            raise ValueError(
                "keep_grad_samples=True: a model that is sharded, or trained one sample at a time, has no per-sample "
                "gradients to keep; leave it out"
            )
        packed = isinstance(units, str) and units == PACKED
        if packed and (keep_grad_samples or not batch_first):
            what = "keep_grad_samples" if keep_grad_samples else "batch_first=False"
            raise ValueError(
                f"units={PACKED!r} with {what}: rows that hold several samples do not go with it; leave it out"
            )
        model = module._module if isinstance(module, FusedModule) else module
        refuse_gradient_hooks(parameter_names(model))
        filters, names = ascent is not None and ascent.filters, parameter_names(model)
        thresholds = self._thresholds(model, optimizer, clipping, max_grad_norm)
        check_noise_correction(noise_correction, optimizer, names, filters=filters, why_not=why_not_fused(optimizer))
        thresholds.share_noise(group_noise)
        if adaptive is not None:
            adaptive.of_sums(noise_multiplier, len(thresholds.thresholds))
        thresholds.function = clipping_function(clipping_fn)
        self._check_model(module, max_physical_batch_size)
        planner = Planner(memory_budget, {"": "instantiate"} if keep_grad_samples and plan is None else plan)
        if unknown := set(planner.pins) - {name for name, _ in model.named_modules()}:
            raise ValueError(f"plan names {sorted(unknown)}, which are no modules of the model")
        check_public_state(public_state, model)
        if grad_sample_mode == GHOST and criterion is None:
            criterion = nn.CrossEntropyLoss()  # as in Opacus
        gives_criterion = grad_sample_mode is not None and criterion is not None
        per_sample = PerSampleCriterion(criterion, loss_reduction) if gives_criterion else None
        public, drawn = public_numbers(data_loader, poisson_sampling, expected_batch_size, sample_rate, asked)
        if public.expected_batch_size is None and (loss_reduction == "mean" or adaptive is not None):
            raise LoaderError(NO_SIZE)
        unit = drawn.unit if isinstance(drawn, Units) else getattr(data_loader.batch_sampler, "unit", ROW)
        self._check_unit(unit)
        shared_by(ranks, self.accountant)
        check_shares(data_loader, ranks, poisson_sampling, (public, drawn))
        self.unit = unit
        private_loader = self._private_loader(data_loader, drawn, public, rand_on_empty, ranks)
        hooks = self._attach(module, wrap_model, batch_first, loss_reduction, max_physical_batch_size, ranks)
        hooks.clipped_sum.planner = planner
        hooks.clipped_sum.by_unit = isinstance(private_loader.batch_sampler, UserBatches)
        hooks.clipped_sum.packed = packed
        hooks.clipped_sum.keeps_grad_samples = keep_grad_samples
        if any(p.device.type == "cpu" for p in model.parameters()):
            allocator.keep_freed_memory()
        hooks.public_state = tuple(public_state)
        if per_sample is not None:
            per_sample.recorder = hooks.clipped_sum
        if poisson_sampling or isinstance(data_loader.batch_sampler, (PoissonBatches, UniformWithReplacementSampler)):
            hooks.forbid_grad_accumulation()  # a sample may be in two of such batches
        else:
            hooks.allow_grad_accumulation()
        private_optimizer = FusedDPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            clipping=thresholds,
            clipped_sum=hooks.clipped_sum,
            expected_batch_size=public.expected_batch_size,  # type: ignore[arg-type]
            loss_reduction=loss_reduction,
            generator=noise_generator,
            secure_mode=self.secure_mode,
            low_precision=low_precision,
            noise_correction=noise_correction,
            adaptive=adaptive,
            ascent=ascent,
            ranks=ranks,
        )
        private_optimizer.accounting = self.accountant.get_optimizer_hook_fn(sample_rate=public.sample_rate)
        private_loader = watched(private_loader, hooks.clipped_sum)
        if per_sample is None:
            return hooks, private_optimizer, private_loader
        return hooks, private_optimizer, per_sample, private_loader

    def sampled(
        self,
        data_loader: DataLoader,
        *,
        expected_batch_size: int | float | None = None,
        sample_rate: float | None = None,
        noise_generator: torch.Generator | None = None,
    ) -> tuple[DataLoader, Public]:
        """A loader of Poisson batches of rows, for a mechanism of another kind, and the public numbers.

        Raises:
            ValueError: as from :meth:`make_private`, before anything is changed.
        """
        self._check_generator(noise_generator)
        public, drawn = public_numbers(data_loader, True, expected_batch_size, sample_rate)
        if public.expected_batch_size is None:
            raise LoaderError(NO_SIZE)
        unit = getattr(data_loader.batch_sampler, "unit", ROW)
        if not unit.is_like(ROW):
            raise LoaderError(
                f"data_loader: its batches are of units ({unit}): give the loader of rows that it was made of"
            )
        self._check_unit(ROW)
        loader = self._private_loader(data_loader, drawn, public, False, Ranks())
        self.unit = ROW
        return loader, public

    def _is_opacus(self, mode: str | None) -> TypeGuard[str]:
        """Whether ``mode`` runs as it does in Opacus, and not fused."""
        return mode not in (None, FUSED, GHOST)

    def _check_mode_of_opacus(self, mode: str, module: nn.Module, fused_only: Mapping[str, Any]) -> None:
        """What Opacus' own modes cannot serve."""
        if given := [name for name, value in fused_only.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: an argument of the fused mode, not of {mode!r}")
        if isinstance(module, FusedModule):
            raise AlreadyPrivateError(
                f"grad_sample_mode={mode!r} with a model that is private in the fused mode already: "
                f"pass module.to_standard_module()"
            )
        if self.secure_mode and importlib.util.find_spec("torchcsprng") is None:
            raise ImportError(
                f"secure_mode=True with grad_sample_mode={mode!r}: Opacus' modes need the package "
                f"torchcsprng; the fused mode has secure noise of its own"
            )
        ModuleValidator.validate(module, strict=True)

    def _check_unit(self, unit: Unit) -> None:
        """Steps that protect rows and steps that protect users have no ε together."""
        if self.unit is not None and len(self.accountant) and not unit.is_like(self.unit):
            raise BudgetError(
                f"units=, data_loader: ε would be for {unit}, and this engine has accounted for steps whose ε is for "
                f"{self.unit}: no ε holds for both. Give this training a PrivacyEngine of its own"
            )

    def _check_generator(self, noise_generator: Any) -> None:
        if noise_generator is not None and not isinstance(noise_generator, torch.Generator):
            raise ValueError(
                f"noise_generator={noise_generator!r}: give a torch.Generator, such as "
                f"torch.Generator().manual_seed(seed)"
            )
        if noise_generator is not None and self.secure_mode:
            raise ValueError("noise_generator: passing a seed is prohibited in secure mode")

    def _private_loader(
        self, data_loader: DataLoader, drawn: Any, public: Any, rand_on_empty: bool, ranks: Ranks
    ) -> DataLoader:
        """The loader to train with: Poisson batches of the samples ``drawn`` from, else the given one's own batches."""
        if drawn is not None:
            loader = poisson_loader(
                data_loader,
                drawn,
                public,
                secure_generator=self.secure_rng,
                rand_on_empty=rand_on_empty,
                ranks=ranks,
            )
            self._note_dataset(data_loader.dataset)
            return loader
        if isinstance(data_loader.batch_sampler, PoissonBatches):  # they are private as they are
            return data_loader
        return self._prepare_data_loader(data_loader, poisson_sampling=False, distributed=False)

    def make_private_with_epsilon(
        self,
        *,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        grad_sample_mode: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """:meth:`make_private` with the noise multiplier that spends ``target_epsilon`` in ``epochs`` epochs.

        Other arguments are those of :meth:`make_private`; ``epsilon_tolerance`` is how much may be left over.
        :meth:`get_epsilon` is at most ``target_epsilon`` after all steps of ``epochs`` epochs of the private loader, at
        the rate at which it samples.

        Raises:
            ValueError: also where ``target_epsilon`` cannot be met; nothing is changed.
        """
        check_budget("target_epsilon", target_epsilon)
        check_delta("target_delta", target_delta)
        check_budget("epochs", epochs)
        search = {name: kwargs.pop(name) for name in ("epsilon_tolerance",) if name in kwargs}

        def noise_multiplier_at(rate: float, steps: int) -> float:
            return noise_multiplier_for(
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sample_rate=rate,
                steps=math.ceil(epochs * steps),
                accountant=self.accountant.mechanism(),
                **search,
            )

        if not self._is_opacus(grad_sample_mode):
            asked = {name: kwargs.get(name) for name in ("expected_batch_size", "sample_rate")}
            poisson = kwargs.get("poisson_sampling", True)
            of_units = asked_for(
                kwargs.get("units"),
                kwargs.get("rows_per_unit"),
                kwargs.get("augmentations", 1),
                poisson_sampling=poisson,
                rand_on_empty=kwargs.get("rand_on_empty", False),
                alone=kwargs.get("max_physical_batch_size") == 1,
            )
            public, drawn = public_numbers(data_loader, poisson, **asked, asked=of_units)
            if of_units is not None and of_units.units is not None:
                kwargs["units"] = drawn  # ids are read from the data set once
            rate, steps = public.sample_rate, public.steps
        elif not (steps := len(data_loader)):
            raise LoaderError("data_loader has no batches: its data set has fewer samples than a batch, and drop_last")
        else:
            rate = 1 / steps
        if len(self.accountant) > 0:
            warnings.warn(
                "make_private_with_epsilon with privacy budget already spent: the noise multiplier assumes a fresh "
                "start, so the overall budget will be higher",
                stacklevel=2,
            )
        made = self.make_private(
            noise_multiplier=noise_multiplier_at(rate, steps),
            data_loader=data_loader,
            grad_sample_mode=grad_sample_mode,
            **kwargs,
        )
        # Opacus' own sampler gives int(1 / (1 / n)) batches, which may be n - 1, and its modes account for that rate.
        if self._is_opacus(grad_sample_mode) and len(made[-1]) != steps:
            made[1].noise_multiplier = noise_multiplier_at(1 / len(made[-1]), len(made[-1]))
        return made

    def get_epsilon(self, delta: float) -> float:
        """ε of all steps so far at ``delta``; 0 before the first. What it is for is in ``engine.unit``: "one row".

        Where the accountant fails, or would take minutes, it is an upper bound: see
        :func:`dpfast.accounting.epsilon.epsilon_of`.
        """
        return epsilon_of(self.accountant, delta)

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: Any,
        optimizer: DPOptimizer | None = None,
        checkpoint_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in Opacus; the fused mode's checkpoint also holds the plan, and states of what the fused mode adds.

        The file is whole or not there, and its owner alone can read it (mode 0600). It holds no key of the noise: see
        :meth:`load_checkpoint`.

        Raises:
            ValueError: ``checkpoint_dict`` or a scheduler has an object that :meth:`load_checkpoint` would refuse: one
                that is neither a tensor nor plain Python. What was at ``path`` stays.
        """
        held = {**(checkpoint_dict or {}), **checkpoints.contents(module, optimizer, self.accountant, self.unit or ROW)}

        def save(file: Any) -> None:
            super(PrivacyEngine, self).save_checkpoint(
                path=file, module=module, optimizer=optimizer, checkpoint_dict=held, **kwargs
            )

        checkpoints.write(path, save)

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: Any,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As in Opacus: model, optimizer, schedulers and accountant go on from the checkpoint.

        The noise does not: the next step draws a new key from the operating system, whatever ``noise_generator`` was
        given. A checkpoint knows neither the loader nor its workers' random state, so that the batches are other ones,
        and the same noise on other batches would lay bare what it hides. (``DPTrainer`` and the ``finetune`` command
        restore their batches, and go on bit for bit.)

        Steps that this engine has accounted for and the checkpoint has not stay accounted for. The file is read with
        ``weights_only=True``.

        Raises:
            ValueError: an entry is malformed, or the file holds more than tensors and plain Python; nothing is changed.
        """
        held = checkpoints.read(path, **(torch_load_kwargs or {}))
        unit = checkpoints.unit_of(held, self.unit)
        rest = checkpoints.take_over(
            held,
            accountant=self.accountant,
            module=module,
            optimizer=optimizer,
            module_load_dict_kwargs=module_load_dict_kwargs,
            noise_scheduler=noise_scheduler,
            grad_clip_scheduler=grad_clip_scheduler,
        )
        self.unit = unit
        return rest

    def _note_dataset(self, dataset: Any) -> None:
        if self.dataset is None:
            self.dataset: Any = dataset
        elif self.dataset != dataset:
            warnings.warn(
                "PrivacyEngine has accounted for another data set before: accounting is per data set, so give each an "
                "engine of its own, unless both are the same data",
                stacklevel=3,
            )

    def _thresholds(
        self, model: nn.Module, optimizer: optim.Optimizer, clipping: str | Sequence[str], max_grad_norm: Any
    ) -> Clipping:
        names = parameter_names(model)
        params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        if any(p not in names for p in params):
            raise ParametersChangedError("Module parameters are different than optimizer Parameters")
        trained = {names[p]: p for p in params if p.requires_grad}
        several = isinstance(plain(max_grad_norm), (Sequence, Mapping))
        if clipping == "flat" or (clipping == "adaptive" and not several):
            return Clipping.flat(max_grad_norm)
        if clipping in ("per_layer", "adaptive"):
            return Clipping.per_layer(max_grad_norm, trained)
        if isinstance(clipping, Sequence) and not isinstance(clipping, str) and clipping:
            return Clipping.equal_shares(max_grad_norm, clipping, trained)
        raise ValueError(
            f"clipping={clipping!r}: the fused mode has 'flat', 'per_layer', 'adaptive' and lists of parameter-name "
            f"prefixes; other styles need an Opacus mode such as grad_sample_mode='hooks'"
        )

    def _check_model(self, module: nn.Module, max_physical_batch_size: int | None) -> None:
        if isinstance(module, FusedModule):
            return
        if isinstance(module, AbstractGradSampleModule):
            raise AlreadyPrivateError(
                f"module is a {type(module).__name__} of another mode: pass module.to_standard_module()"
            )
        if found := problems(module, served_only=max_physical_batch_size != 1):
            raise UnservedModuleError("\n".join(found))

    def _attach(
        self,
        module: nn.Module,
        wrap_model: bool,
        batch_first: bool,
        loss_reduction: str,
        max_physical_batch_size: int | None,
        ranks: Ranks,
    ) -> FusedHooks:
        if isinstance(module, FusedModule):
            if (module.batch_first, module.loss_reduction) != (batch_first, loss_reduction):
                raise AlreadyPrivateError(
                    f"module is private already, with batch_first={module.batch_first}, "
                    f"loss_reduction={module.loss_reduction!r}; pass module.to_standard_module() to change that"
                )
            return module
        cls = FusedModule if wrap_model else FusedHooks
        return cls(
            module,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            max_physical_batch_size=max_physical_batch_size,
            ranks=ranks,
        )


def _adaptive(arguments: dict[str, Any]) -> AdaptiveClipping:
    """Adaptive clipping of those of the ``arguments`` that are its own, which are taken out."""
    names = [field.name for field in fields(AdaptiveClipping)]
    if missing := [name for name in names if name not in arguments]:
        raise ValueError(f"clipping='adaptive' needs {', '.join(missing)}")
    return AdaptiveClipping(**{name: plain(arguments.pop(name)) for name in names})
