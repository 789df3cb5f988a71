// Sums of per-sample gradients that are written out, and those of layers whose per-sample gradients are sums over
// positions.
#include "arguments.h"

namespace dpfast {
namespace {

constexpr int64_t COLUMNS = 1024;  // columns that one thread sums over positions at a time

// Σ_i factor_i g_i over the samples whose factor is not 0.
Tensors weighted_sums(Tensors samples, Tensor factors) {
  const int64_t B = check_samples(samples), count = int64_t(samples.size());
  check_factors(factors, "factors");
  if (factors.dim() == 1)
    check_shape(factors, "factors", {B});
  else
    check_shape(factors, "factors", {count, B});
  Tensors out;
  struct Kept {
    Integers index;
    std::vector<double> factors;
  };
  // Where factors are the same for all tensors: those of narrow tensors, and of float64 ones. Else those of each.
  const bool shared = factors.dim() == 1;
  std::vector<Kept> kept(shared ? 2 : count);
  std::vector<double> all[2];
  const auto kept_of = [&](int64_t k) -> Kept& { return kept[shared ? type_of(samples[k]) == Type::float64 : k]; };
  struct Block {
    int64_t tensor, begin, end;
  };
  std::vector<Block> blocks;
  Integers weights;
  for (int64_t k = 0; k < count; ++k) {
    const Type type = type_of(samples[k]);
    std::vector<double>& rounded = all[type == Type::float64];
    if (rounded.empty()) rounded = factors_of(factors, type);
    Kept& mine = kept_of(k);
    if (!shared || mine.index.empty())
      for (int64_t i = 0; i < B; ++i)
        if (const double factor = rounded[shared ? i : k * B + i]; factor != 0) {
          mine.index.push_back(i);
          mine.factors.push_back(factor);
        }
    const int64_t n = row_size(samples[k]);
    out.push_back(make({n}, sum_type(type), samples[k]));
    // Blocks wide enough for long reads, but enough of them for all threads.
    const int64_t columns = std::clamp<int64_t>(n / torch::stable::get_num_threads(), 512, 8192);
    for (int64_t begin = 0; begin < n; begin += columns) {
      blocks.push_back({k, begin, std::min(n, begin + columns)});
      weights.push_back((blocks.back().end - begin) * (1 + int64_t(mine.index.size())));
    }
  }
  share(weights, [&](size_t b) {
    const auto [k, begin, end] = blocks[b];
    const Kept& mine = kept_of(k);
    const Rows rows{type_of(samples[k]),        samples[k].const_data_ptr(), out[k].numel(),
                    int64_t(mine.index.size()), mine.index.data(),           mine.factors.data()};
    kernels().sum_rows(out[k].data_ptr(), rows, begin, end);
  });
  return out;
}

// [B, d] sums over positions and their squared norms, in blocks of columns: f(sample, first column, last column) makes
// one and gives the places where its sums start.
template <class F>
void sum_samples(int64_t B, int64_t T, int64_t d, std::initializer_list<double*> squared, Type type, const F& f) {
  const int64_t blocks = pieces(d, COLUMNS);
  std::vector<std::vector<double>> parts(squared.size(), std::vector<double>(B * blocks));
  const Integers weights(B * blocks, (T + 1) * std::min(d, COLUMNS));
  share(weights, [&](size_t k) {
    const int64_t begin = int64_t(k) % blocks * COLUMNS, end = std::min(d, begin + COLUMNS);
    const auto places = f(int64_t(k) / blocks, begin, end);
    for (size_t s = 0; s < parts.size(); ++s) parts[s][k] = kernels().squares(places[s], type, end - begin);
  });
  for (size_t s = 0; s < parts.size(); ++s) add_parts(parts[s].data(), blocks, squared.begin()[s], B);
}

char* element(const Tensor& tensor, int64_t i) {
  return static_cast<char*>(tensor.data_ptr()) + i * int64_t(tensor.element_size());
}

// For reading only: a tensor that shares its memory until one of the two is written to stays shared.
const char* given(const Tensor& tensor, int64_t i) {
  return static_cast<const char*>(tensor.const_data_ptr()) + i * int64_t(tensor.element_size());
}

double* places_of(const Tensor& doubles) { return static_cast<double*>(doubles.data_ptr()); }

// g_i = Σ_t G_i,t and ‖g_i‖²
Tensor positions_into(const Tensor& G, double* squared) {
  check_floats(G, "G");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2);
  const Type type = type_of(G);
  Tensor samples = make({B, d}, sum_type(type), G);
  sum_samples(B, T, d, {squared}, type_of(samples), [&](int64_t i, int64_t begin, int64_t end) {
    const Rows rows{type, given(G, i * T * d), d, T, nullptr, nullptr};
    kernels().sum_rows(element(samples, i * d), rows, begin, end);
    return std::array{element(samples, i * d + begin)};
  });
  return samples;
}

std::tuple<Tensor, Tensor> sum_positions(Tensor G) {
  check_floats(G, "G");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
  Tensor squared = make({G.size(0)}, ScalarType::Double, G);
  return {positions_into(G, places_of(squared)), squared};
}

// w_i = Σ_t G_i,t ∘ (x_i,t - mean_i,t) · rstd_i,t,  b_i = Σ_t G_i,t,  ‖w_i‖² and ‖b_i‖²
std::tuple<Tensor, Tensor> normalised_into(const Tensor& G, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                           double* weight_squared, double* bias_squared) {
  check_floats(G, "G");
  check_floats(x, "x");
  check_floats(mean, "mean");
  check_floats(rstd, "rstd");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2);
  check_shape(x, "x", {B, T, d});
  STD_TORCH_CHECK(x.scalar_type() == G.scalar_type(), "dpfast: x must have the dtype of G");
  const bool centred = mean.numel() > 0;
  for (const auto& [side, name] : {std::pair{&mean, "mean"}, std::pair{&rstd, "rstd"}})
    STD_TORCH_CHECK((side == &mean && !centred) || side->numel() == B * T, "dpfast: ", name, " must have ", B * T,
                    " elements, one a position, not the shape ", shape_of(*side));
  const Type type = type_of(G);
  const std::vector<double> means = numbers(mean), rstds = numbers(rstd);
  Tensor weight = make({B, d}, sum_type(type), G), bias = make({B, d}, sum_type(type), G);
  sum_samples(B, T, d, {weight_squared, bias_squared}, type_of(bias), [&](int64_t i, int64_t begin, int64_t end) {
    const Normalised sample{type, given(G, i * T * d),  given(x, i * T * d),
                            d,    T, centred ? means.data() + i * T : nullptr, rstds.data() + i * T};
    kernels().sum_normalised(element(weight, i * d), element(bias, i * d), sample, begin, end);
    return std::array{element(weight, i * d + begin), element(bias, i * d + begin)};
  });
  return {weight, bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalised_sums(Tensor G, Tensor x, Tensor mean, Tensor rstd) {
  check_floats(G, "G");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
  Tensor squared[2] = {make({G.size(0)}, ScalarType::Double, G), make({G.size(0)}, ScalarType::Double, G)};
  auto [weight, bias] = normalised_into(G, x, mean, rstd, places_of(squared[0]), places_of(squared[1]));
  return {weight, squared[0], bias, squared[1]};
}

// sum_positions of several G of one B.
std::tuple<Tensors, Tensor> all_position_sums(Tensors G) {
  const int64_t B = check_samples(G);
  Tensor all = make({int64_t(G.size()), B}, ScalarType::Double, G[0]);
  Tensors samples;
  for (size_t k = 0; k < G.size(); ++k) samples.push_back(positions_into(G[k], places_of(all) + k * B));
  return {samples, all};
}

// normalised_sums of several layers of one B; squared norms of all weights, then of all biases.
std::tuple<Tensors, Tensors, Tensor> all_normalised_sums(Tensors G, Tensors x, Tensors mean, Tensors rstd) {
  const size_t n = G.size();
  STD_TORCH_CHECK(x.size() == n && mean.size() == n && rstd.size() == n,
                  "dpfast: G, x, mean and rstd must be lists of one length");
  const int64_t B = check_samples(G);
  Tensor all = make({2 * int64_t(n), B}, ScalarType::Double, G[0]);
  double* squared = places_of(all);
  Tensors weights, biases;
  for (size_t k = 0; k < n; ++k) {
    auto [weight, bias] = normalised_into(G[k], x[k], mean[k], rstd[k], squared + k * B, squared + (n + k) * B);
    weights.push_back(weight);
    biases.push_back(bias);
  }
  return {weights, biases, all};
}

// w_r,c = Σ_t G_r,c,t · (x_r,c,t - mean) · rstd of the channel's group, and b_r,c = Σ_t G_r,c,t
std::tuple<Tensor, Tensor> channel_sums(Tensor G, Tensor x, Tensor mean, Tensor rstd) {
  check_floats(G, "G");
  check_floats(x, "x");
  check_floats(mean, "mean");
  check_floats(rstd, "rstd");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [R, C, T], not ", shape_of(G));
  const int64_t R = G.size(0), C = G.size(1), T = G.size(2);
  check_shape(x, "x", {R, C, T});
  STD_TORCH_CHECK(x.scalar_type() == G.scalar_type(), "dpfast: x must have the dtype of G");
  STD_TORCH_CHECK(mean.dim() == 2 && mean.size(0) == R && mean.size(1) > 0 && C % mean.size(1) == 0,
                  "dpfast: mean must be [R, groups] with groups that divide C, not ", shape_of(mean));
  const int64_t groups = mean.size(1);
  check_shape(rstd, "rstd", {R, groups});
  const Type type = type_of(G);
  const std::vector<double> means = numbers(mean), rstds = numbers(rstd);
  Tensor weight = make({R, C}, sum_type(type), G), bias = make({R, C}, sum_type(type), G);
  const auto put = [](const Tensor& tensor, int64_t k, double value) {
    if (tensor.scalar_type() == ScalarType::Double)
      static_cast<double*>(tensor.data_ptr())[k] = value;
    else
      static_cast<float*>(tensor.data_ptr())[k] = float(value);
  };
  share(Integers(R * C, 2 * T), [&](size_t k) {
    const int64_t statistic = int64_t(k) / (C / groups);  // channels of a group lie side by side
    double w, b;
    kernels().sum_channel(
        w, b, {type, given(G, int64_t(k) * T), given(x, int64_t(k) * T), T, means[statistic], rstds[statistic]});
    put(weight, int64_t(k), w);
    put(bias, int64_t(k), b);
  });
  return {weight, bias};
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("weighted_sums", TORCH_BOX(&dpfast::weighted_sums));
  library.impl("sum_positions", TORCH_BOX(&dpfast::sum_positions));
  library.impl("normalised_sums", TORCH_BOX(&dpfast::normalised_sums));
  library.impl("all_position_sums", TORCH_BOX(&dpfast::all_position_sums));
  library.impl("all_normalised_sums", TORCH_BOX(&dpfast::all_normalised_sums));
  library.impl("channel_sums", TORCH_BOX(&dpfast::channel_sums));
}
