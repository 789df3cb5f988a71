// Per-sample gradients g_i = G_iᵀ A_i and clipped sums of many small weights, in one call: as many products as there are
// weights, and one operator. Every element is added up in one order, whatever the threads.
#include "arguments.h"

namespace dpfast {
namespace {

// Sides of n weights: A[k] is [B, *, d_k] and G[k] [B, *, p_k], float32, with the same positions.
struct Sides {
  const Tensors &A, &G;
  int64_t B;

  Sides(const Tensors& A, const Tensors& G) : A(A), G(G), B(0) {
    STD_TORCH_CHECK(!A.empty() && A.size() == G.size(), "dpfast: A and G must be lists of one length, not ", A.size(),
                    " and ", G.size());
    STD_TORCH_CHECK(A[0].dim() >= 2, "dpfast: A[0] must be [B, *, d], not ", shape_of(A[0]));
    B = A[0].size(0);
    for (size_t k = 0; k < A.size(); ++k) {
      check_side(A[k], "A[" + std::to_string(k) + "]");
      check_side(G[k], "G[" + std::to_string(k) + "]");
      STD_TORCH_CHECK(rows(A[k]) == rows(G[k]), "dpfast: A[", k, "] and G[", k, "] must have the same positions, not ",
                      shape_of(A[k]), " and ", shape_of(G[k]));
    }
  }
  void check_side(const Tensor& side, const std::string& name) const {
    check_argument(side, name);
    STD_TORCH_CHECK(side.scalar_type() == ScalarType::Float, "dpfast: ", name, " must be float32");
    STD_TORCH_CHECK(side.dim() >= 2 && side.size(0) == B, "dpfast: ", name, " must be [B, *, features] with the B of ",
                    "A[0], not ", shape_of(side));
  }
  static int64_t rows(const Tensor& side) {
    int64_t n = 1;
    for (int64_t i = 0; i + 1 < side.dim(); ++i) n *= side.size(i);
    return n;
  }
  static int64_t features(const Tensor& side) { return side.size(side.dim() - 1); }
  static const float* data(const Tensor& side) { return static_cast<const float*>(side.const_data_ptr()); }
  int64_t positions(size_t k) const { return B ? rows(A[k]) / B : 0; }
};

// Products of two matrices with n rows, one after the other on a thread.
struct Multiplier {
  std::vector<float> padded;
  Integers columns, starts;

  // out [p, d] = G [n, p]ᵀ A [n, d]. Returns its squared norm.
  double multiply(const float* G, int64_t p, const float* A, int64_t d, int64_t n, float* out) {
    const int64_t width = kernels().patch_gradient_width(d);
    if (width != d) {
      padded.assign(n * width, 0.0f);
      for (int64_t t = 0; t < n; ++t) std::copy_n(A + t * d, d, padded.data() + t * width);
      A = padded.data();
    }
    fill(columns, p, 1);
    fill(starts, n, p);
    return kernels().patch_gradient({G, columns.data(), p, starts.data(), n, A, width, d, out, d});
  }
  // 0, step, 2 step, ..., at least n of them
  static void fill(Integers& numbers, int64_t n, int64_t step) {
    if (int64_t(numbers.size()) >= n && (n < 2 || numbers[1] == step)) return;
    numbers.resize(n);
    for (int64_t i = 0; i < n; ++i) numbers[i] = i * step;
  }
};

// Σ_i factor_i G_iᵀ A_i over the samples whose factor is not 0: [p, d].
Tensors weighted_products(Tensors A, Tensors G, Tensor factors) {
  const Sides sides(A, G);
  const int64_t B = sides.B, count = int64_t(A.size());
  check_factors(factors, "factors");
  if (factors.dim() == 1)
    check_shape(factors, "factors", {B});
  else
    check_shape(factors, "factors", {count, B});
  const std::vector<double> all = factors_of(factors, Type::float32);
  std::vector<Integers> shapes;
  Integers weights;
  for (int64_t k = 0; k < count; ++k) {
    shapes.push_back({Sides::features(G[k]), Sides::features(A[k])});
    weights.push_back(Sides::rows(A[k]) * (shapes[k][0] * shapes[k][1] + 1));
  }
  const Tensors out = make_all(shapes, ScalarType::Float, A[0]);
  share(weights, [&](size_t k) {
    thread_local std::vector<float> scaled, kept;
    thread_local Multiplier rows;
    const int64_t T = sides.positions(k), d = Sides::features(A[k]), p = Sides::features(G[k]);
    const double* of_samples = all.data() + (factors.dim() == 1 ? 0 : int64_t(k) * B);
    const bool all_in = std::all_of(of_samples, of_samples + B, [](double factor) { return factor != 0; });
    scaled.resize(B * T * p);
    if (!all_in) kept.resize(B * T * d);
    int64_t n = 0;
    for (int64_t i = 0; i < B; ++i) {
      const float factor = float(of_samples[i]);
      if (factor == 0) continue;
      const float* g = Sides::data(G[k]) + i * T * p;
      for (int64_t e = 0; e < T * p; ++e) scaled[n * p + e] = factor * g[e];
      if (!all_in) std::copy_n(Sides::data(A[k]) + i * T * d, T * d, kept.data() + n * d);
      n += T;
    }
    rows.multiply(scaled.data(), p, all_in ? Sides::data(A[k]) : kept.data(), d, n, static_cast<float*>(out[k].data_ptr()));
  });
  return out;
}

// g_i = G_iᵀ A_i of every weight, [B, p, d], and ‖g_i‖², [n, B].
std::tuple<Tensors, Tensor> product_samples(Tensors A, Tensors G) {
  const Sides sides(A, G);
  const int64_t B = sides.B;
  Tensor squared = make({int64_t(A.size()), B}, ScalarType::Double, A[0]);
  double* squares = static_cast<double*>(squared.data_ptr());
  std::vector<Integers> shapes;
  Integers weights;
  for (size_t k = 0; k < A.size(); ++k) {
    shapes.push_back({B, Sides::features(G[k]), Sides::features(A[k])});
    weights.insert(weights.end(), B, (sides.positions(k) + 1) * Sides::features(A[k]) * Sides::features(G[k]));
  }
  const Tensors samples = make_all(shapes, ScalarType::Float, A[0]);
  share(weights, [&](size_t unit) {
    thread_local Multiplier rows;
    const size_t k = unit / B;
    const int64_t i = int64_t(unit) % B, T = sides.positions(k), d = Sides::features(A[k]), p = Sides::features(G[k]);
    float* out = static_cast<float*>(samples[k].data_ptr()) + i * p * d;
    squares[unit] = rows.multiply(Sides::data(G[k]) + i * T * p, p, Sides::data(A[k]) + i * T * d, d, T, out);
  });
  return {samples, squared};
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("weighted_products", TORCH_BOX(&dpfast::weighted_products));
  library.impl("product_samples", TORCH_BOX(&dpfast::product_samples));
}
