// The kernels of reductions.cu. A sum has one order, given by sizes alone: not by time, addresses or the GPU.
#pragma once

#include <type_traits>

#include "../cpu/kernels.h"
#include "table.h"
#include "warps.h"

namespace dpfast::DPFAST_ISA {

// ------------------------------------------------------------------ squared norms

// Samples [B, n] of `type`; a warp squares a piece of a sample, and writes its sum to partials.
struct NormEntry {
  const void* x;
  int64_t n, place;  // results are out[place .. place + B - 1]
  uint32_t pieces;   // of one sample
  Type type;
};

constexpr int NORM_PIECE = 8192;

// Σ x² of count elements from p on, the same in every lane.
template <class T>
__device__ inline double squares_of(const T* p, int count, int lane) {
  constexpr int QUADS = 4;
  const bool aligned = is_aligned(p);
  SquareSum<T> sums[QUADS];
  for (int i = 4 * lane; i - 4 * lane < count; i += QUADS * TILE_COLUMNS) {
    Sum<T> x[QUADS][4];
    DPFAST_UNROLL
    for (int q = 0; q < QUADS; ++q) {
      const int at = i + q * TILE_COLUMNS;
      get(x[q], p + at, Span{at, 0, count, aligned && at + 4 <= count});
    }
    DPFAST_UNROLL
    for (int q = 0; q < QUADS; ++q) {
      DPFAST_UNROLL
      for (int j = 0; j < 4; ++j) sums[q].add(x[q][j]);
    }
  }
  double total = 0;
  DPFAST_UNROLL
  for (int q = 0; q < QUADS; ++q) total += sums[q].over_warp();
  return total;
}

__global__ void __launch_bounds__(BLOCK_THREADS)
    squared_norms_kernel(double* partials, int64_t units, const Table<NormEntry> __grid_constant__ table) {
  const int64_t unit = int64_t(blockIdx.x) * BLOCK_WARPS + warp_of(threadIdx.x);
  if (unit >= units) return;
  const int k = table.find(uint32_t(unit)), lane = lane_of(threadIdx.x);
  const NormEntry e = table.entry[k];
  const uint32_t local = uint32_t(unit) - table.first[k], sample = local / e.pieces, piece = local % e.pieces;
  const int64_t begin = int64_t(piece) * NORM_PIECE, left = e.n - begin;
  const int count = left < NORM_PIECE ? int(left) : NORM_PIECE;
  double total = 0;
  with_element(e.type, [&](auto* element) {
    total = squares_of(static_cast<decltype(element)>(e.x) + sample * e.n + begin, count, lane);
  });
  if (lane == 0) partials[unit] = total;
}

// Σ of `pieces` partial sums, the same in every lane.
__device__ inline double sum_of_partials(const double* partials, int64_t pieces, int lane) {
  double sum = 0;
  for (int64_t k = lane; k < pieces; k += 32) sum += partials[k];
  return warp_sum(sum);
}

// A warp for each of the B samples of each tensor.
__global__ void __launch_bounds__(BLOCK_THREADS)
    finish_norms_kernel(double* out, const double* partials, int64_t B, int64_t rows,
                        const Table<NormEntry> __grid_constant__ table) {
  const int64_t row = int64_t(blockIdx.x) * BLOCK_WARPS + warp_of(threadIdx.x);
  if (row >= rows) return;
  const int k = int(row / B), lane = lane_of(threadIdx.x);
  const int64_t sample = row % B, pieces = table.entry[k].pieces;
  const double sum = sum_of_partials(partials + table.first[k] + sample * pieces, pieces, lane);
  if (lane == 0) out[table.entry[k].place + sample] = sum;
}

// out[row] = Σ partials[row, :]
__global__ void __launch_bounds__(BLOCK_THREADS)
    finish_rows_kernel(double* out, const double* partials, int64_t rows, int64_t pieces) {
  const int64_t row = int64_t(blockIdx.x) * BLOCK_WARPS + warp_of(threadIdx.x);
  if (row >= rows) return;
  const double sum = sum_of_partials(partials + row * pieces, pieces, lane_of(threadIdx.x));
  if (lane_of(threadIdx.x) == 0) out[row] = sum;
}

// ------------------------------------------------------------------ sums over rows

// A block is `slices` warps deep, which share the rows, and BLOCK_WARPS / slices tiles of columns wide.
struct Slice {
  int slice, slices;
  int64_t tile, begin, end;  // the warp's tile of columns and its rows
};

DPFAST_FN Slice slice_of(uint32_t thread, int64_t block, int slices, int64_t rows) {
  const int warp = warp_of(thread), slice = warp % slices;
  const int64_t deep = (rows + slices - 1) / slices, begin = slice * deep, end = begin + deep;
  return {slice, slices, block * (BLOCK_WARPS / slices) + warp / slices, begin < rows ? begin : rows,
          end < rows ? end : rows};
}

// The warp's rows have been added up in `sum`; the warps of slice 0 get the sum of all slices. For every thread.
template <int N>
__device__ inline void over_slices(double (&sum)[N][4], const Slice& s) {
  __shared__ double shared[BLOCK_WARPS][N * 4][32];
  if (s.slices == 1) return;
  const int warp = warp_of(threadIdx.x), lane = lane_of(threadIdx.x);
  DPFAST_UNROLL
  for (int j = 0; j < N * 4; ++j) shared[warp][j][lane] = sum[j / 4][j % 4];
  __syncthreads();
  if (s.slice != 0) return;
  for (int other = 1; other < s.slices; ++other) {
    DPFAST_UNROLL
    for (int j = 0; j < N * 4; ++j) sum[j / 4][j % 4] += shared[warp + other][j][lane];
  }
}

// The span of columns that a lane has of rows of n elements.
DPFAST_FN Span columns_of(int64_t tile, int lane, int64_t n, bool aligned) {
  const int64_t first = tile * TILE_COLUMNS + 4 * lane, left = n - first;
  return {0, 0, left < 0 ? 0 : left < 4 ? int(left) : 4, aligned && left >= 4};
}

// sum += Σ_r factor(r) · x[r, columns]; a few rows are added in the type of sums, the rest in doubles. Rows with
// factor 0 are not read.
template <class T, class Factor>
__device__ inline void add_rows(double (&sum)[1][4], const T* x, int64_t stride, const Slice& s, const Span& span,
                                const Factor& factor) {
  constexpr int ROWS = sizeof(T) == 8 ? 4 : 8;
  for (int64_t row = s.begin; row < s.end; row += ROWS) {
    Sum<T> values[ROWS][4] = {}, factors[ROWS];
    DPFAST_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      factors[r] = row + r < s.end ? factor(row + r) : Sum<T>(0);
      if (factors[r] != 0) get(values[r], x + (row + r) * stride, span);
    }
    DPFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      Sum<T> part = factors[0] * values[0][j];
      DPFAST_UNROLL
      for (int r = 1; r < ROWS; ++r) part = fma(factors[r], values[r][j], part);
      sum[0][j] += part;
    }
  }
}

