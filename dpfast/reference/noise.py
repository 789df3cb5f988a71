"""Noise as a pure function z(key, step, parameter, element), as in csrc/include/dpfast/noise.h, in plain PyTorch.

Words have 32 bits, in int64. Integers are the native code's exactly. A fused multiply-add is made in float64, where the
product of two float32 is exact, and rounded to float32: that differs from rounding once in about 1 of 2²⁹ results, and
then by one unit. The order of operations is that of gaussian.h, so normals are the native ones to 2 units in the last
place, and nearly always to the bit. Where int64 and int32 overflow they wrap, as everywhere in torch.
"""

import math
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
PIECE = 1 << 17  # elements made at once, a multiple of TILE: what is between two operations stays in cache
TILE = 128  # elements of 16 ChaCha20 blocks
SECURE_ELEMENTS = 1 << 35  # the block counter has 32 bits, a block serves 8 elements
LARGEST_RADIUS = 9.5  # √(-2 ln 2⁻⁶⁵), rounded up
CHACHA_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


# ln(1 + t) = t - t²/2 + t³ P(t); sin and cos of π/4 · y are y S(y²) and C(y²): minimax fits, highest power first
LOG, SINE, COSINE = (
    [_float32(c) for c in row]
    for row in (
        (0.087004304, -0.14267486, 0.14914769, -0.16577585, 0.19963063, -0.25001338, 0.3333391),
        (-3.5950452e-05, 0.002490001, -0.080745436, 0.7853982),
        (3.530338e-06, -0.00032594008, 0.015854327, -0.30842513, 1.0),
    )
)
LN2 = _float32(0.6931472)


