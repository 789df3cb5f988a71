// The kernels of embedding.cu. Ids are sorted, and a warp goes through 32 of them (a piece) at a tile of columns: equal
// ids are neighbours then, and their rows of G are added up in doubles. Next to no rounding is left, and one order.
#pragma once

#include "../cpu/kernels.h"
#include "kernels.h"
#include "warps.h"

namespace dpfast::DPFAST_ISA {

constexpr int PIECE_IDS = 32;

// The warp's piece of `count` sorted ids: in lane k the k-th of them, and where its row of G is.
struct IdPiece {
  int64_t id, row;
  int count;
  uint32_t starts;  // bit k: a segment of equal ids starts at the k-th
};

__device__ inline IdPiece id_piece(const int64_t* ids, const int64_t* order, int64_t n, int64_t piece, int lane) {
  const int64_t begin = piece * PIECE_IDS, left = n - begin;
  IdPiece p{0, 0, left < PIECE_IDS ? int(left) : PIECE_IDS, 0};
  bool start = false;
  if (lane < p.count) {
    p.id = ids[begin + lane], p.row = order[begin + lane];
    start = begin + lane == 0 || ids[begin + lane - 1] != p.id;
  }
  p.starts = __ballot_sync(0xFFFFFFFFu, start);
  return p;
}

// f(k, x) in order for the places first ≤ k < last of a piece: the lane's columns of the k-th row of G. Rows for which
// skip(k) are 0 and not read.
template <class T, class Skip, class F>
__device__ inline void each_row(const T* G, int64_t d, const IdPiece& p, int first, int last, const Span& span,
                                const Skip& skip, const F& f) {
  constexpr int ROWS = sizeof(T) == 8 ? 4 : 8;  // on their way at once
  for (int k = first; k < last; k += ROWS) {
    Sum<T> x[ROWS][4] = {};
    DPFAST_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = __shfl_sync(0xFFFFFFFFu, p.row, (k + r) % 32);
      if (k + r < last && !skip(k + r)) get(x[r], G + row * d, span);
    }
    DPFAST_UNROLL
    for (int r = 0; r < ROWS; ++r)
      if (k + r < last) f(k + r, x[r]);
  }
}

// ------------------------------------------------------------------ norms

// ‖g_i‖² = Σ_segments ‖Σ_{t in segment} G_t‖². The columns of a segment of m rows are summed with at most m - 1
// roundings of at most Σ_t |G_t|, so a lane's part of its norm is off by at most slip = u (m - 1) Σ_t ‖G_t‖, and
// Σ_t ‖G_t‖ ≤ √(m Σ_t ‖G_t‖²). u is that of doubles.
struct SegmentNorm {
  double sum[4] = {}, energy = 0, squared = 0, slack = 0;
  int64_t rows = 0;

  DPFAST_FN void finish() {  // the segment
    double square = 0;
    DPFAST_UNROLL
    for (int j = 0; j < 4; ++j) square = fma(sum[j], sum[j], square), sum[j] = 0;
    if (rows > 1) {
      const double slip = 0x1p-53 * double(rows - 1) * ::sqrt(double(rows) * energy);
      slack += slip * (2 * ::sqrt(square) + slip);
    }
    squared += square, rows = 0, energy = 0;
  }
  template <class Real>
  DPFAST_FN void add(const Real (&x)[4]) {
    ++rows;
    DPFAST_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += x[j], energy = fma(double(x[j]), double(x[j]), energy);
  }
};

