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

// The secure noise's standard deviation in steps of the grid: rounded up where float32 cannot hold it, never below.
inline float secure_steps(double std, double grid) {
  const float nearest = float(std / grid);
  return nearest < std / grid ? std::nextafterf(nearest, 1e30f) : nearest;
}

}  // namespace dpfast::DPFAST_ISA
