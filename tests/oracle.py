"""The judge: per-sample gradients by running one sample at a time, with plain autograd.

Nothing here imports the library under test. A batch is ``(inputs, target)``: ``inputs`` is a tuple of the
model's positional arguments, ``target`` goes to ``loss_fn(output, target)``, and both may hold tensors,
tuples and dicts of tensors, or anything else (passed on as it is). Sample ``i`` of a tensor is
``tensor[i : i + 1]`` along ``batch_dim``, so the model always sees a batch of one.

Tolerances are not constants: they come from the error that PyTorch itself makes at the dtype under test,
measured against float64 on the same weights and the same data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[Any, Any], Tensor]
# The rounding that even a perfect algorithm may add: of the norm, of the sum, of each factor.
FLOOR_ULPS = 8
# Clipping divides by the computed norm plus a bound on its own rounding error: the factor of a clipped sample is
# smaller than the exact one by up to this much on inputs that do not cancel. (Of a weight with several uses the errors
# of their sums add up.)
CERTIFICATE_ULPS = 128
# PyTorch's rounding error is as random as ours: the worst of several runs that differ in the scale of the loss,
# which is divided out again. No power of two, or every rounding would be the same; few bits, so exact in bfloat16.
LOSS_SCALES = (1.0, 0.75, 1.25, 0.625)


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``fn`` applied to each tensor in it (tuples, lists and dicts are walked)."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(fn, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(fn, v) for v in value)
    return value


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors to ``dtype``; ids, masks and the rest as they are."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, value)


def take(value: Any, index: Sequence[int], batch_dim: int = 0) -> Any:
    """The samples ``index`` of every tensor in ``value``."""
    rows = torch.tensor(list(index), dtype=torch.long)
    return map_tensors(lambda t: t.detach().index_select(batch_dim if t.dim() > batch_dim else 0, rows), value)


def batch_size(value: Any, batch_dim: int = 0) -> int:
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(t.shape[batch_dim if t.dim() > batch_dim else 0]) or t, value)
    return sizes[0]


def pristine(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy in ``dtype`` (ties kept) without hooks or attributes left on parameters.

    Hooks of torch's own utilities stay: without that of the older weight norm a weight would stay what it was.
    """
    twin = copy.deepcopy(model).to(dtype)
    for module in twin.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(module, name)
            for key in [k for k, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils.")]:
                del hooks[key]
        if type(vars(module).get("forward")).__module__.startswith("dpfast"):
            del module.forward
    for p in twin.parameters():
        p.__dict__.clear()
        p.grad = None
    return twin


def per_sample_gradients(
    model: nn.Module,
    inputs: tuple,
    target: Any,
    loss_fn: LossFn,
    dtype: torch.dtype = torch.float64,
    batch_dim: int = 0,
    units: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """``{name: [B, *shape]}`` for each trainable parameter; tied parameters once, under their first name.

    With ``units``, the rows of each, all of a unit's rows are run at once: a loss that is a mean over its batch then
    has the mean gradient of the rows.
    """
    (grads,) = scaled_gradients(model, inputs, target, loss_fn, dtype, batch_dim, units, [1.0])
    return grads


def scaled_gradients(
    model: nn.Module,
    inputs: tuple,
    target: Any,
    loss_fn: LossFn,
    dtype: torch.dtype,
    batch_dim: int,
    units: Sequence[Sequence[int]] | None,
    scales: Sequence[float],
) -> list[dict[str, Tensor]]:
    """:func:`per_sample_gradients` of the loss times each of ``scales``, which is divided out again in float64."""
    twin = pristine(model, dtype)
    params = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    rows: list[dict[str, list[Tensor]]] = [{n: [] for n in params} for _ in scales]
    for unit in [[i] for i in range(batch_size(inputs, batch_dim))] if units is None else units:
        x, y = cast(take((inputs, target), unit, batch_dim), dtype)
        loss = loss_fn(twin(*x), y)
        for scale, found in zip(scales, rows, strict=True):
            twin.zero_grad(set_to_none=True)
            (loss if scale == 1 else loss * scale).backward(retain_graph=found is not rows[-1])
            for name, p in params.items():
                found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.to_dense())
    return [
        {n: _stacked(r, params[n]) if scale == 1 else _stacked(r, params[n]).double() / scale for n, r in found.items()}
        for scale, found in zip(scales, rows, strict=True)
    ]


def _stacked(rows: list[Tensor], p: Tensor) -> Tensor:
    return torch.stack(rows) if rows else p.new_zeros(0, *p.shape)


def norms_of(grads: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """``[B]``: the norm of each sample's gradient over ``names`` (all if not given), at least in float32."""
    picked = [grads[n] for n in (grads if names is None else names)]
    wide = torch.promote_types(picked[0].dtype, torch.float32)
    return torch.stack([g.to(wide).square().reshape(len(g), prod(g.shape[1:])).sum(1) for g in picked]).sum(0).sqrt()


def factors_of(norms: Tensor, max_grad_norm: float) -> Tensor:
    """``min(1, C/n)``: 1 at n = 0, and 0 where the norm is not finite."""
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    factors = torch.where(norms > max_grad_norm, max_grad_norm / safe, torch.ones_like(norms))
    return torch.where(norms.isfinite(), factors, torch.zeros_like(norms))


def factors_by_name(
    grads: Mapping[str, Tensor],
    max_grad_norm: float | Mapping[str, float],
    groups: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """``{name: [B]}``; ``groups`` maps a name to its group, ``max_grad_norm`` a group to its C."""
    members: dict[str, list[str]] = {}
    for name in grads:
        members.setdefault("" if groups is None else groups[name], []).append(name)
    out = {}
    for group, names in members.items():
        bound = max_grad_norm[group] if isinstance(max_grad_norm, Mapping) else max_grad_norm
        out |= dict.fromkeys(names, factors_of(norms_of(grads, names), bound))
    return out


def contributions(grads, max_grad_norm, groups=None) -> dict[str, Tensor]:
    """Each sample's clipped gradient; exact zeros for a sample whose norm is not finite."""
    out = {}
    for name, factors in factors_by_name(grads, max_grad_norm, groups).items():
        g = grads[name].to(factors.dtype)
        column = factors.reshape(-1, *[1] * (g.dim() - 1))
        out[name] = torch.where(column > 0, column * g, torch.zeros_like(g))
    return {name: out[name] for name in grads}


def clipped_sum(grads, max_grad_norm, groups=None) -> dict[str, Tensor]:
    """``{name: Σ_i factor_i g_i}``."""
    return {n: c.sum(0) for n, c in contributions(grads, max_grad_norm, groups).items()}


@dataclass
class Verdict:
    """What is right at float64 for weights and data of ``dtype``, and how far PyTorch itself is from it."""

    model: nn.Module
    inputs: tuple
    target: Any
    loss_fn: LossFn
    max_grad_norm: float | Mapping[str, float] | None = None  # None: the median of the norms
    groups: Mapping[str, str] | None = None
    batch_dim: int = 0
    units: Sequence[Sequence[int]] | None = None  # rows of each; None: every row is one
    dtype: torch.dtype = field(init=False)

    def __post_init__(self):
        args = (self.model, self.inputs, self.target, self.loss_fn)
        self.dtype = next(p.dtype for p in self.model.parameters())
        self.grads = per_sample_gradients(*args, torch.float64, self.batch_dim, units=self.units)
        self.norms = norms_of(self.grads)
        if self.max_grad_norm is None:  # some samples clipped, some not; a lone sample is clipped
            finite = self.norms[self.norms.isfinite() & (self.norms > 0)]
            self.max_grad_norm = finite.median().item() * 0.9 if len(finite) else 1.0
        # float64 is judged by the error of float32, scaled by the two machine epsilons; twice that, for the
        # oracle is then no more exact than what it judges
        wide = self.dtype == torch.float64
        probe = torch.float32 if wide else self.dtype
        self.scale = (2 if wide else 1) * torch.finfo(self.dtype).eps / torch.finfo(probe).eps
        self.ulps = FLOOR_ULPS * torch.finfo(self.dtype).eps
        computed = torch.promote_types(self.dtype, torch.float32)  # norms and sums are never made in less
        self.certificate = CERTIFICATE_ULPS * torch.finfo(computed).eps
        self.same = scaled_gradients(*args, probe, self.batch_dim, self.units, LOSS_SCALES)
        self.sums = clipped_sum(self.grads, self.max_grad_norm, self.groups)

    def norm_tolerance(self) -> float:
        """Twice PyTorch's worst error of a norm, and a few ulps of the largest."""
        finite = self.norms.isfinite()
        if not finite.any():
            return 0.0
        error = max((norms_of(g).double() - self.norms)[finite].abs().max().item() for g in self.same)
        return 2 * self.scale * error + self.ulps * self.norms[finite].max().item()

    def sum_tolerances(self) -> dict[str, float]:
        """For each parameter, in L2: twice PyTorch's error, and a few ulps of what was added up.

        PyTorch's error is the larger of the parameter's own and of the model's relative error: the error of
        a tensor of one or two elements may happen to be nothing. Clipped samples have the certificate's room,
        and a gradient that cancels (a bias before a norm) has one ulp of all that was added up.
        """
        errors: dict[str, float] = dict.fromkeys(self.sums, 0.0)
        for grads in self.same:
            for n, s in clipped_sum(grads, self.max_grad_norm, self.groups).items():
                errors[n] = max(errors[n], (s.double() - self.sums[n]).norm().item())
        parts = contributions(self.grads, self.max_grad_norm, self.groups)
        mass = {n: c.abs().sum(0).norm().item() for n, c in parts.items()}
        factors = factors_by_name(self.grads, self.max_grad_norm, self.groups)
        room = {n: c[factors[n] < 1].abs().sum(0).norm().item() for n, c in parts.items()}
        total = sum(m**2 for m in mass.values()) ** 0.5
        relative = sum(e**2 for e in errors.values()) ** 0.5 / total if total else 0.0
        return {
            n: 2 * self.scale * max(e, relative * mass[n])
            + self.ulps * (mass[n] + total / FLOOR_ULPS)
            + self.certificate * room[n]
            for n, e in errors.items()
        }

    def check_norms(self, norms: Tensor, certified: bool = False) -> None:
        """``certified``: with the bound on their own error added, so they may be larger by that, not smaller."""
        assert norms.shape == self.norms.shape, f"norms: {tuple(norms.shape)}, not {tuple(self.norms.shape)}"
        finite = self.norms.isfinite()
        error = (norms.double() - self.norms)[finite]
        if certified:
            error = torch.where(error > 0, (error - self.certificate * self.norms[finite]).clamp(min=0), error)
        worst = error.abs().max().item() if len(error) else 0.0
        assert worst <= self.norm_tolerance(), (
            f"per-sample norms differ by {worst:.3e}, allowed {self.norm_tolerance():.3e}\n"
            f"got  {norms.tolist()}\nwant {self.norms.tolist()}"
        )

    def check_sums(self, sums: Mapping[str, Tensor]) -> None:
        assert set(sums) == set(self.sums)
        allowed = self.sum_tolerances()
        for name, want in self.sums.items():
            got = sums[name].double()
            assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
            error = (got - want).norm().item()
            assert error <= allowed[name], (  # NaN fails too
                f"{name}: the clipped sum is off by {error:.3e}, allowed {allowed[name]:.3e}, "
                f"norm {want.norm().item():.3e}"
            )
