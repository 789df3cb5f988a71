// embedding_squared_norm and embedding_sum, on ids that are sorted.
#include <cfloat>
#include <type_traits>

#include "dpfast/certified.h"
#include "embedding_kernels.h"

namespace dpfast {

using namespace DPFAST_ISA;

namespace {

int64_t blocks_of(int64_t warps) { return ceil_div(warps, BLOCK_WARPS); }

}  // namespace

int64_t embedding_norm_partials(const Segments& s) {
  return 2 * s.B * ceil_div(s.T, PIECE_IDS) * ceil_div(s.d, TILE_COLUMNS);
}

void embedding_squared_norm(const Queue& queue, const Segments& s, double* squared, double* bound, double* partials) {
  const int64_t pieces = ceil_div(s.T, PIECE_IDS), tiles = ceil_div(s.d, TILE_COLUMNS), count = pieces * tiles;
  with_element(s.type, [&](auto* element) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
    launch(queue, &embedding_norm_kernel<T>, blocks_of(s.B * count), BLOCK_THREADS, s, pieces, tiles, partials);
  });
  const bool wide = s.type == Type::float64;
  const double safety = SAFETY_UNITS * (wide ? DBL_EPSILON : double(FLT_EPSILON)) / 2;
  const double underflow = UNDERFLOW * double(s.T * s.d) * (wide ? DBL_MIN : double(FLT_MIN));
  launch(queue, &finish_embedding_norm_kernel, blocks_of(s.B), BLOCK_THREADS, squared, bound, partials, s.B, count,
         safety, underflow);
}

int64_t embedding_sum_partials(const Segments& s) {
  return 2 * ceil_div(s.B * s.T, PIECE_IDS) * ceil_div(s.d, TILE_COLUMNS) * TILE_COLUMNS;
}

void embedding_sum(const Queue& queue, const Segments& s, const void* factors, bool wide, int64_t rows, void* out,
                   double* partials) {
  const int64_t pieces = ceil_div(s.B * s.T, PIECE_IDS), tiles = ceil_div(s.d, TILE_COLUMNS);
  const SumArguments a{s,   factors,  wide, rows, pieces, tiles,
                       out, partials, partials + pieces * tiles * TILE_COLUMNS};
  with_element(s.type, [&](auto* element) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
    launch(queue, &embedding_sum_kernel<T>, blocks_of(pieces * tiles), BLOCK_THREADS, a);
    launch(queue, &embedding_join_kernel<T>, blocks_of(pieces * tiles), BLOCK_THREADS, a);
  });
}

}  // namespace dpfast
