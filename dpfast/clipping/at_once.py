"""Clipping at the end of a compiled graph: traced once, and then replayed without the Python around its operators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfast.capture.graph_calls import GraphCalls
from dpfast.clipping.closing import Factors, Scales, Setting, closed
from dpfast.clipping.functions import NAMED
from dpfast.clipping.thresholds import Clipping
from dpfast.ops import all_left_in, full_precision, index_of

logger = logging.getLogger(__name__)
MOST_REPLAYS = 8  # settings of one graph that are kept: a loss's scale may go up and down
SEEN, NEVER = "seen", "never"
# Operators on A [B, *, d] and G [B, *, p] of several weights, whose positions may have any number of dimensions.
_OF_ANY_POSITIONS = ("dpfast.product_samples.default", "dpfast.weighted_products.default")


class Ended(NamedTuple):
    """What a compiled graph's end has clipped and summed."""

    params: list[Any]
    sums: list[Tensor]
    found: Factors
    scales: Scales
    in_force: list[float]  # when it was clipped: see dpfast.clipping.thresholds.Clipping
    batch: int


def end_at_once(
    graph: GraphCalls, given: Sequence[Tensor], setting: Setting, tracked: set[Any] | None, padding: Sequence[int]
) -> Ended:
    """Clip and sum the forms of a compiled graph; rows in ``padding`` are of no sample.

    The first time runs as it is written, the second one is traced: whatever has to be set up is there by then.
    """
    clipping = setting.clipping
    params = graph.trained
    if tracked is not None and not tracked.issuperset(params):
        params = [p for p in params if p in tracked]
    device = given[0].device
    thresholds, present = clipping.on(device), presence(graph.batch, padding, device)

    def run(thresholds: Tensor, present: Tensor, *given: Tensor) -> list[Tensor]:
        forms = graph.forms(given)
        found, sums = closed({p: forms[p] for p in params}, setting, thresholds, present)
        return [*found, *sums]

    key = key_of(setting, tracked) if is_fixed(clipping) else None
    with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision(device):
        replay = NEVER if key is None else graph.replays.get(key)
        out = None
        if replay is SEEN:
            replay = graph.replays[key] = _traced_or_not(run, thresholds, present, *given)
        if replay is None:
            while len(graph.replays) >= MOST_REPLAYS:
                del graph.replays[next(iter(graph.replays))]
            graph.replays[key] = SEEN
        if callable(replay):
            out = replay(thresholds, present, *given)
            if has_lost(out[3]):
                out = None
        if out is None:
            out = run(thresholds, present, *given)
    found = Factors(*out[:4])
    return Ended(params, out[4:], found, setting.scales, clipping.in_force, graph.batch)


def _traced_or_not(run: Callable[..., list[Tensor]], *inputs: Tensor) -> Any:
    """``run`` traced, or :data:`NEVER` where it cannot be."""
    try:
        return traced(run, *inputs)
    except Exception as error:  # an operator that a trace cannot hold: what is written runs as well
        logger.warning("clipping a compiled model is not replayed, as it cannot be traced: %s", error)
        return NEVER


def key_of(setting: Setting, tracked: set[Any] | None) -> Any:
    """What a trace holds for: all but tensors, and the thresholds are one."""
    clipping, planner = setting.clipping, setting.planner
    trained = None if tracked is None else frozenset(map(id, tracked))
    function = clipping.function if is_fixed(clipping) else None  # which may have no hash
    return clipping, function, planner, planner.loaded, setting.scales, trained


def is_fixed(clipping: Clipping) -> bool:
    """Whether its function is one of ours, which never change; a trace of another would not follow what it reads."""
    return type(clipping.function) in NAMED.values()


def traced(run: Callable[..., list[Tensor]], *inputs: Tensor) -> Callable[..., list[Tensor]]:
    """``run`` as a graph of operators, for inputs of these shapes, no sample being left out."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to load

    with all_left_in():
        module = make_fx(run)(*inputs)
    for node in [*module.graph.nodes]:
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
        elif str(node.target) in _OF_ANY_POSITIONS:
            sides = [[_without_group(side) for side in each] for each in node.args[:2]]
            node.args = (*sides, *node.args[2:])
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _without_group(side: Any) -> Any:
    """``A [B, T, d]`` for ``[B, 1, T, d]``, where that is a view of it."""
    return side.args[0] if side.target is torch.ops.aten.unsqueeze.default and side.args[1] == 1 else side


def has_lost(lost: Tensor) -> bool:
    """Whether samples are left out that may have NaN: a trace has no branch for them. A GPU needs none, and no wait."""
    return lost.device.type == "cpu" and bool(lost.numpy().any())


def presence(batch: int, padding: Sequence[int], device: torch.device) -> Tensor:
    """``[B]``: 1 for a sample, 0 for a row that none is in."""
    present = torch.ones(batch, dtype=torch.float64, device=device)
    if padding:
        present.index_fill_(0, index_of(tuple(padding), device), 0.0)
    return present
