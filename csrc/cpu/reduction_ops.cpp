// Norms and sums of per-sample gradients that are written out, and of the layers whose per-sample gradients are sums
// over positions.
#include "arguments.h"

namespace dpfast {
namespace {

constexpr int64_t PART = 1 << 16;  // elements of a sample that one thread squares at a time
constexpr int64_t COLUMNS = 1024;  // columns that one thread sums over positions at a time

// samples[k] is [B, *]; B of the first.
int64_t check_samples(const Tensors& samples) {
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
int64_t row_size(const Tensor& samples) {
  int64_t n = 1;
  for (int64_t i = 1; i < samples.dim(); ++i) n *= samples.size(i);
  return n;
}

// squared_i = Σ of the parts of sample i, in one order, whoever computed them: parts [n, count].
void add_parts(const double* parts, int64_t count, double* squared, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Sum sum;
    for (int64_t k = 0; k < count; ++k) sum.add(parts[i * count + k]);
    squared[i] = sum.total();
  }
}

// ‖g_i‖² = Σ_e g_i,e²
Tensor squared_norms(Tensors samples) {
  const int64_t B = check_samples(samples);
  Tensor out = make({int64_t(samples.size()), B}, ScalarType::Double, samples[0]);
  double* squared = static_cast<double*>(out.data_ptr());
  struct Part {
    const char* data;
    Type type;
    int64_t n;
  };
  std::vector<Part> parts;
  Integers weights;
  for (const Tensor& tensor : samples) {
    const int64_t n = row_size(tensor), size = int64_t(tensor.element_size());
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < B; ++i)
      for (int64_t begin = 0; begin < n; begin += PART) {
        parts.push_back({data + (i * n + begin) * size, type_of(tensor), std::min(PART, n - begin)});
        weights.push_back(parts.back().n);
      }
  }
  std::vector<double> squares(parts.size());
  share(weights, [&](size_t k) { squares[k] = kernels().squares(parts[k].data, parts[k].type, parts[k].n); });
  const double* of_tensor = squares.data();
  for (size_t k = 0; k < samples.size(); ++k) {
    const int64_t count = pieces(row_size(samples[k]), PART);
    add_parts(of_tensor, count, squared + k * B, B);
    of_tensor += B * count;
  }
  return out;
}

// Of rows of two Gram matrices, from the diagonal on: signed and absolute sums of their products, and of the lengths on
// the diagonals. Σ_{t,s} (a_t·a_s)(g_t·g_s) has each product past the diagonal block twice.
Tensor gram_stats(Tensor products, Tensor other, double lost, double other_lost) {
  check_floats(products, "products");
  check_floats(other, "other");
  STD_TORCH_CHECK(products.dim() == 3 && products.size(2) >= products.size(1),
                  "dpfast: products must be [R, t, s] with s >= t, not ", shape_of(products));
  const int64_t R = products.size(0), t = products.size(1), s = products.size(2);
  check_shape(other, "other", {R, t, s});
  STD_TORCH_CHECK(other.scalar_type() == products.scalar_type(), "dpfast: other must have the dtype of products");
  Tensor out = make({5, R}, ScalarType::Double, products);
  double* sums = static_cast<double*>(out.data_ptr());
  const Type type = type_of(products);
  const int64_t size = int64_t(products.element_size());
  const char *a = static_cast<const char*>(products.const_data_ptr()),
             *g = static_cast<const char*>(other.const_data_ptr());
  const auto number = [&](const char* data, int64_t i) {
    return type == Type::float64 ? reinterpret_cast<const double*>(data)[i]
                                 : double(reinterpret_cast<const float*>(data)[i]);
  };
  STD_TORCH_CHECK(type == Type::float32 || type == Type::float64, "dpfast: products must be float32 or float64");
  share(Integers(R, 2 * t * s), [&](size_t r) {
    double total[5] = {};
    for (int64_t i = 0; i < t; ++i) {
      const int64_t row = (int64_t(r) * t + i) * s;
      double signs[2], sizes[2];
      kernels().product_sums(signs[0], sizes[0], a + row * size, g + row * size, type, t);
      kernels().product_sums(signs[1], sizes[1], a + (row + t) * size, g + (row + t) * size, type, s - t);
      const double length = std::sqrt(number(a, row + i) + lost), other_length = std::sqrt(number(g, row + i) + other_lost);
      total[0] += signs[0] + 2 * signs[1];
      total[1] += sizes[0] + 2 * sizes[1];
      total[2] += length;
      total[3] += other_length;
      total[4] += length * other_length;
    }
    for (int k = 0; k < 5; ++k) sums[k * R + int64_t(r)] = total[k];
  });
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
  Tensors out;
  struct Kept {
    Integers index;
    std::vector<double> factors;
  };
  std::vector<Kept> kept(count);
  struct Block {
    int64_t tensor, begin, end;
  };
  std::vector<Block> blocks;
  Integers weights;
  for (int64_t k = 0; k < count; ++k) {
    const Type type = type_of(samples[k]);
    const auto all = factors_of(factors, type);
    for (int64_t i = 0; i < B; ++i)
      if (const double factor = all[factors.dim() == 1 ? i : k * B + i]; factor != 0) {
        kept[k].index.push_back(i);
        kept[k].factors.push_back(factor);
      }
    const int64_t n = row_size(samples[k]);
    out.push_back(make({n}, sum_type(type), samples[k]));
    // Blocks wide enough for long reads, but enough of them for all threads.
    const int64_t columns = std::clamp<int64_t>(n / torch::stable::get_num_threads(), 512, 8192);
    for (int64_t begin = 0; begin < n; begin += columns) {
      blocks.push_back({k, begin, std::min(n, begin + columns)});
      weights.push_back((blocks.back().end - begin) * (1 + int64_t(kept[k].index.size())));
    }
  }
  share(weights, [&](size_t b) {
    const auto [k, begin, end] = blocks[b];
    const Rows rows{type_of(samples[k]),           samples[k].const_data_ptr(), out[k].numel(),
                    int64_t(kept[k].index.size()), kept[k].index.data(),        kept[k].factors.data()};
    kernels().sum_rows(out[k].data_ptr(), rows, begin, end);
  });
  return out;
}

// [B, d] sums over positions and their squared norms, in blocks of columns: f(sample, first column, last column) makes
// one and gives the places where its sums start.
template <class F>
void sum_samples(int64_t B, int64_t T, int64_t d, std::vector<Tensor> squared, Type type, const F& f) {
  const int64_t blocks = pieces(d, COLUMNS);
  std::vector<std::vector<double>> parts(squared.size(), std::vector<double>(B * blocks));
  const Integers weights(B * blocks, (T + 1) * std::min(d, COLUMNS));
  share(weights, [&](size_t k) {
    const int64_t begin = int64_t(k) % blocks * COLUMNS, end = std::min(d, begin + COLUMNS);
    const auto places = f(int64_t(k) / blocks, begin, end);
    for (size_t s = 0; s < parts.size(); ++s) parts[s][k] = kernels().squares(places[s], type, end - begin);
  });
  for (size_t s = 0; s < parts.size(); ++s)
    add_parts(parts[s].data(), blocks, static_cast<double*>(squared[s].data_ptr()), B);
}

char* element(const Tensor& tensor, int64_t i) {
  return static_cast<char*>(tensor.data_ptr()) + i * int64_t(tensor.element_size());
}

// For reading only: a tensor that shares its memory until one of the two is written to stays shared.
const char* given(const Tensor& tensor, int64_t i) {
  return static_cast<const char*>(tensor.const_data_ptr()) + i * int64_t(tensor.element_size());
}

// g_i = Σ_t G_i,t and ‖g_i‖²
std::tuple<Tensor, Tensor> sum_positions(Tensor G) {
  check_floats(G, "G");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2);
  const Type type = type_of(G);
  Tensor samples = make({B, d}, sum_type(type), G), squared = make({B}, ScalarType::Double, G);
  sum_samples(B, T, d, {squared}, type_of(samples), [&](int64_t i, int64_t begin, int64_t end) {
    const Rows rows{type, given(G, i * T * d), d, T, nullptr, nullptr};
    kernels().sum_rows(element(samples, i * d), rows, begin, end);
    return std::array{element(samples, i * d + begin)};
  });
  return {samples, squared};
}

