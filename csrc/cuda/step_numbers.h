// Key, step and hyperparameters of a step in device memory, where its kernels read them. A launch keeps its arguments: a
// graph that had these among them would add one step's noise to every batch.
#pragma once

#include "../cpu/kernels.h"
#include "dpfast/noisy.h"
#include "dpfast/update.h"
#include "kernels.h"

namespace dpfast::DPFAST_ISA {

// A rule has a number of states and `parameter after = rule(parameter, gradient, state[])`. `arguments` reads its
// hyperparameters in the order of its dataclass in dpfast/ops/update.py.
struct SGDRule {
  static constexpr int states = 1;
  SGD c;
  DPFAST_FN float operator()(float p, float g, float* s) const { return step(c, p, g, s[0]); }
  static DPFAST_FN SGDArguments arguments(const double* n) {
    return {n[0], n[1], n[2], n[3], n[4] != 0, n[5] != 0, n[6] != 0};
  }
};

template <bool amsgrad>
struct AdamRule {
  static constexpr int states = amsgrad ? 3 : 2;
  Adam c;
  DPFAST_FN float operator()(float p, float g, float* s) const { return step<amsgrad>(c, p, g, s[0], s[1], s[2]); }
  static DPFAST_FN AdamArguments arguments(const double* n) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8] != 0, n[9] != 0};
  }
};

struct NoRule {};

struct RoundingNumbers {
  uint32_t key[2];
  bool stochastic;
};

template <class Rule>
struct StepNumbers {
  NoiseNumbers noise;
  RoundingNumbers rounding;
  bool writes;  // false: nothing is written
  Rule rule;
};

template <class Rule>
__global__ void keep_numbers_kernel(StepNumbers<Rule>* kept, const StepNumbers<Rule> __grid_constant__ numbers) {
  *kept = numbers;
}

// One block. See InMemory for what the arguments are.
template <class Rule>
__global__ void read_numbers_kernel(StepNumbers<Rule>* kept, const double* numbers, const int64_t* words,
                                    const bool* lost, int64_t B, bool stochastic) {
  if (threadIdx.x == 0) {
    NoiseArguments noise{{}, uint32_t(words[8]), numbers[1], numbers[2], numbers[3]};
    for (int i = 0; i < 8; ++i) noise.key[i] = uint32_t(words[i]);
    *kept = {noise_numbers(noise),
             {{uint32_t(words[9]), uint32_t(words[10])}, stochastic},
             numbers[0] != 0,
             {constants(Rule::arguments(numbers + 4))}};
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < B; i += blockDim.x)
    if (lost[i]) kept->writes = false;
}

#if defined(__CUDACC__) || defined(DPFAST_EMULATED)
// Launch what `work` launches, which reads its numbers from `workspace`, and leave no key there.
template <class Rule, class Work>
void with_numbers(const Queue& queue, void* workspace, const StepNumbers<Rule>& numbers, const Work& work) {
  static_assert(sizeof(StepNumbers<Rule>) <= STEP_BYTES);
  auto* kept = static_cast<StepNumbers<Rule>*>(workspace);
  launch(queue, &keep_numbers_kernel<Rule>, 1, 1, kept, numbers);
  work(kept);
  check_code(cudaMemsetAsync(workspace, 0, STEP_BYTES, queue.stream), queue.op);
}

template <class Rule, class Work>
void with_numbers(const Queue& queue, void* workspace, const InMemory& given, bool stochastic, const Work& work) {
  static_assert(sizeof(StepNumbers<Rule>) <= STEP_BYTES);
  auto* kept = static_cast<StepNumbers<Rule>*>(workspace);
  launch(queue, &read_numbers_kernel<Rule>, 1, 256, kept, given.numbers, given.words, given.lost, given.B, stochastic);
  work(kept);
  check_code(cudaMemsetAsync(workspace, 0, STEP_BYTES, queue.stream), queue.op);
}
#endif

}  // namespace dpfast::DPFAST_ISA
