// What an element becomes: (x + noise) · scale, in the three modes. `add` on doubles is for one lane of float64 tensors;
// `noise` there has the numbers std, grid and scale as doubles.
#pragma once

#include "narrow.h"
#include "noise.h"

namespace dpfast::DPFAST_ISA {

// (x + std · z) · scale
struct FastNoise {
  f32 z, std, scale;
  DPFAST_FN f32 add(f32 x) const { return fma(std, z, x) * scale; }
  template <class Arguments>
  DPFAST_FN double add(double x, int lane, const Arguments& noise) const {
    return (x + noise.std * double(this->lane(z, lane))) * noise.scale;
  }
  static DPFAST_FN float lane(f32 x, int i) {
    float all[W];
    put(all, x);
    return all[i];
  }
};

// (round(x / grid) + K) · grid · scale: whole numbers until they are scaled.
struct SecureNoise {
  i32 K;
  f32 per_grid, scale;  // 1 / grid; grid · scale
  double wide_per_grid;
  // Whether 32 bits hold the sum: not for NaN.
  DPFAST_FN mask fits(f32 x) const {
    return bits_as<f32>(bits_as<u32>(x * per_grid) & 0x7FFFFFFFu) < splat(0x1p30f);
  }
  DPFAST_FN f32 add_narrow(f32 x) const { return to_float(to_int(x * per_grid) + K) * scale; }
  DPFAST_FN f32 add_wide(f32 x) const {  // in doubles: the same result, slower
    return to_float(round_even(to_double(x) * wide_per_grid) + to_double(K)) * scale;
  }
  DPFAST_FN f32 add(f32 x) const { return any(fits(x) ^ all_lanes()) ? add_wide(x) : add_narrow(x); }
  template <class Arguments>
  DPFAST_FN double add(double x, int lane, const Arguments& noise) const {
    int32_t all[W];
    put(all, K);
    return (::rint(x * wide_per_grid) + all[lane]) * (noise.grid * noise.scale);
  }
};

// Without noise: x · scale.
struct NoNoise {
  f32 scale;
  DPFAST_FN f32 add(f32 x) const { return x * scale; }
  template <class Arguments>
  DPFAST_FN double add(double x, int, const Arguments& noise) const {
    return x * noise.scale;
  }
};

// What the lanes need of a step's noise. It is made once a step: by the host, or by a GPU that finds key, step and
// standard deviation in its memory. Doubles, divided and rounded as IEEE 754 says, give both the same bits.
struct NoiseNumbers {
  uint32_t key[8];
  uint32_t step;
  bool noisy;  // false: std is 0, nothing is drawn
  float fast_std, fast_scale, steps, per_grid, grid_scale;
  double std, grid, scale, wide_per_grid;
};

template <class Arguments>
DPFAST_FN NoiseNumbers noise_numbers(const Arguments& a) {
  NoiseNumbers c{};
  for (int i = 0; i < 8; ++i) c.key[i] = a.key[i];
  c.step = a.step, c.noisy = a.std != 0;
  c.fast_std = float(a.std), c.fast_scale = float(a.scale);
  c.std = a.std, c.grid = a.grid, c.scale = a.scale;
  if (a.grid > 0) {
    // the standard deviation in steps of the grid: rounded up where float32 cannot hold it, never below
    const float nearest = float(a.std / a.grid);
    c.steps = nearest < a.std / a.grid ? ::nextafterf(nearest, 1e30f) : nearest;
    c.per_grid = float(1 / a.grid), c.grid_scale = float(a.grid * a.scale), c.wide_per_grid = 1 / a.grid;
  }
  return c;
}

}  // namespace dpfast::DPFAST_ISA
