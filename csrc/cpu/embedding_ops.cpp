// Embedding tables: g_i[v] = Σ_{t: id_t = v} G_t, from segments of equal ids.
#include <cfloat>

#include "arguments.h"
#include "dpfast/certified.h"

namespace dpfast {
namespace {

// Segments of equal ids: places[start[s] .. start[s + 1]) have the id of segment s, in ascending order; segments are in
// the order of their first places.
struct Segments {
  Integers places, start;

  // T ids; a hash table of the ids seen, in memory that is used again.
  void find(const int64_t* ids, int64_t T) {
    int bits = 4;
    while ((int64_t(1) << bits) < 2 * T) ++bits;
    table.assign(size_t(1) << bits, -1);
    segment.resize(T);
    first.clear();
    start.assign(1, 0);
    for (int64_t t = 0; t < T; ++t) {
      size_t slot = uint64_t(ids[t]) * 0x9E3779B97F4A7C15u >> (64 - bits);
      while (table[slot] >= 0 && ids[first[table[slot]]] != ids[t]) slot = (slot + 1) & (table.size() - 1);
      if (table[slot] < 0) {
        table[slot] = int64_t(first.size());
        first.push_back(t);
        start.push_back(0);
      }
      segment[t] = table[slot];
      ++start[segment[t] + 1];
    }
    for (size_t s = 1; s < start.size(); ++s) start[s] += start[s - 1];
    places.resize(T);
    next.assign(start.begin(), start.end() - 1);
    for (int64_t t = 0; t < T; ++t) places[next[segment[t]]++] = t;
  }

 private:
  Integers table, segment, first, next;
};

void check_ids(const Tensor& ids, const Tensor& G) {
  check_argument(ids, "ids");
  check_floats(G, "G");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "dpfast: ids must be int64");
  STD_TORCH_CHECK(G.dim() == 3, "dpfast: G must be [B, T, d], not ", shape_of(G));
  check_shape(ids, "ids", {G.size(0), G.size(1)});
}

// ‖g_i‖² = Σ_segments ‖Σ_{t in segment} G_t‖². A segment of m rows is summed with at most m - 1 roundings of at most
// the sum of the rows' norms; the bound has that, and what dpfast/reference/rounding.py adds to every squared norm.
std::tuple<Tensor, Tensor> embedding_squared_norm(Tensor ids, Tensor G) {
  check_ids(ids, G);
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2), size = int64_t(G.element_size());
  const Type type = type_of(G), sum = type == Type::float64 ? type : Type::float32;
  const double unit = (sum == Type::float64 ? DBL_EPSILON : double(FLT_EPSILON)) / 2,
               lost = scalar::UNDERFLOW * (sum == Type::float64 ? DBL_MIN : double(FLT_MIN));
  Tensor squared = make({B}, ScalarType::Double, G), bound = make({B}, ScalarType::Double, G);
  double *out = static_cast<double*>(squared.data_ptr()), *error = static_cast<double*>(bound.data_ptr());
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const char* rows = static_cast<const char*>(G.const_data_ptr());
  const auto one = [&](Segments& segments, std::vector<double>& total, int64_t i) {
    const char* sample = rows + i * T * d * size;
    segments.find(id + i * T, T);
    Sum squares;
    double slack = 0;
    for (size_t s = 0; s + 1 < segments.start.size(); ++s) {
      const int64_t* place = segments.places.data() + segments.start[s];
      const int64_t m = segments.start[s + 1] - segments.start[s];
      if (m == 1) {
        squares.add(kernels().squares(sample + *place * d * size, type, d));
        continue;
      }
      double reach = 0;
      for (int64_t k = 0; k < m; ++k) reach += std::sqrt(kernels().squares(sample + place[k] * d * size, type, d));
      kernels().sum_rows(total.data(), {type, sample, d, m, place, nullptr}, 0, d);
      const double square = kernels().squares(total.data(), sum, d), slip = unit * double(m - 1) * reach;
      squares.add(square);
      slack += slip * (2 * std::sqrt(square) + slip);
    }
    out[i] = squares.total();
    error[i] = scalar::SAFETY_UNITS * unit * out[i] + slack + double(T * d) * lost;
  };
  torch::stable::parallel_for(0, B, 1 + (1 << 15) / (1 + T * d), [&](int64_t first, int64_t last) {
    Segments segments;
    std::vector<double> total(d);  // wide enough for floats too
    for (int64_t i = first; i < last; ++i) one(segments, total, i);
  });
  return {squared, bound};
}

