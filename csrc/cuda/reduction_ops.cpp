// The ops on norms, samples and embeddings on CUDA tensors: arguments checked, results and workspaces allocated.
#include <array>
#include <cmath>
#include <string>

#include "dpfast/clip.h"
#include "kernels.h"
#include "tensors.h"

namespace dpfast {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

void check_argument(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == like.get_device_index(), "dpfast: ", name,
                  " must be on the CUDA device of the other arguments");
  STD_TORCH_CHECK(tensor.is_contiguous(), "dpfast: ", name, " must be contiguous");
}

void check_shape(const Tensor& tensor, const char* name, const Integers& shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  std::string wanted;
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && tensor.size(int64_t(i)) == shape[i];
    wanted += (i ? ", " : "") + std::to_string(shape[i]);
  }
  STD_TORCH_CHECK(same, "dpfast: ", name, " must have the shape [", wanted, "]");
}

void check_type(const Tensor& tensor, const char* name, ScalarType type, const char* wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "dpfast: ", name, " must be ", wanted);
}

// Whether factors are float64, not float32.
bool are_wide(const Tensor& factors) {
  const ScalarType type = factors.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "dpfast: factors must be float32 or float64");
  return type == ScalarType::Double;
}

ScalarType sum_type(Type type) { return type == Type::float64 ? ScalarType::Double : ScalarType::Float; }

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

Tensor new_doubles(const Tensor& like, int64_t n) { return new_empty(like, {n}, ScalarType::Double); }

std::tuple<Tensor, Tensor> clip_factors_op(Tensor squared, Tensor bounds, Tensor thresholds, int64_t function,
                                           double shape, double scale) {
  STD_TORCH_CHECK(squared.dim() == 2, "dpfast: squared must have the shape [groups, B]");
  const int64_t groups = squared.size(0), B = squared.size(1);
  check_argument(squared, squared, "squared");
  check_argument(bounds, squared, "bounds");
  check_argument(thresholds, squared, "thresholds");
  check_type(squared, "squared", ScalarType::Double, "float64");
  check_type(bounds, "bounds", ScalarType::Double, "float64");
  check_type(thresholds, "thresholds", ScalarType::Double, "float64");
  check_shape(bounds, "bounds", {groups, B});
  check_shape(thresholds, "thresholds", {groups});
  using scalar::ClippingFunction;
  STD_TORCH_CHECK(0 <= function && function <= int64_t(ClippingFunction::psac), "dpfast: function ", function,
                  " is not a clipping function");
  const bool shaped = function != int64_t(ClippingFunction::abadi) && function != int64_t(ClippingFunction::normalised);
  STD_TORCH_CHECK(!shaped || (shape > 0 && std::isfinite(shape)), "dpfast: shape must be positive and finite");
  STD_TORCH_CHECK(scale > 0 && std::isfinite(scale), "dpfast: scale must be positive and finite");
  const Place place(squared, "clip_factors");
  Tensor factors = new_empty(squared, {groups, B}), nonfinite = new_empty(squared, Integers{}, ScalarType::Long);
  clip_factors(place.queue, {doubles(squared), doubles(bounds), doubles(thresholds), doubles(factors),
                             static_cast<unsigned long long*>(nonfinite.data_ptr()), groups, B, function, shape, scale});
  return {factors, nonfinite};
}

// Each is [B, *]; those of a list have one B.
std::vector<Samples> samples_of(const Tensors& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "dpfast: samples is an empty list");
  std::vector<Samples> all;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const Tensor& x = tensors[k];
    const std::string name = "samples[" + std::to_string(k) + "]";
    check_argument(x, tensors[0], name.c_str());
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(0) == tensors[0].size(0), "dpfast: ", name,
                    " must be [B, *] with the B of samples[0]");
    int64_t n = 1;
    for (int64_t i = 1; i < x.dim(); ++i) n *= x.size(i);
    all.push_back({x.const_data_ptr(), n, type_of(x)});
  }
  return all;
}

Tensor squared_norms_op(Tensors samples) {
  const auto all = samples_of(samples);
  const int64_t B = samples[0].size(0);
  const Place place(samples[0], "squared_norms");
  Tensor out = new_zeros(samples[0], {int64_t(samples.size()), B}, ScalarType::Double);
  const Tensor partials = new_doubles(out, norm_partials(all, B));
  if (B > 0) squared_norms(place.queue, all, B, doubles(out), doubles(partials));
  return out;
}

Tensors weighted_sums_op(Tensors samples, Tensor factors) {
  const auto all = samples_of(samples);
  const int64_t B = samples[0].size(0), count = int64_t(samples.size());
  check_argument(factors, samples[0], "factors");
  const bool wide = are_wide(factors), shared = factors.dim() == 1;
  check_shape(factors, "factors", shared ? Integers{B} : Integers{count, B});
  const Place place(samples[0], "weighted_sums");
  Tensors out;
  std::vector<Weighted> sums;
  for (int64_t k = 0; k < count; ++k) {
    out.push_back(new_empty(samples[k], {all[k].n}, sum_type(all[k].type)));
    const char* row = static_cast<const char*>(factors.const_data_ptr()) + (shared ? 0 : k * B * (wide ? 8 : 4));
    sums.push_back({all[k], row, out[k].data_ptr()});
  }
  weighted_sums(place.queue, sums, B, wide);
  return out;
}

