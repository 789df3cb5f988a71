"""How ``torch.compile`` meets a private model; loaded when it does.

The model's own forward is compiled. What stands around it (batch sizes, the check of the first step, hooks on the
outputs) runs as it is written, outside of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import trace_rules
from torch._dynamo.eval_frame import set_eval_frame, skip_code

from dpfast.capture import joint_graph
from dpfast.model.bare_parameters import BareForward
from dpfast.model.forwards import GenericForward

joint_graph.install()


def outside_graph(run: Callable[..., Any], *args: Any) -> Any:
    """``run(compiler, *args)`` outside of the graph being traced; ``compiler`` is for :func:`within`."""
    compiler = set_eval_frame(None)
    try:
        return run(compiler, *args)
    finally:
        set_eval_frame(compiler)


def within(compiler: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)``, compiled."""
    before = set_eval_frame(compiler)
    try:
        return run(*args, **kwargs)
    finally:
        set_eval_frame(before)


outside_graph._torchdynamo_disable = True  # type: ignore[attr-defined]
outside_graph._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "the entry of a private model runs outside of the graph; what it calls, the model's own forward, is one graph "
    "if it can be: compile without fullgraph=True, or compile the model first and make it private then"
)
for function in (outside_graph, within):
    skip_code(function.__code__)
# vmap, and copies of parameters in place of parameters, are nothing for a compiler: not even for layers below.
GenericForward.__call__ = torch.compiler.disable(GenericForward.__call__)  # type: ignore[method-assign]
BareForward.beside = torch.compiler.disable(BareForward.beside)  # type: ignore[method-assign]


def of_one_model(module: nn.Module, previous: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The module's own forward. Compiled code is kept by function, a few times each, and ``plain`` is all models'."""
    if previous is not None:
        return previous
    forward = type(module).forward
    return plain if _is_skipped(forward) else partial(forward, module)  # PyTorch's own are not compiled alone


@cache
def _is_skipped(forward: Any) -> bool:
    return trace_rules.check(forward)


def uncompiled() -> Any:
    """Within, compiled functions run as they are written."""
    return torch.compiler.set_stance("force_eager")
