// noisy_grad_ and standard_normal.
#include "noise_launch.h"

namespace dpfast {

using namespace DPFAST_ISA;

namespace {

template <class In, class Out>
void noisy_grad_of(const Queue& queue, const std::vector<NoiseEntry>& entries, bool secure,
                   const StepNumbers<NoRule>* numbers) {
  const auto kernel = secure ? &noisy_grad_kernel<true, In, Out> : &noisy_grad_kernel<false, In, Out>;
  launch_pairs(queue, entries, [&](const Table<NoiseEntry>& table, int64_t pieces, uint32_t pairs) {
    launch(queue, kernel, pieces, PAIR_THREADS, numbers, pairs, table);
  });
}

}  // namespace

void noisy_grad(const Queue& queue, const std::vector<Sized<NoisyGradient>>& tensors, const NoiseArguments& noise,
                void* workspace) {
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
  const StepNumbers<NoRule> given{noise_numbers(noise), {}, true, {}};
  with_numbers(queue, workspace, given, [&](const StepNumbers<NoRule>* numbers) {
    const bool secure = noise.grid > 0;
    noisy_grad_of<void, float>(queue, made, secure, numbers);
    noisy_grad_of<float, float>(queue, f32, secure, numbers);
    noisy_grad_of<float, bf16>(queue, bf, secure, numbers);
    noisy_grad_of<float, f16>(queue, f16s, secure, numbers);
    noisy_grad_of<double, double>(queue, f64s, secure, numbers);
  });
}

}  // namespace dpfast