def standard_normal(
    key: Sequence[int], step: int, parameter: int, start: int, stop: int, device: torch.device | str | None = None
) -> Tensor:
    """z of the elements ``start`` to ``stop - 1`` in the fast mode, float32 ``[stop - start]``.

    Element e is place e % 4 of quad e // 4, whose words are the Philox block of the counter (quad's lower 32 bits, its
    upper 32 bits, parameter, step) under the key's first two words. Two words are a pair of normals.
    """
    _check(key, 2, step, parameter, start, stop, 1 << 62)
    out = torch.empty(stop - start, dtype=torch.float32, device=device)
    for low, high in _pieces(start, stop):
        quad = torch.arange(low // 4, -(-high // 4), device=device)
        words = _philox(quad & MASK, quad >> 32, parameter, step, key[0], key[1])
        z = torch.stack([v for w, a in (words[:2], words[2:]) for v in _point(*_polar(w, a))], dim=-1)
        out[low - start : high - start] = z.view(-1)[low % 4 : low % 4 + high - low]
    return out


def low_bits(
    key: Sequence[int], step: int, parameter: int, start: int, stop: int, device: torch.device | str | None = None
) -> Tensor:
    """What a float64 z has below the float32 z of :func:`standard_normal`: uniform in ±2⁻²¹, in steps of 2⁻⁵².

    Element e has word e % 4 of the Philox block of (quad's lower 32 bits, its upper 32 bits + 2³¹, parameter, step).
    """
    _check(key, 2, step, parameter, start, stop, 1 << 62)
    out = torch.empty(stop - start, dtype=torch.float64, device=device)
    for low, high in _pieces(start, stop):
        quad = torch.arange(low // 4, -(-high // 4), device=device)
        words = _philox(quad & MASK, (quad >> 32) | (1 << 31), parameter, step, key[0], key[1])
        signed = torch.stack(words, dim=-1).view(-1)[low % 4 : low % 4 + high - low].to(torch.int32)
        out[low - start : high - start] = signed.double() * 2.0**-52
    return out


def secure_integers(
    key: Sequence[int],
    step: int,
    parameter: int,
    start: int,
    stop: int,
    scale: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """K of the elements ``start`` to ``stop - 1`` in the secure mode, int32 ``[stop - start]``.

    K = round(scale · z) + two signed 16-bit words. Element e is place e % 4 of quad q = e // 4, which has half
    (q // 16) % 2 of the ChaCha20 block 16 · (q // 32) + q % 16: words 0 to 7 of a block make z, words 8 to 15 fill.
    ``scale`` is the standard deviation in steps of the grid, so small that K fits 32 bits.
    """
    _check(key, 8, step, parameter, start, stop, SECURE_ELEMENTS)
    if not 0 <= LARGEST_RADIUS * scale < 2**31 - 2**16:  # false for NaN too
        raise ValueError(f"scale is {scale}: K would not fit 32 bits")
    out = torch.empty(stop - start, dtype=torch.int32, device=device)
    for low, high in _pieces(start, stop):
        tile = low // TILE
        blocks = torch.arange(16 * tile, -(-high // TILE) * 16, device=device)
        words = chacha20_block(key, blocks, (parameter, step, 0)).T
        radius, x, y = _polar(words[0:8:2], words[1:8:2])  # [4 pairs, blocks]
        K = torch.stack(_point(radius * _float32(scale), x, y), dim=1).round().to(torch.int32)  # ties to even
        fill = words[8:].view(4, 2, -1)
        K += (fill << 32 >> 48) + (fill << 48 >> 48)  # a word's upper and lower half, as signed numbers
        K = K.view(2, 4, -1, 16).permute(2, 0, 3, 1)  # half, place, tile, quad → tile, half, quad, place
        out[low - start : high - start] = K.reshape(-1)[low % TILE : low % TILE + high - low]
    return out


def philox4x32_10(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): int64 words ``[..., 4]`` of the counters ``[..., 4]``."""
    x0, x1, x2, x3 = counter.unbind(-1)
    return torch.stack(_philox(x0, x1, x2, x3, *key), dim=-1)


def chacha20_block(key: Sequence[int], counter: Tensor, nonce: Sequence[int]) -> Tensor:
    """The block function of ChaCha20 (RFC 8439, 2.3): int64 words ``[n, 16]`` of the block counters ``[n]``."""
    head = torch.tensor([*CHACHA_CONSTANTS, *key, 0, *nonce], device=counter.device)
    state = head[:, None].repeat(1, len(counter))
    state[12] = counter
    state = state.to(torch.int32)  # half of int64's traffic; the upper half of the words becomes negative
    a, b, c, d = state.clone().view(4, 4, -1)
    for _ in range(10):
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)  # the diagonals become columns
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return (torch.cat([a, b, c, d]).add_(state).to(torch.int64) & MASK).T


def _philox(
    x0: Tensor, x1: Tensor | int, x2: Tensor | int, x3: Tensor | int, key0: int, key1: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``philox4x32_10`` with its words apart; an integer is one for all counters."""
    x1, x2, x3 = (torch.as_tensor(word, device=x0.device).expand_as(x0) for word in (x1, x2, x3))
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # the lower 64 bits, which are all
        x0 = (p1 >> 32).bitwise_xor_(x1).bitwise_xor_(key0).bitwise_and_(MASK)
        x2 = (p0 >> 32).bitwise_xor_(x3).bitwise_xor_(key1).bitwise_and_(MASK)
        x1, x3 = p1, p0  # bits above 32 are masked when they have been through the exclusive or
        key0, key1 = (key0 + 0x9E3779B9) & MASK, (key1 + 0xBB67AE85) & MASK
    return x0, x1 & MASK, x2, x3 & MASK


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """Four quarter rounds side by side, in place: rows ``[4, n]`` int32."""
    for n, m in ((16, 12), (8, 7)):
        a += b
        _rotate(d.bitwise_xor_(a), n)
        c += d
        _rotate(b.bitwise_xor_(c), m)


def _rotate(x: Tensor, n: int) -> None:
    """Rotate int32 words to the left by n bits, in place."""
    upper = (x >> (32 - n)).bitwise_and_((1 << n) - 1)  # the shift drags the sign along
    x.bitwise_left_shift_(n).bitwise_or_(upper)


def _point(radius: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return radius * x, radius * y


def _polar(w: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words w and a, int64 ``[n]`` → radius √(-2 ln u) and direction (x, y), float32 ``[n]``."""
    # torch's own float32 root may be MKL's, which is one unit off in a sixth of the cases
    radius = _minus_two_log(w, ((a << 16) | (a >> 16)) & MASK).double().sqrt().float()
    # φ = π/4 · y, y in (-1, 1) from the lower 30 bits of a; the upper two are the octant
    a = a.to(torch.int32)
    y = _fma((a << 2).float(), 2.0**-31, 2.0**-30)
    y2 = y * y
    s, c = (_polynomial(SINE, y2) * y).view(torch.int32), _polynomial(COSINE, y2).view(torch.int32)
    c = c ^ ((a << 1) & -(1 << 31))
    exchanged = (s ^ c) & (a >> 31)  # where the sign is set, all bits that differ
    return radius, (c ^ exchanged).view(torch.float32), (s ^ exchanged).view(torch.float32)


def _minus_two_log(high: Tensor, low: Tensor) -> Tensor:
    """-2 ln u, u = (2³² high + low + ½) / 2⁶⁴: float32 ``[n]`` from int64 words ``[n]``."""
    above = high >= 0xB504F334  # u > √½: then work with 1 - u, from the complements of all bits
    flip = above * MASK
    part = ((low ^ flip).float() + 0.5) * 2.0**-64
    f = _fma((high ^ flip).float(), 2.0**-32, part)
    bits = f.view(torch.int32)
    # u = 2ᵉ (1 + t) with √½ ≤ 1 + t < √2
    exponent = ((bits - 0x3F3504F3) >> 23) * ~above
    t = torch.where(above, -f, (bits - exponent * (1 << 23)).view(torch.float32) - 1)
    log1p = _fma(t * t, _fma(_polynomial(LOG, t), t, -0.5), t)
    return _fma(exponent, LN2, log1p) * -2


def _fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a · b + c`` of float32 numbers, at least one a tensor, rounded to float32."""
    wide = [v.double() if isinstance(v, Tensor) else v for v in (a, b, c)]
    return torch.as_tensor(wide[0] * wide[1] + wide[2]).float()


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule in float32 with fused multiply-adds, highest power first."""
    x = x.double()
    value: Tensor | float = coefficients[0]
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return torch.as_tensor(value)


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut the range where an element's number is a multiple of PIECE."""
    while start < stop:
        end = min(stop, (start // PIECE + 1) * PIECE)
        yield start, end
        start = end


def _check(key: Sequence[int], words: int, step: int, parameter: int, start: int, stop: int, end: int) -> None:
    if len(key) not in (words, 8) or not all(0 <= word <= MASK for word in key):
        raise ValueError(f"key must be {words} words of 32 bits")  # never shown: it is a secret
    for name, value in (("step", step), ("parameter", parameter)):
        if not 0 <= value <= MASK:
            raise ValueError(f"{name} is {value}, not from 0 to 2³² - 1")
    if not 0 <= start <= stop <= end:
        raise ValueError(f"elements from {start} to {stop}: not a range within 0 to 2^{math.log2(end):.0f}")
