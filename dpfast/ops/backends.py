"""The chooser of backends: for each op and device the compiled library, Triton's kernels, or the reference in PyTorch.

In this order; whatever is passed over has a reason, which ``python -m dpfast doctor`` shows, and a library or kernels
that should be there and are not are warned of once.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache

import torch
from torch import Tensor

from dpfast import native

_log = logging.getLogger("dpfast")

# For many small layers in one call, where a call takes longer than its work; a GPU has launches of its own for them.
CPU_OPS = ("side_norms", "all_position_sums", "all_normalised_sums", "weighted_products", "product_samples")
NATIVE_OPS = (
    "standard_normal",
    "noisy_grad_",
    "noisy_sgd_",
    "noisy_adam_",
    "clip_factors",
    "squared_norms",
    "ghost_stats",
    "weighted_sums",
    "sum_positions",
    "normalised_sums",
    "channel_sums",
    "convolution_grad_samples",
    "convolution_ghost",
    "embedding_squared_norm",
    "embedding_sum",
    *CPU_OPS,
)
TRITON_OPS = (
    "ghost_squared_norm",
    "tile_squared_norm",
    "grad_samples",
    "clipped_weight_gradient",
    "squared_norms",
    "weighted_sums",
    "sum_positions",
    "normalised_sums",
    "channel_sums",
    "convolution_grad_samples",
    "convolution_clipped_gradient",
    "embedding_squared_norm",
    "embedding_sum",
    "embedding_cross_term",
)
TRITON_DEVICES = {"cuda"}
# Without the compiled library these are not done in one pass: noise is added, and torch's optimizer steps.
_OWN_STEP = ("noisy_sgd_", "noisy_adam_")


def is_native(op: str, device: torch.device) -> bool:
    """Whether the compiled library has ``op`` for tensors on ``device``."""
    return op in NATIVE_OPS and native.available(device.type) and _has(op, device.type)


def is_triton(op: str, *tensors: Tensor) -> bool:
    """Whether a Triton kernel serves ``op`` for these tensors: on a GPU, and not float64."""
    narrow = all(x.device.type in TRITON_DEVICES and x.dtype != torch.float64 for x in tensors)
    return narrow and not is_native(op, tensors[0].device) and why_no_triton() is None


@cache
def why_no_triton() -> str | None:
    """Why the Triton kernels cannot be used, None if they can; warned of once where there is a GPU.

    Raises:
        ValueError: ``DPFAST_TRITON`` is neither 0 nor 1.
    """
    asked = os.environ.get("DPFAST_TRITON", "1")
    if asked not in ("0", "1"):
        raise ValueError(f"DPFAST_TRITON={asked!r}: give 1, or 0 for no Triton kernels")
    if asked == "0":
        return "DPFAST_TRITON=0"
    try:
        importlib.import_module("dpfast_kernels.common")
    except ImportError as error:
        if torch.cuda.is_available():
            _log.warning("the dpfast kernels in Triton are not used, plain PyTorch is: %s (pip install triton)", error)
        return str(error)
    return None


def backends() -> list[tuple[str, str, str, str]]:
    """``(op, device type, backend, reason)`` of every op on every kind of device that is here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    ops = dict.fromkeys((*NATIVE_OPS, *TRITON_OPS))
    return [(op, device, *_row(op, device)) for device in devices for op in ops if device == "cpu" or op not in CPU_OPS]


def _row(op: str, device: str) -> tuple[str, str]:
    reasons = []
    if op in NATIVE_OPS:
        if not native.available(device):
            reasons.append(native.why_not(device) or "no library")
        elif _has(op, device):
            return "native", "compiled library"
        else:
            reasons.append(f"the {device} library does not have it")
    if op in TRITON_OPS:
        if device not in TRITON_DEVICES:
            if op not in NATIVE_OPS:
                return "torch", "PyTorch's matrix products; Triton's kernels are for GPUs"
        elif missing := why_no_triton():
            reasons.append(missing)
        else:
            return "triton", "; ".join(["Triton kernel", *reasons])
    instead = "op noisy_grad_ and torch's own step" if op in _OWN_STEP else "reference (plain PyTorch)"
    return instead, "; ".join(reasons)


@cache
def _has(op: str, device: str) -> bool:
    """Asked when the device's library is loaded, so that the answer stays."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dpfast::{op}", device.upper())
