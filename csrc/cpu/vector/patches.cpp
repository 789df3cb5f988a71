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
struct Squares {
  f64 sum = {};
  DPFAST_FN void add(Vector x) {
    const f64 wide = to_double(x);
    sum = fma(wide, wide, sum);
  }
};
#else
// Four floats at once, which every compiler makes of it; fma may be a call there.
constexpr int LANES = 4;
typedef float Vector __attribute__((vector_size(4 * LANES)));
DPFAST_FN Vector broadcast(float x) { return x - Vector{}; }
DPFAST_FN Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
struct Squares {
  double sum[LANES] = {};
  DPFAST_FN void add(Vector x) {
    for (int i = 0; i < LANES; ++i) sum[i] += double(x[i]) * double(x[i]);
  }
};
#endif

#if defined(DPFAST_LANES) && DPFAST_LANES == 16
constexpr int MOST = 4;  // vectors of columns at a time: 24 sums and 5 operands in 32 registers
#else
constexpr int MOST = 2;  // 12 sums in 16 registers
#endif

// So many positions are added up in registers; then what came before is added. Equal terms, rounded alike in one long
// sum, would drift further than error bounds allow.
constexpr int64_t CHUNK = 256;

// out[k][j] = Σ_t x[element_k + place_t] · G[t][j], k of ROWS elements of a patch, j of VECTORS · LANES columns.
// Adds out² to squares. A function of its own, whose sums all are in registers.
template <int ROWS, int VECTORS>
__attribute__((noinline)) void block(const PatchGradient& a, int64_t k, int64_t j, Squares& squares) {
  const int64_t kept = std::min<int64_t>(VECTORS * LANES, a.columns - j);  // beyond are zeros
  const float* x[ROWS];
  DPFAST_UNROLL
  for (int r = 0; r < ROWS; ++r) x[r] = a.x + a.elements[k + r];
  const float* G = a.G + j;
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
    DPFAST_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float* out = a.out + (k + r) * a.stride + j;
      float row[VECTORS * LANES] = {};
      if (begin > 0) {
        memcpy(row, out, kept * sizeof(float));
        DPFAST_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = load<Vector>(row + v * LANES) + sum[r][v];
      }
      float* to = kept == VECTORS * LANES ? out : row;
      DPFAST_UNROLL
      for (int v = 0; v < VECTORS; ++v) memcpy(to + v * LANES, &sum[r][v], sizeof(Vector));
      if (to == row) memcpy(out, row, kept * sizeof(float));
      if (end < a.positions) continue;
      DPFAST_UNROLL
      for (int v = 0; v < VECTORS; ++v) squares.add(sum[r][v]);
    }
  }
}

// Columns j, j + 1, ... of the result: all elements of a patch. As many sums at a time as there are registers, and
// no fewer than additions that a processor has under way.
template <int VECTORS>
void columns(const PatchGradient& a, int64_t j, Squares& squares) {
  constexpr int ROWS = VECTORS == MOST ? 6 : 8;
  int64_t k = 0;
  for (; k + ROWS <= a.size; k += ROWS) block<ROWS, VECTORS>(a, k, j, squares);
  for (; k + 4 <= a.size; k += 4) block<4, VECTORS>(a, k, j, squares);
  for (; k + 2 <= a.size; k += 2) block<2, VECTORS>(a, k, j, squares);
  for (; k < a.size; ++k) block<1, VECTORS>(a, k, j, squares);
}

}  // namespace

int64_t patch_gradient_width(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

double patch_gradient(const PatchGradient& a) {
  const int64_t all = patch_gradient_width(a.columns);
  Squares squares;
  int64_t j = 0;
  for (; j + MOST * LANES <= all; j += MOST * LANES) columns<MOST>(a, j, squares);
  for (; j + 2 * LANES <= all; j += 2 * LANES) columns<2>(a, j, squares);
  for (; j < all; j += LANES) columns<1>(a, j, squares);
  double lanes[LANES], total = 0;
  memcpy(lanes, &squares.sum, sizeof(lanes));
  for (double lane : lanes) total += lane;
  return total;
}

}  // namespace dpfast::DPFAST_ISA
