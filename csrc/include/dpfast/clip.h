// Norm → clipping factor. Each function keeps factor(n) · n at most the threshold C, in float64.
#pragma once

#include "lanes.h"

namespace dpfast::DPFAST_ISA {

enum class ClippingFunction : int64_t { abadi, global, automatic, normalised, psac };

// n is finite and not negative. `shape` is γ of the automatic function, r of PSAC and Z of the global one.
//   abadi       min(1, C/n)               Abadi et al. 2016
//   global      C/Z · 1[n ≤ Z]            Bu et al. 2021 (with Z = C: 1[n ≤ C])
//   automatic   C/(n + γ)                 Bu et al. 2022, AUTO-S
//   normalised  C/n, 0 at n = 0           Bu et al. 2022, AUTO-V
//   psac        C/(n + r/(n + r))         Xia et al. 2023
DPFAST_FN double clipping_factor(ClippingFunction function, double n, double C, double shape) {
  switch (function) {
    case ClippingFunction::abadi:
      return n > C ? C / n : 1.0;
    case ClippingFunction::global:
      return n <= shape ? C / shape : 0.0;
    case ClippingFunction::automatic:
      return C / (n + shape);
    case ClippingFunction::normalised:
      return n > 0.0 ? C / n : 0.0;
    case ClippingFunction::psac:
      return C / (n + shape / (n + shape));
  }
  return 0.0;
}

}  // namespace dpfast::DPFAST_ISA
