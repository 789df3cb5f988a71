"""One graph at a time: told from what a model is called with, where nodes are not samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dpfast.capture.trees import tensors
from dpfast.refusals import LayoutError

ADVICE = (
    "nodes are not samples, and one moves the others' gradients through its edges. If a graph is a sample, call the "
    "model with a batch of one graph, x[None] of shape [1, nodes, features] (a dense adjacency matrix as [None] too; "
    "edge lists as they are), and let its forward gather and add nodes along dimension -2; several graphs are padded "
    "to [B, nodes, features]. What protects single nodes or edges is another guarantee than this library's"
)


def looks_like_one(args: Any, kwargs: Any) -> str:
    """What makes the inputs look like one graph, in words; an empty string if nothing does.

    Node features ``[N, F]`` beside an edge list ``[2, E]`` or ``[E, 2]`` of integers, or a square matrix ``[N, N]``.
    """
    given = tensors((args, kwargs))
    for x in given:
        if x.dim() != 2 or not x.is_floating_point():
            continue
        for y in given:
            if y is x or y.dim() != 2:
                continue
            if _is_edge_list(y) and len(y) != len(x):
                return f"node features of shape {list(x.shape)} beside edges of shape {list(y.shape)}"
            if y.shape[0] == y.shape[1] == len(x):
                return f"node features of shape {list(x.shape)} beside an adjacency matrix of shape {list(y.shape)}"
    return ""


def refuse_one(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], alone: bool) -> None:
    """Raise if the inputs are one graph for sure; if they look like it will do where only batches of one are let in."""
    if graph := surely_one(module, args, kwargs) or (looks_like_one(args, kwargs) if alone else ""):
        raise LayoutError(f"{type(module).__name__} was called with one graph, {graph}: {ADVICE}")


@contextmanager
def told_of(module: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
    """What is refused within says so if the inputs look like one graph."""
    try:
        yield
    except LayoutError as error:
        if not (graph := looks_like_one(args, kwargs)):
            raise
        words = f"{type(module).__name__} was called with what looks like one graph, {graph}: {ADVICE}. ({error})"
        raise LayoutError(words) from error


def surely_one(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """As :func:`looks_like_one`, where an argument is called edges too and its numbers can be rows of ``x`` alone."""
    try:
        named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no such call, or no signature
        named = dict(kwargs)
    nodes = [x for x in named.values() if isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()]
    for name, edges in named.items():
        if not isinstance(edges, Tensor) or "edge" not in name or not _is_edge_list(edges) or not edges.numel():
            continue
        most = int(edges.max())
        for x in nodes:
            if len(edges) != len(x) and x.shape[1] <= most < len(x):
                return f"node features of shape {list(x.shape)} beside {name} of shape {list(edges.shape)}"
    return ""


def _is_edge_list(x: Tensor) -> bool:
    return x.dim() == 2 and 2 in x.shape and not x.is_floating_point() and not x.is_complex() and x.dtype.itemsize > 1
