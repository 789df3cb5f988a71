// The lists of tensors that the ops with noise get, checked and as plain pointers: the same for the CPU and for CUDA.
// `check(tensor, like)` is the device's own: contiguous, where it should be, of one size.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/tensors.h"

namespace dpfast {

inline NoiseArguments noise_arguments(const Integers& key, int64_t step, double std, double grid, double scale) {
  STD_TORCH_CHECK(key.size() == 8, "dpfast: key must have 8 words");
  STD_TORCH_CHECK(0 <= step && step <= UINT32_MAX, "dpfast: step must fit in 32 bits");
  STD_TORCH_CHECK(std >= 0 && std::isfinite(std) && std::isfinite(scale), "dpfast: bad std or scale");
  STD_TORCH_CHECK(grid == 0 || (grid > 0 && std <= grid * 0x1p26), "dpfast: a grid too fine for noise of 32 bits");
  NoiseArguments noise{{}, uint32_t(step), std, grid, scale};
  std::transform(key.begin(), key.end(), noise.key, [](int64_t word) { return uint32_t(word); });
  return noise;
}

template <class Check>
NoisyGradient noisy_gradient(const Tensor& summed, const Tensor* grad, int64_t parameter, int64_t offset,
                             const Check& check) {
  STD_TORCH_CHECK(0 <= parameter && parameter <= UINT32_MAX && offset >= 0, "dpfast: bad parameter index or offset");
  STD_TORCH_CHECK(offset + summed.numel() <= int64_t(1) << 35, "dpfast: more elements than ChaCha20 counts blocks for");
  const Type type = type_of(summed);
  STD_TORCH_CHECK(type == Type::float32 || (grad && type == Type::float64 && type_of(*grad) == type),
                  "dpfast: summed must be float32, or float64 with a float64 grad");
  STD_TORCH_CHECK(!grad || (type_of(*grad) == Type::float64) == (type == Type::float64), "dpfast: grad has a bad dtype");
  check(summed, summed);
  if (grad) check(*grad, summed);
  return {summed.data_ptr(), grad ? grad->data_ptr() : nullptr, type, grad ? type_of(*grad) : type,
          uint32_t(parameter), offset};
}

inline void check_lists(const Tensors& summed, const Integers& parameters, const Integers& offsets) {
  STD_TORCH_CHECK(parameters.size() == summed.size() && offsets.size() == summed.size(),
                  "dpfast: one parameter index and one offset for each tensor");
}

template <class Check>
std::vector<NoisyGradient> noisy_gradients(const Tensors& summed, const Tensors& grads, const Integers& parameters,
                                           const Integers& offsets, const Check& check) {
  check_lists(summed, parameters, offsets);
  STD_TORCH_CHECK(grads.size() == summed.size(), "dpfast: one grad for each summed gradient");
  std::vector<NoisyGradient> work;
  for (size_t k = 0; k < summed.size(); ++k)
    work.push_back(noisy_gradient(summed[k], &grads[k], parameters[k], offsets[k], check));
  return work;
}

// states: an empty list for a state that is not used.
template <class Check>
std::vector<Update> updates(const Tensors& summed, const Tensors& grads, const Tensors& params,
                            const std::vector<const Tensors*>& states, const Tensors& masters,
                            const Integers& parameters, const Integers& offsets, int64_t rounding,
                            const Integers& rounding_key, const Check& check) {
  check_lists(summed, parameters, offsets);
  STD_TORCH_CHECK(params.size() == summed.size() && (grads.empty() || grads.size() == summed.size()),
                  "dpfast: one parameter and one grad for each summed gradient");
  STD_TORCH_CHECK(rounding_key.size() == 2, "dpfast: rounding_key must have 2 words");
  std::vector<Update> work;
  for (size_t k = 0; k < summed.size(); ++k) {
    const Tensor* grad = grads.empty() ? nullptr : &grads[k];
    Update u{noisy_gradient(summed[k], grad, parameters[k], offsets[k], check), type_of(params[k]),
             params[k].data_ptr(), {}, nullptr, Rounding(rounding), {uint32_t(rounding_key[0]), uint32_t(rounding_key[1])}};
    STD_TORCH_CHECK(u.type != Type::float64, "dpfast: float64 parameters are not updated here");
    check(params[k], summed[k]);
    STD_TORCH_CHECK(!grad || type_of(*grad) == u.type, "dpfast: grad must have the parameter's dtype");
    for (size_t s = 0; s < states.size(); ++s) {
      if (states[s]->empty()) continue;
      const Tensor& state = states[s]->at(k);
      check(state, summed[k]);
      STD_TORCH_CHECK(type_of(state) == u.type, "dpfast: optimizer state must have the parameter's dtype");
      u.state[s] = state.data_ptr();
    }
    if (!masters.empty()) {
      check(masters.at(k), summed[k]);
      STD_TORCH_CHECK(type_of(masters[k]) == Type::float32, "dpfast: master copies must be float32");
      u.master = static_cast<float*>(masters[k].data_ptr());
    }
    work.push_back(u);
  }
  return work;
}

}  // namespace dpfast
