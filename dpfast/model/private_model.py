"""The model side of the "fused" mode: every layer's forward goes through its tap, in place.

Types, attributes, ``state_dict`` names and signatures of the model stay as they were: only the instances'
``forward`` is replaced, and :meth:`FusedHooks.cleanup` takes that back.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks, GradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from opacus.layers import DPMultiheadAttention
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import dpfast.layers.double_backward  # noqa: F401 (taps call it)
from dpfast.capture.traced_tap import TracedTap
from dpfast.clipping.clipped_sum import ClippedSum
from dpfast.clipping.thresholds import Clipping
from dpfast.distributed.ranks import Ranks
from dpfast.layers import OpacusAttention, Recurrent, family
from dpfast.layers.derived import Parametrized, sources_of
from dpfast.layers.generic import Generic
from dpfast.layers.own_rules import own_rule
from dpfast.model.bare_parameters import BareForward, BareParameters
from dpfast.model.counted_forward import CountedForward
from dpfast.model.forwards import DerivedForward, Forward, GenericForward, LayerForward
from dpfast.model.one_by_one import OneByOneForward
from dpfast.model.sampled_forward import SampledForward, holders, owned
from dpfast.model.unsupported import problems
from dpfast.refusals import AlreadyPrivateError, UnservedModuleError
from dpfast.separation import Verdict


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter once (tied ones under their first name), with its full name."""
    return {p: name for name, p in module.named_parameters()}


def check_public_state(names: Sequence[str], model: nn.Module) -> None:
    """Refuse names that are no buffer's, parameter's or module's of ``model``."""
    held = {name for named in (model.named_modules, model.named_buffers, model.named_parameters) for name, _ in named()}
    if isinstance(names, str) or (unknown := [name for name in names if name not in held]):
        raise ValueError(
            f"public_state={names!r}: give a list of names of the model's buffers, parameters or modules"
            + ("" if isinstance(names, str) else f"; {unknown} are none")
        )


