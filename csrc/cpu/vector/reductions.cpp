// Sums of squares, and sums over rows: every element of a result is added up in one order, whatever the instruction
// set, the number of threads and the way in which columns are cut into blocks.
#include <algorithm>

#include "../kernels.h"
#include "dpfast/narrow.h"
#include "vector.h"

namespace dpfast::DPFAST_ISA {
namespace {

// W lanes of the type that sums are made in: f32, and f64 for doubles.
#ifdef DPFAST_LANES
DPFAST_FN f64 splat(double x) { return {x - f64half{}, x - f64half{}}; }
DPFAST_FN f64 read(const double* p) { return {load<f64half>(p), load<f64half>(p + W / 2)}; }
DPFAST_FN f64 to_double(f64 x) { return x; }
DPFAST_FN f64 magnitude(f64 x) { return {x.low < 0 ? -x.low : x.low, x.high < 0 ? -x.high : x.high}; }
#else
DPFAST_FN double splat(double x) { return x; }
DPFAST_FN double read(const double* p) { return *p; }
DPFAST_FN double to_double(double x) { return x; }
DPFAST_FN double magnitude(double x) { return std::fabs(x); }
#endif
using DPFAST_ISA::read;
using DPFAST_ISA::splat;
using DPFAST_ISA::to_double;

template <class T>
using Lanes = decltype(read(static_cast<const T*>(nullptr)));

// x in every lane.
template <class T>
DPFAST_FN Lanes<T> lanes_of(double x) {
  if constexpr (sizeof(T) == 8)
    return splat(x);
  else
    return splat(float(x));
}

DPFAST_FN void store(float* p, f32 x) { put(p, x); }
DPFAST_FN void store(float* p, f64 x) { put(p, to_float(x)); }
DPFAST_FN void store(double* p, f64 x) { put(p, x); }

// `whole`: all W elements are there; else the first n of them, and zeros.
template <bool whole, class T>
DPFAST_FN Lanes<T> read(const T* p, int64_t n) {
  if constexpr (whole) return read(p);
  T padded[W] = {};
  memcpy(padded, p, n * sizeof(T));
  return read(padded);
}

// f(null pointer to T) for the element type T that `type` says.
template <class F>
auto with_element(Type type, const F& f) {
  switch (type) {
    case Type::float64:
      return f(static_cast<const double*>(nullptr));
    case Type::bfloat16:
      return f(static_cast<const bf16*>(nullptr));
    case Type::float16:
      return f(static_cast<const f16*>(nullptr));
    case Type::float32:
      break;
  }
  return f(static_cast<const float*>(nullptr));
}

// Σ_e x_e² in doubles, where no square of a float is rounded, overflows or underflows. Element e goes to sum e % SUMS.
constexpr int SUMS = 32;

template <class T>
struct Squares {
  f64 sum[SUMS / W] = {}, lost[SUMS / W] = {};

  DPFAST_FN void add(const T* x) {
    DPFAST_UNROLL
    for (int i = 0; i < SUMS / W; ++i) {
      const f64 wide = to_double(read(x + i * W));
      if constexpr (sizeof(T) == 8) {  // doubles have no wider type: keep what each addition loses
        const f64 square = wide * wide, before = sum[i];
        sum[i] = before + square;
        const f64 back = sum[i] - before;
        lost[i] = lost[i] + ((before - (sum[i] - back)) + (square - back));
      } else if constexpr (W > 1) {
        sum[i] = fma(wide, wide, sum[i]);
      } else {
        sum[i] = sum[i] + wide * wide;  // the same, as the product is exact, where fma may be a call
      }
    }
  }

