// One vocabulary of numbers for every build: a lane on the GPU and in the portable build, 8 or 16 lanes at once on
// AVX2 and AVX-512. The maths in the other headers is written in it once; every operation here is rounded as
// IEEE 754 says, one result for one set of inputs, so every build computes the same bits.
//
//   u32, i32, f32   W lanes of 32 bits         u64   half as many lanes of 64 bits, twice (see Words below)
//   f64             W lanes of double          mask  what a comparison gives, for select()
//
// DPFAST_ISA names the build (scalar, avx2, avx512, cuda) and becomes a namespace: code compiled for one instruction
// set is never linked into the place of another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DPFAST_ISA cuda
#define DPFAST_FN __host__ __device__ __forceinline__
#elif defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DPFAST_ISA avx512
#define DPFAST_LANES 16
#define DPFAST_FN inline __attribute__((always_inline))
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DPFAST_ISA avx2
#define DPFAST_LANES 8
#define DPFAST_FN inline __attribute__((always_inline))
#else
#define DPFAST_ISA scalar
#define DPFAST_FN inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__)
#define DPFAST_UNROLL _Pragma("unroll")
#define DPFAST_LOOP _Pragma("unroll 1")
#define DPFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define DPFAST_UNROLL _Pragma("GCC unroll 16")
#define DPFAST_LOOP _Pragma("GCC unroll 1")
#define DPFAST_NO_UNROLL _Pragma("GCC unroll 1")
#endif

#ifdef DPFAST_LANES
#include <immintrin.h>
#endif

