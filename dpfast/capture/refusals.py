"""What is raised where gradients cannot be told apart, and the words that name the cause and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

SHOWN = 3  # names in a list before "and 11 more"
ONE_BY_ONE = (
    "A physical batch of one is exact for any model: make_private(..., max_physical_batch_size=1) and "
    "BatchMemoryManager(max_physical_batch_size=1)"
)
METHOD_AS_FORWARD = (
    "make private a small module whose forward calls it: class Training(nn.Module) with self.model = model and "
    "forward(self, *inputs) that returns self.model.{method}(*inputs)"
)


def listed(names: Iterable[str]) -> str:
    """``'a', 'b', 'c' and 11 more``."""
    every = list(names)
    shown = ", ".join(repr(name) for name in every[:SHOWN])
    return shown if len(every) <= SHOWN else f"{shown} and {len(every) - SHOWN} more"


def refuse_gradient_hooks(names: Mapping[Any, str]) -> None:
    """Refuse hooks of the user's own on the gradients of parameters: autograd makes none in the fused mode.

    Args:
        names: parameters, and the names that the message uses.

    Raises:
        ValueError: names the parameter.
    """
    for p, name in names.items():
        hooks = [*(p._backward_hooks or {}).values(), *(p._post_accumulate_grad_hooks or {}).values()]
        if any(not str(getattr(hook, "func", hook).__module__).startswith("dpfast.") for hook in hooks):
            raise ValueError(
                f"parameter {name!r} has a hook on its gradient (register_hook or register_post_accumulate_grad_hook), "
                f"which backward() would call with nothing: the gradient is there after the noise, in the step. Take "
                f"the hook off, and give optimizer.attach_step_hook(fn) a function that looks at p.grad"
            )


class LayoutError(RuntimeError):
    """It cannot be told what belongs to which sample."""


class RowsError(LayoutError):
    """A layer got rows that are not as many of each sample."""


class RuleError(ValueError):
    """What a user's own rule for a layer returned is not the layer's per-sample gradients."""


class BypassError(RuntimeError):
    """Parameters were used outside of the modules that own them, past their taps."""

    def __init__(self, parameters: Sequence[nn.Parameter], name: str, message: str = ""):
        super().__init__(
            message
            or f"parameter {name!r} got a gradient outside of its own module's forward (as in "
            f"F.linear(x, model.embedding.weight)), where per-sample gradients cannot be taken. Call the module "
            f"that owns it, or set requires_grad_(False). {ONE_BY_ONE}"
        )
        self.parameters = parameters


def used_by_the_loss(names: Mapping[Any, str], parameters: Iterable[nn.Parameter]) -> BypassError:
    """``parameters`` got ordinary gradients, which nobody has clipped, from outside of the model's forward."""
    used = [p for p in names if p in set(parameters)]
    several = len(used) > 1
    return BypassError(
        used,
        names[used[0]],
        f"parameter{'s' if several else ''} {listed(names[p] for p in used)} got a gradient past the private layers: "
        f"the loss, or other code outside of the model's forward, computes with {'them' if several else 'it'}. A "
        f"penalty on parameters alone needs no clipping: for an L2 penalty use the optimizer's weight_decay (2 λ for "
        f"λ ‖w‖²); for any other, after optimizer.step() and under torch.no_grad(), subtract the learning rate times "
        f"torch.autograd.grad(penalty, parameters) from the parameters. A term that computes with data and a "
        f"parameter, such as F.linear(x, model.embedding.weight) or what a method other than forward returns, belongs "
        f"into the model's forward, where it is exact. "
        f"{ONE_BY_ONE}",
    )


def called_outside(name: str, owner: nn.Module | None) -> LayoutError:
    """``name`` was called while no forward of the private model was under way; ``owner`` is that model."""
    method = None if owner is None else _method_under_way(owner)
    if method is not None:
        kind = type(owner).__name__
        return LayoutError(
            f"{kind}.{method} called {name!r} outside of the private model's forward, where the samples of a batch are "
            f"not known. To train through {method}, {METHOD_AS_FORWARD.format(method=method)}. To evaluate with it, "
            f"call it under torch.no_grad()"
        )
    return LayoutError(
        f"{name!r} was called outside of the private model's forward, where the samples of a batch are not known. If "
        f"the loss needs what it returns, let the model's forward return that too, and call the model itself; to "
        f"evaluate with it, call it under torch.no_grad()"
    )


def _method_under_way(owner: nn.Module) -> str | None:
    """The outermost method of ``owner``'s own classes that has not returned."""
    found, frame = None, sys._getframe()
    own = {name for cls in type(owner).__mro__ if not cls.__module__.startswith("torch.nn.") for name in vars(cls)}
    while frame is not None:
        code = frame.f_code
        if code.co_name in own and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is owner:
            found = code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return found
