"""Ascent steps: a step takes its per-sample gradients not at the weights but at a point that earlier releases chose.

What is shifted by is post-processing of noisy gradients that are accounted for already, so ε is that of DP-SGD.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpfast.capture.shift import Shift
from dpfast.ops import compute_dtype, is_native
from dpfast.refusals import CheckpointError


class Ascent:
    """How the next step's shift follows from this step; see the subclasses. It holds no state of a run."""

    moves: bool = True  # whether there is any shift at all
    filters: bool = False  # whether the optimizer gets another gradient than the step's own
    watches_update: ClassVar[bool] = True  # whether the shift follows from the update, not from the gradient
    scaled_by: ClassVar[str] = ""  # the setting that the shift is proportional to


class _Normalised(Ascent):
    rho: float
    scaled_by = "rho"

    def __post_init__(self) -> None:
        check_number("rho", self.rho)

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self.rho > 0


@dataclass(frozen=True)
class DPSAT(_Normalised):
    """Sharpness-aware training at the price of DP-SGD (Park, Kim, Choi, Lee, ICML 2023, Algorithm 1).

    Step t takes the per-sample gradients at ``w_t + ρ · g̃_{t−1} / ‖g̃_{t−1}‖`` and updates ``w_t``. g̃ is the noisy
    gradient after noise and division, before momentum and weight decay, as ``p.grad`` holds it; the norm is over all
    trained parameters, in float64. Where a group has ``maximize=True`` the shift goes down, as its loss is minus that.

    ==================  ===================================================================================
    the first step      no shift, as in DP-SGD; so after a g̃ that is all zero or not finite
    ρ = 0               DP-SGD to the bit
    an empty batch      its g̃ is noise alone, and is what the next step shifts by
    16-bit parameters   the point is rounded to their dtype: shifts below half a unit in the last place are lost
    ==================  ===================================================================================

    What the model's code reads of a trained parameter outside of its module and without gradients is not shifted (with
    gradients it is refused).

    Args:
        rho: ρ, the length of the shift.
    """

    rho: float = 0.03
    watches_update = False


@dataclass(frozen=True)
class DPSATMomentum(_Normalised):
    """DP-SAT along the last real update: at ``w_t + ρ · (w_{t−1} − w_t) / ‖w_{t−1} − w_t‖`` (Park et al., ICML 2023).

    The update is what the optimizer's step changed; weights loaded or changed in between are none. The first step, and
    one after an update that changed nothing, is DP-SGD. ρ = 0 is DP-SGD to the bit.

    Args:
        rho: ρ, the length of the shift.
    """

    rho: float = 0.1


@dataclass(frozen=True)
class DiSK(Ascent):
    """Simplified Kalman filter on noisy gradients (Zhang et al. 2024, arXiv 2410.03883, Algorithm 1).

    Per-sample gradients are taken at ``w_t + γ (w_t − w_{t−1})`` alone, which is the algorithm where γ = (1−κ)/κ; the
    optimizer gets ``ĝ_t = (1−κ) ĝ_{t−1} + κ g̃_t``, in float32, with ĝ_0 = g̃_0. So the first step is DP-SGD, and κ = 1
    is DP-SGD throughout. The update is torch's own after the noise, not one pass with it.

    Args:
        kappa: κ, above 0 and at most 1.
        gamma: γ; (1−κ)/κ if None. Any other value would need a second evaluation, at w_t, and is refused.
    """

    kappa: float = 0.7
    gamma: float | None = None

    @property
    def ahead(self) -> float:
        """γ."""
        return (1 - self.kappa) / self.kappa

    def __post_init__(self) -> None:
        check_number("kappa", self.kappa)
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa={self.kappa!r}: give a number above 0 and at most 1")
        gamma = self.ahead
        if self.gamma is not None:
            check_number("gamma", self.gamma)
            if not math.isclose(self.gamma, gamma, rel_tol=1e-6):
                raise ValueError(
                    f"gamma={self.gamma!r} with kappa={self.kappa!r}: only gamma = (1 - kappa) / kappa = {gamma:.6g} "
                    f"takes one evaluation of the gradients; any other takes a second one at the weights themselves"
                )
        object.__setattr__(self, "gamma", gamma)

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return self.kappa < 1

    @property
    def filters(self) -> bool:  # type: ignore[override]
        return self.kappa < 1


