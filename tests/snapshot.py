"""Everything about a user's objects that the library might leave changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def of_model(model: nn.Module, values: bool = True) -> dict[str, Any]:
    """Types, instance attributes, hooks, flags, parameters and their attributes; with ``values``, bit for bit."""
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = {k: id(v) for k, v in vars(module).items() if k not in HOOKS and not k.startswith("_")}
        hooks = {k: list(getattr(module, k)) for k in HOOKS}
        out[f"module {name}"] = (type(module), sorted(vars(module)), attributes, hooks, module.training)
    for name, p in model.named_parameters(remove_duplicate=False):
        hooks = [list(getattr(p, k, None) or ()) for k in ("_backward_hooks", "_post_accumulate_grad_hooks")]
        out[f"parameter {name}"] = (id(p), type(p), p.requires_grad, dict(p.__dict__), hooks, p.grad)
        if values:
            out[f"value {name}"] = p.detach().numpy().tobytes()
    return out


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    out: dict[str, Any] = {"type": type(optimizer), "attributes": sorted(vars(optimizer))}
    for i, group in enumerate(optimizer.param_groups):
        out[f"group {i}"] = {k: [id(p) for p in v] if k == "params" else v for k, v in group.items()}
    out["state"] = {id(p): sorted(s) for p, s in optimizer.state.items()}
    out["step"] = optimizer.step.__func__ if hasattr(optimizer.step, "__func__") else optimizer.step
    return out


def of_loader(loader) -> dict[str, Any]:
    return {"type": type(loader)} | {k: id(v) for k, v in vars(loader).items()}
