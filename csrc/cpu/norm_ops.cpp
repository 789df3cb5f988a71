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

constexpr int64_t STRIP = 48;  // rows of Gram matrices that one thread makes at a time

// Weights that share an input, whose Gram matrix is made once for all of them.
struct Shared {
  const Tensor* input;
  std::vector<size_t> weights;
};

// Rows `row` of sides [N, T, features], features behind each other: where position t of one is.
const float* position(const Tensor& side, int64_t row, int64_t t) {
  return static_cast<const float*>(side.const_data_ptr()) + row * side.stride(0) + t * side.stride(1);
}

bool are_same(const Tensor& one, const Tensor& other) {
  return one.const_data_ptr() == other.const_data_ptr() && one.size(2) == other.size(2) &&
         one.stride(0) == other.stride(0) && one.stride(1) == other.stride(1);
}

// What ghost norms and their bounds are made of, [n, 5, S], of n weights with inputs A[k] [N, T, d_k] and backprops
// G[k] [N, T, p_k]. Sample i has the positions t, s from first[i] to end[i] of row[i], of which it is
// Σ_{t,s} (a_t·a_s)(g_t·g_s), the sum of absolute values, Σ_t ‖a_t‖, Σ_t ‖g_t‖ and Σ_t ‖a_t‖·‖g_t‖.
// Lengths have what d_k or p_k squares may lose, `lost` each.
Tensor ghost_stats(Tensors A, Tensors G, Integers row, Integers first, Integers end, double lost) {
  STD_TORCH_CHECK(!A.empty() && A.size() == G.size(), "dpfast: A and G must be lists of one length, not ", A.size(),
                  " and ", G.size());
  STD_TORCH_CHECK(row.size() == first.size() && first.size() == end.size(),
                  "dpfast: row, first and end must be lists of one length");
  const int64_t n = int64_t(A.size()), S = int64_t(first.size());
  std::vector<Shared> inputs;
  for (int64_t k = 0; k < n; ++k) {
    for (const Tensor* side : {&A[k], &G[k]}) {
      const std::string name = (side == &A[k] ? "A[" : "G[") + std::to_string(k) + "]";
      STD_TORCH_CHECK(side->is_cpu() && side->scalar_type() == ScalarType::Float, "dpfast: ", name,
                      " must be float32, on the CPU");
      STD_TORCH_CHECK(side->dim() == 3 && side->size(0) == A[0].size(0) && side->size(1) == A[0].size(1), "dpfast: ",
                      name, " must be [N, T, features] with N and T of A[0], not ", shape_of(*side));
      STD_TORCH_CHECK(side->size(2) < 2 || side->stride(2) == 1, "dpfast: ", name,
                      " must have its features one behind the other");
    }
    const auto same = [&](const Shared& one) { return are_same(*one.input, A[k]); };
    auto input = std::find_if(inputs.begin(), inputs.end(), same);
    if (input == inputs.end()) input = inputs.insert(inputs.end(), {&A[k], {}});
    input->weights.push_back(size_t(k));
  }
  struct Strip {
    const Shared* input;
    int64_t sample, begin, rows, width;
    size_t part;  // in which its sums are, five for each weight of the input
  };
  std::vector<Strip> strips;
  Integers work;
  size_t parts = 0;
  for (const Shared& input : inputs) {
    int64_t columns = input.input->size(2);
    for (size_t k : input.weights) columns += G[k].size(2);
    for (int64_t i = 0; i < S; ++i) {
      STD_TORCH_CHECK(0 <= row[i] && row[i] < A[0].size(0) && 0 <= first[i] && first[i] <= end[i] &&
                          end[i] <= A[0].size(1),
                      "dpfast: sample ", i, " has the positions ", first[i], " to ", end[i], " of row ", row[i],
                      ", and A[0] is ", shape_of(A[0]));
      for (int64_t t = first[i]; t < end[i]; t += STRIP) {
        strips.push_back({&input, i, t, std::min(STRIP, end[i] - t), end[i] - t, parts});
        work.push_back(strips.back().rows * strips.back().width * columns / 16);
        parts += 5 * input.weights.size();
      }
    }
  }
  std::vector<double> sums(parts);
  share(work, [&](size_t which) {
    thread_local std::vector<float> of_input, of_backprops;
    const Strip& strip = strips[which];
    const Tensor& a = *strip.input->input;
    const int64_t d = a.size(2), width = strip.width, in = row[strip.sample];
    of_input.resize(strip.rows * width);
    of_backprops.resize(strip.rows * width);
    kernels().gram_rows({position(a, in, strip.begin), a.stride(1), d, strip.rows, width, of_input.data()});
    double* sum = sums.data() + strip.part;
    for (size_t k : strip.input->weights) {
      const int64_t p = G[k].size(2);
      const float* g = position(G[k], in, strip.begin);
      kernels().gram_rows({g, G[k].stride(1), p, strip.rows, width, of_backprops.data()});
      double total[5] = {};
      for (int64_t i = 0; i < strip.rows; ++i) {
        const float *a_row = of_input.data() + i * width + i, *g_row = of_backprops.data() + i * width + i;
        double sign, size;
        kernels().product_sums(sign, size, a_row + 1, g_row + 1, Type::float32, width - i - 1);
        const double both = double(*a_row) * double(*g_row);
        const double length = std::sqrt(double(*a_row) + double(d) * lost);
        const double other_length = std::sqrt(double(*g_row) + double(p) * lost);
        total[0] += both + 2 * sign;
        total[1] += std::fabs(both) + 2 * size;
        total[2] += length;
        total[3] += other_length;
        total[4] += length * other_length;
      }
      std::copy_n(total, 5, sum);
      sum += 5;
    }
  });
  Tensor out = make({n, 5, S}, ScalarType::Double, A[0]);
  double* made = static_cast<double*>(out.data_ptr());
  std::fill_n(made, n * 5 * S, 0.0);
  for (const Strip& strip : strips) {  // in the order of their positions
    const double* sum = sums.data() + strip.part;
    for (size_t k : strip.input->weights)
      for (int64_t e = 0; e < 5; ++e) made[(int64_t(k) * 5 + e) * S + strip.sample] += *sum++;
  }
  return out;
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("squared_norms", TORCH_BOX(&dpfast::squared_norms));
  library.impl("side_norms", TORCH_BOX(&dpfast::side_norms));
  library.impl("ghost_stats", TORCH_BOX(&dpfast::ghost_stats));
}
