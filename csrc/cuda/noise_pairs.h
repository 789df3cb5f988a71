// Noise for a pair of quads, the work of one thread at a time.
//
// Pair p has the quads q = 32 ⌊p/16⌋ + p mod 16 and q + 16 of the noise stream: in the secure mode these are what the
// ChaCha20 block p makes; in the fast mode any two would do. Sixteen threads side by side touch 16 quads in a row.
#pragma once

#include "dpfast/noisy.h"
#include "quads.h"

namespace dpfast::DPFAST_ISA {

constexpr int PAIR_THREADS = 256;

enum class Mode { none, fast, secure };

// The noise of the pair whose first quad is `quad`; add() makes of x what x becomes.
template <Mode mode>
struct PairNoise {  // none
  const NoiseNumbers& c;
  DPFAST_FN PairNoise(const NoiseNumbers& c, uint32_t, uint64_t) : c(c) {}
  template <class Real>
  DPFAST_FN void add(Real (&x)[2][4]) const {
    DPFAST_UNROLL
    for (int j = 0; j < 8; ++j) {
      Real& element = x[j / 4][j % 4];
      if constexpr (sizeof(Real) == 8)
        element = NoNoise{c.fast_scale}.add(element, 0, c);
      else
        element = NoNoise{c.fast_scale}.add(element);
    }
  }
};

template <>
struct PairNoise<Mode::fast> {
  const NoiseNumbers& c;
  float z[2][4];
  DPFAST_FN PairNoise(const NoiseNumbers& c, uint32_t parameter, uint64_t quad) : c(c) {
    uint64_t words[2][4] = {{quad, quad >> 32, parameter, c.step}, {quad + 16, quad >> 32, parameter, c.step}};
    philox4x32_10<2>(words, c.key[0], c.key[1]);  // quad + 16 has the same upper word: pairs start at multiples of 32
    DPFAST_UNROLL
    for (int h = 0; h < 2; ++h) {
      DPFAST_UNROLL
      for (int j = 0; j < 4; j += 2) {
        const Polar p = polar(uint32_t(words[h][j]), uint32_t(words[h][j + 1]));
        z[h][j] = p.radius * p.x, z[h][j + 1] = p.radius * p.y;
      }
    }
  }
  template <class Real>
  DPFAST_FN void add(Real (&x)[2][4]) const {
    DPFAST_UNROLL
    for (int j = 0; j < 8; ++j) {
      Real& element = x[j / 4][j % 4];
      const FastNoise noise{z[j / 4][j % 4], c.fast_std, c.fast_scale};
      if constexpr (sizeof(Real) == 8)
        element = noise.add(element, 0, c);
      else
        element = noise.add(element);
    }
  }
};

template <>
struct PairNoise<Mode::secure> {
  const NoiseNumbers& c;
  int32_t K[2][4];
  DPFAST_FN PairNoise(const NoiseNumbers& c, uint32_t parameter, uint64_t quad) : c(c) {
    DPFAST_ISA::Stream stream{{}, c.step, parameter};
    DPFAST_UNROLL
    for (int i = 0; i < 8; ++i) stream.key[i] = c.key[i];
    secure_integers(K, stream, uint32_t(quad / 32 * 16 + quad % 16), c.steps);
  }
  DPFAST_FN SecureNoise of(int h, int j) const { return {K[h][j], c.per_grid, c.grid_scale, c.wide_per_grid}; }
  DPFAST_FN void add(float (&x)[2][4]) const {
    bool fit = true;  // of all eight at once: hardly ever false, and then each element finds out for itself
    DPFAST_UNROLL
    for (int j = 0; j < 8; ++j) fit &= of(j / 4, j % 4).fits(x[j / 4][j % 4]);
    DPFAST_UNROLL
    for (int j = 0; j < 8 && fit; ++j) x[j / 4][j % 4] = of(j / 4, j % 4).add_narrow(x[j / 4][j % 4]);
    DPFAST_UNROLL
    for (int j = 0; j < 8 && !fit; ++j) x[j / 4][j % 4] = of(j / 4, j % 4).add(x[j / 4][j % 4]);
  }
  DPFAST_FN void add(double (&x)[2][4]) const {
    DPFAST_UNROLL
    for (int j = 0; j < 8; ++j) x[j / 4][j % 4] = of(j / 4, j % 4).add(x[j / 4][j % 4], 0, c);
  }
};

// A piece of a tensor that starts at element `offset` of its parameter: `pairs` pairs, whole tiles of the noise stream.
// Elements are counted from the piece's first, which is `start` of the tensor and can be before or behind its elements:
// those that are there go from `low` to `high`.
struct Piece {
  int64_t start;
  uint64_t quad;
  int low, high;
};

inline int64_t pairs_of(int64_t offset, int64_t n) {  // that the tensor's elements lie in
  return n == 0 ? 0 : ((offset + n + TILE - 1) / TILE - offset / TILE) * 16;
}

template <class Entry>
DPFAST_FN Piece piece_of(const Entry& e, uint32_t piece, uint32_t pairs) {
  const int64_t stream = e.offset / TILE * TILE + int64_t(8) * piece * pairs;  // the piece's first in the noise stream
  const int64_t start = stream - e.offset, left = e.n - start;
  return {start, uint64_t(stream) / 4, start < 0 ? int(-start) : 0, left < 8 * pairs ? int(left) : int(8 * pairs)};
}

struct PairSpans {
  Span of[2];
};

// finish(spans, load(spans)) for each of this thread's pairs, with the spans of its two quads. Most pieces are inside of
// their tensor: these have a loop of their own, without a test of any element. `ahead`: it loads a pair while it makes
// the noise of the one before, across the loop's end, as the compiler moves a load within an iteration to its use.
template <bool ahead, class Load, class Finish>
DPFAST_FN void each_pair(const Piece& piece, bool aligned, uint32_t pairs, uint32_t thread, const Load& load,
                         const Finish& finish) {
  constexpr int step = 8 * PAIR_THREADS;
  int i = 8 * thread - 4 * (thread % 16);
  if (aligned && piece.low == 0 && piece.high == int(8 * pairs)) {
    const auto spans = [](int i) { return PairSpans{{{i, 0, 0, true}, {i + 64, 0, 0, true}}}; };
    if constexpr (ahead) {
      auto next = load(spans(i));
      DPFAST_NO_UNROLL
      for (; i < piece.high; i += step) {
        const auto data = next;
        if (i + step < piece.high) next = load(spans(i + step));
        finish(spans(i), data);
      }
    } else {
      DPFAST_NO_UNROLL
      for (; i < piece.high; i += step) finish(spans(i), load(spans(i)));
    }
  } else {
    DPFAST_NO_UNROLL
    for (; i < piece.high; i += step) {
      const bool whole = aligned && i >= piece.low && i + 68 <= piece.high;
      const PairSpans spans{{{i, piece.low, piece.high, whole}, {i + 64, piece.low, piece.high, whole}}};
      finish(spans, load(spans));
    }
  }
}

}  // namespace dpfast::DPFAST_ISA
