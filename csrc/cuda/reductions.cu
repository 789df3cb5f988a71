// squared_norms, weighted_sums, sum_positions and normalised_sums.
#include "kernels.h"
#include "reduction_kernels.h"

namespace dpfast {

using namespace DPFAST_ISA;

namespace {

int64_t blocks_of(int64_t warps) { return ceil_div(warps, BLOCK_WARPS); }

// How many warps share the rows of a tile of columns: more where there are few tiles, as long as each has work. By
// sizes alone, so that a sum has the same order on every GPU.
int slices_of(int64_t rows, int64_t tiles) {
  constexpr int64_t enough = 4096;
  int slices = 1;
  while (slices < BLOCK_WARPS && tiles * slices < enough && rows >= 16 * slices) slices *= 2;
  return slices;
}

}  // namespace

int64_t norm_partials(const std::vector<Samples>& samples, int64_t B) {
  int64_t most = 0;
  for (const Samples& s : samples) most += B * ceil_div(s.n, NORM_PIECE);
  return most;
}

void squared_norms(const Queue& queue, const std::vector<Samples>& samples, int64_t B, double* out, double* partials) {
  std::vector<Work<NormEntry>> work;
  for (size_t k = 0; k < samples.size(); ++k) {
    const int64_t pieces = ceil_div(samples[k].n, NORM_PIECE);
    work.push_back({{samples[k].x, samples[k].n, int64_t(k) * B, uint32_t(pieces), samples[k].type}, B * pieces});
  }
  in_tables(work, [&](const Table<NormEntry>& table, int64_t units) {
    const int64_t rows = table.count * B;
    launch(queue, &squared_norms_kernel, blocks_of(units), BLOCK_THREADS, partials, units, table);
    launch(queue, &finish_norms_kernel, blocks_of(rows), BLOCK_THREADS, out, partials, B, rows, table);
    partials += units;
  });
}

void weighted_sums(const Queue& queue, const std::vector<Weighted>& sums, int64_t B, bool wide) {
  std::vector<Work<WeightedEntry>> work;
  for (const Weighted& w : sums) {
    const int64_t tiles = ceil_div(w.samples.n, TILE_COLUMNS);
    const int slices = slices_of(B, tiles);
    work.push_back({{w.samples.x, w.factors, w.out, w.samples.n, w.samples.type, wide, slices},
                    ceil_div(tiles, BLOCK_WARPS / slices)});
  }
  in_tables(work, [&](const Table<WeightedEntry>& table, int64_t blocks) {
    launch(queue, &weighted_sums_kernel, blocks, BLOCK_THREADS, B, table);
  });
}

int64_t position_partials(const Positions& p) { return p.B * ceil_div(p.d, TILE_COLUMNS); }

void sum_positions(const Queue& queue, const Positions& p, double* partials) {
  const int64_t tiles = ceil_div(p.d, TILE_COLUMNS);
  const int slices = slices_of(p.T, p.B * tiles);
  const int64_t blocks = ceil_div(tiles, BLOCK_WARPS / slices);
  const int sums = p.normalised ? 2 : 1;
  PositionArguments a{p.G, p.x, p.mean, p.rstd, {}, {}, p.T, p.d, blocks, p.statistics, slices};
  for (int k = 0; k < sums; ++k) a.out[k] = p.out[k], a.partials[k] = partials + k * p.B * tiles;
  with_element(p.type, [&](auto* element) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
    const auto kernel = p.normalised ? &positions_kernel<T, true> : &positions_kernel<T, false>;
    launch(queue, kernel, p.B * blocks, BLOCK_THREADS, a);
  });
  for (int k = 0; k < sums; ++k)
    launch(queue, &finish_rows_kernel, blocks_of(p.B), BLOCK_THREADS, p.squared[k], a.partials[k], p.B, tiles);
}

}  // namespace dpfast