namespace dpfast::DPFAST_ISA {

template <class To, class From>
DPFAST_FN To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

template <class To, class From>
DPFAST_FN To load(const From* x) {  // at any address
  To y;
  memcpy(&y, x, sizeof(To));
  return y;
}

#ifdef DPFAST_LANES

constexpr int W = DPFAST_LANES;
typedef uint32_t u32 __attribute__((vector_size(4 * W)));
typedef int32_t i32 __attribute__((vector_size(4 * W)));
typedef float f32 __attribute__((vector_size(4 * W)));
typedef uint64_t u64 __attribute__((vector_size(4 * W)));
typedef double f64half __attribute__((vector_size(4 * W)));
using mask = i32;

DPFAST_FN f32 splat(float x) { return x - f32{}; }
DPFAST_FN u32 splat(uint32_t x) { return x + u32{}; }
DPFAST_FN u64 splat(uint64_t x) { return x + u64{}; }
DPFAST_FN f32 select(mask m, f32 a, f32 b) { return m ? a : b; }
DPFAST_FN u32 select(mask m, u32 a, u32 b) { return m ? a : b; }
DPFAST_FN mask is_nan(f32 x) { return x != x; }
DPFAST_FN mask all_lanes() { return ~i32{}; }
DPFAST_FN u32 ones_where(mask m) { return (u32)m; }
DPFAST_FN f32 to_float(i32 x) { return __builtin_convertvector(x, f32); }
template <int n>
DPFAST_FN u32 rotate(u32 x) {
  return (x << n) | (x >> (32 - n));
}

struct f64 {
  f64half low, high;  // lanes 0 .. W/2-1 and the rest
};
DPFAST_FN f64 operator+(f64 a, f64 b) { return {a.low + b.low, a.high + b.high}; }
DPFAST_FN f64 operator-(f64 a, f64 b) { return {a.low - b.low, a.high - b.high}; }
DPFAST_FN f64 operator*(f64 a, f64 b) { return {a.low * b.low, a.high * b.high}; }
DPFAST_FN f64 operator*(f64 a, double b) { return {a.low * b, a.high * b}; }

#if DPFAST_LANES == 16

DPFAST_FN bool any(mask m) { return _mm512_movepi32_mask((__m512i)m) != 0; }
DPFAST_FN f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
DPFAST_FN f32 fms(f32 a, f32 b, f32 c) { return _mm512_fmsub_ps(a, b, c); }
DPFAST_FN f32 sqrt(f32 x) { return _mm512_sqrt_ps(x); }
DPFAST_FN i32 to_int(f32 x) { return (i32)_mm512_cvtps_epi32(x); }  // nearest, ties to even
DPFAST_FN i32 truncate(f32 x) { return (i32)_mm512_cvttps_epi32(x); }
DPFAST_FN f32 to_float(u32 x) { return _mm512_cvtepu32_ps((__m512i)x); }
DPFAST_FN f64 to_double(f32 x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
DPFAST_FN f64 to_double(i32 x) {
  __m512i v = (__m512i)x;
  return {_mm512_cvtepi32_pd(_mm512_castsi512_si256(v)), _mm512_cvtepi32_pd(_mm512_extracti32x8_epi32(v, 1))};
}
DPFAST_FN f64 round_even(f64 x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm512_roundscale_pd(x.low, how), _mm512_roundscale_pd(x.high, how)};
}
DPFAST_FN f64 fma(f64 a, f64 b, f64 c) {
  return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}
DPFAST_FN f32 to_float(f64 x) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.low)), _mm512_cvtpd_ps(x.high), 1);
}
DPFAST_FN u64 multiply_low(u64 a, u64 b) { return (u64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
DPFAST_FN u32 interleave(u64 even, u64 odd) {
  return (u32)_mm512_mask_mov_epi32((__m512i)even, 0xAAAA, (__m512i)(odd << 32));
}
DPFAST_FN void transpose4(f32& a, f32& b, f32& c, f32& d) {  // 4 × 4 within every 128 bits
  __m512 t0 = _mm512_unpacklo_ps(a, b), t1 = _mm512_unpackhi_ps(a, b);
  __m512 t2 = _mm512_unpacklo_ps(c, d), t3 = _mm512_unpackhi_ps(c, d);
  a = _mm512_shuffle_ps(t0, t2, 0x44), b = _mm512_shuffle_ps(t0, t2, 0xEE);
  c = _mm512_shuffle_ps(t1, t3, 0x44), d = _mm512_shuffle_ps(t1, t3, 0xEE);
}

#else

DPFAST_FN bool any(mask m) { return _mm256_movemask_ps((__m256)m) != 0; }
DPFAST_FN f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
DPFAST_FN f32 fms(f32 a, f32 b, f32 c) { return _mm256_fmsub_ps(a, b, c); }
DPFAST_FN f32 sqrt(f32 x) { return _mm256_sqrt_ps(x); }
DPFAST_FN i32 to_int(f32 x) { return (i32)_mm256_cvtps_epi32(x); }
DPFAST_FN i32 truncate(f32 x) { return (i32)_mm256_cvttps_epi32(x); }
DPFAST_FN f32 to_float(u32 x) {  // 16 bits and 16 bits, each exact: the sum is rounded once
  return fma(to_float((i32)(x >> 16)), splat(65536.0f), to_float((i32)(x & 0xFFFF)));
}
DPFAST_FN f64 to_double(f32 x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
DPFAST_FN f64 to_double(i32 x) {
  __m256i v = (__m256i)x;
  return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(v)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(v, 1))};
}
DPFAST_FN f64 round_even(f64 x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_pd(x.low, how), _mm256_round_pd(x.high, how)};
}
DPFAST_FN f64 fma(f64 a, f64 b, f64 c) {
  return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
DPFAST_FN f32 to_float(f64 x) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.low)), _mm256_cvtpd_ps(x.high), 1);
}
DPFAST_FN u64 multiply_low(u64 a, u64 b) { return (u64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
DPFAST_FN u32 interleave(u64 even, u64 odd) {
  return (u32)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
}
DPFAST_FN void transpose4(f32& a, f32& b, f32& c, f32& d) {
  __m256 t0 = _mm256_unpacklo_ps(a, b), t1 = _mm256_unpackhi_ps(a, b);
  __m256 t2 = _mm256_unpacklo_ps(c, d), t3 = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(t0, t2, 0x44), b = _mm256_shuffle_ps(t0, t2, 0xEE);
  c = _mm256_shuffle_ps(t1, t3, 0x44), d = _mm256_shuffle_ps(t1, t3, 0xEE);
}

#endif

#else  // one lane

constexpr int W = 1;
using u32 = uint32_t;
using i32 = int32_t;
using f32 = float;
using u64 = uint64_t;
using f64 = double;
using mask = bool;

DPFAST_FN float splat(float x) { return x; }
DPFAST_FN uint32_t splat(uint32_t x) { return x; }
DPFAST_FN uint64_t splat(uint64_t x) { return x; }
DPFAST_FN float select(bool m, float a, float b) { return m ? a : b; }
DPFAST_FN uint32_t select(bool m, uint32_t a, uint32_t b) { return m ? a : b; }
DPFAST_FN bool is_nan(float x) { return x != x; }
DPFAST_FN bool any(bool m) { return m; }
DPFAST_FN bool all_lanes() { return true; }
DPFAST_FN uint32_t ones_where(bool m) { return m ? 0xFFFFFFFFu : 0u; }
template <int n>
DPFAST_FN uint32_t rotate(uint32_t x) {
  return (x << n) | (x >> (32 - n));
}
#ifdef __CUDA_ARCH__
DPFAST_FN uint64_t multiply_low(uint64_t a, uint64_t b) {  // from C++, the compiler adds upper halves that are 0
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(uint32_t(a)), "r"(uint32_t(b)));
  return product;
}
#else
DPFAST_FN uint64_t multiply_low(uint64_t a, uint64_t b) { return uint64_t(uint32_t(a)) * uint32_t(b); }
#endif
DPFAST_FN double to_double(float x) { return x; }
DPFAST_FN double to_double(int32_t x) { return x; }
#ifdef __CUDA_ARCH__
DPFAST_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DPFAST_FN double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
DPFAST_FN float sqrt(float x) { return __fsqrt_rn(x); }
DPFAST_FN float to_float(uint32_t x) { return __uint2float_rn(x); }
DPFAST_FN float to_float(int32_t x) { return __int2float_rn(x); }
DPFAST_FN float to_float(double x) { return __double2float_rn(x); }
DPFAST_FN int32_t to_int(float x) { return __float2int_rn(x); }
DPFAST_FN double round_even(double x) { return ::rint(x); }
#else
DPFAST_FN float fma(float a, float b, float c) { return std::fmaf(a, b, c); }
DPFAST_FN double fma(double a, double b, double c) { return std::fma(a, b, c); }
DPFAST_FN float sqrt(float x) { return std::sqrt(x); }
DPFAST_FN float to_float(uint32_t x) { return static_cast<float>(x); }
DPFAST_FN float to_float(int32_t x) { return static_cast<float>(x); }
DPFAST_FN float to_float(double x) { return static_cast<float>(x); }
DPFAST_FN int32_t to_int(float x) { return static_cast<int32_t>(std::rint(x)); }
DPFAST_FN double round_even(double x) { return std::rint(x); }
#endif
DPFAST_FN float fms(float a, float b, float c) { return fma(a, b, -c); }
DPFAST_FN int32_t truncate(float x) { return static_cast<int32_t>(x); }

#endif

// √x of an x from 2⁻¹⁰⁰ to 2¹²⁷.
#ifdef __CUDA_ARCH__
DPFAST_FN float sqrt_of_normal(float x) {  // what __fsqrt_rn does in that range, without its test of the range
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse;
  return fma(fma(-root, root, x), inverse * 0.5f, root);
}
#else
DPFAST_FN f32 sqrt_of_normal(f32 x) { return sqrt(x); }
#endif

}  // namespace dpfast::DPFAST_ISA
