// noisy_sgd_ and noisy_adam_, with numbers among their arguments and with numbers in memory.
#include "noise_launch.h"

namespace dpfast {

using namespace DPFAST_ISA;

namespace {

template <class T, class Rule>
void update_of(const Queue& queue, const std::vector<UpdateEntry>& entries, bool secure,
               const StepNumbers<Rule>* numbers) {
  const auto kernel = secure ? &update_kernel<true, T, Rule> : &update_kernel<false, T, Rule>;
  launch_pairs(queue, entries, [&](const Table<UpdateEntry>& table, int64_t pieces, uint32_t pairs) {
    launch(queue, kernel, pieces, PAIR_THREADS, numbers, pairs, table);
  });
}

// Of an op's tensors, those that have the largest squares too (amsgrad), or those that have none.
struct Entries {
  std::vector<UpdateEntry> f32, bf, f16s;
  RoundingNumbers rounding{};

  Entries(const std::vector<Sized<Update>>& tensors, bool largest) {
    for (const auto& [u, n] : tensors) {
      if ((u.state[2] != nullptr) != largest) continue;
      // one for the whole list, like the key
      rounding = {{u.rounding_key[0], u.rounding_key[1]}, u.rounding == Rounding::stochastic};
      (u.type == Type::float32 ? f32 : u.type == Type::bfloat16 ? bf : f16s).push_back(update_entry(u, n));
    }
  }
  bool empty() const { return f32.empty() && bf.empty() && f16s.empty(); }

  template <class Rule>
  void update(const Queue& queue, bool secure, const StepNumbers<Rule>* numbers) const {
    update_of<float>(queue, f32, secure, numbers);
    update_of<bf16>(queue, bf, secure, numbers);
    update_of<f16>(queue, f16s, secure, numbers);
  }
};

template <class Rule, class Arguments>
void update(const Queue& queue, const Entries& entries, const NoiseArguments& noise, const Arguments& a,
            void* workspace) {
  if (entries.empty()) return;
  const StepNumbers<Rule> given{noise_numbers(noise), entries.rounding, true, {constants(a)}};
  with_numbers(queue, workspace, given,
               [&](const StepNumbers<Rule>* numbers) { entries.update(queue, noise.grid > 0, numbers); });
}

template <class Rule>
void update(const Queue& queue, const Entries& entries, const InMemory& given, void* workspace) {
  if (entries.empty()) return;
  with_numbers<Rule>(queue, workspace, given, entries.rounding.stochastic,
                     [&](const StepNumbers<Rule>* numbers) { entries.update(queue, given.secure, numbers); });
}

}  // namespace

void noisy_sgd(const Queue& queue, const std::vector<Sized<Update>>& tensors, const NoiseArguments& noise,
               const SGDArguments& a, void* workspace) {
  update<SGDRule>(queue, Entries(tensors, false), noise, a, workspace);
}

void noisy_sgd(const Queue& queue, const std::vector<Sized<Update>>& tensors, const InMemory& given, void* workspace) {
  update<SGDRule>(queue, Entries(tensors, false), given, workspace);
}

void noisy_adam(const Queue& queue, const std::vector<Sized<Update>>& tensors, const NoiseArguments& noise,
                const AdamArguments& a, void* workspace) {
  update<AdamRule<false>>(queue, Entries(tensors, false), noise, a, workspace);
  update<AdamRule<true>>(queue, Entries(tensors, true), noise, a, workspace);
}

void noisy_adam(const Queue& queue, const std::vector<Sized<Update>>& tensors, const InMemory& given,
                void* workspace) {
  update<AdamRule<false>>(queue, Entries(tensors, false), given, workspace);
  update<AdamRule<true>>(queue, Entries(tensors, true), given, workspace);
}

}  // namespace dpfast
