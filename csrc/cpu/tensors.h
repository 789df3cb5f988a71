// Tensors of the stable ABI as the kernels want them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "kernels.h"

namespace dpfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Double:
      return Type::float64;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Half:
      return Type::float16;
    default:
      STD_TORCH_CHECK(false, "dpfast: a tensor that is not float32, float64, bfloat16 or float16");
  }
}

inline void check(const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == like.numel(),
                  "dpfast: tensors of one parameter must be contiguous, on one device and of one size");
}

}  // namespace dpfast