// Round and write sums; what was written, squared and summed over the warp.
template <class T>
__device__ inline double write_sums(Sum<T>* out, const double (&sum)[4], const Span& span) {
  Quad<Sum<T>> quad;
  SquareSum<Sum<T>> squares;
  DPFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    quad.at[j] = Sum<T>(sum[j]);
    if (span.has(j)) squares.add(quad.at[j]);
  }
  set(out, quad, span);
  return squares.over_warp();
}

// Samples [B, n] of `type` → out [n], float32 or float64.
struct WeightedEntry {
  const void *x, *factors;  // [B], doubles if `wide`, else floats
  void* out;
  int64_t n;
  Type type;
  bool wide;
  int slices;
};

__global__ void __launch_bounds__(BLOCK_THREADS)
    weighted_sums_kernel(int64_t B, const Table<WeightedEntry> __grid_constant__ table) {
  const int k = table.find(blockIdx.x), lane = lane_of(threadIdx.x);
  const WeightedEntry e = table.entry[k];
  const Slice s = slice_of(threadIdx.x, blockIdx.x - table.first[k], e.slices, B);
  with_element(e.type, [&](auto* element) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
    const int64_t column = s.tile * TILE_COLUMNS + 4 * lane;
    const T* const x = static_cast<const T*>(e.x) + column;
    Sum<T>* const out = static_cast<Sum<T>*>(e.out) + column;
    double sum[1][4] = {};
    add_rows(sum, x, e.n, s, columns_of(s.tile, lane, e.n, e.n % 4 == 0 && is_aligned(x)), [&](int64_t row) {
      const double factor =
          e.wide ? static_cast<const double*>(e.factors)[row] : double(static_cast<const float*>(e.factors)[row]);
      if constexpr (sizeof(T) == 8)
        return factor;
      else
        return float_below(factor);
    });
    over_slices(sum, s);
    if (s.slice == 0) write_sums<T>(out, sum[0], columns_of(s.tile, lane, e.n, is_aligned(out)));
  });
}

