"""What of Opacus' own code somebody has replaced in this process, so that a step of Opacus does something else."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import opacus
import torch
from opacus import PrivacyEngine as OpacusEngine
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer

# What a subclass of Opacus' engine may have made its own, and the fused mode does not call.
PARTS = ("_prepare_model", "_prepare_optimizer", "_prepare_data_loader", "_prepare_criterion")
FUNCTIONS = ("_generate_noise", "get_optimizer_class")  # a step goes through these, wherever they are imported
_OWN = [Path(__file__).resolve().parents[1], Path(str(opacus.__file__)).resolve().parent]
_TORCH = Path(str(torch.__file__)).resolve().parent


def replaced_in_opacus() -> str | None:
    """The name of a method or function of Opacus that is somebody else's now, and that a private step runs; or None.

    Those that ``dpfast.register()`` puts in their place do not count.
    """
    held: list[tuple[str, str, Any]] = [("PrivacyEngine", name, vars(OpacusEngine)[name]) for name in PARTS]
    for kind in _of_opacus([DPOptimizer, AbstractGradSampleModule]):
        held += [(kind.__name__, name, method) for name, method in vars(kind).items() if _is_method(method)]
    for module_name, module in [*sys.modules.items()]:
        if module_name.partition(".")[0] == "opacus":
            held += [(module_name, name, vars(module)[name]) for name in FUNCTIONS if name in vars(module)]
    return next((f"{where}.{name}" for where, name, function in held if not _is_own(function)), None)


def _of_opacus(kinds: list[type]) -> list[type]:
    """Those of ``kinds`` and below them that Opacus has defined."""
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] == "opacus"]
    return own + [each for kind in own for each in _of_opacus(kind.__subclasses__())]


def _is_method(value: Any) -> bool:
    return callable(value) and not isinstance(value, (type, staticmethod, classmethod))


def _is_own(function: Any) -> bool:
    """Whether a function's code, and not only its name, is Opacus' or dpfast's; torch may have wrapped it."""
    if not isinstance(function, FunctionType):
        return False
    path = Path(function.__code__.co_filename).resolve()
    if path.is_relative_to(_TORCH):
        return _is_own(getattr(function, "__wrapped__", None))
    return any(path.is_relative_to(home) for home in _OWN)
