// The loop that every op with noise shares: W elements at a time, each with its own z, whatever [begin, end) is.
#pragma once

#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "dpfast/noisy.h"

namespace dpfast::DPFAST_ISA {

// Which of W lanes are there: all, or those in [first, last) at the end of a range.
struct Whole {
  static constexpr int first = 0, last = W;
};
struct Part {
  int first, last;
};

template <class T>
DPFAST_FN f32 read(const T* p, Whole) {
  return read(p);
}
template <class T>
DPFAST_FN f32 read(const T* p, Part lanes) {
  T padded[W] = {};
  for (int i = lanes.first; i < lanes.last; ++i) padded[i] = p[i];
  return read(padded);
}
template <class T, class... Random>
DPFAST_FN void write(T* p, f32 x, Whole, Random... random) {
  write(p, x, random...);
}
template <class T, class... Random>
DPFAST_FN void write(T* p, f32 x, Part lanes, Random... random) {
  T padded[W];
  write(padded, x, random...);
  for (int i = lanes.first; i < lanes.last; ++i) p[i] = padded[i];
}

// body(i, lanes, noise): the lanes are the tensor's elements i, i + 1, ..., as far as they are there.
template <class Make, class Body>
DPFAST_FN void visit_tile(int64_t i, int64_t begin, int64_t end, const Make& make, const Body& body) {
  if (begin <= i && i + TILE <= end) {
    for (int m = 0; m < TILE / W; ++m) body(i + m * W, Whole{}, make(m));
    return;
  }
  for (int m = 0; m < TILE / W; ++m, i += W) {
    const Part lanes{int(std::clamp<int64_t>(begin - i, 0, W)), int(std::clamp<int64_t>(end - i, 0, W))};
    if (lanes.first < lanes.last) body(i, lanes, make(m));
  }
}

template <class Body>
inline void noise_loop(const NoiseArguments& noise, uint32_t parameter, int64_t offset, int64_t begin, int64_t end,
                       const Body& body) {
  const NoiseNumbers c = noise_numbers(noise);
  Stream stream{};
  std::copy(c.key, c.key + 8, stream.key);
  stream.step = c.step, stream.parameter = parameter;
  const int64_t first_tile = (offset + begin) / TILE * TILE;
  if (!c.noisy) {
    const NoNoise none{splat(c.fast_scale)};
    for (int64_t e = first_tile; e < offset + end; e += TILE)
      visit_tile(e - offset, begin, end, [&](int) { return none; }, body);
  } else if (c.grid == 0) {
    const f32 std = splat(c.fast_std), scale = splat(c.fast_scale);
    for (int64_t e = first_tile; e < offset + end; e += TILE) {
      constexpr int N = W == 1 ? 1 : 2;
      f32 z[TILE / W];
      for (int n = 0; n < TILE / W; n += 4 * N)
        fast_normals<N>(reinterpret_cast<f32(*)[4]>(z + n), stream, uint64_t(e + n * W) / 4);
      visit_tile(e - offset, begin, end, [&](int m) { return FastNoise{z[m], std, scale}; }, body);
    }
  } else {
    const SecureNoise unit{{}, splat(c.per_grid), splat(c.grid_scale), c.wide_per_grid};
    for (int64_t e = first_tile; e < offset + end; e += TILE) {
      i32 K[TILE / W];
      for (int block = 0; block < 16; block += W) {
        i32 halves[2][4];
        secure_integers(halves, stream, uint32_t(e / 8 + block), c.steps);
        for (int half = 0; half < 2; ++half)
          for (int m = 0; m < 4; ++m) K[(64 * half + 4 * block) / W + m] = halves[half][m];
      }
      visit_tile(e - offset, begin, end,
                 [&](int m) { return SecureNoise{K[m], unit.per_grid, unit.scale, unit.wide_per_grid}; }, body);
    }
  }
}

// f<T>(nullptr of T*) for the type that `type` says.
template <class F>
inline void with_type(Type type, const F& f) {
  switch (type) {
    case Type::float32:
      return f(static_cast<float*>(nullptr));
    case Type::bfloat16:
      return f(static_cast<bf16*>(nullptr));
    case Type::float16:
      return f(static_cast<f16*>(nullptr));
    case Type::float64:
      return;  // callers treat it apart
  }
}

}  // namespace dpfast::DPFAST_ISA