// ------------------------------------------------------------------ sums over positions

// G, x [B, T, d]; mean and rstd [B, T]; out[0] the weight's samples [B, d], out[1] the bias'; partials of squared norms
// [B, tiles].
struct PositionArguments {
  const void *G, *x, *mean, *rstd;  // null mean: 0
  void* out[2];
  double* partials[2];
  int64_t T, d, blocks;  // blocks of one sample
  Type statistics;       // the type of mean and rstd
  int slices;
};

template <class To>
__device__ inline To number(const void* p, Type type, int64_t i) {
  switch (type) {
    case Type::float32:
      return To(static_cast<const float*>(p)[i]);
    case Type::float64:
      return To(static_cast<const double*>(p)[i]);
    case Type::bfloat16:
      return To(value(static_cast<const bf16*>(p)[i]));
    case Type::float16:
      return To(value(static_cast<const f16*>(p)[i]));
  }
  return To(0);
}

// normalised: w = Σ_t g_t ∘ (x_t - mean_t) · rstd_t and b = Σ_t g_t; else b alone
template <class T, bool normalised>
__global__ void __launch_bounds__(BLOCK_THREADS) positions_kernel(const PositionArguments __grid_constant__ a) {
  constexpr int SUMS = normalised ? 2 : 1;
  const int lane = lane_of(threadIdx.x);
  const int64_t sample = blockIdx.x / a.blocks, tiles = (a.d + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const Slice s = slice_of(threadIdx.x, blockIdx.x % a.blocks, a.slices, a.T);
  const int64_t column = s.tile * TILE_COLUMNS + 4 * lane, first = sample * a.T * a.d + column;
  const T *const G = static_cast<const T*>(a.G) + first, *const x = static_cast<const T*>(a.x) + first;
  double sum[SUMS][4] = {};
  if constexpr (normalised) {
    const Span span = columns_of(s.tile, lane, a.d, a.d % 4 == 0 && is_aligned(G) && is_aligned(x));
    constexpr int ROWS = 4;
    for (int64_t row = s.begin; row < s.end; row += ROWS) {
      Sum<T> g[ROWS][4] = {}, h[ROWS][4] = {}, mean[ROWS] = {}, rstd[ROWS] = {};
      DPFAST_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        if (row + r >= s.end) continue;
        get(g[r], G + (row + r) * a.d, span);
        get(h[r], x + (row + r) * a.d, span);
        if (a.mean) mean[r] = number<Sum<T>>(a.mean, a.statistics, sample * a.T + row + r);
        rstd[r] = number<Sum<T>>(a.rstd, a.statistics, sample * a.T + row + r);
      }
      DPFAST_UNROLL
      for (int j = 0; j < 4; ++j) {
        Sum<T> weight = 0, bias = 0;
        DPFAST_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          weight = fma(g[r][j], (h[r][j] - mean[r]) * rstd[r], weight);
          bias += g[r][j];
        }
        sum[0][j] += weight, sum[1][j] += bias;
      }
    }
  } else {
    add_rows(sum, G, a.d, s, columns_of(s.tile, lane, a.d, a.d % 4 == 0 && is_aligned(G)),
             [](int64_t) { return Sum<T>(1); });
  }
  over_slices(sum, s);
  if (s.slice != 0 || s.tile >= tiles) return;
  DPFAST_UNROLL
  for (int k = 0; k < SUMS; ++k) {
    Sum<T>* const out = static_cast<Sum<T>*>(a.out[k]) + sample * a.d + column;
    const double squares = write_sums<T>(out, sum[k], columns_of(s.tile, lane, a.d, is_aligned(out)));
    if (lane == 0) a.partials[k][sample * tiles + s.tile] = squares;
  }
}

}  // namespace dpfast::DPFAST_ISA
