"""What a rate is, and the rates for plans where none was measured: a guess for CPUs, predictions for GPUs.

Those of GPUs are what ``python -m dpfast bench --suite static`` predicts for an H100 from the machine code of the
Triton kernels, with the waves that their programs take on it (its table says them); nothing was timed. Memory is taken
at 70 % of its rate, and what has no kernel of ours is a guess. Whoever plans with them says so: ``Rates.unmeasured``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dpfast import ops


@dataclass(frozen=True)
class Rates:
    """In a second: floating-point operations of each kind of product, and bytes; ``call`` is what an op costs at least.

    ``gram`` is of ghost norms, counted at ``T²(p + d)``; ``lines`` are elements of both sides, ``T(p + d)``, that those
    of a convolution lay out before (None: nothing is to be); ``tile`` of norms by tiles (None: there is no such op);
    ``sample`` of per-sample gradients written out; ``sum`` of the clipped weight gradient; ``write`` is of memory that
    is new, ``read`` of a weighted sum. A gradient that is written out is read ``passes`` times: for the sum, and for
    the norm where that is not the same op's. ``unmeasured`` says where they are from and why they are not measured;
    None: they are.
    """

    gram: float
    tile: float | None
    sample: float
    sum: float
    write: float
    read: float
    call: float
    passes: int
    lines: float | None = None
    unmeasured: str | None = None


CPU = Rates(gram=9e10, tile=None, sample=1.6e11, sum=1.8e11, write=6e9, read=1.2e10, call=4e-5, passes=2)


def _kernels(gram: float, tile: float | None, sample: float, sum: float, lines: float | None = None) -> Rates:
    memory = 0.7 * 3.35e12
    return Rates(gram, tile, sample, sum, write=memory, read=memory, call=1e-5, passes=1, lines=lines)


CUDA = {  # of a linear layer or of a convolution's patches, whose elements have so many bits
    ("linear", 16): _kernels(gram=4.3e14, tile=5.6e14, sample=5.2e14, sum=5.8e14),
    ("linear", 32): _kernels(gram=2.4e13, tile=4.3e13, sample=4.3e13, sum=4.4e13),
    ("convolution", 16): _kernels(gram=2.8e14, tile=None, sample=2.3e14, sum=2.1e14, lines=2e11),
    ("convolution", 32): _kernels(gram=2.4e13, tile=None, sample=1.8e13, sum=1.8e13, lines=2e11),
}
OTHER = Rates(gram=2e13, tile=None, sample=2e13, sum=2e13, write=2e12, read=2e12, call=1e-5, passes=2)  # float64


def unmeasured(device_type: str, dtype: torch.dtype, patches: bool, why: str) -> Rates:
    """Rates for products of ``dtype`` on a kind of device, with norms by tiles only where there is an op for them.

    Args:
        patches: of a convolution, not of a linear layer's sides.
        why: there are no measured ones.
    """
    if device_type == "cpu":
        return replace(CPU, unmeasured=f"built-in rates of some CPU: {why}")
    if device_type not in ops.TRITON_DEVICES or dtype == torch.float64 or ops.why_no_triton() is not None:
        return replace(OTHER, unmeasured=f"built-in rates: {why}")
    rates = CUDA["convolution" if patches else "linear", 32 if dtype.itemsize > 2 else 16]
    return replace(rates, unmeasured=f"rates predicted from the kernels' machine code for an H100: {why}")