  // Sum i and sum i + n / 2 of n, until there is one.
  static double total(const f64* sums) {
    f64 left[SUMS / W];
    memcpy(left, sums, sizeof(left));
    DPFAST_UNROLL
    for (int half = SUMS / W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) left[i] = left[i] + left[i + half];
#ifdef DPFAST_LANES
    const f64half halves = left[0].low + left[0].high;
    double all[W / 2];
    memcpy(all, &halves, sizeof(all));
    DPFAST_UNROLL
    for (int half = W / 4; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) all[i] += all[i + half];
    return all[0];
#else
    return left[0];
#endif
  }
};

template <class T>
double squares_of(const T* x, int64_t n) {
  Squares<T> squares;
  int64_t e = 0;
  for (; e + SUMS <= n; e += SUMS) squares.add(x + e);
  if (e < n) {
    T padded[SUMS] = {};
    memcpy(padded, x + e, (n - e) * sizeof(T));
    squares.add(padded);
  }
  const double sum = squares.total(squares.sum);
  if constexpr (sizeof(T) != 8) return sum;
  return std::isfinite(sum) ? sum + squares.total(squares.lost) : sum;
}

// out_i = Σ_k term_i(k): N sums over `count` rows, n columns wide. ROWS rows are added in registers, up to FLUSH in
// cache, the rest in doubles: an element goes through at most FLUSH / ROWS + ROWS roundings.
// Terms has N, ROWS, the largest n (COLUMNS) and group<R>(k), which makes the sums over rows k, ..., k + R - 1.
constexpr int64_t FLUSH = 128;

template <class Terms, class Sum, class Out>
DPFAST_FN void sum_block(const Terms& terms, Out* const* out, int64_t count, int64_t n) {
  constexpr int N = Terms::N, ROWS = Terms::ROWS, VECTORS = Terms::COLUMNS / W;
  Sum sums[N][VECTORS];
  f64 totals[N][VECTORS];
  const int64_t vectors = (n + W - 1) / W;
  const auto finish = [&](int i, int64_t v, auto result) {
    if (n >= W) {
      // Where n is no multiple of W, the last W columns overlap with those before: the same results twice.
      store(out[i] + std::min(v * W, n - W), result);
    } else {
      Out padded[W];
      store(padded, result);
      memcpy(out[i], padded, n * sizeof(Out));
    }
  };
  const auto add = [&](auto rows, int64_t k, bool first, bool last) {
    const auto group = terms.template group<rows>(k);
    for (int64_t v = 0; v < vectors; ++v) {
      Sum s[N];
      group.sum(std::max<int64_t>(0, std::min(v * W, n - W)), s);
      for (int i = 0; i < N; ++i) {
        if (!first) s[i] = sums[i][v] + s[i];
        last ? finish(i, v, s[i]) : void(sums[i][v] = s[i]);
      }
    }
  };
  // Rows [begin, end) into sums, or into the result if these are all.
  const auto add_rows = [&](int64_t begin, int64_t end) {
    const bool all = end - begin == count;
    int64_t k = begin;
    const auto next = [&](auto rows) {
      add(rows, k, k == begin, all && k + rows == end);
      k += rows;
    };
    while (k + ROWS <= end) next(std::integral_constant<int, ROWS>{});
    if (ROWS > 4 && k + 4 <= end) next(std::integral_constant<int, 4>{});
    if (k + 2 <= end) next(std::integral_constant<int, 2>{});
    if (k < end) next(std::integral_constant<int, 1>{});
  };
  if (count == 0)
    for (int i = 0; i < N; ++i)
      for (int64_t v = 0; v < vectors; ++v) finish(i, v, Sum{});
  add_rows(0, std::min(count, FLUSH));
  if (count <= FLUSH) return;
  for (int i = 0; i < N; ++i)
    for (int64_t v = 0; v < vectors; ++v) totals[i][v] = to_double(sums[i][v]);
  for (int64_t k = FLUSH; k < count; k += FLUSH) {
    add_rows(k, std::min(count, k + FLUSH));
    for (int i = 0; i < N; ++i)
      for (int64_t v = 0; v < vectors; ++v) totals[i][v] = totals[i][v] + to_double(sums[i][v]);
  }
  for (int i = 0; i < N; ++i)
    for (int64_t v = 0; v < vectors; ++v) finish(i, v, totals[i][v]);
}

// The sums of columns [begin, end), in blocks: Terms<T, whole>{arguments, first column, columns}.
template <template <class, bool> class Terms, class Arguments, int N>
void sum_columns(const Arguments& a, void* const (&out)[N], int64_t begin, int64_t end) {
  with_element(a.type, [&](auto* element) {
    using T = std::remove_cvref_t<decltype(*element)>;
    using Out = std::conditional_t<sizeof(T) == 8, double, float>;
    for (int64_t first = begin; first < end; first += Terms<T, true>::COLUMNS) {
      const int64_t n = std::min<int64_t>(Terms<T, true>::COLUMNS, end - first);
      Out* places[N];
      for (int i = 0; i < N; ++i) places[i] = static_cast<Out*>(out[i]) + first;
      if (n < W)
        sum_block<Terms<T, false>, Lanes<T>>({a, first, n}, places, a.count, n);
      else
        sum_block<Terms<T, true>, Lanes<T>>({a, first, n}, places, a.count, n);
    }
  });
}

template <class T, bool whole>
struct RowTerms {
  static constexpr int N = 1, ROWS = 8, COLUMNS = whole ? 8192 : W;
  const Rows& rows;
  int64_t first, n;

  template <int R>
  struct Group {
    const T* row[R];
    Lanes<T> factor[R];
    int64_t n;
    DPFAST_FN void sum(int64_t column, Lanes<T>* s) const {
      s[0] = factor[0] * read<whole>(row[0] + column, n);
      DPFAST_UNROLL
      for (int r = 1; r < R; ++r) s[0] = fma(factor[r], read<whole>(row[r] + column, n), s[0]);
    }
  };
  template <int R>
  DPFAST_FN Group<R> group(int64_t k) const {
    Group<R> group;
    group.n = n;
    for (int r = 0; r < R; ++r) {
      const int64_t place = rows.index ? rows.index[k + r] : k + r;
      group.row[r] = static_cast<const T*>(rows.first) + place * rows.stride + first;
      group.factor[r] = lanes_of<T>(rows.factors ? rows.factors[k + r] : 1.0);
    }
    return group;
  }
};

template <class T, bool whole>
struct NormalisedTerms {
  static constexpr int N = 2, ROWS = 4, COLUMNS = whole ? 1024 : W;
  const Normalised& a;
  int64_t first, n;