// [B, T, d]
void check_positions(const Tensor& G) {
  check_argument(G, G, "G");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d]");
}

std::tuple<Tensor, Tensor> sum_positions_op(Tensor G) {
  check_positions(G);
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2);
  const Type type = type_of(G);
  const Place place(G, "sum_positions");
  Tensor samples = new_empty(G, {B, d}, sum_type(type)), squared = new_doubles(G, B);
  const Positions p{false, G.const_data_ptr(), nullptr, nullptr, nullptr,
                    {samples.data_ptr(), nullptr}, {doubles(squared), nullptr},
                    B, T, d, type, type};
  const Tensor partials = new_doubles(G, position_partials(p));
  sum_positions(place.queue, p, doubles(partials));
  return {samples, squared};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalised_sums_op(Tensor G, Tensor x, Tensor mean, Tensor rstd) {
  check_positions(G);
  check_argument(x, G, "x");
  check_argument(mean, G, "mean");
  check_argument(rstd, G, "rstd");
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2);
  check_shape(x, "x", {B, T, d});
  check_shape(rstd, "rstd", {B, T});
  STD_TORCH_CHECK(x.scalar_type() == G.scalar_type(), "dpfast: x must have the dtype of G");
  const bool centred = mean.numel() > 0;
  if (centred) {
    check_shape(mean, "mean", {B, T});
    STD_TORCH_CHECK(mean.scalar_type() == rstd.scalar_type(), "dpfast: mean must have the dtype of rstd");
  }
  const Type type = type_of(G);
  const Place place(G, "normalised_sums");
  Tensor weight = new_empty(G, {B, d}, sum_type(type)), bias = new_empty(G, {B, d}, sum_type(type));
  Tensor weight_squared = new_doubles(G, B), bias_squared = new_doubles(G, B);
  const Positions p{true, G.const_data_ptr(), x.const_data_ptr(),
                    centred ? mean.const_data_ptr() : nullptr, rstd.const_data_ptr(),
                    {weight.data_ptr(), bias.data_ptr()}, {doubles(weight_squared), doubles(bias_squared)},
                    B, T, d, type, type_of(rstd)};
  const Tensor partials = new_doubles(G, 2 * position_partials(p));
  sum_positions(place.queue, p, doubles(partials));
  return {weight, weight_squared, bias, bias_squared};
}

// Sorted along the last dimension, equal ids in their order: [2] values and places.
std::array<Tensor, 2> sorted(const Tensor& ids) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// `ids` as [B, T], or flat.
Segments segments_of(const std::array<Tensor, 2>& by_id, const Tensor& G) {
  return {static_cast<const int64_t*>(by_id[0].const_data_ptr()),
          static_cast<const int64_t*>(by_id[1].const_data_ptr()),
          G.const_data_ptr(), G.size(0), G.size(1), G.size(2), type_of(G)};
}

void check_ids(const Tensor& ids, const Tensor& G) {
  check_positions(G);
  check_argument(ids, G, "ids");
  check_type(ids, "ids", ScalarType::Long, "int64");
  check_shape(ids, "ids", {G.size(0), G.size(1)});
}

std::tuple<Tensor, Tensor> embedding_squared_norm_op(Tensor ids, Tensor G) {
  check_ids(ids, G);
  const Place place(G, "embedding_squared_norm");
  Tensor squared = new_doubles(G, G.size(0)), bound = new_doubles(G, G.size(0));
  const auto by_id = sorted(ids);
  const Segments s = segments_of(by_id, G);
  const Tensor partials = new_doubles(G, embedding_norm_partials(s));
  embedding_squared_norm(place.queue, s, doubles(squared), doubles(bound), doubles(partials));
  return {squared, bound};
}

Tensor embedding_sum_op(Tensor ids, Tensor G, Tensor factors, int64_t rows) {
  check_ids(ids, G);
  check_argument(factors, G, "factors");
  const bool wide = are_wide(factors);
  check_shape(factors, "factors", {G.size(0)});
  STD_TORCH_CHECK(rows >= 0, "dpfast: rows must not be negative, not ", rows);
  const Place place(G, "embedding_sum");
  Tensor out = new_zeros(G, {rows, G.size(2)}, sum_type(type_of(G)));
  if (G.numel() == 0) return out;
  const auto by_id = sorted(torch::stable::view(ids, {ids.numel()}));
  const Segments s = segments_of(by_id, G);
  const Tensor partials = new_doubles(G, embedding_sum_partials(s));
  embedding_sum(place.queue, s, factors.const_data_ptr(), wide, rows, out.data_ptr(), doubles(partials));
  return out;
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(DPFAST_LIBRARY, DPFAST_KEY, library) {
  library.impl("clip_factors", TORCH_BOX(&dpfast::clip_factors_op));
  library.impl("squared_norms", TORCH_BOX(&dpfast::squared_norms_op));
  library.impl("weighted_sums", TORCH_BOX(&dpfast::weighted_sums_op));
  library.impl("sum_positions", TORCH_BOX(&dpfast::sum_positions_op));
  library.impl("normalised_sums", TORCH_BOX(&dpfast::normalised_sums_op));
  library.impl("embedding_squared_norm", TORCH_BOX(&dpfast::embedding_squared_norm_op));
  library.impl("embedding_sum", TORCH_BOX(&dpfast::embedding_sum_op));
}
