// Squared norms of per-sample gradients, with bounds on their rounding: of those that are written out or products of two
// sides, of all parameters at once; and what a ghost norm is made of.
#include "arguments.h"
#include "dpfast/certified.h"

namespace dpfast {
namespace {

constexpr int64_t PART = 1 << 16;  // elements of a sample that one thread squares at a time

// ‖x_k,i‖² = Σ_e x_k,i,e² of every tensor k and sample i: [n, B].
void square(const Tensors& samples, int64_t B, double* squared) {
  struct Part {
    const char* data;
    Type type;
    int64_t n;
  };
  std::vector<Part> parts;
  Integers weights;
  for (const Tensor& tensor : samples) {
    const int64_t n = row_size(tensor), size = int64_t(tensor.element_size());
    const Type type = type_of(tensor);
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < B; ++i)
      for (int64_t begin = 0; begin < n; begin += PART) {
        parts.push_back({data + (i * n + begin) * size, type, std::min(PART, n - begin)});
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
}

Tensor squared_norms(Tensors samples) {
  const int64_t B = check_samples(samples);
  Tensor out = make({int64_t(samples.size()), B}, ScalarType::Double, samples[0]);
  square(samples, B, static_cast<double*>(out.data_ptr()));
  return out;
}

// A squared norm and the bound on its error, as dpfast/reference/rounding.py's with_safety makes them.
struct Certified {
  double squared, bound;

  Certified(double value, double slack, double n, bool wide) {
    const double u = wide ? 0x1p-53 : 0x1p-24, tiny = wide ? DBL_MIN : FLT_MIN;
    squared = value < 0 ? 0.0 : value;
    bound = squared * (scalar::SAFETY_UNITS * u) + (slack + n * (scalar::UNDERFLOW * tiny));
  }
};

// Σ over the parameters of each group of ‖g_i‖² and of the bounds. Parameter j is written out in side first[j], or the
// product of sides first[j] and second[j]; of the last sides only their squared norms and their sizes are given.
Tensor side_norms(Tensors sides, Tensors squares, Integers sizes, Integers first, Integers second, Integers groups,
                  int64_t count, int64_t batch, bool wide) {
  STD_TORCH_CHECK(squares.size() == sizes.size(), "dpfast: squares and sizes must be lists of one length");
  STD_TORCH_CHECK(first.size() == second.size() && first.size() == groups.size(),
                  "dpfast: first, second and groups must be lists of one length");
  STD_TORCH_CHECK(!sides.empty() || !squares.empty(), "dpfast: sides and squares are empty lists");
  if (!sides.empty())
    STD_TORCH_CHECK(check_samples(sides) == batch, "dpfast: sides must be [", batch, ", *], not ", shape_of(sides[0]));
  const int64_t all = int64_t(sides.size() + squares.size());
  std::vector<double> of_sides(all * batch), elements(all);
  square(sides, batch, of_sides.data());
  for (size_t k = 0; k < sides.size(); ++k) elements[k] = double(row_size(sides[k]));
  for (size_t k = 0; k < squares.size(); ++k) {
    const std::string name = "squares[" + std::to_string(k) + "]";
    check_doubles(squares[k], name);
    check_shape(squares[k], name, {batch});
    std::copy_n(static_cast<const double*>(squares[k].const_data_ptr()), batch,
                of_sides.data() + (sides.size() + k) * batch);
    elements[sides.size() + k] = double(sizes[k]);
  }
  std::vector<Sum> sums(2 * count * batch);
  for (size_t j = 0; j < first.size(); ++j) {
    STD_TORCH_CHECK(0 <= first[j] && first[j] < all && -1 <= second[j] && second[j] < all && 0 <= groups[j] &&
                        groups[j] < count,
                    "dpfast: first, second or groups has an index that is out of range");
    for (int64_t i = 0; i < batch; ++i) {
      const double n = elements[first[j]];
      Certified norm(of_sides[first[j] * batch + i], 0.0, n, wide);
      if (second[j] >= 0) {  // each sum is rounded, and what one side loses to underflow is multiplied by the other one
        const double other_n = elements[second[j]];
        const Certified other(of_sides[second[j] * batch + i], 0.0, other_n, wide);
        const double product = norm.squared * other.squared;
        const double slack = (norm.squared + norm.bound) * (other.squared + other.bound) - product;
        norm = Certified(product, slack, n * other_n, wide);
      }
      sums[groups[j] * batch + i].add(norm.squared);
      sums[(count + groups[j]) * batch + i].add(norm.bound);
    }
  }
  const Tensor& like = sides.empty() ? squares[0] : sides[0];
  Tensor out = make({2, count, batch}, ScalarType::Double, like);
  for (size_t k = 0; k < sums.size(); ++k) static_cast<double*>(out.data_ptr())[k] = sums[k].total();
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

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("squared_norms", TORCH_BOX(&dpfast::squared_norms));
  library.impl("side_norms", TORCH_BOX(&dpfast::side_norms));
  library.impl("gram_stats", TORCH_BOX(&dpfast::gram_stats));
}