// A warp for each sample, piece and tile does the segments that start in the piece, to their ends. partials
// [2, B, pieces, tiles]: squares, and what they may lack.
template <class T>
__global__ void __launch_bounds__(BLOCK_THREADS, 2)
    embedding_norm_kernel(const Segments s, int64_t pieces, int64_t tiles, double* partials) {
  const int64_t unit = int64_t(blockIdx.x) * BLOCK_WARPS + warp_of(threadIdx.x), units = s.B * pieces * tiles;
  if (unit >= units) return;
  const int lane = lane_of(threadIdx.x);
  const int64_t tile = unit % tiles, first = unit / tiles % pieces, sample = unit / tiles / pieces;
  const int64_t *const ids = s.ids + sample * s.T, *const order = s.order + sample * s.T;
  const int64_t column = tile * TILE_COLUMNS + 4 * lane, left = s.d - column;
  const T* const G = static_cast<const T*>(s.G) + sample * s.T * s.d + column;
  const Span span{0, 0, left < 0 ? 0 : left < 4 ? int(left) : 4, s.d % 4 == 0 && is_aligned(G) && left >= 4};
  SegmentNorm norm;
  for (int64_t piece = first; piece < pieces; ++piece) {
    const IdPiece p = id_piece(ids, order, s.T, piece, lane);
    // In the first piece from the first start on; in those behind it up to the first start.
    if (piece == first && p.starts == 0) break;
    const int from = piece == first ? lowest_bit(p.starts) : 0;
    const int to = piece == first || p.starts == 0 ? p.count : lowest_bit(p.starts);
    each_row(
        G, s.d, p, from, to, span, [](int) { return false; },
        [&](int k, const Sum<T>(&x)[4]) {
          if (p.starts >> k & 1) norm.finish();
          norm.add(x);
        });
    if (piece != first && p.starts != 0) break;
  }
  norm.finish();
  const double squared = warp_sum(norm.squared), slack = warp_sum(norm.slack);
  if (lane == 0) partials[unit] = squared, partials[units + unit] = slack;
}

// squared_i = Σ of its partials; bound_i = 12 u squared_i + slack_i + what squares may lose to underflow, as
// dpfast/reference/rounding.py has it.
__global__ void __launch_bounds__(BLOCK_THREADS)
    finish_embedding_norm_kernel(double* squared, double* bound, const double* partials, int64_t B, int64_t count,
                                 double safety, double underflow) {
  const int64_t i = int64_t(blockIdx.x) * BLOCK_WARPS + warp_of(threadIdx.x);
  if (i >= B) return;
  const int lane = lane_of(threadIdx.x);
  double squares = 0, slack = 0;
  for (int64_t k = lane; k < count; k += 32)
    squares += partials[i * count + k], slack += partials[(B + i) * count + k];
  squares = warp_sum(squares), slack = warp_sum(slack);
  if (lane == 0) squared[i] = squares, bound[i] = safety * squares + slack + underflow;
}

// ------------------------------------------------------------------ sums

struct SumArguments {
  Segments s;
  const void* factors;
  bool wide;
  int64_t rows, pieces, tiles;
  void* out;
  double *heads, *tails;  // [pieces, tiles, 4, 32]: parts of segments that are in several pieces
};

// The ids of all samples are sorted together; place k of a sample i = row / T counts factor_i times.
template <class T>
DPFAST_FN Sum<T> factor_of(const SumArguments& a, int64_t row) {
  const int64_t i = row / a.s.T;
  if constexpr (sizeof(T) == 8)
    return a.wide ? static_cast<const double*>(a.factors)[i] : double(static_cast<const float*>(a.factors)[i]);
  else
    return a.wide ? float_below(static_cast<const double*>(a.factors)[i]) : static_cast<const float*>(a.factors)[i];
}

template <class T>
__device__ inline void write_row(const SumArguments& a, int64_t id, int64_t column, const double (&sum)[4],
                                 const Span& span) {
  if (id < 0 || id >= a.rows) return;  // the layer's own forward has refused it
  Sum<T>* const out = static_cast<Sum<T>*>(a.out) + id * a.s.d + column;
  const Quad<Sum<T>> quad{{Sum<T>(sum[0]), Sum<T>(sum[1]), Sum<T>(sum[2]), Sum<T>(sum[3])}};
  set(out, quad, Span{0, span.low, span.high, span.high == 4 && is_aligned(out)});
}

DPFAST_FN void keep(double* parts, int64_t place, int lane, const double (&sum)[4]) {
  DPFAST_UNROLL
  for (int j = 0; j < 4; ++j) parts[place * TILE_COLUMNS + 32 * j + lane] = sum[j];
}