// w_i = Σ_t G_i,t ∘ (x_i,t - mean_i,t) · rstd_i,t,  b_i = Σ_t G_i,t,  ‖w_i‖² and ‖b_i‖²
std::tuple<Tensor, Tensor, Tensor, Tensor> normalised_sums(Tensor G, Tensor x, Tensor mean, Tensor rstd) {
  check_floats(G, "G");
  check_floats(x, "x");
  check_floats(mean, "mean");
  check_floats(rstd, "rstd");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2);
  check_shape(x, "x", {B, T, d});
  STD_TORCH_CHECK(x.scalar_type() == G.scalar_type(), "dpfast: x must have the dtype of G");
  const bool centred = mean.numel() > 0;
  if (centred) check_shape(mean, "mean", {B, T});
  check_shape(rstd, "rstd", {B, T});
  const Type type = type_of(G);
  const std::vector<double> means = numbers(mean), rstds = numbers(rstd);
  Tensor weight = make({B, d}, sum_type(type), G), weight_squared = make({B}, ScalarType::Double, G);
  Tensor bias = make({B, d}, sum_type(type), G), bias_squared = make({B}, ScalarType::Double, G);
  sum_samples(B, T, d, {weight_squared, bias_squared}, type_of(bias), [&](int64_t i, int64_t begin, int64_t end) {
    const Normalised sample{type, given(G, i * T * d),  given(x, i * T * d),
                            d,    T, centred ? means.data() + i * T : nullptr, rstds.data() + i * T};
    kernels().sum_normalised(element(weight, i * d), element(bias, i * d), sample, begin, end);
    return std::array{element(weight, i * d + begin), element(bias, i * d + begin)};
  });
  return {weight, weight_squared, bias, bias_squared};
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
  library.impl("squared_norms", TORCH_BOX(&dpfast::squared_norms));
  library.impl("gram_stats", TORCH_BOX(&dpfast::gram_stats));
  library.impl("weighted_sums", TORCH_BOX(&dpfast::weighted_sums));
  library.impl("sum_positions", TORCH_BOX(&dpfast::sum_positions));
  library.impl("normalised_sums", TORCH_BOX(&dpfast::normalised_sums));
  library.impl("channel_sums", TORCH_BOX(&dpfast::channel_sums));
}
