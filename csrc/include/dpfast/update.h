// One element's update by torch's optimizers, from a gradient that is in registers. The order of operations is torch's
// own, fused where torch's are (add with alpha, lerp), so that results agree with it to 2 units in the last place.
#pragma once

#include "lanes.h"

namespace dpfast {

// Hyperparameters, as torch has them; t counts this step, from 1.
struct SGDArguments {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, first;
};
struct AdamArguments {
  double lr, beta1, beta2, eps, weight_decay, t;
  double noise, floor;  // the noise's part of the second moments, which is taken off down to the floor; 0: none is
  bool decoupled, maximize;
};

namespace DPFAST_ISA {

struct SGD {
  float lr, momentum, rest, weight_decay;  // rest = 1 - dampening
  bool nesterov, maximize, first;  // first: the momentum buffer is empty and becomes the gradient
};

// Constants are computed in double, as torch does, and rounded once: by the host, or by a GPU that finds the
// hyperparameters in its memory.
DPFAST_FN SGD constants(const SGDArguments& a) {
  return {float(a.lr), float(a.momentum), float(1 - a.dampening), float(a.weight_decay), a.nesterov, a.maximize, a.first};
}

DPFAST_FN f32 step(const SGD& c, f32 p, f32 g, f32& momentum) {
  if (c.maximize) g = -g;
  if (c.weight_decay != 0.0f) g = fma(p, splat(c.weight_decay), g);
  if (c.momentum != 0.0f) {
    momentum = c.first ? g : fma(g, splat(c.rest), momentum * splat(c.momentum));
    g = c.nesterov ? fma(momentum, splat(c.momentum), g) : momentum;
  }
  return fma(g, splat(-c.lr), p);
}

struct Adam {
  float decay;                       // 1 - lr · weight_decay where decoupled (AdamW), else 1
  float weight_decay;                // where not decoupled (Adam), else 0
  float beta1, beta2, rest1, rest2;  // rest = 1 - beta
  float step_size;                   // lr / (1 - beta1^t)
  float correction2;                 // sqrt(1 - beta2^t)
  float eps;
  float unbias2, noise, floor;  // 1 / (1 - beta2^t); the noise's part of square · unbias2, 0 to leave it there; the least left
  bool maximize;
};

// base^t of a whole t, by squaring in pairs of doubles: the libraries' pow differs in its last bit between a CPU and a GPU,
// and this does not. A t that is not whole, which no counter of steps is, is left to the library.
DPFAST_FN double power(double base, double t) {
  if (!(t >= 0 && t < 0x1p53) || t != double(uint64_t(t))) return ::pow(base, t);
  struct Pair {
    double high, low;
  };
  const auto product = [](Pair a, Pair b) {
    const double high = a.high * b.high;
    const double low = ::fma(a.high, b.high, -high) + (a.high * b.low + a.low * b.high), sum = high + low;
    return Pair{sum, low - (sum - high)};
  };
  Pair result{1, 0}, square{base, 0};
  for (uint64_t left = uint64_t(t); left; left >>= 1) {
    if (left & 1) result = product(result, square);
    square = product(square, square);
  }
  return result.high;
}

DPFAST_FN Adam constants(const AdamArguments& a) {
  const double rest2 = 1 - power(a.beta2, a.t);
  return {float(a.decoupled ? 1 - a.lr * a.weight_decay : 1.0),
          float(a.decoupled ? 0.0 : a.weight_decay),
          float(a.beta1),
          float(a.beta2),
          float(1 - a.beta1),
          float(1 - a.beta2),
          float(a.lr / (1 - power(a.beta1, a.t))),
          float(::sqrt(rest2)),
          float(a.eps),
          float(1 / rest2),
          float(a.noise / rest2),
          float(a.floor),
          a.maximize};
}

template <bool amsgrad>
DPFAST_FN f32 step(const Adam& c, f32 p, f32 g, f32& mean, f32& square, f32& largest) {
  if (c.maximize) g = -g;
  p = p * splat(c.decay);
  if (c.weight_decay != 0.0f) g = fma(p, splat(c.weight_decay), g);
  // lerp, from the nearer end
  mean = c.rest1 < 0.5f ? fma(g - mean, splat(c.rest1), mean) : fma(mean - g, splat(c.beta1), g);
  square = fma(g * splat(c.rest2), g, square * splat(c.beta2));
  f32 under = square;
  if constexpr (amsgrad) under = largest = select(is_nan(square) | (square > largest), square, largest);
  f32 root;
  if (c.noise != 0.0f) {  // NaN is kept
    const f32 left = fma(under, splat(c.unbias2), splat(-c.noise)), least = splat(c.floor);
    root = sqrt(select(is_nan(left) | (left > least), left, least));
  } else {
    root = sqrt(under) / splat(c.correction2);
  }
  const f32 denominator = root + splat(c.eps);
  return p - splat(c.step_size) * mean / denominator;
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
