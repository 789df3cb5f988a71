"""dpfast: exact differentially private training in PyTorch, in one backward pass.

Public names are loaded when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from dpfast.version import __version__ as __version__

if TYPE_CHECKING:
    from dpfast.analysis.explain import explain as explain
    from dpfast.analysis.sensitivity import SensitivityReport as SensitivityReport
    from dpfast.analysis.sensitivity import check_sensitivity as check_sensitivity
    from dpfast.clipping.functions import PSAC as PSAC
    from dpfast.clipping.functions import Abadi as Abadi
    from dpfast.clipping.functions import AutoS as AutoS
    from dpfast.clipping.functions import AutoV as AutoV
    from dpfast.clipping.functions import CustomClipping as CustomClipping
    from dpfast.clipping.functions import Global as Global
    from dpfast.data.physical_batches import BatchMemoryManager as BatchMemoryManager
    from dpfast.data.physical_batches import wrap_data_loader as wrap_data_loader
    from dpfast.dropin.patch import patch_opacus as patch_opacus
    from dpfast.dropin.patch import unpatch_opacus as unpatch_opacus
    from dpfast.dropin.registry import register as register
    from dpfast.dropin.registry import unregister as unregister
    from dpfast.engine import PrivacyEngine as PrivacyEngine
    from dpfast.layers.own_rules import Product as Product
    from dpfast.layers.register import register_layer as register_layer
    from dpfast.optim.ascent import DPSAT as DPSAT
    from dpfast.optim.ascent import DiSK as DiSK
    from dpfast.optim.ascent import DPSATMomentum as DPSATMomentum
    from dpfast.recorded import graphed as graphed
    from dpfast.zeroth import zeroth_order as zeroth_order

_HOMES = {
    "Abadi": "dpfast.clipping.functions",
    "AutoS": "dpfast.clipping.functions",
    "AutoV": "dpfast.clipping.functions",
    "BatchMemoryManager": "dpfast.data.physical_batches",
    "CustomClipping": "dpfast.clipping.functions",
    "DPSAT": "dpfast.optim.ascent",
    "DPSATMomentum": "dpfast.optim.ascent",
    "DiSK": "dpfast.optim.ascent",
    "Global": "dpfast.clipping.functions",
    "PSAC": "dpfast.clipping.functions",
    "PrivacyEngine": "dpfast.engine",
    "Product": "dpfast.layers.own_rules",
    "SensitivityReport": "dpfast.analysis.sensitivity",
    "check_sensitivity": "dpfast.analysis.sensitivity",
    "explain": "dpfast.analysis.explain",
    "graphed": "dpfast.recorded",
    "patch_opacus": "dpfast.dropin.patch",
    "register": "dpfast.dropin.registry",
    "register_layer": "dpfast.layers.register",
    "unpatch_opacus": "dpfast.dropin.patch",
    "unregister": "dpfast.dropin.registry",
    "wrap_data_loader": "dpfast.data.physical_batches",
    "zeroth_order": "dpfast.zeroth",
}

__all__ = [
    "DPSAT",
    "PSAC",
    "Abadi",
    "AutoS",
    "AutoV",
    "BatchMemoryManager",
    "CustomClipping",
    "DPSATMomentum",
    "DiSK",
    "Global",
    "PrivacyEngine",
    "Product",
    "SensitivityReport",
    "check_sensitivity",
    "explain",
    "graphed",
    "patch_opacus",
    "register",
    "register_layer",
    "unpatch_opacus",
    "unregister",
    "wrap_data_loader",
    "zeroth_order",
]


def __getattr__(name: str) -> Any:
    """A public name, or a part of the package, loaded now."""
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"dpfast.{name}") is not None:
        return importlib.import_module(f"dpfast.{name}")
    raise AttributeError(f"module 'dpfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
