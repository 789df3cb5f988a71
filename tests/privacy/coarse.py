"""Products rounded to bfloat16 or tf32 as torch's switches allow, on any machine.

Only some processors have such products. Here those that a library may round are rounded, if the switches say so when
they are made, and only from a certain size on, as libraries choose their kernels by sizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    "matmul": {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot},
    "conv": {aten.convolution, aten.convolution_backward},
}
SIZE = 17  # of a dimension, from which on the coarse kernel is taken
# What users write, and whether this coarsens matrix products and convolutions.
SETTINGS = ("medium", "high", "mkldnn.matmul", "mkldnn.conv", "generic bf16", "generic tf32")


def rounded(x: Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return x.bfloat16().float()
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Coarse(TorchDispatchMode):
    """Counts the products that it has rounded."""

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest, self.count = smallest, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = next((kind for kind, ops in PRODUCTS.items() if func.overloadpacket in ops), None)
        precision = torch._C._get_fp32_precision_getter("mkldnn", kind) if kind else "none"
        if precision in ("bf16", "tf32"):
            sides = [x for x in args if isinstance(x, Tensor) and x.dtype == torch.float32]
            batched = func.overloadpacket in (aten.bmm, aten.baddbmm)  # alike for each pair of matrices
            if any(size >= self.smallest for x in sides for size in x.shape[batched:]):
                self.count += 1
                args = [rounded(x, precision) if any(x is side for side in sides) else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def allowed(setting: str) -> Iterator[None]:
    """torch's switches as a user sets them, and back."""
    switches = [(b, op) for b in ("mkldnn", "cuda") for op in ("matmul", "conv")]
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    if setting in ("medium", "high"):
        torch.set_float32_matmul_precision(setting)
    elif setting == "mkldnn.matmul":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    elif setting == "mkldnn.conv":
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
    else:
        torch.backends.fp32_precision = setting.split()[1]
    before = [get(*switch) for switch in switches], _older()
    try:
        yield
        after = [get(*switch) for switch in switches], _older()
        assert after == before, "the switches are not as the user has left them"
    finally:
        torch.set_float32_matmul_precision("highest")
        put("generic", "all", "none")
        for switch in switches:
            put(*switch, "none")


def _older() -> str:
    """torch's older switch; it tells nothing of what was set by the newer ones."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError as error:
        return str(error)


@contextmanager
def coarsely(setting: str, smallest: int = SIZE) -> Iterator[Coarse]:
    with allowed(setting), Coarse(smallest) as mode:
        yield mode
