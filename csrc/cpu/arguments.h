// What the ops on samples ask of their arguments, in messages that name them; and work divided among the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "dpfast/narrow.h"
#include "tensors.h"

namespace dpfast {

// "[2, 3]"
inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void check_argument(const Tensor& tensor, const std::string& name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "dpfast: ", name, " must be on the CPU, as the other arguments are");
  STD_TORCH_CHECK(tensor.is_contiguous(), "dpfast: ", name, " must be contiguous");
}

inline void check_floats(const Tensor& tensor, const std::string& name) {
  check_argument(tensor, name);
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "dpfast: ", name, " must be float32, float64, bfloat16 or float16");
}

inline void check_factors(const Tensor& tensor, const std::string& name) {
  check_argument(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, "dpfast: ",
                  name, " must be float32 or float64");
}

inline void check_doubles(const Tensor& tensor, const std::string& name) {
  check_argument(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "dpfast: ", name, " must be float64");
}

inline void check_shape(const Tensor& tensor, const std::string& name, const Integers& shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape[i];
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(same, "dpfast: ", name, " must have the shape [", wanted, "], not ", shape_of(tensor));
}

// The type that sums of `type` are made in.
inline ScalarType sum_type(Type type) { return type == Type::float64 ? ScalarType::Double : ScalarType::Float; }

inline int64_t pieces(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }

// A sum of doubles that keeps what each addition loses: as if it were made in twice the precision.
struct Sum {
  double high = 0, low = 0;

  void add(double x) {
    const double before = high;
    high += x;
    const double back = high - before;
    low += (before - (high - back)) + (x - back);
  }
  double total() const { return std::isfinite(high) ? high + low : high; }
};

inline Tensor make(const Integers& shape, ScalarType type, const Tensor& like) {
  return torch::stable::new_empty(like, shape, type);
}

// Tensors of these shapes, one after the other in one piece of memory: asking for memory takes as long as a small sum.
inline Tensors make_all(const std::vector<Integers>& shapes, ScalarType type, const Tensor& like) {
  constexpr int64_t line = 16;  // elements from which on the next one starts at a cache line
  Integers starts;
  int64_t size = 0;
  for (const Integers& shape : shapes) {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    starts.push_back(size);
    size += pieces(n, line) * line;
  }
  const Tensor memory = make({size}, type, like);
  Tensors out;
  out.reserve(shapes.size());
  for (size_t k = 0; k < shapes.size(); ++k) {
    Integers strides(shapes[k].size());
    for (int64_t i = int64_t(strides.size()) - 1, n = 1; i >= 0; n *= shapes[k][i--]) strides[i] = n;
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), int64_t(shapes[k].size()), shapes[k].data(),
                                                          strides.data(), starts[k], &view));
    out.emplace_back(view);
  }
  return out;
}

// A tensor's elements, as doubles.
inline std::vector<double> numbers(const Tensor& tensor) {
  const int64_t n = tensor.numel();
  const void* data = tensor.const_data_ptr();
  std::vector<double> out(n);
  switch (type_of(tensor)) {
    case Type::float64:
      std::copy_n(static_cast<const double*>(data), n, out.data());
      break;
    case Type::float32:
      std::copy_n(static_cast<const float*>(data), n, out.data());
      break;
    case Type::bfloat16:
      for (int64_t i = 0; i < n; ++i) out[i] = scalar::read(static_cast<const scalar::bf16*>(data) + i);
      break;
    case Type::float16:
      for (int64_t i = 0; i < n; ++i) out[i] = scalar::read(static_cast<const scalar::f16*>(data) + i);
  }
  return out;
}

// Factors as sums of `type` multiply by them: in float32 rounded towards 0, never to more than was asked for.
inline std::vector<double> factors_of(const Tensor& factors, Type type) {
  std::vector<double> out = numbers(factors);
  if (type == Type::float64) return out;
  for (double& factor : out) {
    const float nearest = float(factor);
    factor = std::fabs(nearest) > std::fabs(factor) ? std::nextafterf(nearest, 0.0f) : nearest;
  }
  return out;
}

// samples[k] is [B, *]; B of the first.
inline int64_t check_samples(const Tensors& samples) {
  STD_TORCH_CHECK(!samples.empty(), "dpfast: samples is an empty list");
  for (size_t k = 0; k < samples.size(); ++k) {
    const std::string name = "samples[" + std::to_string(k) + "]";
    check_floats(samples[k], name);
    STD_TORCH_CHECK(samples[k].dim() >= 1 && samples[k].size(0) == samples[0].size(0), "dpfast: ", name,
                    " must be [B, *] with the B of samples[0], not ", shape_of(samples[k]));
  }
  return samples[0].size(0);
}

// Elements of one sample: the product of the other dimensions, for B = 0 too.
inline int64_t row_size(const Tensor& samples) {
  int64_t n = 1;
  for (int64_t i = 1; i < samples.dim(); ++i) n *= samples.size(i);
  return n;
}

// squared_i = Σ of the parts of sample i, in one order, whoever computed them: parts [n, count].
inline void add_parts(const double* parts, int64_t count, double* squared, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Sum sum;
    for (int64_t k = 0; k < count; ++k) sum.add(parts[i * count + k]);
    squared[i] = sum.total();
  }
}

// f(k) for every piece k of work, the pieces divided among the threads by their weights, in elements read.
template <class F>
void share(const Integers& weights, const F& f) {
  constexpr int64_t least = 1 << 15;  // for which a thread is worth waking
  Integers start(weights.size() + 1, 0);
  for (size_t k = 0; k < weights.size(); ++k) start[k + 1] = start[k] + weights[k] + 1;
  torch::stable::parallel_for(0, start.back(), least, [&](int64_t first, int64_t last) {
    size_t k = std::lower_bound(start.begin(), start.end(), first) - start.begin();
    for (; k < weights.size() && start[k] < last; ++k) f(k);
  });
}

}  // namespace dpfast
