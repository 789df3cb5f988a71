// From lists of tensors to tables: what noise.cu and update.cu share on the host.
#pragma once

#include <initializer_list>

#include "kernels.h"
#include "noise_kernels.h"

namespace dpfast::DPFAST_ISA {

// Whether the quads of the noise stream are aligned quads of a tensor whose elements have `size` bytes.
inline bool aligned_quads(const void* p, int64_t size, int64_t offset) {
  return (int64_t(reinterpret_cast<uintptr_t>(p)) - offset * size) % (4 * size) == 0;
}

inline int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

inline NoiseEntry noise_entry(const NoisyGradient& g, int64_t n) {
  const bool aligned = (!g.summed || aligned_quads(g.summed, size_of(g.summed_type), g.offset)) &&
                       (!g.grad || aligned_quads(g.grad, size_of(g.grad_type), g.offset));
  return {g.summed, g.grad, n, g.offset, g.parameter, aligned};
}

inline UpdateEntry update_entry(const Update& u, int64_t n) {
  UpdateEntry e{noise_entry(u.gradient, n), u.parameter, {u.state[0], u.state[1], u.state[2]}, nullptr};
  if (u.type != Type::float32 && u.rounding == Rounding::nearest) e.master = u.master;
  for (const void* p : {e.param, e.state[0], e.state[1], e.state[2]})
    e.aligned &= !p || aligned_quads(p, size_of(u.type), e.offset);
  e.aligned &= !e.master || aligned_quads(e.master, 4, e.offset);
  return e;
}

// launch(table, pieces, pairs of a piece) for all entries. Pieces are as large as still gives every multiprocessor a few.
template <class Entry, class Launch>
void launch_pairs(const Queue& queue, const std::vector<Entry>& entries, const Launch& launch) {
  if (entries.empty()) return;
  int64_t total = 0;
  for (const Entry& e : entries) total += pairs_of(e.offset, e.n);
  const int64_t wanted = 16 * processors(queue);
  uint32_t pairs = 8 * PAIR_THREADS;
  while (pairs > PAIR_THREADS && total / pairs < wanted) pairs /= 2;
  std::vector<Work<Entry>> work;
  for (const Entry& e : entries) work.push_back({e, ceil_div(pairs_of(e.offset, e.n), pairs)});
  in_tables(work, [&](const Table<Entry>& table, int64_t pieces) { launch(table, pieces, pairs); });
}

}  // namespace dpfast::DPFAST_ISA
