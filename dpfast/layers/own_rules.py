"""Rules for layers of other packages, which their users have registered: what each is, and which module has one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dpfast import ops
from dpfast.capture.forms import EmbeddingRows, Factored, Instantiated, OuterProduct
from dpfast.layers.base import by_sample, product_form


@dataclass(frozen=True)
class Product:
    """Per-sample gradients of a weight as sums of outer products over positions, which are never written out for it.

    ``g_i = Σ_t backprops[i, t] ⊗ activations[i, t]``, that is ``G_iᵀ A_i``, for a weight of ``p`` rows. Norms and
    clipped sums are taken of these two sides, in whichever way the planner finds fastest, and with the certified bounds
    that a linear layer's have. Several dimensions between the first and the last are positions, as is none.

    Args:
        activations: ``[B, *, d]``, where the weight has ``p · d`` elements. Or integers ``[B, *]``: the weight's rows
            that are used, as in an embedding table; ``backprops[i, t]`` is then added to row ``activations[i, t]``.
        backprops: ``[B, *, p]``, with the same ``*``; for integer activations ``[B, *, d]``.
    """

    activations: Tensor
    backprops: Tensor


OwnRule = Callable[[Any, list[Tensor], Tensor], Mapping[Any, "Tensor | Product"]]
RULES: OrderedDict[int, tuple[type[nn.Module], OwnRule]] = OrderedDict()  # by torch's handles; a later one counts


def own_rule(module: nn.Module) -> OwnRule | None:
    """The rule that is registered for the class of ``module``, or for one whose forward that class has kept.

    None where the rule's parameters are not the module's own plain ones, as under a parametrisation, weight norm or
    pruning, or with a forward that only this instance has. Such a module is served as if nothing were registered.
    """
    if not RULES or parametrize.is_parametrized(module):
        return None
    if any(type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values()):
        return None
    forward = vars(module).get("forward")
    if forward is not None and not type(forward).__module__.startswith("dpfast."):
        return None
    for cls in type(module).__mro__:
        if "forward" in vars(cls) and vars(cls)["forward"] is not type(module).forward:
            return None
        for registered, rule in reversed(RULES.values()):
            if registered is cls:
                return rule
    return None


Made = Instantiated | OuterProduct | Factored | EmbeddingRows  # of what a rule returns


def as_form(given: Any, parameter: Tensor, rows: int, batch: int) -> Made | None:
    """What a rule has returned for ``parameter``, of ``rows`` rows of which each sample has ``rows / batch``.

    None where its shapes are no such thing.
    """
    dtype = ops.compute_dtype(parameter.dtype)
    if isinstance(given, Tensor):
        if given.shape != (rows, *parameter.shape):
            return None
        samples = given.detach().to(dtype)
        return Instantiated(samples if rows == batch else samples.unflatten(0, (batch, rows // batch)).sum(1))
    if not isinstance(given, Product) or parameter.dim() == 0:
        return None
    A, G = given.activations.detach(), given.backprops.detach().to(dtype)
    if A.dim() == 0 or len(A) != rows:
        return None
    if not A.is_floating_point():
        if (*A.shape, parameter[0].numel()) != G.shape:
            return None
        return EmbeddingRows(by_sample(A.long(), batch, 0), by_sample(G, batch), len(parameter))
    if A.dim() < 2 or (*A.shape[:-1], len(parameter)) != G.shape or A.shape[-1] != parameter[0].numel():
        return None
    return product_form(A.to(dtype), G, batch, len(parameter))
