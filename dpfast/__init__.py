"""dpfast: exact differentially private training in PyTorch, in one backward pass."""

from dpfast.analysis.explain import explain
from dpfast.analysis.sensitivity import SensitivityReport, check_sensitivity
from dpfast.clipping.functions import PSAC, Abadi, AutoS, AutoV, CustomClipping, Global
from dpfast.data.physical_batches import BatchMemoryManager
from dpfast.dropin.patch import patch_opacus, unpatch_opacus
from dpfast.dropin.registry import register, unregister
from dpfast.engine import PrivacyEngine
from dpfast.graphed import graphed
from dpfast.optim.ascent import DPSAT, DiSK, DPSATMomentum

__version__ = "0.1.0"

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
    "SensitivityReport",
    "check_sensitivity",
    "explain",
    "graphed",
    "patch_opacus",
    "register",
    "unpatch_opacus",
    "unregister",
]
