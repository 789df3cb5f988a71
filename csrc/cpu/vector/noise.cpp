// noisy_grad: grad = (summed + std · z) · scale, one read, one write; z stays in registers.
#include "noise_loop.h"
#include "vector.h"

namespace dpfast::DPFAST_ISA {

void standard_normal(float* out, const NoiseArguments& noise, uint32_t parameter, int64_t offset, int64_t n) {
  noise_loop(noise, parameter, offset, 0, n, [&](int64_t i, auto lanes, const auto& with) {
    write(out + i, with.add(splat(0.0f)), lanes);
  });
}

void noisy_grad(const NoisyGradient& g, const NoiseArguments& noise, int64_t begin, int64_t end) {
  if (g.summed_type == Type::float64) {
    const double* summed = static_cast<const double*>(g.summed);
    double* grad = static_cast<double*>(g.grad);
    noise_loop(noise, g.parameter, g.offset, begin, end, [&](int64_t i, auto lanes, const auto& with) {
      for (int lane = lanes.first; lane < lanes.last; ++lane) grad[i + lane] = with.add(summed[i + lane], lane, noise);
    });
    return;
  }
  const float* summed = static_cast<const float*>(g.summed);
  with_type(g.grad_type, [&](auto* type) {
    auto* grad = static_cast<decltype(type)>(g.grad);
    noise_loop(noise, g.parameter, g.offset, begin, end, [&](int64_t i, auto lanes, const auto& with) {
      write(grad + i, with.add(read(summed + i, lanes)), lanes);
    });
  });
}

}  // namespace dpfast::DPFAST_ISA
