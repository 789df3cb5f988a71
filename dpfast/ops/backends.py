"""The chooser of backends: for each op and device the compiled library, or the plain-PyTorch reference."""

from __future__ import annotations

import torch

from dpfast import native

NATIVE_OPS = (
    "standard_normal",
    "noisy_grad_",
    "noisy_sgd_",
    "noisy_adam_",
    "clip_factors",
    "squared_norms",
    "weighted_sums",
    "sum_positions",
    "normalised_sums",
    "channel_sums",
    "convolution_grad_samples",
    "convolution_ghost",
    "embedding_squared_norm",
    "embedding_sum",
)
# Without the compiled library these are not done in one pass: noise is added, and torch's optimizer steps.
_OWN_STEP = ("noisy_sgd_", "noisy_adam_")


def is_native(op: str, device: torch.device) -> bool:
    """Whether the compiled library has ``op`` for tensors on ``device``."""
    return native.available(device.type) and _has(op, device.type)


def backends() -> list[tuple[str, str, str, str]]:
    """``(op, device type, backend, reason)`` of every op on every kind of device that is here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [(op, device, *_row(op, device)) for device in devices for op in NATIVE_OPS]


def _row(op: str, device: str) -> tuple[str, str]:
    instead = "op noisy_grad_ and torch's own step" if op in _OWN_STEP else "reference (plain PyTorch)"
    if not native.available(device):
        return instead, native.why_not(device) or "no library"
    if not _has(op, device):
        return instead, f"the {device} library does not have it"
    return "native", "compiled library"


def _has(op: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dpfast::{op}", device.upper())
