"""dpfast: exact differentially private training in PyTorch, in one backward pass."""

from dpfast.analysis.sensitivity import SensitivityReport, check_sensitivity
from dpfast.clipping_functions import PSAC, Abadi, AutoS, AutoV, CustomClipping, Global
from dpfast.engine import PrivacyEngine
from dpfast.explain import explain
from dpfast.optim.ascent import DPSAT, DiSK, DPSATMomentum
from dpfast.physical_batches import BatchMemoryManager
from dpfast.registry import register, unregister

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
    "register",
    "unregister",
]
