"""``PrivacyEngine``: Opacus' engine with one more ``grad_sample_mode``, "fused", which is the default."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

import opacus
import torch
from opacus.accountants.utils import get_noise_multiplier
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators.errors import UnsupportedModuleError
from opacus.validators.module_validator import ModuleValidator
from torch import nn, optim
from torch.utils.data import DataLoader

from dpfast.clipping import Clipping
from dpfast.clipping_functions import ClippingFunction, clipping_function
from dpfast.compatibility import problems
from dpfast.criterion import PerSampleCriterion
from dpfast.grad_sample import FusedHooks, FusedModule, parameter_names
from dpfast.noise import check_state
from dpfast.optim.adaptive import AdaptiveClipping
from dpfast.optim.ascent import Ascent, check_ascent
from dpfast.optim.optimizer import FusedDPOptimizer, check_low_precision, check_noise_multiplier
from dpfast.planner import Planner
from dpfast.planner import check_state as check_plan
from dpfast.ranks import Ranks, apart
from dpfast.sampling import PoissonBatches, check_shares, shared_out, system_generator

FUSED = "fused"
# In a checkpoint:
NOISE_STATE, PLAN, THRESHOLDS = "noise_state_dict", "plan_state_dict", "max_grad_norms"
ASCENT = "ascent_state_dict"


class PrivacyEngine(opacus.PrivacyEngine):
    """Drop-in for ``opacus.PrivacyEngine`` (1.6): same arguments, methods, accountants and checkpoints.

    ``grad_sample_mode="fused"`` (the default) clips per-sample gradients exactly in one backward pass; every other
    mode is Opacus', untouched. (ε, δ) is that of the accountant for the sampled Gaussian mechanism with the given
    noise multiplier, sample rate and number of steps: one sample moves the clipped sum by at most
    ``max_grad_norm`` (L2), and noise of ``noise_multiplier · max_grad_norm`` is added once a step.

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
        noise: see :class:`dpfast.noise.NoiseStream`. Batches are drawn by torchcsprng if it is installed, else by
        torch's Mersenne Twister with its whole state from the operating system.
        """
        with warnings.catch_warnings():
            if secure_mode:
                warnings.filterwarnings("ignore", "Secure RNG turned off")
            super().__init__(accountant=accountant)
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
            raise UnsupportedModuleError("\n".join(found))

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
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = FUSED,
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        max_physical_batch_size: int | None = None,
        low_precision: str = "nearest",
        ascent: Ascent | None = None,
        memory_budget: int | float | None = None,
        plan: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Make training objects private; see ``opacus.PrivacyEngine.make_private`` for what is not said here.

        Args:
            criterion: if given, the fused mode returns it too, as Opacus' ghost mode does: its result has
                ``backward()``, ``item()`` and arithmetic on per-sample losses.
            max_grad_norm: C; with ``clipping="per_layer"`` a list (one C for each of the optimizer's parameters) or
                a dict of parameter-name prefixes to C.
            clipping: ``"flat"`` (one norm over all parameters), ``"per_layer"`` (one number is shared out, C/√M each),
                a list of parameter-name prefixes (groups, C/√M each), or ``"adaptive"`` (C follows a quantile of the
                norms; give the arguments of :class:`dpfast.optim.adaptive.AdaptiveClipping` too, as in Opacus).
            clipping_fn: from norms to factors: ``"abadi"``, ``"global"``, ``"automatic"`` (AUTO-S), ``"normalised"``
                (AUTO-V), ``"psac"``, or an object of :mod:`dpfast.clipping_functions`.
            grad_sample_mode: ``"fused"``, or any mode of Opacus.
            wrap_model: False attaches to ``module`` in place and returns the hooks object, with ``cleanup()``.
            module: the model; or the model in torch's ``DistributedDataParallel`` or Opacus' own, or after
                ``torch.distributed.fsdp.fully_shard``.
            max_physical_batch_size: 1 accepts a model that no per-sample path serves; it must then be trained one
                sample at a time, through ``BatchMemoryManager(max_physical_batch_size=1)``, which is exact for any
                model.
            noise_generator: where the key of the noise is drawn from (once); ``torch.manual_seed`` repeats a run
                without it. Refused in secure mode, whose keys come from the operating system.
            low_precision: how bfloat16 and float16 parameters take an update: rounded to the ``"nearest"``, with
                ``"stochastic"`` rounding, or through a float32 ``"master"`` copy in the optimizer's state.
            ascent: where a step takes its gradients, if not at the weights: ``dpfast.DPSAT(rho=0.03)`` or another of
                :mod:`dpfast.optim.ascent`. ε does not change.
            memory_budget, plan: what per-sample gradients may take, and layers whose way is not the planner's to
                choose: see :class:`dpfast.planner.Planner`. ``dpfast.explain`` shows the plan.

        Returns:
            ``(module, optimizer, data_loader)``, or ``(module, optimizer, criterion, data_loader)``.

        Raises:
            ValueError, UnsupportedModuleError: before anything is changed; module, optimizer and loader are as they
                were.
        """
        if grad_sample_mode != FUSED:
            if memory_budget is not None or plan is not None or clipping_fn != "abadi":
                raise ValueError(
                    f"memory_budget, plan and clipping_fn are of the fused mode, not of {grad_sample_mode!r}"
                )
            if ascent is not None:
                raise ValueError(f"ascent={ascent!r}: the fused mode has it, not {grad_sample_mode!r}")
            if isinstance(module, FusedModule):
                raise ValueError(
                    f"grad_sample_mode={grad_sample_mode!r} with a model that is private in the fused mode already: "
                    f"pass module.to_standard_module()"
                )
            if self.secure_mode and importlib.util.find_spec("torchcsprng") is None:
                raise ImportError(
                    f"secure_mode=True with grad_sample_mode={grad_sample_mode!r}: Opacus' modes need the package "
                    f"torchcsprng; the fused mode has secure noise of its own"
                )
            ModuleValidator.validate(module, strict=True)
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
        adaptive = None
        if clipping == "adaptive":
            names = [field.name for field in fields(AdaptiveClipping)]
            if missing := [name for name in names if name not in kwargs]:
                raise ValueError(f"clipping='adaptive' needs {', '.join(missing)}")
            adaptive = AdaptiveClipping(**{name: kwargs.pop(name) for name in names})
            adaptive.of_sums(noise_multiplier)
        if kwargs:
            raise TypeError(f"make_private got unexpected arguments in the fused mode: {sorted(kwargs)}")
        if noise_generator is not None and self.secure_mode:
            raise ValueError("noise_generator: passing a seed is prohibited in secure mode")
        if max_physical_batch_size not in (None, 1):
            raise ValueError(
                f"max_physical_batch_size={max_physical_batch_size!r}: only 1 changes anything here; to split batches "
                f"into larger pieces use BatchMemoryManager alone"
            )
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: use 'mean' or 'sum'")
        check_noise_multiplier(noise_multiplier)
        wrapped = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        check_low_precision(low_precision, wrapped)
        check_ascent(ascent, wrapped, low_precision)
        optimizer = wrapped
        module, ranks = apart(module)
        if isinstance(module, FusedModule) and ranks.world_size == 1:  # it was taken apart when it was made private
            ranks = module.book.ranks
        if ascent is not None and ranks.sharded:
            raise ValueError(f"ascent={ascent!r}: a sharded model has no ascent; use DistributedDataParallel")
        model = module._module if isinstance(module, FusedModule) else module
        thresholds = self._thresholds(model, optimizer, clipping, max_grad_norm)
        thresholds.function = clipping_function(clipping_fn)
        self._check_model(module, max_physical_batch_size)
        planner = Planner(memory_budget, plan)
        if unknown := set(planner.pins) - {name for name, _ in model.named_modules()}:
            raise ValueError(f"plan names {sorted(unknown)}, which are no modules of the model")
        per_sample = None if criterion is None else PerSampleCriterion(criterion, loss_reduction)
        if not len(data_loader):
            raise ValueError("data_loader has no batches: its data set has fewer samples than a batch, and drop_last")
        # Opacus takes int(N · (1/steps)), which floats may make one less than N/steps, down to 0.
        expected_batch_size = len(data_loader.dataset) // len(data_loader)  # type: ignore[arg-type]
        check_shares(data_loader, ranks, poisson_sampling)
        private_loader = data_loader
        if not isinstance(data_loader.batch_sampler, PoissonBatches):  # they are private as they are
            private_loader = self._prepare_data_loader(
                data_loader,
                distributed=False,
                poisson_sampling=poisson_sampling,
                batch_first=batch_first,
                rand_on_empty=rand_on_empty,
            )
            if poisson_sampling and ranks.world_size > 1:
                private_loader = shared_out(private_loader, ranks, self.secure_mode)

        hooks = self._attach(module, wrap_model, batch_first, loss_reduction, max_physical_batch_size, ranks)
        hooks.book.planner = planner
        if per_sample is not None:
            per_sample.recorder = hooks.book
        if poisson_sampling or isinstance(data_loader.batch_sampler, PoissonBatches):
            hooks.forbid_grad_accumulation()  # a sample may be in two of such batches
        else:
            hooks.allow_grad_accumulation()
        private_optimizer = FusedDPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            clipping=thresholds,
            book=hooks.book,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=noise_generator,
            secure_mode=self.secure_mode,
            low_precision=low_precision,
            adaptive=adaptive,
            ascent=ascent,
            ranks=ranks,
        )
        private_optimizer.accounting = self.accountant.get_optimizer_hook_fn(sample_rate=1 / len(private_loader))
        private_optimizer.attach_step_hook(private_optimizer.accounting)
        if per_sample is None:
            return hooks, private_optimizer, private_loader
        return hooks, private_optimizer, per_sample, private_loader

    def make_private_with_epsilon(
        self,
        *,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        grad_sample_mode: str = FUSED,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """:meth:`make_private` with the noise multiplier that spends ``target_epsilon`` in ``epochs`` epochs.

        Other arguments are those of :meth:`make_private`; ``epsilon_tolerance`` goes to the search.
        """
        common = dict(data_loader=data_loader, grad_sample_mode=grad_sample_mode, **kwargs)
        if grad_sample_mode != FUSED:
            return super().make_private_with_epsilon(
                target_epsilon=target_epsilon, target_delta=target_delta, epochs=epochs, **common
            )
        if len(self.accountant) > 0:
            warnings.warn(
                "make_private_with_epsilon with privacy budget already spent: the noise multiplier assumes a fresh "
                "start, so the overall budget will be higher",
                stacklevel=2,
            )
        search = {name: common.pop(name) for name in ("epsilon_tolerance",) if name in common}
        noise_multiplier = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=1 / len(data_loader),
            epochs=epochs,
            accountant=self.accountant.mechanism(),
            **search,
        )
        return self.make_private(noise_multiplier=noise_multiplier, **common)

    def save_checkpoint(
        self, *, path: Any, optimizer: DPOptimizer | None = None, checkpoint_dict: Any = None, **kwargs: Any
    ) -> None:
        """As in Opacus; the fused mode's checkpoint also holds the plan and the noise's key and step.

        A run that goes on from it is bit-equal to one that was not interrupted (in secure mode up to the noise, whose
        keys are never kept). Whoever has it can take the fast mode's noise off: publish the model, not the checkpoint.
        """
        checkpoint = dict(checkpoint_dict or {})
        if isinstance(optimizer, FusedDPOptimizer):
            checkpoint[NOISE_STATE] = optimizer.noise.state_dict()
            if optimizer.ascending.ascent is not None:
                checkpoint[ASCENT] = optimizer.ascending.state_dict()
            if optimizer.adaptive is not None:
                checkpoint[THRESHOLDS] = optimizer.max_grad_norms
        if isinstance(module := kwargs.get("module"), FusedHooks):
            checkpoint[PLAN] = module.book.planner.state_dict()
        super().save_checkpoint(path=path, optimizer=optimizer, checkpoint_dict=checkpoint, **kwargs)

    def load_checkpoint(self, *, optimizer: DPOptimizer | None = None, **kwargs: Any) -> dict[str, Any]:
        """As in Opacus, with the state of the noise where there is one; refused whole if that is malformed."""
        path = kwargs["path"]
        place = path.tell() if hasattr(path, "tell") else None
        held = torch.load(path, map_location="meta", weights_only=False)  # "meta" reads no weights
        if place is not None:
            path.seek(place)
        if NOISE_STATE in held and isinstance(optimizer, FusedDPOptimizer):
            check_state(held[NOISE_STATE])
        if isinstance(optimizer, FusedDPOptimizer):
            optimizer.ascending.check_state(held.get(ASCENT))
        if PLAN in held:
            check_plan(held[PLAN])
        checkpoint = super().load_checkpoint(optimizer=optimizer, **kwargs)
        if isinstance(optimizer, FusedDPOptimizer):
            optimizer.ascending.load_state_dict(checkpoint.pop(ASCENT, None))
        if isinstance(optimizer, FusedDPOptimizer) and NOISE_STATE in checkpoint:
            optimizer.noise.load_state_dict(checkpoint.pop(NOISE_STATE))
            if THRESHOLDS in checkpoint and optimizer.adaptive is not None:
                (optimizer.max_grad_norm,) = checkpoint.pop(THRESHOLDS)
        if isinstance(module := kwargs.get("module"), FusedHooks) and PLAN in checkpoint:
            module.book.planner.load_state_dict(checkpoint.pop(PLAN))
        return checkpoint

    def _thresholds(
        self, model: nn.Module, optimizer: optim.Optimizer, clipping: str | Sequence[str], max_grad_norm: Any
    ) -> Clipping:
        names = parameter_names(model)
        params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        if any(p not in names for p in params):
            raise ValueError("Module parameters are different than optimizer Parameters")
        trained = {names[p]: p for p in params if p.requires_grad}
        if clipping in ("flat", "adaptive"):
            return Clipping.flat(max_grad_norm)
        if clipping == "per_layer":
            return Clipping.per_layer(max_grad_norm, trained)
        if isinstance(clipping, Sequence) and not isinstance(clipping, str) and clipping:
            return Clipping.shared_out(max_grad_norm, clipping, trained)
        raise ValueError(
            f"clipping={clipping!r}: the fused mode has 'flat', 'per_layer', 'adaptive' and lists of parameter-name "
            f"prefixes; other styles need an Opacus mode such as grad_sample_mode='hooks'"
        )

    def _check_model(self, module: nn.Module, max_physical_batch_size: int | None) -> None:
        if isinstance(module, FusedModule):
            return
        if isinstance(module, AbstractGradSampleModule):
            raise ValueError(f"module is a {type(module).__name__} of another mode: pass module.to_standard_module()")
        if found := problems(module, served_only=max_physical_batch_size != 1):
            raise UnsupportedModuleError("\n".join(found))

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
                raise ValueError(
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