// Σ_i factor_i Σ_t e_{id_t} ⊗ G_i,t over the samples whose factor is not 0. Every row is made once, by one thread, from
// its places in ascending order.
Tensor embedding_sum(Tensor ids, Tensor G, Tensor factors, int64_t rows) {
  check_ids(ids, G);
  check_factors(factors, "factors");
  const int64_t B = G.size(0), T = G.size(1), d = G.size(2);
  check_shape(factors, "factors", {B});
  STD_TORCH_CHECK(rows >= 0, "dpfast: rows must not be negative, not ", rows);
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t k = 0; k < B * T; ++k)
    STD_TORCH_CHECK(0 <= id[k] && id[k] < rows, "dpfast: ids has ", id[k], ", outside of a table of ", rows, " rows");
  const Type type = type_of(G);
  const std::vector<double> factor = factors_of(factors, type);
  // Places of row v: [start[v], start[v + 1]).
  Integers start(rows + 1, 0);
  for (int64_t i = 0; i < B; ++i)
    for (int64_t t = 0; t < T && factor[i] != 0; ++t) ++start[id[i * T + t] + 1];
  for (int64_t v = 0; v < rows; ++v) start[v + 1] += start[v];
  Integers places(start[rows]), next(start.begin(), start.end() - 1);
  std::vector<double> weights(start[rows]);
  for (int64_t i = 0; i < B; ++i)
    for (int64_t t = 0; t < T && factor[i] != 0; ++t) {
      const int64_t place = next[id[i * T + t]]++;
      places[place] = i * T + t;
      weights[place] = factor[i];
    }
  Tensor out = make({rows, d}, sum_type(type), G);
  const int64_t size = int64_t(out.element_size()), n = start[rows] + rows;
  char* const table = static_cast<char*>(out.data_ptr());
  const char* const backprops = static_cast<const char*>(G.const_data_ptr());
  const int64_t row_bytes = d * int64_t(G.element_size());
  // Threads take equal shares of rows and places together: row v counts from start[v] + v.
  const auto row_at = [&](int64_t share) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      start[middle] + middle < share ? low = middle + 1 : high = middle;
    }
    return low;
  };
  torch::stable::parallel_for(0, n, 1 + (1 << 15) / (1 + d), [&](int64_t first, int64_t last) {
    const int64_t end = row_at(last);
    for (int64_t v = row_at(first); v < end;) {
      const int64_t begin = v;
      while (v < end && start[v + 1] == start[v]) ++v;
      std::fill_n(table + begin * d * size, (v - begin) * d * size, char(0));
      if (v == end) break;
      const int64_t m = start[v + 1] - start[v];
      const Rows row{type, backprops, d, m, places.data() + start[v], weights.data() + start[v]};
      // Rows of G are wanted in an order that the hardware cannot foresee.
      constexpr int64_t ahead = 8, line = 64;
      for (int64_t k = start[v] + ahead; k < std::min(start[v + 1] + ahead, start[rows]); ++k)
        for (int64_t byte = 0; byte < std::min(row_bytes, 8 * line); byte += line)
          __builtin_prefetch(backprops + places[k] * row_bytes + byte);
      kernels().sum_rows(table + v * d * size, row, 0, d);
      ++v;
    }
  });
  return out;
}

}  // namespace
}  // namespace dpfast

STABLE_TORCH_LIBRARY_IMPL(dpfast, CPU, library) {
  library.impl("embedding_squared_norm", TORCH_BOX(&dpfast::embedding_squared_norm));
  library.impl("embedding_sum", TORCH_BOX(&dpfast::embedding_sum));
}