  template <int R>
  struct Group {
    const T *G, *x;
    Lanes<T> mean[R], rstd[R];
    int64_t stride, n;
    DPFAST_FN void sum(int64_t column, Lanes<T>* s) const {
      s[0] = s[1] = Lanes<T>{};
      DPFAST_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto g = read<whole>(G + r * stride + column, n);
        s[0] = fma(g, (read<whole>(x + r * stride + column, n) - mean[r]) * rstd[r], s[0]);
        s[1] = s[1] + g;
      }
    }
  };
  template <int R>
  DPFAST_FN Group<R> group(int64_t k) const {
    Group<R> group;
    group.stride = a.stride, group.n = n;
    group.G = static_cast<const T*>(a.G) + k * a.stride + first;
    group.x = static_cast<const T*>(a.x) + k * a.stride + first;
    for (int r = 0; r < R; ++r) {
      group.mean[r] = lanes_of<T>(a.mean ? a.mean[k + r] : 0.0);
      group.rstd[r] = lanes_of<T>(a.rstd[k + r]);
    }
    return group;
  }
};

}  // namespace

double squares(const void* x, Type type, int64_t n) {
  return with_element(type, [&](auto* element) { return squares_of(static_cast<decltype(element)>(x), n); });
}

// sum = Σ_e a_e b_e and absolute = Σ_e |a_e b_e|, in doubles, where no product of floats is rounded
void product_sums(double& sum, double& absolute, const void* a, const void* b, Type type, int64_t n) {
  with_element(type, [&](auto* element) {
    using T = std::remove_cvref_t<decltype(*element)>;
    const auto *x = static_cast<const T*>(a), *y = static_cast<const T*>(b);
    f64 sums[2][SUMS / W] = {};
    const auto add = [&](const T* p, const T* q) {
      DPFAST_UNROLL
      for (int i = 0; i < SUMS / W; ++i) {
        const f64 product = to_double(read(p + i * W)) * to_double(read(q + i * W));
        sums[0][i] = sums[0][i] + product;
        sums[1][i] = sums[1][i] + magnitude(product);
      }
    };
    int64_t e = 0;
    for (; e + SUMS <= n; e += SUMS) add(x + e, y + e);
    if (e < n) {
      T p[SUMS] = {}, q[SUMS] = {};
      memcpy(p, x + e, (n - e) * sizeof(T));
      memcpy(q, y + e, (n - e) * sizeof(T));
      add(p, q);
    }
    sum = Squares<T>::total(sums[0]);
    absolute = Squares<T>::total(sums[1]);
  });
}

// out_j = Σ_k factor_k · row_k,j
void sum_rows(void* out, const Rows& rows, int64_t begin, int64_t end) {
  sum_columns<RowTerms>(rows, {out}, begin, end);
}

// weight_j = Σ_t g_t,j · (x_t,j - mean_t) · rstd_t and bias_j = Σ_t g_t,j
void sum_normalised(void* weight, void* bias, const Normalised& sample, int64_t begin, int64_t end) {
  sum_columns<NormalisedTerms>(sample, {weight, bias}, begin, end);
}

// weight = Σ_t g_t · (x_t - mean) · rstd and bias = Σ_t g_t, in doubles
void sum_channel(double& weight, double& bias, const Channel& channel) {
  with_element(channel.type, [&](auto* element) {
    using T = std::remove_cvref_t<decltype(*element)>;
    const auto *G = static_cast<const T*>(channel.G), *x = static_cast<const T*>(channel.x);
    const auto mean = lanes_of<double>(channel.mean);
    f64 sums[2][SUMS / W] = {};
    const auto add = [&](const T* g, const T* values) {
      DPFAST_UNROLL
      for (int i = 0; i < SUMS / W; ++i) {
        const f64 wide = to_double(read(g + i * W));
        sums[0][i] = sums[0][i] + wide * (to_double(read(values + i * W)) - mean);
        sums[1][i] = sums[1][i] + wide;
      }
    };
    int64_t t = 0;
    for (; t + SUMS <= channel.n; t += SUMS) add(G + t, x + t);
    if (t < channel.n) {
      T g[SUMS] = {}, values[SUMS] = {};
      memcpy(g, G + t, (channel.n - t) * sizeof(T));
      memcpy(values, x + t, (channel.n - t) * sizeof(T));
      add(g, values);
    }
    weight = Squares<T>::total(sums[0]) * channel.rstd;
    bias = Squares<T>::total(sums[1]);
  });
}

}  // namespace dpfast::DPFAST_ISA
