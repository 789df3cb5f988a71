// One launch over many tensors: a table of them travels as a kernel parameter, its pieces are counted from 0 on, and a
// block (or a warp) looks up the tensor that its piece belongs to.
#pragma once

#include <algorithm>
#include <vector>

#include "dpfast/lanes.h"
#include "launch.h"

namespace dpfast {

// Kernel parameters may have 32,764 bytes (CUDA 12.1 and later); 508 are for what a kernel takes besides.
constexpr int TABLE_BYTES = 32764 - 508;

template <class Entry>
struct Table {
  static constexpr int capacity = (TABLE_BYTES - 8) / int(sizeof(Entry) + sizeof(uint32_t));
  Entry entry[capacity];
  uint32_t first[capacity];  // the entry's first piece
  int32_t count;

  // The entry of a piece: the last that starts at it or before. Every entry has a piece.
  DPFAST_FN int find(uint32_t piece) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= piece)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

template <class Entry>
struct Work {
  Entry entry;
  int64_t pieces;
};

// f(table, pieces) for as few tables as hold all entries that have pieces.
template <class Entry, class F>
void in_tables(const std::vector<Work<Entry>>& all, const F& f) {
  static_assert(sizeof(Table<Entry>) <= TABLE_BYTES);
  Table<Entry> table;
  int64_t pieces = 0;
  table.count = 0;
  const auto flush = [&] {
    if (table.count) f(static_cast<const Table<Entry>&>(table), pieces);
    table.count = 0, pieces = 0;
  };
  for (const auto& [entry, count] : all) {
    if (count == 0) continue;
    if (table.count == Table<Entry>::capacity || pieces + count > INT32_MAX) flush();
    table.entry[table.count] = entry;
    table.first[table.count++] = uint32_t(pieces);
    pieces += count;
  }
  flush();
}

// How many multiprocessors the current device has.
inline int processors(const Queue& queue) {
  int device = 0, count = 0;
  check_code(cudaGetDevice(&device), queue.op);
  check_code(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), queue.op);
  return count;
}

}  // namespace dpfast
