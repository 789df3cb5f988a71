// Noise as a pure function z(key, step, parameter, element), four elements ("a quad") a call and lane.
//
//   fast     Philox4x32-10, key 64 bits, counter (quad, parameter, step): one block, four words, two pairs
//   secure   ChaCha20, key 256 bits, nonce (parameter, step), block counter: a block serves two quads
#pragma once

#include "chacha.h"
#include "gaussian.h"
#include "philox.h"

namespace dpfast::DPFAST_ISA {

struct Stream {
  uint32_t key[8];  // the fast mode uses two words
  uint32_t step, parameter;
};

// Work comes in tiles of 128 elements, 32 quads: TILE / W vectors.
constexpr int TILE = 128;

// A lane L of W computes quad place(L) of every W: after transpose4 the W lanes of the m-th vector are then the
// elements m·W, m·W + 1, ... in order.
DPFAST_FN constexpr int place(int lane) { return W / 4 * (lane % 4) + lane / 4; }

#ifdef DPFAST_LANES
struct Places {
  alignas(64) uint32_t all[W];
  alignas(64) uint64_t even[W / 2];  // of the lanes 0, 2, ...
  alignas(64) uint64_t odd[W / 2];   // of the lanes 1, 3, ...
  alignas(64) uint64_t quad[W / 2];  // where a lane is an element: its quad, the same for lanes 2i and 2i + 1
  alignas(64) int32_t word[4][W];    // and all ones where its word is this one
  constexpr Places() : all(), even(), odd(), quad(), word() {
    for (int i = 0; i < W; ++i) {
      all[i] = place(i);
      (i % 2 ? odd : even)[i / 2] = place(i);
      quad[i / 2] = i / 4;
      word[i % 4][i] = -1;
    }
  }
};
static constexpr Places kPlaces;
#endif

// Words of the Philox blocks of N · W quads from `first` on (a multiple of W).
template <int N>
DPFAST_FN void fast_words(u32 words[N][4], const Stream& stream, uint64_t first) {
#ifdef DPFAST_LANES
  u64 x[2 * N][4];
  DPFAST_UNROLL
  for (int n = 0; n < N; ++n) {
    x[2 * n][0] = load<u64>(kPlaces.even) + splat(first + n * W);
    x[2 * n + 1][0] = load<u64>(kPlaces.odd) + splat(first + n * W);
    for (int half = 0; half < 2; ++half) {
      x[2 * n + half][1] = splat(first >> 32);
      x[2 * n + half][2] = splat(uint64_t(stream.parameter));
      x[2 * n + half][3] = splat(uint64_t(stream.step));
    }
  }
  philox4x32_10<2 * N>(x, stream.key[0], stream.key[1]);
  DPFAST_UNROLL
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < 4; ++i) words[n][i] = interleave(x[2 * n][i], x[2 * n + 1][i]);
#else
  uint64_t x[N][4];
  DPFAST_UNROLL
  for (int n = 0; n < N; ++n) {
    x[n][0] = first + n, x[n][1] = first >> 32, x[n][2] = stream.parameter, x[n][3] = stream.step;
  }
  philox4x32_10<N>(x, stream.key[0], stream.key[1]);
  DPFAST_UNROLL
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < 4; ++i) words[n][i] = uint32_t(x[n][i]);
#endif
}

// A word for each of the W elements from `first` on (a multiple of W), in order, of a stream apart from the noise's:
// the counter's highest bit is set. For stochastic rounding.
DPFAST_FN u32 rounding_words(const Stream& stream, uint64_t first) {
  const uint64_t quad = first / 4, high = (quad >> 32) | 0x80000000u;
#ifdef DPFAST_LANES
  u64 x[1][4] = {{load<u64>(kPlaces.quad) + splat(quad), splat(high), splat(uint64_t(stream.parameter)),
                  splat(uint64_t(stream.step))}};
  philox4x32_10<1>(x, stream.key[0], stream.key[1]);
  u32 word = interleave(x[0][0], x[0][0]);
  for (int i = 1; i < 4; ++i) word = select(load<i32>(kPlaces.word[i]), interleave(x[0][i], x[0][i]), word);
  return word;
#else
  uint64_t x[1][4] = {{quad, high, stream.parameter, stream.step}};
  philox4x32_10<1>(x, stream.key[0], stream.key[1]);
  return uint32_t(x[0][first % 4]);
#endif
}

// z of the 4 · N · W elements from 4 · first on, in order.
template <int N>
DPFAST_FN void fast_normals(f32 z[N][4], const Stream& stream, uint64_t first) {
  u32 words[N][4];
  fast_words<N>(words, stream, first);
  DPFAST_UNROLL
  for (int n = 0; n < N; ++n) {
    for (int i = 0; i < 4; i += 2) {
      const Polar p = polar(words[n][i], words[n][i + 1]);
      z[n][i] = p.radius * p.x, z[n][i + 1] = p.radius * p.y;
    }
#ifdef DPFAST_LANES
    transpose4(z[n][0], z[n][1], z[n][2], z[n][3]);
#endif
  }
}

DPFAST_FN i32 sum_of_halves(u32 x) { return (bits_as<i32>(x) >> 16) + (bits_as<i32>(x << 16) >> 16); }

// Secure noise, in whole steps of a grid: K = round(scale · z) + two signed 16-bit words, eight of them from a block.
// The uniform words fill the low bits that a float32 z leaves empty (dpfast/noise/stream.py says what that guards against);
// their variance is 2²⁹, a millionth of K's or less. Words 0 to 7 make z, words 8 to 15 fill. The quads 32 i + j and 32 i + 16 + j (j < 16) share
// block 16 i + j; `first` is the first block, a multiple of W.
DPFAST_FN void secure_integers(i32 K[2][4], const Stream& stream, uint32_t first, float scale) {
  u32 words[16];
  const uint32_t nonce[3] = {stream.parameter, stream.step, 0};
#ifdef DPFAST_LANES
  const u32 counter = load<u32>(kPlaces.all) + splat(first);
#else
  const u32 counter = first;
#endif
  chacha20_block(words, stream.key, counter, nonce);
  for (int half = 0; half < 2; ++half) {
    f32 integers[4];
    for (int pair = 0; pair < 2; ++pair) {
      const u32 *w = words + 4 * half + 2 * pair, *fill = w + 8;
      const Polar p = polar(w[0], w[1]);
      const f32 radius = p.radius * splat(scale);
      integers[2 * pair] = bits_as<f32>(to_int(radius * p.x) + sum_of_halves(fill[0]));
      integers[2 * pair + 1] = bits_as<f32>(to_int(radius * p.y) + sum_of_halves(fill[1]));
    }
#ifdef DPFAST_LANES
    transpose4(integers[0], integers[1], integers[2], integers[3]);
#endif
    for (int j = 0; j < 4; ++j) K[half][j] = bits_as<i32>(integers[j]);
  }
}

}  // namespace dpfast::DPFAST_ISA
