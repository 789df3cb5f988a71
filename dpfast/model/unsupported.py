"""Which models the fused mode can train, asked before anything is changed."""

from __future__ import annotations

from opacus.validators.module_validator import ModuleValidator
from torch import nn

from dpfast.capture.refusals import ONE_BY_ONE
from dpfast.layers import exact_alone, refusal


def problems(module: nn.Module, served_only: bool = True) -> list[str]:
    """Why the fused mode cannot train ``module``: a line for each of its modules that stands in the way.

    With ``served_only=False`` modules without a per-sample path are let through, for a physical batch of one.
    """
    found = []
    if not module.training:
        found.append("Model needs to be in training mode: call model.train()")
    for name, child in module.named_modules():
        if not any(p.requires_grad for p in child.parameters(recurse=False)):
            continue
        for own, p in child.named_parameters(name, recurse=False):
            if p.requires_grad and p.is_complex():
                found.append(
                    f"{own} is a complex parameter ({p.dtype}), which is neither clipped nor noised here: keep "
                    f"nn.Parameter(torch.view_as_real(...)), of shape {[*p.shape, 2]}, and compute with "
                    f"torch.view_as_complex(...) of it in forward, which is the same model; or freeze it with "
                    f"requires_grad_(False)"
                )
        where = f"{name or 'the model'} ({type(child).__name__})"
        validator = ModuleValidator.VALIDATORS.get(type(child))
        if (reason := refusal(child)) is not None:
            alone = exact_alone(child)
            if served_only or not alone:
                found.append(f"{where}: {reason}. {ONE_BY_ONE if alone else ''}".strip())
        elif validator is not None and not isinstance(child, nn.MultiheadAttention):  # that one is served here
            advice = "opacus.validators.ModuleValidator.fix(model) replaces it"
            found += [f"{where}: {error} {advice}" for error in validator(child)]
    return found
