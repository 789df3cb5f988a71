"""Which way each layer's norm and clipped sum are computed: the fastest by prediction, within a memory budget; of ways
that are about as fast the one that keeps less memory.

Every way is exact; the choice moves time and memory only.

    ================  =====================================================================================
    ``product``       T = 1: ``‖a‖²·‖g‖²``, then one matrix product over the batch
    ``ghost``         norms from ``A Aᵀ`` and ``G Gᵀ``, then one matrix product over batch and positions
    ``norm-GEMM``     norms from tiles of ``G_iᵀ A_i`` that are dropped, then the same
    ``instantiate``   per-sample gradients written out, with their norm; later a weighted sum of them
    ``segments``      embeddings: sums over equal ids
    ``recompute``     heads without stored logits (``linear_cross_entropy``): tiles of ``G_iᵀ A_i``, G made twice
    ================  =====================================================================================
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dpfast.planning.logits import fit
from dpfast.planning.rates import rates_of
from dpfast.planning.unmeasured import Rates
from dpfast.refusals import CheckpointError

WAYS = ("ghost", "norm-GEMM", "instantiate")  # those that there is a choice of
NEAR = 1.1  # times as long as the fastest way, which a way that keeps less memory may take: rates err by as much
DEFAULT_FRACTION = 0.10  # of the memory that is in use when a backward pass starts


class Shape(NamedTuple):
    """One use of a weight: ``A [batch, groups, T, d]``, ``G [batch, groups, T, p]``, of a convolution over its patches.

    ``sides`` are the bytes of what is kept where no gradient is written out. ``singly``: per-sample gradients are
    written out by a product for each sample, as samples are not equally long.
    """

    batch: int
    groups: int
    T: int
    d: int
    p: int
    dtype: torch.dtype
    device: torch.device
    sides: int
    patches: bool = False
    singly: bool = False

    @property
    def elements(self) -> int:
        """Of a per-sample gradient, times the batch."""
        return self.batch * self.groups * self.p * self.d

    @property
    def itemsize(self) -> int:
        return max(4, self.dtype.itemsize)


@dataclass(frozen=True)
class Plan:
    """How one use of a parameter is handled, the seconds predicted for it, and the bytes it adds to memory; and where
    the rates of that prediction are from, if none were measured.
    """

    way: str
    T: int
    d: int
    p: int
    seconds: float
    kept: int = 0
    unmeasured: str | None = None


def predicted(shape: Shape, way: str, rates: Rates) -> Plan | None:
    """Norm and clipped sum of a weight by ``way``; None where there is no such way."""
    product = 2.0 * shape.elements * shape.T
    clipped_sum = product / rates.sum + rates.call
    kept = 0
    if way == "product":
        seconds = shape.sides / rates.read + clipped_sum
    elif way == "ghost":
        flops = 1.0 * shape.batch * shape.groups * shape.T**2 * (shape.d + shape.p)
        seconds = flops / rates.gram + clipped_sum
        if rates.lines is not None:
            seconds += shape.batch * shape.groups * shape.T * (shape.d + shape.p) / rates.lines
    elif way == "norm-GEMM":
        if rates.tile is None:
            return None
        seconds = product / rates.tile + clipped_sum
    elif way == "instantiate":
        written = shape.itemsize * shape.elements
        if shape.singly:  # as a sum's product, which writes next to nothing
            made = product / rates.sum + shape.batch * rates.call + written / rates.write
        else:
            made = max(product / rates.sample, written / rates.write)
        seconds = made + rates.passes * written / rates.read
        kept = max(0, written - shape.sides)
    else:
        raise ValueError(f"way={way!r}: use one of {', '.join(WAYS)}")
    return Plan(way, shape.T, shape.d, shape.p, seconds + rates.call, kept, rates.unmeasured)


def choices(shape: Shape) -> list[Plan]:
    """Every way that there is for a weight, the fastest first."""
    rates = rates_of(shape.device, shape.dtype, shape.patches)
    ways: Iterable[str] = ("product",) if shape.T == 1 and not shape.patches else WAYS
    plans = (predicted(shape, way, rates) for way in ways)
    return sorted((plan for plan in plans if plan is not None), key=lambda plan: plan.seconds)


def segments(batch: int, T: int, d: int, itemsize: int, device: torch.device) -> Plan:
    """Embedding rows: G is read for the norm and for the sum."""
    rates = rates_of(device, torch.float32, False)
    seconds = 2 * itemsize * batch * T * d / rates.read + 2 * rates.call
    return Plan("segments", T, d, 1, seconds, unmeasured=rates.unmeasured)


def recomputed(batch: int, T: int, d: int, p: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """A head whose logits are not stored: two products for the norm, and two for the sum."""
    rates = rates_of(device, dtype, False)
    return Plan("recompute", T, d, p, 8.0 * batch * T * d * p / rates.sum + 2 * rates.call, unmeasured=rates.unmeasured)


def small(batch: int, size: int, itemsize: int, device: torch.device) -> Plan:
    """Biases, normalisation layers and bare parameters: ``[batch, size]`` formed and kept in any case."""
    rates = rates_of(device, torch.float32, False)
    kept = itemsize * batch * size
    seconds = 2 * kept / rates.read + 2 * rates.call
    return Plan("instantiate", 1, size, 1, seconds, unmeasured=rates.unmeasured)


class Planner:
    """The choices of one model, each made once for a layer and a shape.

    Args:
        memory_budget: what gradients written out may take beyond the activations and backprops that they replace, of
            all layers together: bytes (int), or a fraction (float) of the memory that is in use when the backward pass
            starts (on a GPU the allocator's, else what is resident). None: 10 % of that.
        pins: ``{prefix of a layer's name: way}``, whatever the prediction and the budget; the longest prefix counts.
            Layers with one position per sample have no choice.

    Raises:
        ValueError: a budget that is negative, NaN or of another type; a way that there is not.
    """

    def __init__(self, memory_budget: int | float | None = None, pins: Mapping[str, str] | None = None):
        known = isinstance(memory_budget, int | float) and not isinstance(memory_budget, bool)
        if memory_budget is not None and not (known and 0 <= memory_budget < math.inf):
            raise ValueError(f"memory_budget={memory_budget!r}: give bytes (an int) or a fraction (a float), or None")
        for layer, way in (pins or {}).items():
            if way not in WAYS:
                raise ValueError(f"plan={{{layer!r}: {way!r}}}: use one of {', '.join(WAYS)}")
        self.memory_budget = memory_budget
        self.pins = dict(pins or {})
        self._plans: dict[tuple[str, Shape], Plan] = {}
        self._logits: dict[tuple[str, int], bool] = {}  # by the head's name and bytes: whether they are stored
        self.loaded = 0  # how often plans were taken over
        self._left: float | None = None  # None: no pass has started

    def start_pass(self) -> None:
        """A backward pass starts: nothing is written out."""
        self._left = None

    def choose(self, layer: str, shape: Shape) -> Plan:
        """The plan for one use of ``layer``'s weight; it is the same in every pass."""
        plan = self._plans.get((layer, shape))
        if plan is None:
            plan = self._plans[layer, shape] = self._new(layer, shape)
        self._left = self._left_on(shape.device) - plan.kept
        return plan

    def choose_once(self, layer: str, shape: Shape) -> Plan:
        """The plan for a shape that comes with this batch alone: it is not remembered."""
        plan = self._new(layer, shape)
        self._left = self._left_on(shape.device) - plan.kept
        return plan

    def _left_on(self, device: torch.device) -> float:
        """What may still be written out in the running pass."""
        if self._left is None:
            self._left = self._budget(device)
        return self._left

    def stores_logits(self, layer: str, nbytes: int, device: torch.device) -> bool:
        """Whether the head ``layer`` stores so many bytes of logits; it is the same in every pass."""
        key = layer, nbytes
        if key not in self._logits:
            self._logits[key] = fit(nbytes, device)
        return self._logits[key]

    def _new(self, layer: str, shape: Shape) -> Plan:
        plans = choices(shape)
        pin = self._pin(layer)
        if pin is not None and plans[0].way != "product":
            found = next((plan for plan in plans if plan.way == pin), None)
            if found is not None:
                return found
            warnings.warn(f"plan: there is no {pin!r} for layer {layer!r} on {shape.device}", stacklevel=2)
        within = [plan for plan in plans if plan.kept <= max(0.0, self._left_on(shape.device))] or plans[:1]
        near = (plan for plan in within if plan.seconds <= NEAR * within[0].seconds)
        return min(near, key=lambda plan: plan.kept)

    def _pin(self, layer: str) -> str | None:
        """The way that the longest prefix of the layer's name is pinned to; the empty one is of every layer."""
        matches = [name for name in self.pins if name == "" or layer == name or layer.startswith(f"{name}.")]
        return self.pins[max(matches, key=len)] if matches else None

    def _budget(self, device: torch.device) -> float:
        if isinstance(self.memory_budget, int):
            return self.memory_budget
        try:
            used = in_use(device)
        except ValueError:
            if self.memory_budget is not None:
                raise
            return math.inf
        # In steps of a quarter of an octave: two runs of one script have the same plan.
        steps = math.floor(4 * math.log2(max(1, used)))
        return (DEFAULT_FRACTION if self.memory_budget is None else self.memory_budget) * 2 ** (steps / 4)

    def state_dict(self) -> dict[str, list[Any]]:
        """The choices that were made, for a checkpoint: a run that goes on elsewhere has the same ones."""
        plans = [(layer, shape._asdict(), plan.way) for (layer, shape), plan in self._plans.items()]
        logits = [(*key, stored) for key, stored in self._logits.items()]
        return {"plans": plans} | ({"logits": logits} if logits else {})

    def load_state_dict(self, state: Mapping[str, list[Any]]) -> None:
        """Take over choices, all or none; those pinned here, and those of ways or devices that are not here, are
        made anew.

        Raises:
            ValueError: ``state`` is none of :meth:`state_dict`'s.
        """
        loaded = {}
        for layer, shape, way in check_state(state):
            index = shape.device.index or 0
            if self._pin(layer) is not None or (shape.device.type == "cuda" and index >= torch.cuda.device_count()):
                continue
            plan = predicted(shape, way, rates_of(shape.device, shape.dtype, shape.patches))
            if plan is not None:
                loaded[layer, shape] = plan
        self._plans |= loaded
        self._logits |= {(layer, nbytes): stored for layer, nbytes, stored in state.get("logits", ())}
        self.loaded += 1


def check_state(state: Mapping[str, list[Any]]) -> list[tuple[str, Shape, str]]:
    """``(layer, shape, way)`` of every choice that a checkpoint holds.

    Raises:
        ValueError: it holds something else.
    """
    try:
        choices = [(str(layer), Shape(**fields), way) for layer, fields, way in state["plans"]]
        if any(way not in (*WAYS, "product") for _, _, way in choices):
            raise ValueError("a way that there is not")
        for _, shape, _ in choices:
            sizes = (shape.batch, shape.groups, shape.T, shape.d, shape.p, shape.sides)
            if not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError(f"sizes that are no sizes: {sizes}")
            if not (isinstance(shape.dtype, torch.dtype) and isinstance(shape.device, torch.device)):
                raise ValueError(f"no dtype or device: {shape.dtype!r}, {shape.device!r}")
        for layer, nbytes, stored in state.get("logits", ()):
            if not (type(layer) is str and type(nbytes) is int and type(stored) is bool):
                raise ValueError(f"no choice for logits: {(layer, nbytes, stored)}")
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's plan_state_dict is not one of dpfast's: {error}") from error
    return choices


class Once(Planner):
    """Another planner's choices, for shapes that it need not remember."""

    def __init__(self, of: Planner):
        super().__init__()
        self.of = of

    def choose(self, layer: str, shape: Shape) -> Plan:
        return self.of.choose_once(layer, shape)


class KeepSides(Planner):
    """No gradient is written out: for looks at what layers hand over, which must not depend on the plan.

    Logits are stored, or are not, as ``training`` does it, whatever the number of samples.
    """

    def __init__(self, training: Planner):
        super().__init__()
        self.training = training

    def stores_logits(self, layer: str, nbytes: int, device: torch.device) -> bool:
        if any(not stored for (name, _), stored in self.training._logits.items() if name == layer):
            return False
        return self.training.stores_logits(layer, nbytes, device)

    def choose(self, layer: str, shape: Shape) -> Plan:
        return Plan("ghost", shape.T, shape.d, shape.p, 0.0)


def in_use(device: torch.device) -> int:
    """Bytes of memory: of a GPU's allocator, or resident in this process.

    Raises:
        ValueError: that cannot be told here.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError as error:
        raise ValueError(
            "memory in use cannot be told here, but on Linux and GPUs: give memory_budget in bytes"
        ) from error
