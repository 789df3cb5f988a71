"""The plan of a model on a batch, as a table."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpfast import tables
from dpfast.capture.forms import Convolved, EmbeddingRows, Factored, Form, OuterProduct, by
from dpfast.capture.graph_calls import INSIDE
from dpfast.capture.recomputed import Recomputed
from dpfast.capture.refusals import listed
from dpfast.capture.trees import tensors
from dpfast.model.forwards import Forward, LayerForward
from dpfast.model.private_model import FusedHooks, FusedModule
from dpfast.planning.planner import Plan, Planner, recomputed, segments, small
from dpfast.planning.rates import seconds
from dpfast.separation import Verdict, observed

_COLUMNS = ("layer", "T", "d", "p", "way", "predicted ms", "measured ms", "kept bytes")


def explain(model: nn.Module, batch: Any) -> str:
    """Print and return how every parameter's norm and clipped sum would be computed on ``batch``.

    Args:
        model: a plain or private model; it is not touched.
        batch: the model's input as the loader gives it: a tensor, a dict of keyword arguments, or a sequence, of
            which the first element is the input and the rest (targets) is ignored.

    Returns:
        A table: layer and parameter, T positions, d and p (the sides of its per-sample gradient), way, what its norm
        and clipped sum were predicted to take and took here (the ordinary weight gradient, which they replace, is in
        these), and the bytes of per-sample gradients that are kept until the factors are known. Below it: with which
        rates it is predicted, where none were measured on this device; whether the model keeps the samples apart,
        proved from its operators or tried, and which operators in which modules are not proved. Of a private
        model that ``torch.compile`` has met in training: which layers are in a graph, and why
        others are not. And of one that is clipped in several groups, what each is clipped to, and its noise.
    """
    plain = model._module if isinstance(model, FusedModule) else model
    planner = model.clipped_sum.planner if isinstance(model, FusedModule) else Planner()
    planner = Planner(planner.memory_budget, planner.pins)
    rows: list[tuple[str, ...]] = []
    total, unmeasured = [0.0, 0.0, 0], dict[str, None]()
    with torch.no_grad():
        forms, separation = _forms(plain, batch)
        for name, kept in forms.items():
            for part, form in kept:
                plan, took = _measured(name, form, planner)
                if plan.unmeasured is not None:
                    unmeasured[plan.unmeasured] = None
                total = [sum(pair) for pair in zip(total, (plan.seconds, took, plan.kept), strict=True)]
                sizes = map(str, (plan.T, plan.d, plan.p, plan.way))
                rows.append((part, *sizes, *_numbers(plan.seconds, took, plan.kept)))
    rows.append(("total", "", "", "", "", *_numbers(*total)))
    table = tables.plain(rows, _COLUMNS)
    table += "".join(f"\npredicted with {rates}" for rates in unmeasured)
    table += f"\n{separation}" if separation else ""
    table += _groups(model) + _compiled(model) if isinstance(model, FusedModule) else ""
    print(table)
    return Printed(table)


class Printed(str):
    """A text that was printed: a notebook and Python's prompt do not show it once more."""

    def _ipython_display_(self) -> None:
        """Nothing is left to show."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} text of {self.count(chr(10)) + 1} lines, see above>"


def _groups(model: FusedModule) -> str:
    """The norm to clip to, and what noise is scaled by, of each group, where there are several."""
    clipping = model.clipped_sum.clipping
    if len(clipping.thresholds) == 1:
        return ""
    names = clipping.names or [f"group {k}" for k in range(len(clipping.thresholds))]
    rows = [
        (name, f"{C:.4g}", f"{scale:.4g}")
        for name, C, scale in zip(names, clipping.thresholds, clipping.noise_scales, strict=True)
    ]
    return f"\n\n{tables.plain(rows, ('clipped together', 'C', 'noise / noise_multiplier'))}"


def _compiled(model: FusedModule) -> str:
    """What has become of the layers that a compiler has met, each outcome with its layers."""
    recorder = model.clipped_sum
    layers: dict[str, list[str]] = {}
    for name, outcome in recorder.compiled.items():
        layers.setdefault(outcome, []).append(name)
    if not layers:
        return ""
    lines = ["", "compiled:"]
    for outcome, names in sorted(layers.items(), key=lambda its: its[0] != INSIDE):
        if outcome is INSIDE:
            when = "at the graph's end" if recorder.ends_at_once else "at the end of the backward pass"
            lines.append(f"  {len(names)} layers are {outcome}, and clipped {when}")
        else:
            lines.append(f"  {listed(names)}: {outcome}")
    if others := [name for name in _tapped(model) if name not in recorder.compiled]:
        lines.append(f"  {listed(others)}: not met by a compiler in training")
    return "\n".join(lines)


def _tapped(model: FusedModule) -> list[str]:
    found = (vars(module).get("forward") for module in model._module.modules())
    return [forward.tap.name for forward in found if isinstance(forward, LayerForward)]


def _numbers(predicted: float, measured: float, kept: float) -> tuple[str, str, str]:
    return f"{1e3 * predicted:.3g}", f"{1e3 * measured:.3g}", f"{kept:.3g}"


def _measured(name: str, form: Form, planner: Planner) -> tuple[Plan, float]:
    """The form's plan, and seconds that its norm and clipped sum take."""
    if isinstance(form, OuterProduct):
        form = form.factored()
    if isinstance(form, Factored | Convolved):
        plan = planner.choose(name, form.shape)
    elif isinstance(form, EmbeddingRows):
        B, T, d = form.G.shape
        plan = segments(B, T, d, max(4, form.G.element_size()), form.G.device)
    elif isinstance(form, Recomputed):
        B, T, d = form.sides.x.shape
        plan = recomputed(B, T, d, form.rows, form.sides.x.dtype, form.sides.x.device)
    else:
        samples = form.samples
        plan = small(form.batch, samples[:1].numel(), samples.element_size(), samples.device)
    device = next(iter(tensors(vars(form)))).device
    factors = torch.ones(form.batch, device=device)

    def run() -> None:
        planned: Form = form
        if isinstance(form, Factored | Convolved):
            planned = by(form, plan)
        elif isinstance(form, Recomputed):
            planned = Recomputed(form.sides)
        planned.squared_norm()
        planned.clipped_sum(factors)

    return plan, seconds(run, device)


