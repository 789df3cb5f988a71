// noisy_sgd_ and noisy_adam_.
#include "noise_launch.h"

namespace dpfast {

using namespace DPFAST_ISA;

namespace {

template <class T, class Rule>
void update_of(const Queue& queue, const std::vector<UpdateEntry>& entries, const NoiseArguments& noise,
               const RoundingNumbers& rounding, const Rule& rule) {
  const NoiseNumbers numbers = noise_numbers(noise);
  const auto kernel = noise.grid > 0 ? &update_kernel<true, T, Rule> : &update_kernel<false, T, Rule>;
  launch_pairs(queue, entries, [&](const Table<UpdateEntry>& table, int64_t pieces, uint32_t pairs) {
    launch(queue, kernel, pieces, PAIR_THREADS, numbers, rounding, rule, pairs, table);
  });
}

// Those of `tensors` that have the largest squares too (amsgrad), or those that have none.
template <class Rule>
void update(const Queue& queue, const std::vector<Sized<Update>>& tensors, const NoiseArguments& noise,
            const Rule& rule, bool largest) {
  std::vector<UpdateEntry> f32, bf, f16s;
  RoundingNumbers rounding{};
  for (const auto& [u, n] : tensors) {
    if ((u.state[2] != nullptr) != largest) continue;
    rounding.stochastic = u.rounding == Rounding::stochastic;  // one for the whole list, like the key
    philox_keys(rounding.keys, u.rounding_key);
    (u.type == Type::float32 ? f32 : u.type == Type::bfloat16 ? bf : f16s).push_back(update_entry(u, n));
  }
  update_of<float>(queue, f32, noise, rounding, rule);
  update_of<bf16>(queue, bf, noise, rounding, rule);
  update_of<f16>(queue, f16s, noise, rounding, rule);
}

}  // namespace

void noisy_sgd(const Queue& queue, const std::vector<Sized<Update>>& tensors, const NoiseArguments& noise,
               const SGDArguments& a) {
  const SGDRule rule{
      sgd_constants(a.lr, a.momentum, a.dampening, a.weight_decay, a.nesterov, a.maximize, a.first)};
  update(queue, tensors, noise, rule, false);
}

void noisy_adam(const Queue& queue, const std::vector<Sized<Update>>& tensors, const NoiseArguments& noise,
                const AdamArguments& a) {
  const Adam constants =
      adam_constants(a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.t, a.decoupled, a.maximize);
  update(queue, tensors, noise, AdamRule<false>{constants}, false);
  update(queue, tensors, noise, AdamRule<true>{constants}, true);
}

}  // namespace dpfast