// out[v] = Σ_{k: id_k = v} factor_k G_k for the segments within a piece; the parts of others are kept: `head` of the one
// that started before the piece, `tail` of the one that starts in it and goes on behind it.
template <class T>
__global__ void __launch_bounds__(BLOCK_THREADS) embedding_sum_kernel(const SumArguments __grid_constant__ a) {
  const int64_t unit = int64_t(blockIdx.x) * BLOCK_WARPS + warp_of(threadIdx.x), n = a.s.B * a.s.T;
  if (unit >= a.pieces * a.tiles) return;
  const int lane = lane_of(threadIdx.x);
  const int64_t tile = unit % a.tiles, piece = unit / a.tiles, end = (piece + 1) * PIECE_IDS;
  const int64_t column = tile * TILE_COLUMNS + 4 * lane, left = a.s.d - column;
  const T* const G = static_cast<const T*>(a.s.G) + column;
  const Span span{0, 0, left < 0 ? 0 : left < 4 ? int(left) : 4, a.s.d % 4 == 0 && is_aligned(G) && left >= 4};
  const IdPiece p = id_piece(a.s.ids, a.s.order, n, piece, lane);
  const Sum<T> factor = lane < p.count ? factor_of<T>(a, p.row) : Sum<T>(0);
  const uint32_t counted = __ballot_sync(0xFFFFFFFFu, factor != 0);
  double sum[4] = {};
  bool head = (p.starts & 1) == 0;  // the segment at hand started before the piece
  each_row(
      G, a.s.d, p, 0, p.count, span, [&](int k) { return (counted >> k & 1) == 0; },
      [&](int k, const Sum<T>(&x)[4]) {
        if (k > 0 && (p.starts >> k & 1)) {
          const int64_t id = __shfl_sync(0xFFFFFFFFu, p.id, (k + 31) % 32);
          if (head)
            keep(a.heads, unit, lane, sum);
          else
            write_row<T>(a, id, column, sum, span);
          head = false;
          DPFAST_UNROLL
          for (int j = 0; j < 4; ++j) sum[j] = 0;
        }
        const double times = __shfl_sync(0xFFFFFFFFu, factor, k);
        DPFAST_UNROLL
        for (int j = 0; j < 4; ++j) sum[j] = fma(times, double(x[j]), sum[j]);
      });
  const int64_t id = __shfl_sync(0xFFFFFFFFu, p.id, p.count - 1);
  if (head)
    keep(a.heads, unit, lane, sum);
  else if (end < n && a.s.ids[end] == id)
    keep(a.tails, unit, lane, sum);
  else
    write_row<T>(a, id, column, sum, span);
}

// The segments in several pieces: the tail of the one where it starts, and the heads of the others, in order.
template <class T>
__global__ void __launch_bounds__(BLOCK_THREADS) embedding_join_kernel(const SumArguments __grid_constant__ a) {
  const int64_t unit = int64_t(blockIdx.x) * BLOCK_WARPS + warp_of(threadIdx.x), n = a.s.B * a.s.T;
  if (unit >= a.pieces * a.tiles) return;
  const int lane = lane_of(threadIdx.x);
  const int64_t tile = unit % a.tiles, piece = unit / a.tiles, begin = piece * PIECE_IDS, end = begin + PIECE_IDS;
  if (end >= n || a.s.ids[end - 1] != a.s.ids[end]) return;  // no segment goes on behind this piece
  const int64_t id = a.s.ids[end];
  if (a.s.ids[begin] == id && begin > 0 && a.s.ids[begin - 1] == id) return;  // it started before
  int64_t low = end + 1, high = n;  // the segment ends at the first place from `low` on that has another id
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (a.s.ids[middle] == id)
      low = middle + 1;
    else
      high = middle;
  }
  const int64_t last = (low - 1) / PIECE_IDS, column = tile * TILE_COLUMNS + 4 * lane, left = a.s.d - column;
  double sum[4];
  DPFAST_UNROLL
  for (int j = 0; j < 4; ++j) sum[j] = a.tails[unit * TILE_COLUMNS + 32 * j + lane];
#ifdef __CUDACC__
#pragma unroll 4
#endif
  for (int64_t next = piece + 1; next <= last; ++next) {
    DPFAST_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += a.heads[(next * a.tiles + tile) * TILE_COLUMNS + 32 * j + lane];
  }
  write_row<T>(a, id, column, sum, Span{0, 0, left < 0 ? 0 : left < 4 ? int(left) : 4, false});
}

}  // namespace dpfast::DPFAST_ISA