class Ascending:
    """An ascent at work in one optimizer: makes the :class:`Shift` of the next logical batch when a step ends.

    Args:
        ascent: what to do; None for plain DP-SGD.
        optimizer: the wrapped optimizer.
        names: every parameter's name, under which a checkpoint keeps what belongs to it.
    """

    def __init__(self, ascent: Ascent | None, optimizer: Optimizer, names: Mapping[Any, str]):
        self.ascent = ascent
        self.optimizer = optimizer
        self.names = names
        self.shift = Shift()
        self.shift.in_use = self.moves
        self._filtered: dict[Any, Tensor] = {}
        self._before: dict[Any, Tensor] = {}

    @property
    def moves(self) -> bool:
        return self.ascent is not None and self.ascent.moves

    @property
    def filters(self) -> bool:
        return self.ascent is not None and self.ascent.filters

    def filter(self) -> None:
        """Noisy gradients, in ``p.grad``, become what the ascent wants the optimizer to use."""
        if not isinstance(self.ascent, DiSK) or not self.filters:
            return
        for p in self._trained():
            grad, old = p.grad.to(compute_dtype(p.dtype)), self._filtered.get(p)
            new = grad.clone() if old is None else old.mul_(1 - self.ascent.kappa).add_(grad, alpha=self.ascent.kappa)
            self._filtered[p] = new
            p.grad = new.to(p.dtype, copy=True)

    def before_update(self) -> None:
        """The optimizer is about to change the weights."""
        if self.ascent is not None and self.moves and self.ascent.watches_update:
            self._before = {p: p.detach().clone() for p in self._trained()}

    def see_gradients(self) -> None:
        """``p.grad`` is the noisy gradient that the optimizer uses."""
        if isinstance(self.ascent, DPSAT) and self.moves:
            down = {p for group in self.optimizer.param_groups if group.get("maximize") for p in group["params"]}
            trained = [p for p in self._trained() if p.grad is not None]
            grads = [-p.grad if p in down else p.grad for p in trained]
            self.shift.set(dict(zip(trained, normalised(grads, self.ascent.rho), strict=False)))

    def after_update(self) -> None:
        """The optimizer has changed the weights."""
        params, before = list(self._before), list(self._before.values())
        self._before = {}
        if not params:
            return
        now = [p.detach() for p in params]
        if isinstance(self.ascent, DPSATMomentum):
            self.shift.set(dict(zip(params, normalised(_differences(before, now), self.ascent.rho), strict=False)))
        elif isinstance(self.ascent, DiSK):
            moved = _differences(now, before)
            torch._foreach_mul_(moved, self.ascent.ahead)
            self.shift.set(dict(zip(params, moved, strict=True)))

    def _trained(self) -> list[Any]:
        """What the step changes."""
        params = (p for group in self.optimizer.param_groups for p in group["params"])
        return [p for p in dict.fromkeys(params) if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """For a run that goes on bit for bit: the shift of the next step and, of DiSK, the filter."""
        kept = {"shifts": self.shift.shifts, "filtered": self._filtered}
        named = {key: {self.names[p]: x.clone() for p, x in of.items()} for key, of in kept.items()}
        return {"ascent": type(self.ascent).__name__, "settings": asdict(self.ascent), **named}  # type: ignore[call-overload]

    def check_state(self, state: Any) -> None:
        """Refuse what is not the state of such an ascent on such a model.

        Raises:
            ValueError: says what is wrong; nothing is changed.
        """
        if state is None or (self.ascent is None and isinstance(state, Mapping)):
            return
        if not isinstance(state, Mapping) or state.get("ascent") != type(self.ascent).__name__:
            found = state.get("ascent") if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(f"ascent state: of {found!r}, and this optimizer has {self.ascent!r}")
        if self.ascent is not None and (name := self.ascent.scaled_by):
            settings = state.get("settings")
            check_number(
                f"ascent state: settings: {name}", settings.get(name) if isinstance(settings, Mapping) else None
            )
        if isinstance(self.ascent, DiSK) and state.get("settings") != asdict(self.ascent):
            raise CheckpointError(f"ascent state: of {state.get('settings')}, and this optimizer has {self.ascent!r}")
        shapes = {name: p.shape for p, name in self.names.items()}
        for key in ("shifts", "filtered"):
            kept = state.get(key)
            if not isinstance(kept, Mapping):
                raise CheckpointError(f"ascent state: {key} must be a mapping of names to tensors")
            for name, value in kept.items():
                if not isinstance(value, Tensor) or shapes.get(name) != value.shape:
                    raise CheckpointError(
                        f"ascent state: {key}[{name!r}] does not fit the model's parameter of that name"
                    )

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on where :meth:`state_dict` was taken; None starts afresh, with a step of DP-SGD.

        A shift that was made with another ρ is scaled to this one.
        """
        self.check_state(state)
        if self.ascent is None:
            if state is not None:
                warnings.warn(
                    f"the checkpoint is of a run with {state['ascent']}; this one has no ascent", stacklevel=3
                )
            return
        params = {name: p for p, name in self.names.items()}

        def loaded(key: str, scale: float = 1.0) -> dict[Any, Tensor]:
            kept = {} if state is None else state[key]
            wanted = {params[name]: x for name, x in kept.items()}
            wide = {p: x.detach().to(p.device, compute_dtype(p.dtype), copy=True) for p, x in wanted.items()}
            return wide if scale == 1 else {p: x * scale for p, x in wide.items()}

        kept = [] if state is None else [x for key in ("shifts", "filtered") for x in state[key].values()]
        if not all(bool(x.isfinite().all()) for x in kept):
            raise CheckpointError("ascent state: it has numbers that are not finite")
        scale = 1.0
        if state is not None and (name := self.ascent.scaled_by):
            scale = getattr(self.ascent, name) / state["settings"][name] if state["settings"][name] else 0.0
        self.shift.set(loaded("shifts", scale) if self.moves else {})
        self._filtered = loaded("filtered") if self.filters else {}


def normalised(tensors: Sequence[Tensor], length: float) -> list[Tensor]:
    """``tensors``, together scaled to ``length`` (L2), in float32 (float64 for float64), by a norm in float64.

    None at all if they have no direction: the norm is 0, infinite or NaN.
    """
    if not tensors:
        return []
    norm = _norm(tensors)
    scale = length / norm if norm > 0 else math.inf
    if not math.isfinite(norm) or not math.isfinite(scale):
        return []
    wide = [x.to(torch.float64 if scale > 1e30 else compute_dtype(x.dtype)) for x in tensors]
    return [y.to(compute_dtype(x.dtype)) for x, y in zip(tensors, torch._foreach_mul(wide, scale), strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    """Over all ``tensors``, in float64."""
    if all(x.device.type == "cpu" for x in tensors) and is_native("squared_norms", tensors[0].device):
        squares = torch.ops.dpfast.squared_norms([x.contiguous().view(1, -1) for x in tensors])
        if 2.0**-900 < (squared := float(squares.sum())) < math.inf:  # else squares may have left the range
            return math.sqrt(squared)
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))


def _differences(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``left − right``, in float32 (float64 for float64)."""
    wide = [[x.to(compute_dtype(x.dtype)) for x in side] for side in (left, right)]
    return list(torch._foreach_sub(*wide))


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a finite number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r}: give a finite number that is not negative")


def check_ascent(ascent: Any, optimizer: Optimizer, low_precision: str = "nearest") -> None:
    """Refuse an ascent that ``optimizer`` cannot follow.

    Raises:
        ValueError: says why.
    """
    if ascent is None:
        return
    if not isinstance(ascent, Ascent):
        raise ValueError(f"ascent={ascent!r}: give an object such as dpfast.DPSAT(rho=0.03)")
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError(f"ascent={ascent!r}: the optimizer holds no parameter, so there is nothing to shift")
    if ascent.filters and low_precision != "nearest":
        raise ValueError(
            f"ascent={ascent!r} with low_precision={low_precision!r}: its filter stands between the noise and the "
            f"update, which are one pass there; use 'nearest'"
        )