def _forms(plain: nn.Module, batch: Any) -> tuple[dict[str, list[tuple[str, Form]]], Verdict | None]:
    """What a backward pass on a copy of the model hands over, by layer, each form with the name of its row; and whether
    samples are kept apart.
    """
    found: dict[str, list[tuple[str, Form]]] = {}
    twin = pristine_copy(plain).train()
    hooks = FusedHooks(twin)

    def observe(layer: str, form: Form, parameter: Any) -> None:
        name = hooks.clipped_sum.names[parameter]
        row = layer if name == layer else f"{layer}.{name.rpartition('.')[2]}"
        found.setdefault(layer, []).append((row, form))

    with torch.enable_grad(), torch.random.fork_rng():
        outputs = [x for x in tensors(call(twin, batch)) if x.requires_grad]
        if not outputs:
            raise ValueError("explain: the model has no trainable parameter that its output depends on")
        with observed(hooks.clipped_sum, observe):
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return found, hooks.separation


def pristine_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` with nothing of ours attached, whether or not the original has."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(forward := vars(module).get("forward"), Forward):
            forward.remove()
    return twin


def call(model: nn.Module, batch: Any) -> Any:
    """``model`` on the input part of a loader's batch."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence) and len(batch):
        return call(model, batch[0])
    raise ValueError(f"batch of type {type(batch).__name__}: give a tensor, a dict of inputs, or (inputs, targets)")
