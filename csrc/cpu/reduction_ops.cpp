// Sums of per-sample gradients that are written out, and those of layers whose per-sample gradients are sums over
// positions.
#include "arguments.h"

namespace dpfast {
namespace {

constexpr int64_t COLUMNS = 1024;  // columns that one thread sums over positions at a time

// Tensors of these shapes in the types that sums of `given` are made in.
Tensors make_sums(const Tensors& given, const std::vector<Integers>& shapes) {
  const ScalarType first = sum_type(type_of(given[0]));
  if (std::all_of(given.begin(), given.end(), [&](const Tensor& x) { return sum_type(type_of(x)) == first; }))
    return make_all(shapes, first, given[0]);
  Tensors out;
  for (size_t k = 0; k < given.size(); ++k) out.push_back(make(shapes[k], sum_type(type_of(given[k])), given[k]));
  return out;
}

// Σ_i factor_i g_i over the samples whose factor is not 0.
Tensors weighted_sums(Tensors samples, Tensor factors) {
  const int64_t B = check_samples(samples), count = int64_t(samples.size());
  check_factors(factors, "factors");
  if (factors.dim() == 1)
    check_shape(factors, "factors", {B});
  else
    check_shape(factors, "factors", {count, B});
  std::vector<Integers> shapes;
  for (const Tensor& tensor : samples) {
    shapes.emplace_back();
    for (int64_t i = 1; i < tensor.dim(); ++i) shapes.back().push_back(tensor.size(i));
  }
  const Tensors out = make_sums(samples, shapes);
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

char* element(const Tensor& tensor, int64_t i) {
  return static_cast<char*>(tensor.data_ptr()) + i * int64_t(tensor.element_size());
}

// For reading only: a tensor that shares its memory until one of the two is written to stays shared.
const char* given(const Tensor& tensor, int64_t i) {
  return static_cast<const char*>(tensor.const_data_ptr()) + i * int64_t(tensor.element_size());
}

double* places_of(const Tensor& doubles) { return static_cast<double*>(doubles.data_ptr()); }

// A layer whose per-sample gradients are sums over positions: where they are to be, [B, d], and their squared norms, [B].
struct Summed {
  const Tensor& samples;
  double* squared;
};

void check_backprops(const Tensor& G) {
  check_floats(G, "G");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
}

void check_statistics(const Tensor& G, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  check_floats(x, "x");
  check_floats(mean, "mean");
  check_floats(rstd, "rstd");
  const int64_t B = G.size(0), T = G.size(1);
  check_shape(x, "x", {B, T, G.size(2)});
  STD_TORCH_CHECK(x.scalar_type() == G.scalar_type(), "dpfast: x must have the dtype of G");
  for (const auto& [side, name] : {std::pair{&mean, "mean"}, std::pair{&rstd, "rstd"}})
    STD_TORCH_CHECK((side == &mean && mean.numel() == 0) || side->numel() == B * T, "dpfast: ", name, " must have ",
                    B * T, " elements, one a position, not the shape ", shape_of(*side));
}

Integers sizes_of_sums(const Tensor& G) {
  check_backprops(G);
  return {G.size(0), G.size(2)};
}

// f(layer, sample, first column, last column) makes a block of a sample's sums in all tensors of `layers[layer]`. What is
// narrow goes through the threads together, whatever the number of layers.
template <size_t N, class F>
void sum_layers(const Tensors& G, const std::vector<std::array<Summed, N>>& layers, const F& f) {
  struct Block {
    size_t layer;
    int64_t sample, begin, end;
  };
  std::vector<Block> blocks;
  Integers weights;
  for (size_t k = 0; k < G.size(); ++k)
    for (int64_t i = 0; i < G[k].size(0); ++i)
      for (int64_t begin = 0; begin < std::max<int64_t>(1, G[k].size(2)); begin += COLUMNS) {
        blocks.push_back({k, i, begin, std::min(G[k].size(2), begin + COLUMNS)});
        weights.push_back((G[k].size(1) + 1) * (blocks.back().end - begin));
      }
  std::vector<std::array<double, N>> parts(blocks.size());
  share(weights, [&](size_t b) {
    const auto [k, i, begin, end] = blocks[b];
    f(k, i, begin, end);
    for (size_t s = 0; s < N; ++s) {
      const Tensor& samples = layers[k][s].samples;
      parts[b][s] = kernels().squares(element(samples, i * samples.size(1) + begin), type_of(samples), end - begin);
    }
  });
  for (size_t b = 0; b < blocks.size();) {
    const auto [k, i, begin, end] = blocks[b];
    const size_t count = std::max<int64_t>(1, pieces(G[k].size(2), COLUMNS));
    for (size_t s = 0; s < N; ++s) {
      Sum sum;
      for (size_t c = 0; c < count; ++c) sum.add(parts[b + c][s]);
      layers[k][s].squared[i] = sum.total();
    }
    b += count;
  }
}

// g_i = Σ_t G_i,t and ‖g_i‖², of several G of one B.
std::tuple<Tensors, Tensor> all_position_sums(Tensors G) {
  const int64_t B = check_samples(G);
  Tensor all = make({int64_t(G.size()), B}, ScalarType::Double, G[0]);
  std::vector<Integers> shapes;
  for (const Tensor& each : G) shapes.push_back(sizes_of_sums(each));
  const Tensors samples = make_sums(G, shapes);
  std::vector<std::array<Summed, 1>> layers;
  for (size_t k = 0; k < G.size(); ++k) layers.push_back({Summed{samples[k], places_of(all) + k * B}});
  sum_layers(G, layers, [&](size_t k, int64_t i, int64_t begin, int64_t end) {
    const int64_t T = G[k].size(1), d = G[k].size(2);
    const Rows rows{type_of(G[k]), given(G[k], i * T * d), d, T, nullptr, nullptr};
    kernels().sum_rows(element(samples[k], i * d), rows, begin, end);
  });
  return {samples, all};
}

std::tuple<Tensor, Tensor> sum_positions(Tensor G) {
  check_backprops(G);
  auto [samples, squared] = all_position_sums({G});
  return {samples[0], torch::stable::select(squared, 0, 0)};
}

// w_i = Σ_t G_i,t ∘ (x_i,t - mean_i,t) · rstd_i,t,  b_i = Σ_t G_i,t,  ‖w_i‖² and ‖b_i‖², of several layers of one B;
// squared norms of all weights, then of all biases.
std::tuple<Tensors, Tensors, Tensor> all_normalised_sums(Tensors G, Tensors x, Tensors mean, Tensors rstd) {
  const size_t n = G.size();
  STD_TORCH_CHECK(x.size() == n && mean.size() == n && rstd.size() == n,
                  "dpfast: G, x, mean and rstd must be lists of one length");
  const int64_t B = check_samples(G);
  Tensor all = make({2 * int64_t(n), B}, ScalarType::Double, G[0]);
  std::vector<Integers> shapes;
  std::vector<std::vector<double>> means, rstds;
  for (size_t k = 0; k < n; ++k) {
    shapes.push_back(sizes_of_sums(G[k]));
    check_statistics(G[k], x[k], mean[k], rstd[k]);
    means.push_back(numbers(mean[k]));
    rstds.push_back(numbers(rstd[k]));
  }
  const Tensors weights = make_sums(G, shapes), biases = make_sums(G, shapes);
  std::vector<std::array<Summed, 2>> layers;
  double* squared = places_of(all);
  for (size_t k = 0; k < n; ++k)
    layers.push_back({Summed{weights[k], squared + k * B}, Summed{biases[k], squared + (n + k) * B}});
  sum_layers(G, layers, [&](size_t k, int64_t i, int64_t begin, int64_t end) {
    const int64_t T = G[k].size(1), d = G[k].size(2);
    const double* centre = means[k].empty() ? nullptr : means[k].data() + i * T;
    const Normalised sample{type_of(G[k]), given(G[k], i * T * d), given(x[k], i * T * d), d, T, centre,
                            rstds[k].data() + i * T};
    kernels().sum_normalised(element(weights[k], i * d), element(biases[k], i * d), sample, begin, end);
  });
  return {weights, biases, all};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalised_sums(Tensor G, Tensor x, Tensor mean, Tensor rstd) {
  check_backprops(G);
  auto [weights, biases, squared] = all_normalised_sums({G}, {x}, {mean}, {rstd});
  return {weights[0], torch::stable::select(squared, 0, 0), biases[0], torch::stable::select(squared, 0, 1)};
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
  const bool wide = type == Type::float64;
  void *weights = weight.data_ptr(), *biases = bias.data_ptr();
  const auto put = [wide](void* to, int64_t k, double value) {
    if (wide)
      static_cast<double*>(to)[k] = value;
    else
      static_cast<float*>(to)[k] = float(value);
  };
  const int64_t together = C / groups, bytes = T * int64_t(G.element_size());  // channels of a group lie side by side
  const char *of_G = given(G, 0), *of_x = given(x, 0);
  share(Integers(R * groups, 2 * together * T), [&](size_t group) {
    for (int64_t k = int64_t(group) * together; k < int64_t(group + 1) * together; ++k) {
      double w, b;
      kernels().sum_channel(w, b, {type, of_G + k * bytes, of_x + k * bytes, T, means[group], rstds[group]});
      put(weights, k, w);
      put(biases, k, b);
    }
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
