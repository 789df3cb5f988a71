// The kernels of noise.cu and update.cu. Every element is read once and written once; z stays in registers.
#pragma once

#include <type_traits>

#include "noise_pairs.h"
#include "step_numbers.h"
#include "table.h"

namespace dpfast::DPFAST_ISA {

struct NoiseEntry {
  const void* summed;
  void* grad;          // may be the same memory as summed; null: not written
  int64_t n, offset;
  uint32_t parameter;
  bool aligned;  // a quad of the noise stream is an aligned quad in memory, in every tensor
};

struct UpdateEntry : NoiseEntry {
  void* param;
  void* state[3];
  float* master;
};

// grad = (summed + std · z) · scale; In = void: without a sum
template <Mode mode, class In, class Out>
DPFAST_FN void noisy_grad_piece(const NoiseEntry& e, const NoiseNumbers& numbers, const Piece& piece, uint32_t pairs) {
  struct Data {
    Sum<Out> x[2][4];
  };
  const auto load = [&](const PairSpans& spans) {
    Data data{};
    if constexpr (!std::is_void_v<In>) {
      DPFAST_UNROLL
      for (int h = 0; h < 2; ++h)
        get(data.x[h], static_cast<const In*>(e.summed) + piece.start + spans.of[h].i, spans.of[h]);
    }
    return data;
  };
  each_pair<true>(piece, e.aligned, pairs, threadIdx.x, load, [&](const PairSpans& spans, Data data) {
    PairNoise<mode>(numbers, e.parameter, piece.quad + (spans.of[0].i >> 2)).add(data.x);
    DPFAST_UNROLL
    for (int h = 0; h < 2; ++h) {
      Sum<Out>(&x)[4] = data.x[h];
      Out* const grad = static_cast<Out*>(e.grad) + piece.start + spans.of[h].i;
      if constexpr (sizeof(Out) == 8)
        set(grad, {x[0], x[1], x[2], x[3]}, spans.of[h]);
      else
        set_rounded(grad, x, spans.of[h]);
    }
  });
}

// Small parameters first: the hardware's instructions reach only the start of the parameters directly.
template <bool secure, class In, class Out>
__global__ void __launch_bounds__(PAIR_THREADS)
    noisy_grad_kernel(const StepNumbers<NoRule>* of_step, uint32_t pairs,
                      const Table<NoiseEntry> __grid_constant__ table) {
  if (!of_step->writes) return;
  const NoiseNumbers numbers = of_step->noise;  // what is used of it stays in registers
  const int k = table.find(blockIdx.x);
  const NoiseEntry e = table.entry[k];
  const Piece piece = piece_of(e, blockIdx.x - table.first[k], pairs);
  if (numbers.noisy)
    noisy_grad_piece<secure ? Mode::secure : Mode::fast, In, Out>(e, numbers, piece, pairs);
  else
    noisy_grad_piece<Mode::none, In, Out>(e, numbers, piece, pairs);
}

// A word for each element of a quad: rounding_words() of noise.h, four at once.
DPFAST_FN void rounding_quad(uint32_t words[4], const RoundingNumbers& r, uint32_t step, uint32_t parameter,
                             uint64_t quad) {
  uint64_t x[1][4] = {{quad, (quad >> 32) | 0x80000000u, parameter, step}};
  philox4x32_10<1>(x, r.key[0], r.key[1]);
  DPFAST_UNROLL
  for (int j = 0; j < 4; ++j) words[j] = uint32_t(x[0][j]);
}

// g = (summed + std · z) · scale;  grad = g;  param, state = rule(param or its master copy, g, state)
template <Mode mode, class T, class Rule>
DPFAST_FN void update_piece(const UpdateEntry& e, const NoiseNumbers& numbers, const RoundingNumbers& rounding,
                            const Rule& rule, const Piece& piece, uint32_t pairs) {
  constexpr int states = Rule::states;
  struct Data {
    float x[2][4], p[2][4], s[states][2][4];
  };
  const auto load = [&](const PairSpans& spans) {
    Data data{};
    DPFAST_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Span& span = spans.of[h];
      const int64_t at = piece.start + span.i;
      get(data.x[h], static_cast<const float*>(e.summed) + at, span);
      get(data.p[h], static_cast<const T*>(e.param) + at, span);
      DPFAST_UNROLL
      for (int k = 0; k < states; ++k)
        if (e.state[k]) get(data.s[k][h], static_cast<const T*>(e.state[k]) + at, span);
      if (sizeof(T) == 2 && e.master) {  // a parameter that is not its copy's rounding was set from outside
        float kept[4];
        get(kept, e.master + at, span);
        DPFAST_UNROLL
        for (int j = 0; j < 4; ++j) {
          T narrowed;
          write(&narrowed, kept[j]);
          data.p[h][j] = select(data.p[h][j] == value(narrowed), kept[j], data.p[h][j]);
        }
      }
    }
    return data;
  };
  each_pair<false>(piece, e.aligned, pairs, threadIdx.x, load, [&](const PairSpans& spans, Data data) {
    const uint64_t quad = piece.quad + (spans.of[0].i >> 2);
    PairNoise<mode>(numbers, e.parameter, quad).add(data.x);
    DPFAST_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Span& span = spans.of[h];
      const int64_t at = piece.start + span.i;
      float(&x)[4] = data.x[h], (&p)[4] = data.p[h];
      DPFAST_UNROLL
      for (int j = 0; j < 4; ++j) {
        float state[3];
        DPFAST_UNROLL
        for (int k = 0; k < states; ++k) state[k] = data.s[k][h][j];
        p[j] = rule(p[j], x[j], state);
        DPFAST_UNROLL
        for (int k = 0; k < states; ++k) data.s[k][h][j] = state[k];
      }
      if (e.grad) set_rounded(static_cast<T*>(e.grad) + at, x, span);
      DPFAST_UNROLL
      for (int k = 0; k < states; ++k)
        if (e.state[k]) set_rounded(static_cast<T*>(e.state[k]) + at, data.s[k][h], span);
      if (sizeof(T) == 2 && e.master) set_rounded(e.master + at, p, span);
      if (sizeof(T) == 2 && rounding.stochastic) {
        uint32_t words[4];
        rounding_quad(words, rounding, numbers.step, e.parameter, quad + 16 * h);
        set_rounded(static_cast<T*>(e.param) + at, p, span, words);
      } else {
        set_rounded(static_cast<T*>(e.param) + at, p, span);
      }
    }
  });
}

template <bool secure, class T, class Rule>
__global__ void __launch_bounds__(PAIR_THREADS, Rule::states == 3 ? 2 : 0)
    update_kernel(const StepNumbers<Rule>* of_step, uint32_t pairs, const Table<UpdateEntry> __grid_constant__ table) {
  if (!of_step->writes) return;
  const NoiseNumbers numbers = of_step->noise;  // what is used of these stays in registers
  const RoundingNumbers rounding = of_step->rounding;
  const Rule rule = of_step->rule;
  const int k = table.find(blockIdx.x);
  const UpdateEntry e = table.entry[k];
  const Piece piece = piece_of(e, blockIdx.x - table.first[k], pairs);
  if (numbers.noisy)
    update_piece<secure ? Mode::secure : Mode::fast, T>(e, numbers, rounding, rule, piece, pairs);
  else
    update_piece<Mode::none, T>(e, numbers, rounding, rule, piece, pairs);
}

}  // namespace dpfast::DPFAST_ISA
