// Warps of a block, and sums over them: always in one order.
#pragma once

#include "dpfast/narrow.h"
#include "quads.h"

namespace dpfast::DPFAST_ISA {

constexpr int BLOCK_WARPS = 8, BLOCK_THREADS = 32 * BLOCK_WARPS;
// A warp works on 128 columns at a time, its lanes on four each.
constexpr int TILE_COLUMNS = 128;

DPFAST_FN int lane_of(uint32_t thread) { return int(thread % 32); }
DPFAST_FN int warp_of(uint32_t thread) { return int(thread / 32); }
DPFAST_FN uint32_t lanes_below(int n) { return n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1u; }

DPFAST_FN int lowest_bit(uint32_t bits) {  // of bits ≠ 0
#ifdef __CUDA_ARCH__
  return __ffs(int(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// Towards zero: a factor is never rounded to more than was asked for.
DPFAST_FN float float_below(double x) {
#ifdef __CUDA_ARCH__
  return __double2float_rz(x);
#else
  const float nearest = float(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
#endif
}

// The same sum in every lane.
__device__ inline double warp_sum(double x) {
  DPFAST_UNROLL
  for (int with = 16; with > 0; with /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, with);
  return x;
}

// Σ x² in doubles, where no square of a float is rounded, overflows or underflows. What additions lose is kept for
// doubles, which have no wider type.
template <class T>
struct SquareSum {
  double sum = 0, lost = 0;
  DPFAST_FN void add(Sum<T> x) {
    const double wide = x;
    if constexpr (sizeof(T) == 8) {
      const double square = wide * wide, before = sum;
      sum = before + square;
      const double back = sum - before;
      lost += (before - (sum - back)) + (square - back);
    } else {
      sum = fma(wide, wide, sum);
    }
  }
  __device__ double over_warp() const {
    const double total = warp_sum(sum);
    if constexpr (sizeof(T) != 8) return total;
    const double rest = warp_sum(lost);  // NaN where the sum is infinite
    return total - total == 0 ? total + rest : total;
  }
};

// f(null pointer to T) for the element type T that `type` says; f is of the host or of the device, as the caller.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
DPFAST_FN void with_element(Type type, const F& f) {
  switch (type) {
    case Type::float32:
      return f(static_cast<const float*>(nullptr));
    case Type::float64:
      return f(static_cast<const double*>(nullptr));
    case Type::bfloat16:
      return f(static_cast<const bf16*>(nullptr));
    case Type::float16:
      return f(static_cast<const f16*>(nullptr));
  }
}

template <class T>
DPFAST_FN bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

}  // namespace dpfast::DPFAST_ISA
