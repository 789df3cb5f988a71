// clip_factors: certified norms → clipping factors, without the host waiting for them.
#include "dpfast/certified.h"
#include "kernels.h"

namespace dpfast {

using namespace DPFAST_ISA;

namespace {

constexpr int THREADS = 256;

// n_r = √(squared_r + bound_r) · scale;  factor_r = clipping_factor(n_r, C_r), and 0 in all groups r for a sample that has
// a norm which is not finite: such samples are counted. A thread for each sample.
__global__ void __launch_bounds__(THREADS) clip_factors_kernel(const ClipArguments a) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, end = a.groups * a.B;
  if (i >= a.B) return;
  bool finite = true;
  for (int64_t k = i; k < end; k += a.B) {
    const double n = certified_norm(a.squared[k], a.bounds[k], a.scale);
    finite &= n >= 0;
    a.factors[k] = n;
  }
  if (!finite) atomicAdd(a.nonfinite, 1ull);  // of integers: the same in any order
  for (int64_t k = i, r = 0; k < end; k += a.B, ++r)
    a.factors[k] =
        finite ? certified_factor(ClippingFunction(a.function), a.factors[k], a.thresholds[r], a.shape) : 0.0;
}

}  // namespace

void clip_factors(const Queue& queue, const ClipArguments& a) {
  check_code(cudaMemsetAsync(a.nonfinite, 0, sizeof(*a.nonfinite), queue.stream), queue.op);
  launch(queue, &clip_factors_kernel, ceil_div(a.B, THREADS), THREADS, a);
}

}  // namespace dpfast
