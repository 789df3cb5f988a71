// noisy_grad_, noisy_sgd_, noisy_adam_ and standard_normal on CUDA tensors, all of one device.
#include "../noise_lists.h"
#include "kernels.h"
#include "tensors.h"

namespace dpfast {
namespace {

// Pairs each part with the size of its tensor; parts without elements are left out.
template <class Part>
std::vector<Sized<Part>> sized(const std::vector<Part>& parts, const Tensors& tensors) {
  std::vector<Sized<Part>> work;
  for (size_t k = 0; k < parts.size(); ++k) {
    STD_TORCH_CHECK(tensors[k].get_device_index() == tensors[0].get_device_index(),
                    "dpfast: all tensors of a call must be on one CUDA device");
    if (const int64_t n = tensors[k].numel()) work.push_back({parts[k], n});
  }
  return work;
}

void standard_normal_op(Tensor out, Integers key, int64_t step, int64_t parameter, int64_t offset, double grid) {
  const NoiseArguments noise = noise_arguments(key, step, 1.0, grid, 1.0);
  NoisyGradient g = noisy_gradient(out, &out, parameter, offset, check_on_device);
  STD_TORCH_CHECK(g.summed_type == Type::float32, "dpfast: out must be float32");
  g.summed = nullptr;
  const Place place(out, "standard_normal");
  noisy_grad(place.queue, sized<NoisyGradient>({g}, {out}), noise);
}

void noisy_grad_op(Tensors summed, Tensors grads, Integers parameters, Integers offsets, Integers key, int64_t step,
                   double std, double grid, double scale) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  const auto work = sized(noisy_gradients(summed, grads, parameters, offsets, check_on_device), summed);
  if (work.empty()) return;
  const Place place(summed[0], "noisy_grad_");
  noisy_grad(place.queue, work, noise);
}

void noisy_sgd_op(Tensors summed, Tensors grads, Tensors params, Tensors momenta, Tensors masters,
                  Integers parameters, Integers offsets, Integers key, int64_t step, double std, double grid,
                  double scale, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                  bool maximize, bool first, int64_t rounding, Integers rounding_key) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  STD_TORCH_CHECK(momentum == 0 || momenta.size() == summed.size(), "dpfast: momentum needs its buffers");
  const auto work = sized(updates(summed, grads, params, {&momenta}, masters, parameters, offsets, rounding,
                                  rounding_key, check_on_device),
                          summed);
  if (work.empty()) return;
  const Place place(summed[0], "noisy_sgd_");
  noisy_sgd(place.queue, work, noise, {lr, momentum, dampening, weight_decay, nesterov, maximize, first});
}

void noisy_adam_op(Tensors summed, Tensors grads, Tensors params, Tensors means, Tensors squares, Tensors largest,
                   Tensors masters, Integers parameters, Integers offsets, Integers key, int64_t step, double std,
                   double grid, double scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                   double t, bool decoupled, bool maximize, int64_t rounding, Integers rounding_key) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  STD_TORCH_CHECK(means.size() == summed.size() && squares.size() == summed.size(), "dpfast: Adam needs its state");
  const auto work = sized(updates(summed, grads, params, {&means, &squares, &largest}, masters, parameters, offsets,
                                  rounding, rounding_key, check_on_device),
                          summed);
  if (work.empty()) return;
  const Place place(summed[0], "noisy_adam_");
  noisy_adam(place.queue, work, noise, {lr, beta1, beta2, eps, weight_decay, t, decoupled, maximize});
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(DPFAST_LIBRARY, DPFAST_KEY, library) {
  library.impl("standard_normal", TORCH_BOX(&dpfast::standard_normal_op));
  library.impl("noisy_grad_", TORCH_BOX(&dpfast::noisy_grad_op));
  library.impl("noisy_sgd_", TORCH_BOX(&dpfast::noisy_sgd_op));
  library.impl("noisy_adam_", TORCH_BOX(&dpfast::noisy_adam_op));
}
