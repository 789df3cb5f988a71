// Numbers in memory: float32, float64, bfloat16 and float16, read into and written from W lanes of float32.
#pragma once

#include "lanes.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace dpfast::DPFAST_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#ifdef DPFAST_LANES
typedef uint16_t u16 __attribute__((vector_size(2 * W)));

DPFAST_FN u32 widen(u16 x) { return __builtin_convertvector(x, u32); }
DPFAST_FN u16 narrow(u32 x) { return __builtin_convertvector(x, u16); }
#if DPFAST_LANES == 16
DPFAST_FN f32 half_to_float(u16 x) { return _mm512_cvtph_ps((__m256i)x); }
DPFAST_FN u16 float_to_half(f32 x) { return (u16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
DPFAST_FN f32 half_to_float(u16 x) { return _mm256_cvtph_ps((__m128i)x); }
DPFAST_FN u16 float_to_half(f32 x) { return (u16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#endif
#else
using u16 = uint16_t;
DPFAST_FN uint32_t widen(uint16_t x) { return x; }
DPFAST_FN uint16_t narrow(uint32_t x) { return static_cast<uint16_t>(x); }
#ifdef __CUDACC__
DPFAST_FN float half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }
DPFAST_FN uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
inline float half_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7FFF;
  if (rest >= 0x7C00) return bits_as<float>(sign | 0x7F800000u | (rest & 0x3FF) << 13);
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000u) return uint16_t(sign | 0x7E00 | (rest >> 13 & 0x3FF));
  if (rest >= 0x477FF000u) return uint16_t(sign | 0x7C00);  // 65520 and above round to infinity
  if (rest < 0x38800000u)  // below 2⁻¹⁴: units of 2⁻²⁴, which adding ½ puts at the end of a float
    return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3F000000u));
  return uint16_t(sign | ((rest - 0x38000000u + 0xFFF + (rest >> 13 & 1)) >> 13));
}
#endif
#endif

DPFAST_FN f32 read(const float* p) { return load<f32>(p); }
DPFAST_FN f32 read(const bf16* p) { return bits_as<f32>(widen(load<u16>(p)) << 16); }
DPFAST_FN f32 read(const f16* p) { return half_to_float(load<u16>(p)); }

template <class T, class V>
DPFAST_FN void put(T* p, V x) {
  memcpy(p, &x, sizeof(V));
}

// To the nearest, ties to even.
DPFAST_FN void write(float* p, f32 x) { put(p, x); }
DPFAST_FN void write(f16* p, f32 x) { put(p, float_to_half(x)); }
DPFAST_FN void write(bf16* p, f32 x) {
  const u32 bits = bits_as<u32>(x), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  put(p, narrow(select(is_nan(x), (bits >> 16) | 0x40u, rounded)));
}

// Stochastic rounding: up with the probability of the part cut off, so that the mean is x. Infinities and NaN stay.
DPFAST_FN void write(float* p, f32 x, u32) { put(p, x); }
DPFAST_FN void write(bf16* p, f32 x, u32 random) {
  const u32 bits = bits_as<u32>(x);
  const mask finite = (bits & 0x7F800000u) != splat(0x7F800000u);
  put(p, narrow(select(finite, bits + (random >> 16), bits | select(is_nan(x), splat(0x400000u), splat(0u))) >> 16));
}
DPFAST_FN void write(f16* p, f32 x, u32 random) {
  // Between 2⁻¹⁴ and 65504 a float16 drops 13 bits of the float; below, its units are 2⁻²⁴, 65536 times x's ½.
  const u32 bits = bits_as<u32>(x), sign = bits & 0x80000000u;
  const f32 size = bits_as<f32>(bits & 0x7FFFFFFFu);
  const u32 normal = ((bits & 0x7FFFFFFFu) + (random >> 19)) & 0xFFFFE000u;
  const f32 steps = fma(size, splat(0x1p24f), to_float(random >> 18) * splat(0x1p-14f));
  const u32 subnormal = bits_as<u32>(to_float(truncate(steps)) * splat(0x1p-24f));
  const u32 rounded = select(size < splat(0x1p-14f), subnormal, normal);
  const mask exact = size >= splat(65504.0f);  // the largest, infinity, NaN: nothing to choose from
  put(p, float_to_half(bits_as<f32>(sign | select(exact | is_nan(x), bits & 0x7FFFFFFFu, rounded))));
}

}  // namespace dpfast::DPFAST_ISA
