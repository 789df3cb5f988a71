// noisy_grad_ and standard_normal.
#include "noise_launch.h"

namespace dpfast {

using namespace DPFAST_ISA;

namespace {

template <class In, class Out>
void noisy_grad_of(const Queue& queue, const std::vector<NoiseEntry>& entries, const NoiseArguments& noise) {
  const NoiseNumbers numbers = noise_numbers(noise);
  const auto kernel = noise.grid > 0 ? &noisy_grad_kernel<true, In, Out> : &noisy_grad_kernel<false, In, Out>;
  launch_pairs(queue, entries, [&](const Table<NoiseEntry>& table, int64_t pieces, uint32_t pairs) {
    launch(queue, kernel, pieces, PAIR_THREADS, numbers, pairs, table);
  });
}

}  // namespace

void noisy_grad(const Queue& queue, const std::vector<Sized<NoisyGradient>>& tensors, const NoiseArguments& noise) {
  std::vector<NoiseEntry> made, f32, bf, f16s, f64s;
  for (const auto& [g, n] : tensors) {
    const Type type = g.grad_type;
    auto& entries = !g.summed                 ? made
                    : type == Type::float32   ? f32
                    : type == Type::bfloat16  ? bf
                    : type == Type::float16   ? f16s
                                              : f64s;
    entries.push_back(noise_entry(g, n));
  }
  noisy_grad_of<void, float>(queue, made, noise);
  noisy_grad_of<float, float>(queue, f32, noise);
  noisy_grad_of<float, bf16>(queue, bf, noise);
  noisy_grad_of<float, f16>(queue, f16s, noise);
  noisy_grad_of<double, double>(queue, f64s, noise);
}

}  // namespace dpfast
