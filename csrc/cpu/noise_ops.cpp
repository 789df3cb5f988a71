// noisy_grad_, noisy_sgd_ and noisy_adam_ on lists of CPU tensors, their work divided evenly among the threads.
#include <algorithm>

#include "../noise_lists.h"
#include "dpfast/update.h"

namespace dpfast {
namespace {

// f(tensor, begin, end) over all elements of all tensors, in pieces that start at multiples of the noise's tiles.
template <class F>
void divide(const Tensors& tensors, const Integers& offsets, const F& f) {
  constexpr int64_t piece = 1 << 15;
  struct Piece {
    size_t tensor;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const int64_t n = tensors[k].numel();
    for (int64_t begin = 0; begin < n;) {
      const int64_t end = std::min(n, begin + piece - (offsets[k] + begin) % 128);
      pieces.push_back({k, begin, end});
      begin = end;
    }
  }
  torch::stable::parallel_for(0, int64_t(pieces.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(pieces[i].tensor, pieces[i].begin, pieces[i].end);
  });
}

void standard_normal(Tensor out, Integers key, int64_t step, int64_t parameter, int64_t offset, double grid) {
  const NoiseArguments noise = noise_arguments(key, step, 1.0, grid, 1.0);
  const NoisyGradient g = noisy_gradient(out, &out, parameter, offset, check);
  STD_TORCH_CHECK(g.summed_type == Type::float32, "dpfast: out must be float32");
  float* p = static_cast<float*>(g.grad);
  divide({out}, {offset}, [&](size_t, int64_t begin, int64_t end) {
    kernels().standard_normal(p + begin, noise, g.parameter, offset + begin, end - begin);
  });
}

void noisy_grad_(Tensors summed, Tensors grads, Integers parameters, Integers offsets, Integers key, int64_t step,
                 double std, double grid, double scale) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  const auto work = noisy_gradients(summed, grads, parameters, offsets, check);
  divide(summed, offsets,
         [&](size_t k, int64_t begin, int64_t end) { kernels().noisy_grad(work[k], noise, begin, end); });
}

void noisy_sgd_(Tensors summed, Tensors grads, Tensors params, Tensors momenta, Tensors masters, Integers parameters,
                Integers offsets, Integers key, int64_t step, double std, double grid, double scale, double lr,
                double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool first,
                int64_t rounding, Integers rounding_key) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  STD_TORCH_CHECK(momentum == 0 || momenta.size() == summed.size(), "dpfast: momentum needs its buffers");
  const auto work = updates(summed, grads, params, {&momenta}, masters, parameters, offsets, rounding,
                            rounding_key, check);
  const SGDArguments arguments{lr, momentum, dampening, weight_decay, nesterov, maximize, first};
  const scalar::SGD constants = scalar::constants(arguments);
  divide(summed, offsets, [&](size_t k, int64_t begin, int64_t end) {
    kernels().noisy_sgd(work[k], noise, &constants, begin, end);
  });
}

void noisy_adam_(Tensors summed, Tensors grads, Tensors params, Tensors means, Tensors squares, Tensors largest,
                 Tensors masters, Integers parameters, Integers offsets, Integers key, int64_t step, double std,
                 double grid, double scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                 double t, double noise_variance, double floor, bool decoupled, bool maximize, int64_t rounding,
                 Integers rounding_key) {
  const NoiseArguments noise = noise_arguments(key, step, std, grid, scale);
  STD_TORCH_CHECK(means.size() == summed.size() && squares.size() == summed.size(), "dpfast: Adam needs its state");
  const auto work = updates(summed, grads, params, {&means, &squares, &largest}, masters, parameters, offsets,
                            rounding, rounding_key, check);
  const AdamArguments arguments{lr, beta1, beta2, eps, weight_decay, t, noise_variance, floor, decoupled, maximize};
  const scalar::Adam constants = scalar::constants(arguments);
  divide(summed, offsets, [&](size_t k, int64_t begin, int64_t end) {
    kernels().noisy_adam(work[k], noise, &constants, begin, end);
  });
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("standard_normal", TORCH_BOX(&dpfast::standard_normal));
  library.impl("noisy_grad_", TORCH_BOX(&dpfast::noisy_grad_));
  library.impl("noisy_sgd_", TORCH_BOX(&dpfast::noisy_sgd_));
  library.impl("noisy_adam_", TORCH_BOX(&dpfast::noisy_adam_));
}
