"""A traced step whose forward and backward are compiled, while what clips runs as it was traced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

logger = logging.getLogger(__name__)
_OF_BACKWARD = "dpfast_of_backward"


def mark_backward() -> None:
    """What has been traced so far is forward and backward; what comes from here on clips."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    assert mode is not None, "nothing is being traced"
    for node in mode.tracer.graph.nodes:
        node.meta[_OF_BACKWARD] = True


def with_compiled_backward(module: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """``module``, its marked part compiled for inputs of these shapes.

    Activations and backprops leave that part as tensors, so that norms and sums are of the same numbers: fused into
    both, a backprop could be rounded in one and not in the other.
    """
    from torch._inductor import compile as compile_graph
    from torch.fx.passes.split_module import split_module

    from dpfast.capture.joint_graph import adds_at_indices

    if adds_at_indices(module.graph):
        logger.warning("a graphed step is replayed without Inductor: it adds up at indices (max pooling, gather)")
        return module
    later = _later(module)
    parts: Any = split_module(module, module, lambda node: int(node in later))
    values = dict(zip((node for node in parts.graph.nodes if node.op == "placeholder"), inputs, strict=True))
    call = next(node for node in parts.graph.nodes if node.target == "submod_0")
    # Parameters are inputs of the part, too: a compiler may take what a graph holds for constant.
    given: list[Any] = [values[n] if n in values else getattr(parts, n.target).detach() for n in call.args]
    with torch.no_grad():
        parts.submod_0 = _Compiled(compile_graph(parts.submod_0, given))
    return parts


def _later(module: GraphModule) -> set[Node]:
    """What is not compiled: what clips, and before that our own operators and what follows from them."""
    later: set[Node] = set()
    for node in module.graph.nodes:
        ours = getattr(node.target, "namespace", "") == "dpfast"
        if ours or _OF_BACKWARD not in node.meta or not later.isdisjoint(node.all_input_nodes):
            later.add(node)
    return later


class _Compiled(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)