class FusedHooks(AbstractGradSampleHooks):
    """Exact per-sample clipping in one backward pass, attached to a model in place.

    After ``backward()`` each trainable parameter's ``summed_grad`` holds the clipped sum and
    :attr:`per_sample_gradient_norms` the norms. Guarantee: see :class:`dpfast.clipping.clipped_sum.ClippedSum`.

    Args:
        m: the model; its layers' ``forward`` are replaced on the instances.
        batch_first: whether the batch is dimension 0 (else 1) of the layers' inputs.
        loss_reduction: ``"mean"`` or ``"sum"``, over the batch.
        clipping: thresholds and groups; those of the optimizer, once there is one.
        max_physical_batch_size: 1 if the model is to be trained one sample at a time, with no layer tapped.
        ranks: how the processes of a run share the model.
    """

    GRAD_SAMPLERS = GradSampleHooks.GRAD_SAMPLERS

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        clipping: Clipping | None = None,
        max_physical_batch_size: int | None = None,
        ranks: Ranks | None = None,
    ):
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: use 'mean' or 'sum'")
        if isinstance(vars(m).get("forward"), Forward):
            raise AlreadyPrivateError("this model is already private; call cleanup() or to_standard_module() first")
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self.clipped_sum = ClippedSum(parameter_names(m), clipping or Clipping.flat(1.0), loss_reduction)
        self.clipped_sum.verifies = self.clipped_sum.needs_model = True
        self.clipped_sum.ranks = ranks or Ranks()
        self._forwards: list[Forward] = []
        self._max_physical_batch_size = max_physical_batch_size
        self.add_hooks()

    def add_hooks(self, **_: Any) -> None:
        """Tap every layer, again after :meth:`remove_hooks`; arguments, which Opacus' method has, change nothing."""
        if self._forwards:
            raise ValueError("add_hooks: the model has its hooks; call remove_hooks() first")
        max_physical_batch_size, loss_reduction = self._max_physical_batch_size, self.loss_reduction
        root, batch_dim = self._module, 0 if self.batch_first else 1
        batch_dims = _batch_dims(root, batch_dim)
        served, loose, ruled = _split_parameters(root)
        self.clipped_sum.model = root
        self.clipped_sum.alone = max_physical_batch_size == 1 and not self.clipped_sum.ranks.sharded
        sources = sources_of(root)
        made = {source.owner: source for source in sources if isinstance(source, Parametrized)}
        inside = {child for owner in made for child in owner.modules()}  # runs when its tensor is made, and only then
        for p in {p for source in sources for p in source.parameters}:
            loose.pop(p, None)
        bare = BareParameters(self.clipped_sum)
        for name, module in root.named_modules():
            if _is_container(module):
                continue  # never called: its parameters are its parent's affair
            own = {p for p in module._parameters.values() if p is not None}
            needs_forward = own or any(_is_container(child) and child._parameters for child in module.children())
            needs_forward = needs_forward or is_parametrized(module)
            layer = family(module)
            forward: Forward | None = None
            if self.clipped_sum.alone:
                forward = OneByOneForward(module, name, self.clipped_sum) if needs_forward else None
            elif module in inside:
                forward = DerivedForward(module, made[module], self.clipped_sum) if module in made else None
            elif ruled_here := owned(holders(module)):
                if self.clipped_sum.ranks.sharded and len(ruled_here) < len([*module.parameters()]):
                    raise UnservedModuleError(
                        f"{name or 'the model'} ({type(module).__name__}) has a rule of register_layer and modules "
                        f"with parameters below it, which fully_shard would gather for the comparison of the rule on "
                        f"some ranks only. Register a class for the part that has no modules, or use "
                        f"DistributedDataParallel"
                    )
                forward = SampledForward(module, self.clipped_sum, name, batch_dims.get(module, batch_dim))
            elif module in served and layer is not None:
                tap = TracedTap(
                    self.clipped_sum, layer, name or type(module).__name__, batch_dims.get(module, batch_dim)
                )
                forward = LayerForward(module, layer, tap)
            elif needs_forward:
                inside_it = {*module.parameters()}
                below, rules = ({p: n for p, n in some.items() if p in inside_it} for some in (loose, ruled))
                if any(p.requires_grad for p in below):
                    below |= rules
                generic = Generic(module, below, self.clipped_sum, batch_dim, sources=sources)
                if self.clipped_sum.ranks.sharded and generic.trains:
                    raise UnservedModuleError(
                        f"{name or 'the model'} ({type(module).__name__}): no layer family serves its parameters, and "
                        f"vmap, which could, does not know parameters that fully_shard has gathered. Freeze it with "
                        f"requires_grad_(False), or use DistributedDataParallel"
                    )
                forward = GenericForward(module, generic)
                derived = is_parametrized(module) or any(source.owner is module for source in sources)
                if batch_dim == 0 and not derived and not self.clipped_sum.ranks.sharded:
                    forward = BareForward(module, generic, bare, below)
            if forward is not None:
                self._forwards.append(forward)
        inner = next((forward for forward in self._forwards if forward.module is root), None)
        self._forwards = [forward for forward in self._forwards if forward is not inner]
        by_sample = Generic(
            root, loose | ruled, self.clipped_sum, batch_dim, whole_model=loss_reduction, sources=sources
        )
        model = CountedForward(root, inner, by_sample, bare, batch_dim, one_by_one=max_physical_batch_size == 1)
        self._model_forward = model
        self._forwards.append(model)
        for forward in self._forwards:
            forward.install()

    @property
    def per_sample_gradient_norms(self) -> Tensor:
        """``[B]`` L2 norms of the last backward's per-sample gradients, over all trained parameters.

        They are not private: for debugging only.
        """
        norms = self.clipped_sum.per_sample_gradient_norms
        if norms is None:
            raise AttributeError("per_sample_gradient_norms is not set: run forward and backward first")
        return norms

    @property
    def runs_by_sample(self) -> bool:
        """Whether the model is run one sample at a time under vmap, as its layers cannot tell the samples apart."""
        return self._model_forward.runs_by_sample

    @property
    def separation(self) -> Verdict | None:
        """What the last check has shown of whether the model keeps samples apart; None before the first one."""
        return self._model_forward.verdict

    @property
    def public_state(self) -> tuple[str, ...]:
        """Names of buffers, parameters and modules that forwards may change by the samples."""
        return self._model_forward.public_state

    @public_state.setter
    def public_state(self, names: Sequence[str]) -> None:
        check_public_state(names, self._module)
        self._model_forward.public_state = tuple(names)

    @property
    def nonfinite_samples(self) -> int:
        """How many samples had a NaN or infinite norm so far; each contributed exact zeros."""
        return self.clipped_sum.nonfinite_samples

    def forbid_grad_accumulation(self) -> None:
        """Refuse a second backward before a step (Poisson sampling accounts for one batch a step)."""
        self.clipped_sum.accumulation_allowed = False

    def allow_grad_accumulation(self) -> None:
        """Undo :meth:`forbid_grad_accumulation`."""
        self.clipped_sum.accumulation_allowed = True

    def set_grad_sample_to_none(self) -> None:
        """Drop the batch whose backward no step has used yet: how a bad batch is skipped, as in ``zero_grad()``.

        A physical batch takes its logical batch along, which could not be released without it.
        """
        super().set_grad_sample_to_none()
        self.clipped_sum.drop_physical_batch()

    def del_grad_sample(self) -> None:
        """As :meth:`set_grad_sample_to_none`: there are no per-sample gradients to delete."""
        self.set_grad_sample_to_none()

    def remove_hooks(self) -> None:
        """Give every module its own forward back."""
        for forward in self._forwards:
            forward.remove()
        self._forwards = []

    def disable_hooks(self) -> None:
        """Run the model as it is: gradients are then torch's own, and no step uses them, until :meth:`enable_hooks`."""
        if self.hooks_enabled:
            for forward in self._forwards:
                forward.remove()

    def enable_hooks(self) -> None:
        """Undo :meth:`disable_hooks`."""
        if not self.hooks_enabled:
            for forward in self._forwards:
                forward.install()

    @property
    def hooks_enabled(self) -> bool:
        """Whether the next forward is one of private training."""
        return any(vars(forward.module).get("forward") is forward for forward in self._forwards)

    @property
    def grad_accumulation_allowed(self) -> bool:
        """Whether several backward passes may come before a step."""
        return self.clipped_sum.accumulation_allowed

    @classmethod
    def is_supported(cls, module: nn.Module) -> bool:
        """Whether the fused mode can train ``module``, by itself."""
        return not problems(module)

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        """Why the fused mode cannot train ``module``, an error for each reason; ``strict`` raises the first one."""
        errors = [NotImplementedError(problem) for problem in problems(module)]
        if strict and errors:
            raise errors[0]
        return errors

    def cleanup(self) -> None:
        """Remove everything that was added to the model and its parameters."""
        super().cleanup()
        for p in self._module.parameters():
            if hasattr(p, "summed_grad"):
                del p.summed_grad


