// Two random words → a point of the plane with a standard normal distribution (Box and Muller, 1958):
//
//   radius = √(-2 ln u),  u = (2³²·w + (a rotated by 16) + ½) / 2⁶⁴          direction = octant and angle φ from a
//
// u has 64 bits, so radii reach past 8 in every direction (8.2 to 9.5). a's bits hardly count in it but where w is near
// 0 (radius > 6.6), and there its lower 16 set the radius, its upper 16 the direction: both stay uniform. In float32,
// with polynomials of our own.
#pragma once

#include "lanes.h"

namespace dpfast::DPFAST_ISA {

struct Polar {
  f32 radius, x, y;  // the point is (radius · x, radius · y)
};

// -2 ln u for u = (2³² high + low + ½) / 2⁶⁴, to 2 units in the last place, near u = 1 too.
DPFAST_FN f32 minus_two_log(u32 high, u32 low) {
  // Above √½ the float is 1 - u, from the complements of all bits: u itself would be rounded to units of 1.
  const mask above = high >= splat(0xB504F334u);
  const u32 flip = ones_where(above);
  const f32 part = (to_float(low ^ flip) + splat(0.5f)) * splat(0x1p-64f);
  const f32 f = fma(to_float(high ^ flip), splat(0x1p-32f), part);
  // u = 2ᵉ (1 + t) with √½ ≤ 1 + t < √2
  const i32 bits = bits_as<i32>(f), exponent = ((bits - 0x3F3504F3) >> 23) & ~bits_as<i32>(flip);
  const f32 t = select(above, -f, bits_as<f32>(bits - (exponent << 23)) - splat(1.0f));
  // ln(1 + t) = t - t²/2 + t³ P(t), P a minimax fit, relative error 3.5e-8
  f32 P = splat(0.087004304f);
  P = fma(P, t, splat(-0.14267486f));
  P = fma(P, t, splat(0.14914769f));
  P = fma(P, t, splat(-0.16577585f));
  P = fma(P, t, splat(0.19963063f));
  P = fma(P, t, splat(-0.25001338f));
  P = fma(P, t, splat(0.3333391f));
  const f32 log1p = fma(t * t, fma(P, t, splat(-0.5f)), t);
  return splat(-2.0f) * fma(to_float(exponent), splat(0.6931472f), log1p);
}

DPFAST_FN Polar polar(u32 w, u32 a) {
  // φ = π/4 · y, y in (-1, 1) from the lower 30 bits of a
  const f32 y = fma(to_float((i32)(a << 2)), splat(0x1p-31f), splat(0x1p-30f)), y2 = y * y;
  f32 s = splat(-3.5950452e-05f);
  s = fma(s, y2, splat(0.002490001f));
  s = fma(s, y2, splat(-0.080745436f));
  s = fma(s, y2, splat(0.7853982f)) * y;
  f32 c = splat(3.530338e-06f);
  c = fma(c, y2, splat(-0.00032594008f));
  c = fma(c, y2, splat(0.015854327f));
  c = fma(c, y2, splat(-0.30842513f));
  c = fma(c, y2, splat(1.0f));
  c = bits_as<f32>(bits_as<u32>(c) ^ ((a << 1) & 0x80000000u));
  const mask swap = bits_as<i32>(a) < 0;
  return {sqrt_of_normal(minus_two_log(w, rotate<16>(a))), select(swap, s, c), select(swap, c, s)};
}

}  // namespace dpfast::DPFAST_ISA
