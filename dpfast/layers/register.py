"""``dpfast.register_layer``: a layer of another package is served without an edit of this one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dpfast.layers import family_of_class
from dpfast.layers.own_rules import RULES, OwnRule


def register_layer(layer: type[nn.Module], rule: OwnRule) -> RemovableHandle:
    """Serve modules of a class by a rule of your own, from the next ``make_private`` on.

    You may not need this: a module that no rule is known for runs under ``torch.func.vmap``, which is exact. A rule is
    for one that ``vmap`` cannot run, or runs slowly. It is a function with the signature of Opacus' grad samplers::

        def rule(module, activations, backprops):
            A, G = activations[0], backprops
            return {module.weight: dpfast.Product(A, G), module.bias: G.flatten(1, -2).sum(1)}

        handle = dpfast.register_layer(MyLinear, rule)  # handle.remove() takes it back

    The module's own forward runs as it is, and so does its gradient with respect to its inputs. The rule is called in
    the backward pass. ``activations`` are the tensors that the forward was called with and ``backprops`` the gradient
    of its output, both with the samples first, 16-bit numbers as float32; the module's parameters are those that the
    forward computed with. The rule returns, for each trainable parameter of the module's own (those of submodules have
    their own rules), either per-sample gradients ``[B, *parameter.shape]`` or a :class:`~dpfast.Product`.

    Guarantee: norms and clipped sums are both made from what the rule returns, here, so that a sample contributes at
    most the sensitivity whatever the rule returns for it; tied and re-used weights count with their cross-terms. That
    a sample's gradient depends on that sample alone is looked at as for every layer. A rule that returns something
    else than the gradient is refused: it is compared with ``torch.autograd``, up to eight rows of the batch one at a
    time in float64, in the first check of the model, and again in the layer's 2nd, 4th, 8th, ... backward and whenever
    the layer is called in another way.

    Args:
        layer: a subclass of ``nn.Module`` with a forward of its own that returns one tensor. Subclasses that keep the
            forward are served too. Registered again, the later rule counts.
        rule: called as above. It must be a pure function of its arguments: a layer that draws random numbers in its
            forward, such as dropout before its parameters, cannot have one.

    Returns:
        torch's handle: ``handle.remove()``, or the end of ``with handle:``, forgets the rule. Models that are private
        by then keep it.

    Raises:
        ValueError: ``layer`` is no class of modules with a forward, or one that dpfast serves anyway; ``rule`` cannot
            be called. In training: the rule is wrong, naming layer and parameter.
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)) or layer.forward is nn.Module.forward:
        raise ValueError(f"layer={layer!r}: give a subclass of nn.Module, the class itself, with a forward of its own")
    if not callable(rule):
        raise ValueError(f"rule={rule!r}: give a function (module, activations, backprops) → {{parameter: ...}}")
    if family_of_class(layer) is not None:
        raise ValueError(
            f"layer={layer.__name__}: dpfast has a rule for it already, which is exact; register a subclass with a "
            f"forward of its own if yours computes something else"
        )
    handle: Any = RemovableHandle(RULES)
    RULES[handle.id] = layer, rule
    return handle