class FusedModule(FusedHooks, AbstractGradSampleModule):
    """:class:`FusedHooks` as a module around the model, as Opacus' ``GradSampleModule`` is.

    ``isinstance(model, opacus.GradSampleModule)`` is true of it: products ask that to see whether a model is private.
    """

    def __init__(self, m: nn.Module, **kwargs: Any):
        nn.Module.__init__(self)
        FusedHooks.__init__(self, m, **kwargs)
        self.grad_accumulation_hook = None

    def __getattr__(self, item: str) -> Any:
        """Submodules, as in Opacus, and the model's own methods.

        A method is exact if it calls the model itself (``self(x)``); one that calls layers past ``forward`` is refused
        by name as soon as it does, except without gradients.
        """
        try:
            return super().__getattr__(item)
        except AttributeError:
            model = vars(self).get("_modules", {}).get("_module")
            if model is None or item.startswith("_") or not inspect.isfunction(getattr(type(model), item, None)):
                raise
            return getattr(model, item)


GradSampleModule.register(FusedModule)


def _is_container(module: nn.Module) -> bool:
    """Whether ``module`` has no forward of its own, like a ``ParameterList``."""
    return type(module).forward is nn.Module.forward


def _batch_dims(root: nn.Module, batch_dim: int) -> dict[nn.Module, int]:
    """Modules whose batch dimension is their parent's affair, not the model's."""
    dims: dict[nn.Module, int] = {}
    for module in root.modules():
        if isinstance(module, RNNLinear):
            dims[module] = 0
        elif isinstance(module, nn.MultiheadAttention):
            dims[module.out_proj] = 0
        elif isinstance(module, DPMultiheadAttention):
            for child in (module.qlinear, module.klinear, module.vlinear, module.out_proj):
                dims[child] = 0 if module.batch_first else 1
    return dims


def _split_parameters(
    root: nn.Module,
) -> tuple[set[nn.Module], dict[nn.Parameter, str], dict[nn.Parameter, str]]:
    """Modules that a family or a rule of the user's serves; the parameters that only the generic path can serve; and
    those of registered rules, which it serves where samples run one at a time.

    One that a served module owns too counts as served: should the unserved owner use it, that is found out in the
    first forward, and it goes through both; its uses add up in the clipped sum.
    """
    served: set[nn.Module] = set()
    loose: dict[nn.Parameter, str] = {}
    ruled: dict[nn.Parameter, str] = {}
    taken: set[nn.Parameter] = set()
    for prefix, module in root.named_modules():
        layer = family(module)
        known = layer is not None and (module._parameters or isinstance(layer, (Recurrent, OpacusAttention)))
        if own := owned(holders(module)):
            served.add(module)
            taken |= set(own.values())
            if own_rule(module) is not None:
                ruled |= {p: f"{prefix}.{name}" if prefix else name for name, p in own.items()}
        elif known:
            served.add(module)
            taken |= {p for p in module._parameters.values() if p is not None}
        else:
            for name, p in module._parameters.items():
                if p is not None:
                    loose.setdefault(p, f"{prefix}.{name}" if prefix else name)
    return served, {p: name for p, name in loose.items() if p not in taken}, ruled
