// Rows of a Gram matrix: dot products of the rows of a matrix, which are read where they lie. Each is made lane by lane,
// by fma where vectors have it, in an order that its place and the width decide, whatever the threads.
#include <algorithm>

#include "vector.h"

namespace dpfast::DPFAST_ISA {
namespace {

#ifdef DPFAST_LANES
constexpr int LANES = W;
using Vector = f32;
DPFAST_FN Vector multiply_add(Vector a, Vector b, Vector c) { return fma(a, b, c); }
#else
// Four floats at once, which every compiler makes of it; fma may be a call there.
constexpr int LANES = 4;
typedef float Vector __attribute__((vector_size(4 * LANES)));
DPFAST_FN Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif

#if defined(DPFAST_LANES) && DPFAST_LANES == 16
constexpr int MOST = 6;  // rows at a time: 24 sums and 5 operands in 32 registers
#else
constexpr int MOST = 3;  // 12 sums and 4 operands in 16 registers
#endif
constexpr int COLUMNS = 4;

// So many features at a time: these of a strip's rows stay in a fast cache while all others pass by.
constexpr int64_t CHUNK = 1024;

// The first n floats, and zeros.
DPFAST_FN Vector read(const float* x, int64_t n) {
  float padded[LANES] = {};
  memcpy(padded, x, n * sizeof(float));
  return load<Vector>(padded);
}

// The sum of all lanes: halves are added up until one is left.
DPFAST_FN float total(Vector x) {
  float lanes[LANES];
  memcpy(lanes, &x, sizeof(lanes));
  DPFAST_UNROLL
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The totals of four vectors.
DPFAST_FN void totals(const Vector* x, float* out) {
#if defined(DPFAST_LANES) && DPFAST_LANES == 16
  const __m512 ab = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
  const __m512 cd = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
  const __m512 all = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(DPFAST_LANES)
  const __m256 ab = _mm256_unpacklo_ps(x[0], x[1]) + _mm256_unpackhi_ps(x[0], x[1]);
  const __m256 cd = _mm256_unpacklo_ps(x[2], x[3]) + _mm256_unpackhi_ps(x[2], x[3]);
  const __m256 all = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  _mm_storeu_ps(out, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
#else
  for (int i = 0; i < 4; ++i) out[i] = total(x[i]);
#endif
}

// out[r][c] = Σ_k a[r][k] · b[c][k] over n features, added to what is there if `more`; rows are `stride` apart. A
// function of its own, whose sums all are in registers.
template <int ROWS, int COUNT>
__attribute__((noinline)) void block(const float* a, const float* b, int64_t stride, int64_t n, float* out,
                                     int64_t width, bool more) {
  Vector sum[ROWS][COUNT] = {};
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
    Vector column[COUNT];
    DPFAST_UNROLL
    for (int c = 0; c < COUNT; ++c) column[c] = load<Vector>(b + c * stride + k);
    DPFAST_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const Vector row = load<Vector>(a + r * stride + k);
      DPFAST_UNROLL
      for (int c = 0; c < COUNT; ++c) sum[r][c] = multiply_add(row, column[c], sum[r][c]);
    }
  }
  if (k < n) {
    Vector column[COUNT];
    DPFAST_UNROLL
    for (int c = 0; c < COUNT; ++c) column[c] = read(b + c * stride + k, n - k);
    DPFAST_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const Vector row = read(a + r * stride + k, n - k);
      DPFAST_UNROLL
      for (int c = 0; c < COUNT; ++c) sum[r][c] = multiply_add(row, column[c], sum[r][c]);
    }
  }
  DPFAST_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    float of_row[COUNT];
    if constexpr (COUNT == 4) {
      totals(sum[r], of_row);
    } else {
      for (int c = 0; c < COUNT; ++c) of_row[c] = total(sum[r][c]);
    }
    float* to = out + r * width;
    for (int c = 0; c < COUNT; ++c) to[c] = more ? to[c] + of_row[c] : of_row[c];
  }
}

// Columns j to j + COUNT, of the rows that have one of these on or behind the diagonal.
template <int COUNT>
void columns(const GramRows& g, int64_t begin, int64_t j) {
  const int64_t n = std::min(CHUNK, g.size - begin), rows = std::min(g.rows, j + COUNT);
  const float *a = g.x + begin, *b = a + j * g.stride;
  const bool more = begin > 0;
  int64_t i = 0;
  for (; i + MOST <= rows; i += MOST) block<MOST, COUNT>(a + i * g.stride, b, g.stride, n, g.out + i * g.width + j, g.width, more);
  for (; i + 2 <= rows; i += 2) block<2, COUNT>(a + i * g.stride, b, g.stride, n, g.out + i * g.width + j, g.width, more);
  for (; i < rows; ++i) block<1, COUNT>(a + i * g.stride, b, g.stride, n, g.out + i * g.width + j, g.width, more);
}

}  // namespace

void gram_rows(const GramRows& g) {
  for (int64_t begin = 0; begin == 0 || begin < g.size; begin += CHUNK) {
    int64_t j = 0;
    for (; j + COLUMNS <= g.width; j += COLUMNS) columns<COLUMNS>(g, begin, j);
    for (; j < g.width; ++j) columns<1>(g, begin, j);
  }
}

}  // namespace dpfast::DPFAST_ISA
