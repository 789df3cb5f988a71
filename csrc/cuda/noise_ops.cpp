// noisy_grad_, noisy_sgd_, noisy_adam_ and standard_normal on CUDA tensors, all of one device.
#include "../noise_lists.h"
#include "kernels.h"
#include "tensors.h"

namespace dpfast {
namespace {

constexpr int64_t WORDS = 11, SGD_NUMBERS = 11, ADAM_NUMBERS = 14;

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

// The place of an op whose key and step are among its arguments, which a CUDA graph keeps.
Place outside_of_graphs(const Tensor& tensor, const char* op) {
  Place place(tensor, op);
  STD_TORCH_CHECK(!is_captured(place.queue), "dpfast: ", op, " is being captured by a CUDA graph, which would replay ",
                  "the noise of this key and step on other sums; capture a step by dpfast.graphed with its optimizer, ",
                  "or call optimizer.step() outside of the graph");
  return place;
}

InMemory in_memory(const Tensor& numbers, const Tensor& words, const Tensor& lost, bool secure, int64_t least,
                   const Tensor& like) {
  const auto check = [&](const Tensor& tensor, const char* name, ScalarType type, const char* dtype, int64_t n) {
    STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == like.get_device_index() && tensor.is_contiguous() &&
                        tensor.scalar_type() == type && tensor.numel() >= n,
                    "dpfast: ", name, " must be ", dtype, ", contiguous, of ", n,
                    " elements or more, on the sums' CUDA device");
  };
  check(numbers, "numbers", ScalarType::Double, "float64", least);
  check(words, "words", ScalarType::Long, "int64", WORDS);
  check(lost, "lost", ScalarType::Bool, "bool", 0);
  return {static_cast<const double*>(numbers.data_ptr()), static_cast<const int64_t*>(words.data_ptr()),
          static_cast<const bool*>(lost.data_ptr()), lost.numel(), secure};
}

void standard_normal_op(Tensor out, Integers key, int64_t step, int64_t parameter, int64_t offset, double grid) {
  const NoiseArguments noise = noise_arguments(key, step, 1.0, grid, 1.0);
  NoisyGradient g = noisy_gradient(out, &out, parameter, offset, check_on_device);
  STD_TORCH_CHECK(g.summed_type == Type::float32, "dpfast: out must be float32");
  g.summed = nullptr;
  const Place place = outside_of_graphs(out, "standard_normal");
  noisy_grad(place.queue, sized<NoisyGradient>({g}, {out}), noise, step_workspace(out).data_ptr());
}

void noisy_grad_op(Tensors summed, Tensors grads, Integers parameters, Integers offsets, Integers key, int64_t step,
                   double std, double grid, double scale) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  const auto work = sized(noisy_gradients(summed, grads, parameters, offsets, check_on_device), summed);
  if (work.empty()) return;
  const Place place = outside_of_graphs(summed[0], "noisy_grad_");
  noisy_grad(place.queue, work, noise, step_workspace(summed[0]).data_ptr());
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
  const Place place = outside_of_graphs(summed[0], "noisy_sgd_");
  noisy_sgd(place.queue, work, noise, {lr, momentum, dampening, weight_decay, nesterov, maximize, first},
            step_workspace(summed[0]).data_ptr());
}

void noisy_sgd_in_graph_op(Tensors summed, Tensors grads, Tensors params, Tensors momenta, Tensors masters,
                           Integers parameters, Integers offsets, Tensor numbers, Tensor words, Tensor lost,
                           bool secure, int64_t rounding) {
  const auto work = sized(updates(summed, grads, params, {&momenta}, masters, parameters, offsets, rounding, {0, 0},
                                  check_on_device),
                          summed);
  if (work.empty()) return;
  const InMemory given = in_memory(numbers, words, lost, secure, SGD_NUMBERS, summed[0]);
  const Place place(summed[0], "noisy_sgd_in_graph_");
  noisy_sgd(place.queue, work, given, step_workspace(summed[0]).data_ptr());
}

void noisy_adam_op(Tensors summed, Tensors grads, Tensors params, Tensors means, Tensors squares, Tensors largest,
                   Tensors masters, Integers parameters, Integers offsets, Integers key, int64_t step, double std,
                   double grid, double scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                   double t, double noise_variance, double floor, bool decoupled, bool maximize, int64_t rounding,
                   Integers rounding_key) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  STD_TORCH_CHECK(means.size() == summed.size() && squares.size() == summed.size(), "dpfast: Adam needs its state");
  const auto work = sized(updates(summed, grads, params, {&means, &squares, &largest}, masters, parameters, offsets,
                                  rounding, rounding_key, check_on_device),
                          summed);
  if (work.empty()) return;
  const Place place = outside_of_graphs(summed[0], "noisy_adam_");
  noisy_adam(place.queue, work, noise,
             {lr, beta1, beta2, eps, weight_decay, t, noise_variance, floor, decoupled, maximize},
             step_workspace(summed[0]).data_ptr());
}

void noisy_adam_in_graph_op(Tensors summed, Tensors grads, Tensors params, Tensors means, Tensors squares,
                            Tensors largest, Tensors masters, Integers parameters, Integers offsets, Tensor numbers,
                            Tensor words, Tensor lost, bool secure, int64_t rounding) {
  STD_TORCH_CHECK(means.size() == summed.size() && squares.size() == summed.size(), "dpfast: Adam needs its state");
  const auto work = sized(updates(summed, grads, params, {&means, &squares, &largest}, masters, parameters, offsets,
                                  rounding, {0, 0}, check_on_device),
                          summed);
  if (work.empty()) return;
  const InMemory given = in_memory(numbers, words, lost, secure, ADAM_NUMBERS, summed[0]);
  const Place place(summed[0], "noisy_adam_in_graph_");
  noisy_adam(place.queue, work, given, step_workspace(summed[0]).data_ptr());
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(DPFAST_LIBRARY, DPFAST_KEY, library) {
  library.impl("standard_normal", TORCH_BOX(&dpfast::standard_normal_op));
  library.impl("noisy_grad_", TORCH_BOX(&dpfast::noisy_grad_op));
  library.impl("noisy_sgd_", TORCH_BOX(&dpfast::noisy_sgd_op));
  library.impl("noisy_adam_", TORCH_BOX(&dpfast::noisy_adam_op));
  library.impl("noisy_sgd_in_graph_", TORCH_BOX(&dpfast::noisy_sgd_in_graph_op));
  library.impl("noisy_adam_in_graph_", TORCH_BOX(&dpfast::noisy_adam_in_graph_op));
}
