// From squared norm and bound to clipping factor, every rounding on the safe side: with n the true
// √(squared + bound) · scale, factor · n ≤ C holds in exact arithmetic. Where nothing is rounded, nothing is moved.
#pragma once

#include <cfloat>

#include "clip.h"

namespace dpfast::DPFAST_ISA {

// Below it, an operation's own error may be too small for a double: then a result counts as rounded.
constexpr double EXACT = 0x1p-900;
// Larger factors, of functions that have no largest one, could overflow in float32 when a batch size multiplies them.
constexpr double LARGEST_FACTOR = 0x1p100;
// As dpfast/reference/rounding.py has them: units of rounding that every squared norm is raised by, and how many times
// the smallest normal number for each element that may underflow when the clipped sum is made.
constexpr double SAFETY_UNITS = 12, UNDERFLOW = 0x1p26;

// The next double above (below) a finite x ≥ 0 (x > 0), if `move`.
DPFAST_FN double up(double x, bool move) { return bits_as<double>(bits_as<uint64_t>(x) + uint64_t(move)); }
DPFAST_FN double down(double x, bool move) { return bits_as<double>(bits_as<uint64_t>(x) - uint64_t(move)); }

// At least √(squared + bound) · scale; negative where that is no finite number.
DPFAST_FN double certified_norm(double squared, double bound, double scale) {
  double sum = squared + bound;
  if (!(sum >= 0.0 && sum <= DBL_MAX)) return -1.0;
  const double back = sum - squared;
  sum = up(sum, (squared - (sum - back)) + (bound - back) > 0.0);
  double root = ::sqrt(sum);
  root = up(root, sum > 0.0 && (sum < EXACT || ::fma(root, root, -sum) < 0.0));
  double n = root * scale;
  n = up(n, n < EXACT ? root > 0.0 : ::fma(root, scale, -n) > 0.0);
  return n <= DBL_MAX ? n : -1.0;
}

// The factor of a sample with norm n ≥ 0, never so large that factor · n is above C.
DPFAST_FN double certified_factor(ClippingFunction function, double n, double C, double shape) {
  double factor = clipping_factor(function, n, C, shape);
  if (!(factor > 0.0)) return 0.0;
  if (factor > LARGEST_FACTOR) factor = LARGEST_FACTOR;
  return down(factor, C < EXACT ? factor * n >= C : ::fma(factor, n, -C) > 0.0);
}

}  // namespace dpfast::DPFAST_ISA
