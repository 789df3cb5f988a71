"""The noise stream's fast mode on the device: z(key, step, parameter, element) as csrc/include/dpfast/{philox,gaussian,
noise}.h and dpfast/reference/noise.py define it, for the epilogue of the kernel that uses it.

The order of operations is that of gaussian.h, and every multiply-add that is fused there is a ``tl.fma`` here; none of
the other products is added to anything, so it does not matter whether the compiler fuses what it can: where an fma is
rounded once, the normals are the native ones to the bit. Triton's interpreter does that since 3.9; before, it rounds
twice, which moves a normal by at most 2 units in the last place. The secure mode (ChaCha20) is the native core's alone.

Key and step come from device memory, never as numbers of the launch: those a CUDA graph would repeat, and with them the
noise, at every replay.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, Compile, cdiv, launch, meta


def noise_stream(key: Sequence[int], step: int, device: torch.device | str) -> torch.Tensor:
    """``[key's first word, its second word, step]`` int64, which the kernels read. Copied from the host: keep it, and
    count its last element up on the device.
    """
    return torch.tensor([key[0], key[1], step], dtype=torch.int64, device=device)


@triton.jit
def minus_two_log(high, low):
    """-2 ln u for u = (2³² high + low + ½) / 2⁶⁴."""
    # above √½ the float is 1 - u, from the complements of all bits
    above = high >= 0xB504F334
    high = tl.where(above, high ^ 0xFFFFFFFF, high)
    low = tl.where(above, low ^ 0xFFFFFFFF, low)
    part = (low.to(tl.float32) + 0.5) * 5.421010862427522e-20  # 2⁻⁶⁴
    f = tl.fma(high.to(tl.float32), 2.3283064365386963e-10, part)  # 2⁻³²
    # u = 2ᵉ (1 + t) with √½ ≤ 1 + t < √2
    bits = f.to(tl.int32, bitcast=True)
    exponent = tl.where(above, 0, (bits - 0x3F3504F3) >> 23)
    t = tl.where(above, -f, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    # ln(1 + t) = t - t²/2 + t³ P(t)
    P = tl.fma(tl.full(t.shape, 0.087004304, tl.float32), t, -0.14267486)
    P = tl.fma(P, t, 0.14914769)
    P = tl.fma(P, t, -0.16577585)
    P = tl.fma(P, t, 0.19963063)
    P = tl.fma(P, t, -0.25001338)
    P = tl.fma(P, t, 0.3333391)
    log1p = tl.fma(t * t, tl.fma(P, t, -0.5), t)
    return -2.0 * tl.fma(exponent.to(tl.float32), 0.6931472, log1p)


@triton.jit
def polar(w, a):
    """Words → radius √(-2 ln u) and direction: the point is (radius · x, radius · y)."""
    # φ = π/4 · y, y in (-1, 1) from the lower 30 bits of a; the upper two are the octant
    y = tl.fma((a << 2).to(tl.int32, bitcast=True).to(tl.float32), 4.656612873077393e-10, 9.313225746154785e-10)
    y2 = y * y
    s = tl.fma(tl.full(y.shape, -3.5950452e-05, tl.float32), y2, 0.002490001)
    s = tl.fma(s, y2, -0.080745436)
    s = tl.fma(s, y2, 0.7853982) * y
    c = tl.fma(tl.full(y.shape, 3.530338e-06, tl.float32), y2, -0.00032594008)
    c = tl.fma(c, y2, 0.015854327)
    c = tl.fma(c, y2, -0.30842513)
    c = tl.fma(c, y2, 1.0)
    c = (c.to(tl.uint32, bitcast=True) ^ ((a << 1) & 0x80000000)).to(tl.float32, bitcast=True)
    exchanged = a.to(tl.int32, bitcast=True) < 0
    radius = tl.sqrt_rn(minus_two_log(w, (a << 16) | (a >> 16)))
    return radius, tl.where(exchanged, s, c), tl.where(exchanged, c, s)


@triton.jit
def words_of(quad, stream, parameter):
    """The four words of each quad (int64): those of its Philox4x32-10 block."""
    key = (tl.load(stream + 1) << 32) | tl.load(stream)
    c0 = quad.to(tl.uint32)
    c1 = (quad >> 32).to(tl.uint32)
    c2 = (quad * 0 + parameter).to(tl.uint32)
    c3 = (quad * 0 + tl.load(stream + 2)).to(tl.uint32)
    return tl.philox(key, c0, c1, c2, c3)


@triton.jit
def normals_of(quad, stream, parameter):
    """z of the four elements of each quad."""
    w0, a0, w1, a1 = words_of(quad, stream, parameter)
    radius, x, y = polar(w0, a0)
    z0 = radius * x
    z1 = radius * y
    radius, x, y = polar(w1, a1)
    return z0, z1, radius * x, radius * y


@triton.jit
def normal_of(element, stream, parameter):
    """z of each element, anywhere in the parameter; four times the integer work of ``normals_of``."""
    w0, a0, w1, a1 = words_of(element >> 2, stream, parameter)
    first = (element & 2) == 0
    radius, x, y = polar(tl.where(first, w0, w1), tl.where(first, a0, a1))
    return radius * tl.where((element & 1) == 0, x, y)


@triton.jit
def in_order(z0, z1, z2, z3):
    """[..., n] four times → [..., 4 n], place after place."""
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def noisy(total, first, stream, parameter, std, scale, QUADS: tl.constexpr):
    """(total + std · z) · scale for a tile [rows, columns] of sums, as FastNoise in noisy.h: for an epilogue.

    ``first`` [rows] int64 is the element of the parameter that each row of the tile begins with; with ``QUADS`` they
    are all multiples of 4, and four elements share the work.
    """
    if QUADS:
        quad = (first >> 2)[:, None] + tl.arange(0, total.shape[1] // 4)[None, :]
        z0, z1, z2, z3 = normals_of(quad, stream, parameter)
        z = in_order(z0, z1, z2, z3)
    else:
        z = normal_of(first[:, None] + tl.arange(0, total.shape[1])[None, :], stream, parameter)
    return tl.fma(tl.full(z.shape, 1.0, tl.float32) * std, z, total) * scale


@triton.jit(do_not_specialize=["parameter", "offset"])
def standard_normal_kernel(out, stream, parameter, offset, n, BLOCK: tl.constexpr):
    # out[e - offset] = z of element e
    quad = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) + offset // 4
    z0, z1, z2, z3 = normals_of(quad, stream, parameter)
    place = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - offset % 4
    tl.store(out + place, in_order(z0, z1, z2, z3), mask=(place >= 0) & (place < n))


@torch.library.custom_op("dpfast_kernels::standard_normal", mutates_args=("out",))
def standard_normal(out: torch.Tensor, stream: torch.Tensor, parameter: int, offset: int) -> None:
    """Fills ``out`` (float32, contiguous) with z of the parameter's elements from ``offset`` on.

    ``stream``: see ``noise_stream``.
    """
    block = 64 if INTERPRETED else 512
    grid = (cdiv(out.numel() + offset % 4, 4 * block) if out.numel() else 0,)
    arguments = (out, stream, parameter, offset, out.numel())
    launch(standard_normal_kernel, grid, *arguments, device=out.device, BLOCK=block, num_warps=4)


@standard_normal.register_fake
def _(out, stream, parameter, offset):
    return None


COMPILES = [
    Compile(
        "standard_normal",
        lambda: standard_normal._init_fn(meta(1 << 20), meta(3, dtype=torch.int64), 5, 0),
    )
]
