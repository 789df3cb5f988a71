// clip_factors: certified norms → clipping factors.
#include "arguments.h"
#include "dpfast/certified.h"

namespace dpfast {
namespace {

using scalar::ClippingFunction;

void check_function(int64_t function, double shape, double scale) {
  STD_TORCH_CHECK(0 <= function && function <= int64_t(ClippingFunction::psac), "dpfast: function ", function,
                  " is not a clipping function");
  const bool shaped = function != int64_t(ClippingFunction::abadi) && function != int64_t(ClippingFunction::normalised);
  STD_TORCH_CHECK(!shaped || (shape > 0 && std::isfinite(shape)), "dpfast: shape must be positive and finite, not ",
                  shape);
  STD_TORCH_CHECK(scale > 0 && std::isfinite(scale), "dpfast: scale must be positive and finite, not ", scale);
}

// n_r,i = √(squared_r,i + bound_r,i) · scale;  factor_r,i = clipping_factor(n_r,i, C_r), and 0 in all groups r for a
// sample i that has a norm which is not finite: such samples are counted.
std::tuple<Tensor, Tensor> clip_factors(Tensor squared, Tensor bounds, Tensor thresholds, int64_t function,
                                        double shape, double scale) {
  check_doubles(squared, "squared");
  check_doubles(bounds, "bounds");
  check_doubles(thresholds, "thresholds");
  STD_TORCH_CHECK(squared.dim() == 2, "dpfast: squared must have the shape [groups, B], not ", shape_of(squared));
  const int64_t groups = squared.size(0), B = squared.size(1);
  check_shape(bounds, "bounds", {groups, B});
  check_shape(thresholds, "thresholds", {groups});
  check_function(function, shape, scale);
  const double *s = static_cast<const double*>(squared.const_data_ptr()),
               *b = static_cast<const double*>(bounds.const_data_ptr()),
               *C = static_cast<const double*>(thresholds.const_data_ptr());
  for (int64_t r = 0; r < groups; ++r)
    STD_TORCH_CHECK(C[r] >= 0 && std::isfinite(C[r]), "dpfast: thresholds must be finite and not negative, not ", C[r]);

  Tensor factors = make({groups, B}, ScalarType::Double, squared), nonfinite = make({}, ScalarType::Long, squared);
  double* factor = static_cast<double*>(factors.data_ptr());
  int64_t& count = *static_cast<int64_t*>(nonfinite.data_ptr());
  count = 0;
  for (int64_t i = 0; i < B; ++i) {
    bool finite = true;
    for (int64_t k = i; k < groups * B; k += B) finite &= (factor[k] = scalar::certified_norm(s[k], b[k], scale)) >= 0;
    count += !finite;
    for (int64_t r = 0, k = i; r < groups; ++r, k += B)
      factor[k] = finite ? scalar::certified_factor(ClippingFunction(function), factor[k], C[r], shape) : 0.0;
  }
  return {factors, nonfinite};
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("clip_factors", TORCH_BOX(&dpfast::clip_factors));
}
