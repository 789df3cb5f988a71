// One element's update by torch's optimizers, from a gradient that is in registers. The order of operations is torch's
// own, fused where torch's are (add with alpha, lerp), so that results agree with it to 2 units in the last place.
#pragma once

#include "lanes.h"

namespace dpfast::DPFAST_ISA {

struct SGD {
  float lr, momentum, rest, weight_decay;  // rest = 1 - dampening
  bool nesterov, maximize, first;  // first: the momentum buffer is empty and becomes the gradient
};

// Constants are computed in double, as torch does, and rounded once.
inline SGD sgd_constants(double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                         bool maximize, bool first) {
  return {float(lr), float(momentum), float(1 - dampening), float(weight_decay), nesterov, maximize, first};
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
  float correction2;                 // 1 / sqrt(1 - beta2^t)
  float eps;
  bool maximize;
};

inline Adam adam_constants(double lr, double beta1, double beta2, double eps, double weight_decay, double t,
                           bool decoupled, bool maximize) {
  return {float(decoupled ? 1 - lr * weight_decay : 1.0),
          float(decoupled ? 0.0 : weight_decay),
          float(beta1),
          float(beta2),
          float(1 - beta1),
          float(1 - beta2),
          float(lr / (1 - std::pow(beta1, t))),
          float(std::sqrt(1 - std::pow(beta2, t))),
          float(eps),
          maximize};
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
  const f32 denominator = sqrt(under) / splat(c.correction2) + splat(c.eps);
  return p - splat(c.step_size) * mean / denominator;
}

}  // namespace dpfast::DPFAST_ISA
