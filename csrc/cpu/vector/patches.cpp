// Per-sample gradients of convolutions: matrix products over patches that are never written out. Every element is
// added up in one order, by fma where vectors have it, whatever the blocks.
#include <algorithm>

#include "dpfast/narrow.h"
#include "vector.h"

namespace dpfast::DPFAST_ISA {
namespace {

#ifdef DPFAST_LANES
constexpr int LANES = W;
using Vector = f32;
DPFAST_FN Vector broadcast(float x) { return splat(x); }
DPFAST_FN Vector multiply_add(Vector a, Vector b, Vector c) { return fma(a, b, c); }
DPFAST_FN double squares_of(const float* x, int n) {
  f64 sum = {};
  for (int i = 0; i < n; i += W) {
    const f64 wide = to_double(load<f32>(x + i));
    sum = fma(wide, wide, sum);
  }
  double lanes[W], total = 0;
  memcpy(lanes, &sum, sizeof(lanes));
  for (double lane : lanes) total += lane;
  return total;
}
#else
// Four floats at once, which every compiler makes of it; fma may be a call there.
constexpr int LANES = 4;
typedef float Vector __attribute__((vector_size(4 * LANES)));
DPFAST_FN Vector broadcast(float x) { return x - Vector{}; }
DPFAST_FN Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
DPFAST_FN double squares_of(const float* x, int n) {
  double total = 0;
  for (int i = 0; i < n; ++i) total += double(x[i]) * double(x[i]);
  return total;
}
#endif

// So many positions are added up in registers; then what came before is added. Equal terms, rounded alike in one long
// sum, would drift further than error bounds allow.
constexpr int64_t CHUNK = 256;

// out[k][j] = Σ_t x[element_k + place_t] · G[t][j], k of ROWS elements of a patch, j of VECTORS · LANES columns.
// Returns Σ out².
template <int ROWS, int VECTORS>
double block(const PatchGradient& a, int64_t k, int64_t j) {
  const int64_t kept = std::min<int64_t>(VECTORS * LANES, a.columns - j);  // beyond are zeros
  const float* x[ROWS];
  for (int r = 0; r < ROWS; ++r) x[r] = a.x + a.elements[k + r];
  const float* G = a.G + j;
  float row[VECTORS * LANES] = {};
  double squares = 0;
  for (int64_t begin = 0; begin == 0 || begin < a.positions; begin += CHUNK) {
    const int64_t end = std::min(a.positions, begin + CHUNK);
    Vector sum[ROWS][VECTORS] = {};
    for (int64_t t = begin; t < end; ++t, G += a.width) {
      Vector g[VECTORS];
      DPFAST_UNROLL
      for (int v = 0; v < VECTORS; ++v) g[v] = load<Vector>(G + v * LANES);
      const int64_t place = a.places[t];
      DPFAST_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const Vector value = broadcast(x[r][place]);
        DPFAST_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(value, g[v], sum[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      float* out = a.out + (k + r) * a.stride + j;
      if (begin > 0) {
        memcpy(row, out, kept * sizeof(float));
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = load<Vector>(row + v * LANES) + sum[r][v];
      }
      memcpy(row, sum[r], sizeof(row));
      memcpy(out, row, kept * sizeof(float));
      if (end == a.positions) squares += squares_of(row, VECTORS * LANES);
    }
  }
  return squares;
}

// Columns j, j + 1, ... of the result: all elements of a patch.
template <int VECTORS>
double columns(const PatchGradient& a, int64_t j) {
  constexpr int ROWS = 6;  // with VECTORS = 4: 24 sums and 5 operands in 32 registers
  double squares = 0;
  int64_t k = 0;
  for (; k + ROWS <= a.size; k += ROWS) squares += block<ROWS, VECTORS>(a, k, j);
  for (; k < a.size; ++k) squares += block<1, VECTORS>(a, k, j);
  return squares;
}

}  // namespace

int64_t patch_gradient_width(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

double patch_gradient(const PatchGradient& a) {
#if defined(DPFAST_LANES) && DPFAST_LANES == 16
  constexpr int MOST = 4;
#else
  constexpr int MOST = 2;  // 12 sums in 16 registers
#endif
  const int64_t all = patch_gradient_width(a.columns);
  double squares = 0;
  int64_t j = 0;
  for (; j + MOST * LANES <= all; j += MOST * LANES) squares += columns<MOST>(a, j);
  for (; j + 2 * LANES <= all; j += 2 * LANES) squares += columns<2>(a, j);
  for (; j < all; j += LANES) squares += columns<1>(a, j);
  return squares;
}

}  // namespace dpfast::DPFAST_ISA
