// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
#pragma once

#include "lanes.h"

namespace dpfast::DPFAST_ISA {

// What is added to the two words of the key after a round.
constexpr uint32_t PHILOX_KEY0 = 0x9E3779B9, PHILOX_KEY1 = 0xBB67AE85;

template <int N>
DPFAST_FN void philox_round(u64 x[N][4], uint32_t key0, uint32_t key1) {
  const u64 m0 = splat(uint64_t(0xD2511F53)), m1 = splat(uint64_t(0xCD9E8D57));
  const u64 k0 = splat(uint64_t(key0)), k1 = splat(uint64_t(key1));
  u64 p0[N], p1[N];
  DPFAST_UNROLL
  for (int n = 0; n < N; ++n) p0[n] = multiply_low(x[n][0], m0), p1[n] = multiply_low(x[n][2], m1);
  DPFAST_UNROLL
  for (int n = 0; n < N; ++n) {
    x[n][0] = (p1[n] >> 32) ^ x[n][1] ^ k0, x[n][1] = p1[n];
    x[n][2] = (p0[n] >> 32) ^ x[n][3] ^ k1, x[n][3] = p0[n];
  }
}

// N counters at a time, which hides the latency of multiplication: four words each, every one in the lower half of a
// 64-bit lane. The upper halves are ignored, and left undefined.
template <int N>
DPFAST_FN void philox4x32_10(u64 x[N][4], uint32_t key0, uint32_t key1) {
  DPFAST_UNROLL
  for (int round = 0; round < 10; ++round, key0 += PHILOX_KEY0, key1 += PHILOX_KEY1) philox_round<N>(x, key0, key1);
}

}  // namespace dpfast::DPFAST_ISA
